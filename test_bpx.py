"""What bpx.py does: literal tables first, then a class for each of its parts.

Run it with "python -m unittest", in an environment that has PyNaCl.
"""

import atexit
import base64
import contextlib
import decimal
import doctest
import enum
import gc
import gzip
import http.client
import http.server
import inspect
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import urllib.parse
import warnings
import zipfile
from unittest import mock

import nacl.exceptions
import nacl.signing

import bpx

HERE = pathlib.Path(__file__).resolve().parent
README = (HERE / "README.md").read_text(encoding="utf-8")

# --- Published keys and signatures ---

GUIDE_KEY = "TDSkv44jf/iD/QCKkyCdixO+p1sfLXxk+PZH7mW/ams="
SECOND_KEY = "4odxgSUxFrC/zsKWZF4OQwYAgnNu9hnWH3NxWfLAPz4="
API_KEYS = {
    GUIDE_KEY: "5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o=",
    SECOND_KEY: "zDIJj9qneWIY0IYZ5aXoHcNMCm+XDhVcTssiT0HyY0A=",
}

# Name, secret key, instruction, timestamp, window, params; canonical string;
# signature. The comment above a row is its source. The signatures were
# made with cryptography, and most of them also with bpx-py 2.0.11,
# backpack-exchange-sdk 1.1.4 and openssl; never with bpx.py.
# fmt: off
VECTORS = [
    # Backpack Exchange Python API guide, Retrieving a Deposit Address (parameters and key; timestamp fixed here)
    ("deposit address", GUIDE_KEY, "depositAddressQuery", 1750793021519, 5000, {"blockchain": "Solana"},
     "instruction=depositAddressQuery&blockchain=Solana&timestamp=1750793021519&window=5000",
     "UP5Dl28ZNszPhy8HHPZbmLlh+3R46/6Ssbk8vj987syjWCNUJnhNey4RDkfKD5WWzun6iPKUL5++7A0piffrDg=="),
    # Backpack Exchange Python API guide, Executing an Order (parameters and key; timestamp fixed here)
    ("limit order", GUIDE_KEY, "orderExecute", 1750793021519, 5000, {"symbol": "SOL_USDC", "side": "Bid", "orderType": "Limit", "price": "170.50", "quantity": "1.0", "timeInForce": "GTC", "clientId": 123456, "selfTradePrevention": "RejectTaker"},
     "instruction=orderExecute&clientId=123456&orderType=Limit&price=170.50&quantity=1.0&selfTradePrevention=RejectTaker&side=Bid&symbol=SOL_USDC&timeInForce=GTC&timestamp=1750793021519&window=5000",
     "KKMji+Yn8YrlqDUFSQNlVt4Wm/KflOp68yytrV6t48DITYfTqaxij8/UY4b+TxJaH0rrAfvSRehrEWdCTc2wAg=="),
    # Backpack Exchange Python API guide, .env example key
    ("second key of the guide", SECOND_KEY, "orderExecute", 1750793021519, 5000, {"symbol": "SOL_USDC", "side": "Bid", "orderType": "Limit", "price": "170.50", "quantity": "1.0", "timeInForce": "GTC", "clientId": 123456, "selfTradePrevention": "RejectTaker"},
     "instruction=orderExecute&clientId=123456&orderType=Limit&price=170.50&quantity=1.0&selfTradePrevention=RejectTaker&side=Bid&symbol=SOL_USDC&timeInForce=GTC&timestamp=1750793021519&window=5000",
     "PDjvYVJO3gquThUnAr01mP2TagNpVK3G1QmuE72WQh7E2mvasfQvRW5lAmXJKEOhWdHxz28SRrGSiugVcCo7BQ=="),
    # docs.backpack.exchange, Signature Generation (string as printed there)
    ("cancel order", GUIDE_KEY, "orderCancel", 1614550000000, 5000, {"orderId": 28, "symbol": "BTC_USDT"},
     "instruction=orderCancel&orderId=28&symbol=BTC_USDT&timestamp=1614550000000&window=5000",
     "aKisDELOQeekrU+Up7rS/6gZBp0qunOsPwThvby1n5TaohLLP7NghvHoc4peKNGCg/rWC1gtiOKKSW2xNxCGAQ=="),
    # docs.backpack.exchange, Signature Generation (string as printed there)
    ("batch of orders", GUIDE_KEY, "orderExecute", 1750793021519, 5000, [{"symbol": "SOL_USDC_PERP", "side": "Bid", "orderType": "Limit", "price": "141", "quantity": "12"}, {"symbol": "SOL_USDC_PERP", "side": "Bid", "orderType": "Limit", "price": "140", "quantity": "11"}],
     "instruction=orderExecute&orderType=Limit&price=141&quantity=12&side=Bid&symbol=SOL_USDC_PERP&instruction=orderExecute&orderType=Limit&price=140&quantity=11&side=Bid&symbol=SOL_USDC_PERP&timestamp=1750793021519&window=5000",
     "l1Ktkoi3af0KVm9hiIf8lDont1IjLRb67Qm58QpXwVVYrJrII979yz/Jg3DyC34+r5vyQuS00xAp0QlbA6cpDg=="),
    # docs.backpack.exchange, Signature Generation, last paragraph
    ("no parameters", GUIDE_KEY, "balanceQuery", 1614550000000, 5000, None,
     "instruction=balanceQuery&timestamp=1614550000000&window=5000",
     "4KIbQtbDnOO3IXvJDWPg631l9urKfjqgMt/XxsrcMsQufhyIBIgSVgWM6G50rNdPz0nACkGj2rk/Inh2rfidAA=="),
    # docs.backpack.exchange, Streams, Private (string as printed there)
    ("private stream subscription", GUIDE_KEY, "subscribe", 1614550000000, 5000, None,
     "instruction=subscribe&timestamp=1614550000000&window=5000",
     "/ZisNiUfIIbBKRrLsdRTnZUuMA870U2RQJ+AyGLn0PC6Qb00ZYRSNZMwEItKkCdln555j4MMx1lA2iFuOKImBw=="),
    # Backpack Exchange Python API guide (rule); parameters chosen here
    ("booleans in lower case", GUIDE_KEY, "orderExecute", 1750793021519, 5000, {"symbol": "SOL_USDC_PERP", "side": "Ask", "orderType": "Market", "quantity": "2", "reduceOnly": True, "postOnly": False},
     "instruction=orderExecute&orderType=Market&postOnly=false&quantity=2&reduceOnly=true&side=Ask&symbol=SOL_USDC_PERP&timestamp=1750793021519&window=5000",
     "RW5qEec5zjAmsAcv0dDMAKVOIrkVFOPmfckCLYL2JvBwS2DfkhgvqLCxTbaFmK1zVALXLw4zTDdAic3EogTiDA=="),
    # parameters of GET /wapi/v1/history/fills; chosen here
    ("integers and reserved words as names", GUIDE_KEY, "fillHistoryQueryAll", 1750793021519, 5000, {"to": 1750793021519, "from": 1750700000000, "limit": 100, "offset": 0, "symbol": "SOL_USDC"},
     "instruction=fillHistoryQueryAll&from=1750700000000&limit=100&offset=0&symbol=SOL_USDC&to=1750793021519&timestamp=1750793021519&window=5000",
     "PKK00uHs1iREIQGqRv5TgKb/N5at7JeE4GSJnGrnd39/VupE89FjN4y1Ii7Di7JxgHgDVgknw2vArizjW9HsAQ=="),
    # chosen here
    ("longest window", GUIDE_KEY, "accountQuery", 1750793021519, 60000, {},
     "instruction=accountQuery&timestamp=1750793021519&window=60000",
     "g7E4vz90JXPe6V/SIQs3+wTl0hawzDWFcYkNE+TzIjHF31xuyme7Pd25Md+SP0mDR1sERzkPKpp63DKrBmZ8CA=="),
    # chosen here
    ("names sort by code point", GUIDE_KEY, "orderExecute", 1750793021519, 5000, {"b": "1", "a": "2", "B": "3", "aa": "4", "A": "5"},
     "instruction=orderExecute&A=5&B=3&a=2&aa=4&b=1&timestamp=1750793021519&window=5000",
     "c8XMAbL3247X4bRLhgwa/1I/hp3sUMXBcK8j+l5AbamayPMZNxpskn2t78/s7QGWX+1fj5lsmwVfNryyFBLZDA=="),
    # chosen here
    ("values are signed as they are, not percent-encoded", GUIDE_KEY, "withdraw", 1750793021519, 5000, {"address": "rAddr?dt=1 x/+&%é", "blockchain": "XRP", "quantity": "10.00", "symbol": "XRP"},
     "instruction=withdraw&address=rAddr?dt=1 x/+&%é&blockchain=XRP&quantity=10.00&symbol=XRP&timestamp=1750793021519&window=5000",
     "Zv/poQOowbPYcDlpMG8QmseVCLHKBpvRk/jkT/B+i8+d/4G++akjRm3aUH4b1J/Bk2Jijwbifx2Vynqhu7c+DQ=="),
    # chosen here
    ("unset values are left out", GUIDE_KEY, "orderQueryAll", 1750793021519, 5000, {"symbol": "SOL_USDC", "marketType": None},
     "instruction=orderQueryAll&symbol=SOL_USDC&timestamp=1750793021519&window=5000",
     "EAoIule9TjrOHJqi/H8/82/Gy2p9LtR9grhWiOOQcHE1ZLOolmoLgcOCihbHeYckna1QTz5IMwi6Uqewk3/pCg=="),
    # as other public clients do; not defined by the documentation
    ("a list repeats its name in order", GUIDE_KEY, "fillHistoryQueryAll", 1750793021519, 5000, {"symbol": "SOL_USDC", "marketType": ["SPOT", "PERP"]},
     "instruction=fillHistoryQueryAll&marketType=SPOT&marketType=PERP&symbol=SOL_USDC&timestamp=1750793021519&window=5000",
     "ZbnLlzrLjXqCmozNdK2aljgcjWjrFycysjJ/cgrrME9yuSWHL+MHZhaM62C7W2XzI9AxRraowBceKwvnR8K0CQ=="),
    # as the official Rust client does; not defined by the documentation
    ("a nested object is compact JSON with sorted names", GUIDE_KEY, "withdraw", 1750793021519, 5000, {"address": "A", "blockchain": "Solana", "quantity": "1", "symbol": "SOL", "recipientInformation": {"lastName": "Doe", "firstName": "Ann"}},
     'instruction=withdraw&address=A&blockchain=Solana&quantity=1&recipientInformation={"firstName":"Ann","lastName":"Doe"}&symbol=SOL&timestamp=1750793021519&window=5000',
     "FIv3Am+UlyZjyvoBHjZOWrYV7bp6kb+UocSA1RfwEE3vfFd9JFWCWZyRTe9gQMZLxcGs2U/XCsi7yVtv7bmiBw=="),
]
# fmt: on

# Every signed operation in the exchange's API documentation, in its order: a
# path, and each of its methods with its instruction.
OPERATIONS = """\
/api/v1/account GET accountQuery PATCH accountUpdate
/api/v1/account/limits/borrow GET maxBorrowQuantity
/api/v1/account/limits/order GET maxOrderQuantity
/api/v1/account/limits/withdrawal GET maxWithdrawalQuantity
/api/v1/borrowLend POST borrowLendExecute
/api/v1/borrowLend/positions GET borrowLendPositionQuery
/wapi/v1/history/borrowLend GET borrowHistoryQueryAll
/wapi/v1/history/borrowLend/positions GET borrowPositionHistoryQueryAll
/wapi/v1/history/interest GET interestHistoryQueryAll
/api/v1/account/convertDust POST convertDust
/api/v1/capital GET balanceQuery
/api/v1/capital/collateral GET collateralQuery
/wapi/v1/capital/deposit/address GET depositAddressQuery
/wapi/v1/capital/deposits GET depositQueryAll
/wapi/v1/capital/withdrawals GET withdrawalQueryAll POST withdraw
/wapi/v1/history/dust GET dustHistoryQueryAll
/wapi/v1/history/settlement GET settlementHistoryQueryAll
/api/v1/order DELETE orderCancel GET orderQuery POST orderExecute
/api/v1/orders DELETE orderCancelAll GET orderQueryAll POST orderExecute
/wapi/v1/history/fills GET fillHistoryQueryAll
/wapi/v1/history/orders GET orderHistoryQueryAll
/api/v1/position GET positionQuery
/wapi/v1/history/funding GET fundingHistoryQueryAll
/wapi/v1/history/position GET positionHistoryQueryAll
/api/v1/rfq POST rfqSubmit
/api/v1/rfq/accept POST quoteAccept
/api/v1/rfq/cancel POST rfqCancel
/api/v1/rfq/quote POST quoteSubmit
/api/v1/rfq/refresh POST rfqRefresh
/api/v1/rfqs GET rfqQuery
/wapi/v1/history/quote GET quoteHistoryQueryAll
/wapi/v1/history/quote/fill GET quoteFillHistoryQueryAll
/wapi/v1/history/rfq GET rfqHistoryQueryAll
/wapi/v1/history/rfq/fill GET rfqFillHistoryQueryAll
/api/v1/strategies DELETE strategyCancelAll GET strategyQueryAll
/api/v1/strategy DELETE strategyCancel GET strategyQuery POST strategyCreate
/wapi/v1/history/strategies GET strategyHistoryQueryAll
/wapi/v1/user/2fa POST issueTwoFactorToken
/api/v1/vault/mint POST vaultMint
/api/v1/vault/nav GET vaultNavQuery
/api/v1/vault/redeem DELETE vaultRedeemCancel POST vaultRedeemRequest
/api/v1/vault/redeems/pending GET vaultPendingRedeemsQuery
/wapi/v1/history/vault/mint GET vaultMintHistoryQueryAll
/wapi/v1/history/vault/redeem GET vaultRedeemHistoryQueryAll
"""
OPERATIONS = [
    (f"{method} {path}", instruction)
    for path, *rest in map(str.split, OPERATIONS.splitlines())
    for method, instruction in zip(rest[::2], rest[1::2])
]

# --- Values of parameters ---


# Subclasses whose own methods say something else than what they hold.
LIES = """
__str__ __repr__ __format__ encode isascii capitalize lower upper strip rstrip
startswith
"""
LIES = dict.fromkeys(LIES.split(), lambda self, *args: "lie")
NUMBER = {"__int__": lambda self: 9, "__index__": lambda self: 9}
FINITE = {"is_finite": lambda self: True, "adjusted": lambda self: 0}
LyingStr = type("LyingStr", (str,), LIES)
LyingInt = type("LyingInt", (int,), {**LIES, **NUMBER})
LyingDecimal = type("LyingDecimal", (decimal.Decimal,), {**LIES, **FINITE})


class LyingEnum(str, enum.Enum):
    """A str whose characters are not its value."""

    BID = "Bid"

    def __new__(cls, value):
        member = str.__new__(cls, "lie")
        member._value_ = value
        return member


Market = enum.Enum("Market", {"SPOT": "SPOT"}, type=str)
Limit = enum.IntEnum("Limit", {"TEN": 10})
Side = enum.Enum("Side", {"BID": "Bid"})
Switch = enum.Enum("Switch", {"ON": True, "OFF": None})
D = decimal.Decimal
NESTED = {"BID": Side.BID, "TEN": D("1E1"), "HALF": 0.5}
Nested = enum.Enum("Nested", NESTED)
# fmt: off
# Value, its texts as signed and in a query, the value in a JSON body.
VALUES = [
    *((text, [text], text) for text in ("", "170.50", "a b/c?d=e&f+g%20~é€😀", '"\\\n\x00')),
    (LyingStr("Bid"), ["Bid"], "Bid"),
    (LyingStr("é"), ["é"], "é"),
    (True, ["true"], True),
    (False, ["false"], False),
    (0, ["0"], 0),
    (-(10**30), ["-1" + "0" * 30], -(10**30)),
    (LyingInt(7), ["7"], 7),
    *((D(number), [text], text) for number, text in [
        ("170.50", "170.50"), ("1E-8", "0.00000001"), ("1E+3", "1000"), ("-0.0", "-0.0"),
        ("1E+999", "1" + "0" * 999), ("1E-999", "0." + "0" * 998 + "1")]),
    (LyingDecimal("7.0"), ["7.0"], "7.0"),
    (Side.BID, ["Bid"], "Bid"),
    (Market.SPOT, ["SPOT"], "SPOT"),
    (Limit.TEN, ["10"], 10),
    (LyingEnum.BID, ["Bid"], "Bid"),
    (Switch.ON, ["true"], True),
    (Nested.TEN, ["10"], "10"),
    (Nested.BID, ["Bid"], "Bid"),
    (["SPOT", "PERP"], ["SPOT", "PERP"], ["SPOT", "PERP"]),
    (("b", "a"), ["b", "a"], ["b", "a"]),
    ([Market.SPOT, None, True, 1, D("1E1"), Switch.OFF], ["SPOT", "true", "1", "10"], ["SPOT", True, 1, "10"]),
    ([], [], []),
    ([None], [], []),
]
# Values that are left out.
UNSET = [None, Switch.OFF]
# Object, its text as signed, the object in a JSON body.
OBJECTS = [
    ({}, "{}", {}),
    (types.MappingProxyType({"b": "é", "B": None, "a": [1, True, None]}), '{"a":[1,true],"b":"é"}', {"a": [1, True], "b": "é"}),
    ({"z": {LyingStr("y"): Limit.TEN}, "d": D("1E1"), "é": [], "Z": '"'}, '{"Z":"\\"","d":"10","z":{"y":10},"é":[]}', {"Z": '"', "d": "10", "z": {"y": 10}, "é": []}),
]
SIGNED_HEADERS = ["X-API-Key", "X-Signature", "X-Timestamp", "X-Window"]
# Params; what stands between "instruction=a" and "&timestamp=5&window=5000".
STRINGS = [
    *(({"n": value, "z": "1"}, "".join(f"&n={text}" for text in texts) + "&z=1") for value, texts, _ in VALUES),
    *(({"n": value}, f"&n={text}") for value, text, _ in OBJECTS),
    *(({"n": value}, "") for unset in UNSET for value in (unset, [unset])),
    (types.MappingProxyType({"c": 2, "b": 1}), "&b=1&c=2"),
    ([{"c": 2, "b": 1}, {}], "&b=1&c=2&instruction=a"),
    (({"c": 2}, types.MappingProxyType({"b": True})), "&c=2&instruction=a&b=true"),
    ({LyingStr("b"): "1", Market.SPOT: "2", "é": "3"}, "&SPOT=2&b=1&é=3"),
    ({"window": "1", "timestamp": "2", "instruction": "3"}, "&instruction=3&timestamp=2&window=1"),
    ({"b": None, "a": [Side.BID, None], "c": {"d": None}}, "&a=Bid&c={}"),
]
# Arguments of build_request; path, query and body of the request. A str
# subclass is no more than its characters.
REQUESTS = [
    ({"method": "get", "path": "/p", "params": {"symbol": "a b/+&%é", "type": ["SPOT", "PERP"], "to": 1}}, "/p?symbol=a%20b%2F%2B%26%25%C3%A9&to=1&type=SPOT&type=PERP", None),
    ({"method": "post", "path": "/p", "params": {"symbol": "é", "price": D("1E1"), "a": None}}, "/p", '{"price":"10","symbol":"é"}'.encode()),
    *(({"method": "GET", "path": "/p", "params": empty}, "/p", None) for empty in (None, {}, {"a": None}, {"a": []})),
    *(({"method": "PATCH", "path": "/p", "params": empty}, "/p", b"{}") for empty in (None, {}, {"a": None})),
    *(({"method": "GET", "path": path}, path, None) for path in ("/", "/a/b_c.d~e-f%20G0", "/a//b")),
    *(({"method": "GET", "path": "/p", "base_url": url}, "/p", None) for url in """
https://a.example https://a.example/ https://a.example/X https://a-1.b:8443/x/y_z.~ https://[2001:db8::1]:8443
https://[::1.2.3.4] https://a.example:1 https://a.example:65535/ http://localhost:1 http://127.0.0.1:1/ http://[::1]:1
""".split()),
    ({"method": LyingStr("get"), "path": LyingStr("/api/v1/capital"), "base_url": LyingStr("https://a.example/"), "secret_key": LyingStr(GUIDE_KEY)}, "/api/v1/capital", None),
]
# fmt: on

# --- Bad arguments: what is passed, and the whole message ---

LOOP = {}
LOOP["again"] = LOOP
# fmt: off
# As some mappings that are no dict, it repeats a name.
TwoParams, TwoHeaders = (type("Repeating", (dict,), {"items": lambda self, pairs=pairs: pairs}) for pairs in ([("a", 1), ("é", None), ("é", 3)], [("x-a", ""), ("x-a", "")]))
ANY = ": pass a str, bool, int, Decimal, Enum member, list or mapping, not "
FLOAT = ": pass a str or Decimal, not the float {}, because floats are not exact (0.1 + 0.2 is not 0.3)"
RANGE = ": pass an exponent from -999 to +999, not "
UTF_8 = ": pass text that UTF-8 can encode, without surrogates"
IN_LIST = ": pass only single values in a list, not {}"
MAPPING = ": pass a mapping of names to values, not "
NAMES = ": pass names as str, not "
CHANGED = "params: pass a copy that no other thread changes (dictionary changed size during iteration)"
BAD_PARAMS = [
    *(({"p": value}, "params.p" + FLOAT.format("0.5")) for value in (0.5, Nested.HALF)),
    ({"p": ["1", 0.1]}, "params.p[1]" + FLOAT.format("0.1")),
    ([{}, {"a": {"b": 0.1}}], "params[1].a.b" + FLOAT.format("0.1")),
    ({"k" * 42: 0.1}, "params." + "k" * 42 + FLOAT.format("0.1")),
    ({GUIDE_KEY: 0.1}, "params.(a long text)" + FLOAT.format("0.1")),
    *(({"p": value}, "params.p" + ANY + type(value).__name__) for value in (b"SOL", {"SPOT"}, object())),
    *(({"p": value("NaN")}, "params.p: pass a finite number, not NaN") for value in (D, LyingDecimal)),
    ({"p": D("-Infinity")}, "params.p: pass a finite number, not -Infinity"),
    *(({"p": D(text)}, "params.p" + RANGE + text[2:]) for text in "1E+999999999 0E-999999999 1E+1000 1E-1000".split()),
    *(({"p": value}, "params.p" + RANGE + "+1000") for value in (LyingDecimal("1E+1000"), D("9" * 1001))),
    (TwoParams(), "params: pass each name only once"),
    ({"p": TwoParams()}, "params.p: pass each name only once"),
    ({"p": "\ud800"}, "params.p" + UTF_8),
    ({"p": ["a", LyingStr("\ud800")]}, "params.p[1]" + UTF_8),
    ({"\udfff": "x"}, "params, name '\\udfff'" + UTF_8),
    ({"k" * 42 + "\ud800": 0.1}, "params, name (a long text)" + UTF_8),
    *(({"p": ["a", value]}, "params.p[1]" + IN_LIST.format(type(value).__name__)) for value in (["b"], ("b",), {})),
    ({1: "x"}, "params" + NAMES + "1"),
    ({None: "x"}, "params" + NAMES + "NoneType"),
    ({"p": {b"x": 1}}, "params.p" + NAMES + "bytes"),
    *((value, "params" + MAPPING + type(value).__name__) for value in ("symbol=SOL", 0, False)),
    ([("symbol", "SOL")], "params[0]" + MAPPING + "tuple"),
    ([{"symbol": "SOL"}, None], "params[1]" + MAPPING + "NoneType"),
    *((value, "params: pass at least one order in a batch") for value in ([], ())),
    (LOOP, "params: pass fewer levels of nesting"),
]
INSTRUCTION = "instruction: pass only letters and digits, as in 'orderExecute'"
TIMESTAMP = "timestamp: pass an int of milliseconds since 1970, not "
WINDOW = "window: pass an int from 1 to 60000 milliseconds, not "
BAD_TIMES = [
    *(({"window": value}, WINDOW + str(value)) for value in (0, 60001, -1, True, 5000.0)),
    *(({"window": value}, WINDOW + type(value).__name__) for value in ("5000", None)),
    *(({"timestamp": value}, TIMESTAMP + str(value)) for value in (-1, True, 1.5)),
    ({"timestamp": "1750793021519"}, TIMESTAMP + "str"),
    *(({"instruction": value}, INSTRUCTION) for value in ("a&b=c", "a\n", " ", "", "é", "²", GUIDE_KEY, b"orderExecute", 5)),
]
KEY = "secret_key: pass the base64 of 32 bytes; "
NOT_BASE64 = KEY + "the {} characters that were passed are not base64"
SIZE = KEY + "what was passed is the base64 of {} bytes"
BAD_KEYS = [
    ("!" + GUIDE_KEY[1:], NOT_BASE64.format(44)),
    (GUIDE_KEY.replace("/", "_"), NOT_BASE64.format(44)),
    (GUIDE_KEY[:-1] + "é", NOT_BASE64.format(44)),
    (GUIDE_KEY[:-1], NOT_BASE64.format(43)),
    (GUIDE_KEY + "=", NOT_BASE64.format(45)),
    (GUIDE_KEY[:20] + " " + GUIDE_KEY[20:], NOT_BASE64.format(45)),
    (GUIDE_KEY[:-2] + "t=", NOT_BASE64.format(44)),
    *((base64.b64encode(bytes(size)).decode(), SIZE.format(size)) for size in (0, 31, 33, 64)),
    (base64.b64decode(GUIDE_KEY).hex(), SIZE.format(48)),
    *((key, f"secret_key: pass a str, not {type(key).__name__}") for key in (GUIDE_KEY.encode(), [GUIDE_KEY], 5)),
]
LONG = "(a long text)"
METHOD = "method: pass a word, such as 'GET', not "
URL_AS_PATH = "path: pass only the path of the URL, such as '/api/v1/order'; pass the scheme and host as base_url"
QUERY_IN_PATH = "path: pass the query as params, not within "
SLASH = "path: begin with a slash, as in '/api/v1/order', not "
PATH = "path: use only letters, digits and -._~%/ in a path, not "
BASE_URL = "base_url: pass https://HOST, with a port and a path if needed"
HTTPS = "base_url: pass https; http is allowed only for localhost, 127.0.0.1 and [::1]"
PORT = "base_url: pass a port from 1 to 65535, not "
HEADER_NAMES = "headers: pass names of letters, digits and hyphens"
RESERVED = "header {}: leave it out, because it is reserved"
HEADER_TEXT = "header X-A: pass printable ASCII text"
IN_QUERY = ": pass a single value or a list, not a mapping, because GET sends it in a query"
NO_KEY = "{} must be signed: pass secret_key"
NOT_KNOWN = "{} is not a known signed operation: pass instruction, or leave out secret_key"
BAD_REQUESTS = [
    *(({"method": text}, METHOD + repr(text)) for text in ("GET /", "GET\n", "")),
    ({"method": GUIDE_KEY}, METHOD + LONG),
    ({"method": b"GET"}, "method: pass a str, not bytes"),
    *(({"path": text}, SLASH + repr(text)) for text in ("api/v1/order", "@evil.example/", "")),
    *(({"path": text}, URL_AS_PATH) for text in ("//evil.example/api", "https://user:PASSWORD@evil.example/api")),
    *(({"path": text}, QUERY_IN_PATH + repr(text)) for text in ("/api?symbol=SOL", "/api?" + "a" * 37)),
    ({"path": "/api?" + "a" * 38}, QUERY_IN_PATH + LONG),
    ({"path": GUIDE_KEY}, SLASH + LONG),
    ({"path": "/" + GUIDE_KEY}, PATH + LONG),
    *(({"path": text}, PATH + repr(text)) for text in ("/api#a", "/api\n", "/api\r\nX: y", "/é", "/\\evil.example")),
    ({"path": None}, "path: pass a str, not NoneType"),
    *(({"base_url": url}, HTTPS) for url in """
http://api.backpack.exchange http://localhost.evil.example http://127.0.0.1.evil.example http://127a0a0a1
http://127.0.0.x http://127.0.0.256 http://127.255.99.200 http://128.0.0.1 http://[::2]
""".split()),
    *(({"base_url": url}, BASE_URL) for url in ["", "https://api.backpack.exchange\n"] + """
http://127.0.0.1@evil.example https://user:PASSWORD@api.backpack.exchange https://api.backpack.exchange?x=
https://api.backpack.exchange/a?x= https://api.backpack.exchange/a//b https://api.backpack.exchange//
https://api.backpack.exchange# file:///etc/passwd ftp://localhost https:// https:///api https://[]
https://[evil.example] https://[::1 https://a.example: https://a.example:x https://a.example:1:2 https://a.example:123456
""".split()),
    *(({"base_url": f"http://localhost:{port}"}, PORT + port) for port in "65536 85536 0".split()),
    ({"base_url": "https://a.example:65536"}, PORT + "65536"),
    ({"base_url": b"https://a.example"}, "base_url: pass a str, not bytes"),
    ({"headers": [("X-A", "b")]}, "headers: pass a mapping, not list"),
    *(({"headers": {"X-A": text}}, HEADER_TEXT) for text in ("b\r\nX-C: d", "b\n", "é")),
    ({"headers": {"X-A": 1}}, "header X-A: pass a str, not int"),
    *(({"headers": {name: "b"}}, HEADER_NAMES) for name in ("X-A\n", "X: A", "", "X-\u212a", 5)),
    *(({"headers": headers}, "header x-a: pass it only once") for headers in ({"X-A": "1", "x-a": "1"}, TwoHeaders())),
    ({"headers": {"A" * 42: 1}}, f"header {'A' * 42}: pass a str, not int"),
    ({"headers": {"A" * 43: 1}}, "header (a long text): pass a str, not int"),
    *(({"headers": {name: "5"}}, RESERVED.format(name)) for name in """
Accept-Encoding Content-Encoding content-length CONTENT-TYPE Host
Transfer-Encoding X-API-KEY X-Signature X-Timestamp x-window
""".split()),
    ({"secret_key": None}, NO_KEY.format("POST /api/v1/order")),
    *(({"path": path, "secret_key": None, "instruction": "a"}, NO_KEY.format(f"POST {shown}")) for path, shown in {f"/{'p' * 41}": f"/{'p' * 41}", f"/{'p' * 42}": "(a long text)"}.items()),
    *(({"method": "M" * length, "secret_key": None, "instruction": "a"}, NO_KEY.format(f"{shown} /api/v1/order")) for length, shown in ((42, "M" * 42), (43, "(a long text)"))),
    *(({"path": "/p", **key}, NOT_KNOWN.format("POST /p")) for key in ({}, {"secret_key": ""})),
    ({"method": "put"}, NOT_KNOWN.format("PUT /api/v1/order")),
    ({"method": "GET", "params": [{"a": "b"}]}, "params: pass one mapping to GET, not a batch"),
    ({"method": "GET", "params": {"z": 1, "a": {}}}, "params.a" + IN_QUERY),
    ({"method": "GET", "params": {GUIDE_KEY: {}}}, "params.(a long text)" + IN_QUERY),
]
TIMEOUT = "timeout: pass a number of seconds above 0 and at most 86400, not "
BAD_TIMEOUTS = [
    *((value, TIMEOUT + str(value)) for value in (0, -1, True, False, float("nan"), float("inf"), 86400.1, 86401)),
    *((value, TIMEOUT + type(value).__name__) for value in (None, "5")),
]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
PRINTABLE = "".join(map(chr, range(32, 127)))
# Argument, values with a place for one character, what is accepted there.
CHARACTERS = [
    ("method", "{} {}ET G{}T GE{}", LETTERS),
    ("path", "{}api", "/"),
    ("path", "/{}api", LETTERS + DIGITS + "._~%-"),
    ("path", "/a{}i /api{}", LETTERS + DIGITS + "/._~%-"),
    ("base_url", "https://{}a", LETTERS + DIGITS + ".-"),
    ("base_url", "https://a{}b https://a{}", LETTERS + DIGITS + ".-/"),
    ("base_url", "https://a:{}", "123456789"),
    ("base_url", "https://a:1{}", DIGITS + "/"),
    ("base_url", "https://a/{}", LETTERS + DIGITS + "._~-"),
    ("base_url", "https://a/b{}c https://a/b{}", LETTERS + DIGITS + "._~-/"),
    ("base_url", "https://[::{}]", DIGITS + "ABCDEFabcdef"),
    ("base_url", "http://localhost{}", "/"),
    ("base_url", "http{}://localhost", "s"),
    ("base_url", "https{}://localhost", ""),
    ("header name", "{}A A{}A A{}", LETTERS + DIGITS + "-"),
    ("header value", "{}a a{}a a{}", PRINTABLE),
]
# fmt: on


# --- Two servers on 127.0.0.1: one that answers, and one that misbehaves ---


class FakeExchange(http.server.ThreadingHTTPServer):
    """Answers every request with .answer, and keeps what it got in .seen."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeExchangeHandler)
        self.url = "http://127.0.0.1:%d" % self.server_address[1]
        self.seen = []

    def start(self):
        serve = threading.Thread(target=self.serve_forever, args=(0.01,))
        serve.daemon = True  # An interrupt of the tests must end them.
        serve.start()

    def stop(self):
        self.shutdown()
        self.server_close()


class FakeExchangeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", 5, True

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        seen = types.SimpleNamespace(path=path, query=query)
        seen.method, seen.headers = self.command, self.headers
        seen.pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        seen.body = json.loads(body) if body else None
        self.server.seen.append(seen)
        status, headers, answer = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = do_HEAD = respond

    def log_message(self, *args):
        pass


class ScriptedServer:
    """Plays one script for each request, and after the last one an echo.

    A script is a sequence of steps, and a step is one of
    - bytes: they are sent,
    - a number: so many seconds are waited,
    - a function: it is called with the socket (close, reset, shut, ...).
    After a script the connection stays open for another request. An echo is
    the JSON of [number of the connection, target of the request].
    """

    scheme = "http"

    def __init__(self, *scripts, port=0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"{self.scheme}://localhost:{self.port}"
        self.scripts, self.stop = iter(scripts), threading.Event()
        self.seen, self.threads, self.sockets = [], [], []
        self.played = threading.Semaphore(0)  # a script, or all of them

    def __enter__(self):
        self.start(self.accept)
        return self

    def __exit__(self, *error):
        self.stop.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.threads[0].join(5)
        self.listener.close()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                shut(sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self):
        for number in itertools.count(1):
            sock = self.listener.accept()[0]
            if self.stop.is_set():
                return sock.close()
            self.start(self.serve, sock, number)

    def serve(self, sock, number):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # close, or the client is gone
            if self.scheme == "https":
                sock = SERVER_CONTEXT.wrap_socket(sock, server_side=True)
            self.sockets.append(sock)
            with sock, sock.makefile("rb") as stream:
                for line in stream:
                    if b" HTTP/1." in line:  # and not TLS, say
                        headers = http.client.parse_headers(stream)
                        stream.read(int(headers.get("Content-Length", 0)))
                        self.seen.append((line.decode(), headers))
                        self.answer(sock, number, line.decode().split()[1])
        self.played.release()

    def answer(self, sock, *echo):
        echo = json.dumps(echo).encode()
        for step in next(self.scripts, [LENGTH % len(echo) + echo]):
            if self.stop.is_set():
                close(sock)
            if isinstance(step, bytes):
                sock.sendall(step)
            elif callable(step):
                step(sock)
            else:
                self.stop.wait(step)
        self.played.release()

    def has_closed(self, number):
        """Whether the client soon closes its connection of that number."""
        self.threads[number].join(2)
        return not self.threads[number].is_alive()


class TLSScriptedServer(ScriptedServer):
    scheme = "https"


BOTH = ScriptedServer, TLSScriptedServer


def close(sock):
    raise ConnectionError  # for ScriptedServer.serve, which closes


def reset(sock):
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    close(sock)


def shut(sock, how=socket.SHUT_WR):
    socket.socket.shutdown(sock, how)  # not TLS's, which ends reading too


def interrupt(sock):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def relay_to(port):
    """What a proxy does once it has answered CONNECT."""

    def relay(client):
        with socket.create_connection(("127.0.0.1", port)) as server:
            other = {client: server, server: client}
            while True:
                for source in select.select(other, [], [], 5)[0] or close(0):
                    other[source].sendall(source.recv(65536) or close(0))

    return relay


def repeat_forever(first, *steps):
    return itertools.chain([first], itertools.cycle(steps))


# fmt: off
# For localhost only, its own authority, until 2120. The key is for tests.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg5lqaAY+ycNKSSrZr8TDSVnRTK07eT+9XddHRaKzvHsyhRANCAAS8kh+uZSAmIzM40gBlNpTQtLohFJ9s6AImScaMjti5AT04hYMbFnZ/MXWirhBG2dvfkFC7gVSplpOif3ZDDdwx
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkjCCATigAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLySH65lICYjMzjSAGU2lNC0
uiEUn2zoAiZJxoyO2LkBPTiFgxsWdn8xdaKuEEbZ29+QULuBVKmWk6J/dkMN3DGjeTB3MA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1UdDgQWBBTDsQO3HiD+Uu8c1uzp/t8iDTJyrDAfBgNVHSMEGDAWgBTDsQO3HiD+Uu8c1uzp/t8iDTJyrDAU
BgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwIDSAAwRQIgXClWVA5U9PMfyc+jyfIEpkC2nUSYeoTMglg3ag0UU+4CIQDH1RVScza8Vuh6urLkWqEH5wlIPtjUKdzoOlJSso9Fng==
-----END CERTIFICATE-----
"""
# fmt: on
FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)
PEM_FILE = os.path.join(FOLDER.name, "localhost.pem")
pathlib.Path(PEM_FILE).write_text(PEM)
SERVER_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
SERVER_CONTEXT.load_cert_chain(PEM_FILE)


# --- What the tests share ---


def signed_text(seen, instruction):
    """The canonical string, by the documentation, of what was on the wire."""
    orders = seen.body if isinstance(seen.body, list) else [seen.body or {}]
    parts = []
    for order in orders:
        pairs = list(seen.pairs)
        for name, value in order.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool):
                    item = str(item).lower()
                elif isinstance(item, dict):
                    style = {"separators": (",", ":"), "sort_keys": True}
                    item = json.dumps(item, ensure_ascii=False, **style)
                pairs.append((name, item))
        pairs.sort(key=lambda pair: pair[0])
        parts += ["instruction=" + instruction]
        parts += ["%s=%s" % pair for pair in pairs]
    times = seen.headers["X-Timestamp"], seen.headers["X-Window"]
    return "&".join(parts) + "&timestamp=%s&window=%s" % times


def verify(seen, instruction):
    """Raise unless the signature is of now, and of what was on the wire."""
    age = time.time() * 1000 - int(seen.headers["X-Timestamp"])
    if not -1000 < age < 60000:
        raise ValueError("expired")
    key = nacl.signing.VerifyKey(base64.b64decode(seen.headers["X-API-Key"]))
    signature = base64.b64decode(seen.headers["X-Signature"])
    key.verify(signed_text(seen, instruction).encode(), signature)


def all_texts(error):
    """All that a log could show of an error, and of those behind it."""
    texts, chain = [], [error]
    while chain:
        error = chain.pop()
        texts += traceback.format_exception(type(error), error, None)
        texts += traceback.format_tb(error.__traceback__)
        texts += [repr(error), repr(vars(error)), repr(error.args)]
        chain += filter(None, [error.__cause__, error.__context__])
    return "".join(texts)


class SecretsCase(unittest.TestCase):
    def assert_refused(self, call, options, message):
        """The whole message of a bad argument, which shows no secret."""
        with self.subTest(message, options=repr(options)[:60]):
            with self.assertRaises((TypeError, ValueError)) as caught:
                call(**options)
            self.assertEqual(str(caught.exception), message)
            if caught.exception.__context__:
                self.assertTrue(caught.exception.__suppress_context__)
            shown = all_texts(caught.exception)
            for secret in (GUIDE_KEY, "PASSWORD", options.get("secret_key")):
                if isinstance(secret, str) and secret:
                    self.assertNotIn(secret, shown)
                    self.assertNotIn(secret[2:30] or secret, shown)


class ExchangeCase(SecretsCase):
    @classmethod
    def setUpClass(cls):
        cls.exchange = FakeExchange()
        cls.exchange.start()
        cls.addClassCleanup(cls.exchange.stop)

    def setUp(self):
        self.exchange.seen.clear()
        self.exchange.answer = (200, {}, b"{}")

    def send(self, method, path, params=None, **options):
        """Return what a call returns and what the exchange has seen of it."""
        options.setdefault("base_url", self.exchange.url)
        result = bpx.request(method, path, params, **options)
        self.assertEqual(len(self.exchange.seen), 1)
        return result, self.exchange.seen.pop()

    def signed(self, method, params):
        """What the exchange has seen of a signed call, which is verified."""
        options = {"secret_key": GUIDE_KEY}
        _, seen = self.send(method, "/api/v1/order", params, **options)
        verify(seen, {"GET": "orderQuery", "POST": "orderExecute"}[method])
        return seen


class Changing(dict):
    """A mapping with another value each time it is read."""

    numbers = itertools.count(1)

    def items(self):
        return [("clientId", next(self.numbers))]


# --- 1 to 3: signing and building, which need no server ---


class CanonicalString(SecretsCase):
    def test_vectors(self):
        for name, _, instruction, *times, params, text, _ in VECTORS:
            with self.subTest(name):
                found = bpx.canonical_string(instruction, params, *times)
                self.assertEqual(found, text)

    def test_params(self):
        with mock.patch("bpx._normalize_value", side_effect=KeyError):
            bpx.canonical_string("a", {"b": "c", "d": 1, "e": True}, 5)
        for params, pairs in STRINGS:
            with self.subTest(repr(params)):
                before = repr(params)
                found = bpx.canonical_string("a", params, 5)
                expected = f"instruction=a{pairs}&timestamp=5&window=5000"
                self.assertEqual(found, expected)
                self.assertIs(type(found), str)
                self.assertEqual(repr(params), before)

    def test_instructions_and_times(self):
        for name, shown in (LyingStr("aZ09"), "aZ09"), (Market.SPOT, "SPOT"):
            for times in (0, 1), (2**63, 60000):
                found = bpx.canonical_string(name, None, *times)
                expected = f"instruction={shown}&timestamp=%d&window=%d"
                self.assertEqual(found, expected % times)

    def test_bad_arguments(self):
        rows = [({"params": params}, text) for params, text in BAD_PARAMS]
        for options, message in rows + BAD_TIMES:
            options = {"params": None, "timestamp": 5, **options}
            options = {"instruction": "a", **options}
            self.assert_refused(bpx.canonical_string, options, message)

    def test_params_that_change_meanwhile(self):
        params = {"a": Changing(), "b": "c"}
        options = {"instruction": "a", "params": params, "timestamp": 5}
        with mock.patch.object(Changing, "items") as items:
            items.side_effect = lambda: params.update(c="d") or []
            found = bpx.canonical_string(**options)
            text = "instruction=a&a={}&b=c&timestamp=5&window=5000"
            self.assertEqual(found, text)
            options["params"] = types.MappingProxyType(params)
            items.side_effect = lambda: params.update(e="f") or []
            self.assert_refused(bpx.canonical_string, options, CHANGED)

    def test_memory_errors_are_not_swallowed(self):
        with mock.patch.object(Changing, "items", side_effect=MemoryError):
            with self.assertRaises(MemoryError):
                bpx.canonical_string("a", Changing(), 5)


class SignRequest(SecretsCase):
    def sign(self, key, **times):
        return list(bpx.sign_request("a", None, key, **times).values())

    def test_vectors(self):
        for name, key, instruction, stamp, window, params, _, sign in VECTORS:
            with self.subTest(name):
                times = {"timestamp": stamp, "window": window}
                found = bpx.sign_request(instruction, params, key, **times)
                values = [API_KEYS[key], sign, str(stamp), str(window)]
                self.assertEqual(found, dict(zip(SIGNED_HEADERS, values)))

    def test_now_by_default(self):
        before = time.time_ns() // 1000000
        *_, timestamp, window = self.sign(GUIDE_KEY)
        after = time.time_ns() // 1000000
        self.assertTrue(before <= int(timestamp) <= after)
        self.assertEqual(window, "5000")
        self.assertEqual(self.sign(GUIDE_KEY, timestamp=0)[2], "0")

    def test_white_space_around_a_key(self):
        expected = self.sign(GUIDE_KEY, timestamp=5)
        for key in (f"{GUIDE_KEY}\n", f"\t {GUIDE_KEY}\r\n"):
            self.assertEqual(self.sign(key, timestamp=5), expected)
        found = self.sign(LyingStr(GUIDE_KEY), timestamp=5)
        self.assertEqual(found, expected)

    def test_bad_keys(self):
        message = "secret_key: pass a str, not NoneType"
        for key, message in [*BAD_KEYS, (None, message)]:
            options = {"instruction": "a", "params": None, "secret_key": key}
            self.assert_refused(bpx.sign_request, options, message)

    def test_eight_keys_are_kept(self):
        keys = [base64.b64encode(bytes([n] * 32)).decode() for n in range(9)]
        load = nacl.signing.SigningKey
        with mock.patch("nacl.signing.SigningKey", wraps=load) as loaded:
            # The keys that are used, how many of them are loaded.
            for used, count in [(keys, 9), (keys[1:], 0), (keys[:1] * 2, 1)]:
                loaded.reset_mock()
                for key in used:
                    self.sign(key)
                self.assertEqual(loaded.call_count, count)

    def test_without_pynacl(self):
        key = base64.b64encode(bytes([99] * 32)).decode()
        module = types.ModuleType("nacl.signing")
        with mock.patch.dict(sys.modules, {"nacl.signing": module}):
            text = r"\Ato sign requests, pip install PyNaCl\Z"
            with self.assertRaisesRegex(ImportError, text) as caught:
                self.sign(key)
        self.assertIsInstance(caught.exception.__cause__, ImportError)
        self.sign(key)


class BuildRequest(SecretsCase):
    def test_requests(self):
        for options, selector, data in REQUESTS:
            with self.subTest(options):
                built = bpx.build_request(**options)
                method = str.upper(options["method"])
                url = str.rstrip(options.get("base_url", bpx.BASE_URL), "/")
                self.assertEqual(built.get_method(), method)
                self.assertIs(type(built.get_method()), str)
                self.assertEqual(built.full_url, url + selector)
                self.assertIs(type(built.full_url), str)
                self.assertEqual(built.data, data)

    def test_headers(self):
        agent = {"User-agent": f"bpx.py/{bpx.__version__}"}
        kind = {"Content-type": "application/json; charset=utf-8"}
        times = {"timestamp": 5, "window": 6}
        signed = bpx.sign_request("orderQuery", None, GUIDE_KEY, **times)
        signed = {name.capitalize(): text for name, text in signed.items()}
        own = {"X-Extra": LyingStr("~ !"), LyingStr("user-agent"): "mine"}
        own["X-Empty"] = ""
        shown = {"X-extra": "~ !", "User-agent": "mine", "X-empty": ""}
        key = {"secret_key": GUIDE_KEY, **times}
        other = {**key, "instruction": "orderQuery"}
        for method, path, options, expected in [
            ("GET", "/p", times, agent),
            ("GET", "/p", {"headers": own}, shown),
            ("PUT", "/p", {"headers": own}, {**shown, **kind}),
            ("GET", "/api/v1/order", key, {**agent, **signed}),
            ("GET", "/p", other, {**agent, **signed}),
            ("PATCH", "/p", other, {**agent, **signed, **kind}),
            ("DELETE", "/api/v1/order", other, {**agent, **signed, **kind}),
        ]:
            with self.subTest(method, path=path, options=options):
                built = bpx.build_request(method, path, **options)
                found = dict(built.header_items())
                self.assertEqual({*map(type, found.values())}, {str})
                self.assertEqual(found, expected)

    def test_headers_that_change_meanwhile(self):
        headers = {"X-A": "d"}

        def change(value, place):
            if place == "header X-A":
                headers["b"] = "c"

        with mock.patch("bpx._check_str", change):
            built = bpx.build_request("GET", "/", headers=headers)
        self.assertEqual(built.header_items()[0], ("X-a", "d"))
        self.assertEqual(len(built.header_items()), 2)

    def test_every_character_at_every_place(self):
        for argument, templates, accepted in CHARACTERS:
            places = itertools.product(templates.split(), map(chr, range(128)))
            for template, character in places:
                if template == "https://[::{}]" and character in ":.":
                    continue  # Newer Pythons check the address.
                value = template.format(character)
                options = {"method": "GET", "path": "/p", argument: value}
                if argument == "header name":
                    options["headers"] = {options.pop(argument): "a"}
                elif argument == "header value":
                    options["headers"] = {"X-A": options.pop(argument)}
                try:
                    bpx.build_request(**options)
                    found = character
                except ValueError:
                    found = ""
                with self.subTest(argument, value=value):
                    self.assertEqual(found != "", character in accepted)

    def test_instructions(self):
        self.assertEqual(list(bpx.INSTRUCTIONS.items()), OPERATIONS)


# --- 4 and 5: what a call sends and returns ---

# fmt: off
# Body of a response; what is returned.
BODIES = [
    (b"", None),
    (b"{}", {}),
    (b'{"a": [1, "\xc3\xa9", null, true, 0.5]}', {"a": [1, "é", None, True, 0.5]}),
    (b"[]", []),
    (b"null", None),
    (b"1750793021519", 1750793021519),
    (b"pong", "pong"),
    (b"\xef\xbb\xbf[1]", [1]),
    (b"\xef\xbb\xbf", None),
    (b"\xff{", "\ufffd{"),
    (b'"\xff"', "\ufffd"),
    (b"{", "{"),
    (b"[" * 100000, "[" * 100000),
    (b"9" * 5000 + b"x", "9" * 5000 + "x"),
]
# Body of a response with status 400; code and message; text of the error.
ERRORS = [
    (b'{"code": "INVALID_SIGNATURE", "message": "Invalid\\n signature"}', ("INVALID_SIGNATURE", "Invalid\n signature"), "400 INVALID_SIGNATURE Invalid signature"),
    (b'{"message": "no"}', (None, "no"), "400 no"),
    (b'{"code": 5, "message": 0.5}', (5, 0.5), "400 5 0.5"),
    (b'{"code": {"a": []}, "message": [1]}', ({"a": []}, [1]), "400"),
    (b'{"code": null, "message": null}', (None, None), "400"),
    (b"", (None, None), "400"),
    (b"[1]", (None, [1]), "400"),
    (b"null", (None, None), "400"),
    (b"<h1>Bad\nGateway", (None, "<h1>Bad\nGateway"), "400 <h1>Bad Gateway"),
    (b"a\x1b[31m\x00\xc2\x9b\xe2\x80\xaeb", None, "400 a [31m b"),
    (b"x" * 999, (None, "x" * 999), "400 " + "x" * 278),
    (b'{"message": ' + b"[" * 150 + b"]" * 150 + b"}", None, "400"),
]
# The parameters of the public functions, as inspect.signature shows them.
OPTIONS = "secret_key=None, instruction=None, timestamp=None, window=5000, base_url='https://api.backpack.exchange', headers=None"
SIGNATURES = {
    "canonical_string": "(instruction, params, timestamp, window=5000)",
    "sign_request": "(instruction, params, secret_key, *, timestamp=None, window=5000)",
    "build_request": f"(method, path, params=None, *, {OPTIONS})",
    "send": "(request, *, timeout=10.0)",
    "request": f"(method, path, params=None, *, {OPTIONS}, timeout=10.0)",
    **dict.fromkeys(["get", "post", "delete", "patch"], "(path, params=None, **options)"),
    "main": "(argv=None)",
}
CONSTANTS = {
    "BASE_URL": "https://api.backpack.exchange", "DEFAULT_WINDOW": 5000, "MAX_WINDOW": 60000,
    "DEFAULT_TIMEOUT": 10.0, "MAX_IDLE": 15.0, "MAX_BODY": 16777216,
}
# Name, outcome_unknown of the class.
ERROR_CLASSES = {"BPXError": False, "APIError": False, "NotSentError": False, "UnknownOutcomeError": True}
# fmt: on


class Calls(ExchangeCase):
    def fails(self, error, method="GET", *args, **options):
        """The error of a call whose request has reached the exchange."""
        with self.assertRaises(error) as caught:
            self.send(method, "/api/v1/ping", *args, **options)
        self.assertEqual(len(self.exchange.seen), 1)
        self.exchange.seen.clear()
        return caught.exception

    def test_public_names(self):
        names = [*CONSTANTS, *SIGNATURES, *ERROR_CLASSES]
        names += ["INSTRUCTIONS", "Response"]
        self.assertEqual(sorted(bpx.__all__), sorted(names))
        for name, value in CONSTANTS.items():
            self.assertEqual(getattr(bpx, name), value, name)
        for name, expected in SIGNATURES.items():
            parameters = inspect.signature(getattr(bpx, name)).parameters
            plain = [
                p.replace(annotation=p.empty) for p in parameters.values()
            ]
            self.assertEqual(str(inspect.Signature(plain)), expected, name)
            self.assertTrue(getattr(bpx, name).__doc__, name)

    def test_every_signed_operation(self):
        for operation, instruction in OPERATIONS:
            method, path = operation.split()
            with self.subTest(operation):
                params = {"symbol": "SOL_USDC", "b": True, "e": Side.BID}
                if operation == "POST /api/v1/orders":
                    params = [params, {**params, "n": 5}]
                options = {"base_url": self.exchange.url}
                call = getattr(bpx, method.lower())
                call(path, params, secret_key=GUIDE_KEY, **options)
                seen = self.exchange.seen.pop()
                self.assertEqual((seen.method, seen.path), (method, path))
                verify(seen, instruction)

    def test_values(self):
        for value, texts, _ in VALUES:
            with self.subTest("query", value=repr(value)):
                seen = self.signed("GET", {"n": value})
                self.assertEqual(seen.pairs, [("n", text) for text in texts])
                self.assertRegex(seen.query, "^[A-Za-z0-9._~%=&-]*$")
        for value, _, body in VALUES + OBJECTS:
            with self.subTest("body", value=repr(value)):
                seen = self.signed("POST", {"n": value})
                self.assertEqual(repr(seen.body), repr({"n": body}))
        for value in UNSET:
            params = {LyingStr("b/"): "1", Market.SPOT: "2", "n": value}
            query = self.signed("GET", params).query
            self.assertEqual(query, "SPOT=2&b%2F=1")
            body = self.signed("POST", params).body
            self.assertEqual(body, {"SPOT": "2", "b/": "1"})

    def test_batches(self):
        for kind in (list, tuple):
            for orders in ([{"symbol": "A"}, {"symbol": "B"}], [{"a": "b"}]):
                seen = self.signed("POST", kind(orders))
                self.assertEqual(seen.body, orders)

    def test_params_are_read_once(self):
        for method in ("GET", "POST"):
            self.signed(method, Changing())
        self.signed("POST", {"recipientInformation": Changing()})

    def test_a_public_operation_is_not_signed(self):
        _, seen = self.send("GET", "/api/v1/depth", {"symbol": "SOL_USDC"})
        names = ["Accept-Encoding", "Host", "User-agent"]
        self.assertEqual(sorted(seen.headers), names)

    def test_verify_can_fail(self):
        seen = self.signed("POST", {"a": "b"})
        seen.body = {"a": "c"}
        with self.assertRaises(nacl.exceptions.BadSignatureError):
            verify(seen, "orderExecute")

    def test_bad_arguments_send_nothing(self):
        rows = [({"params": params}, text) for params, text in BAD_PARAMS]
        rows += [({"secret_key": key}, text) for key, text in BAD_KEYS]
        rows += [({"timeout": each}, text) for each, text in BAD_TIMEOUTS]
        for options, message in rows + BAD_TIMES + BAD_REQUESTS:
            order = {"method": "POST", "path": "/api/v1/order"}
            order.update(secret_key=GUIDE_KEY, base_url=self.exchange.url)
            self.assert_refused(bpx.request, {**order, **options}, message)
            self.assertEqual(self.exchange.seen, [])

    def test_bodies(self):
        for body, expected in BODIES:
            for status in (200, 202, 299, 500):
                with self.subTest(body[:30], status=status):
                    self.exchange.answer = (status, {}, body)
                    if status == 500:
                        result = self.fails(bpx.APIError).body
                    else:
                        result, _ = self.send("GET", "/api/v1/ping")
                    self.assertEqual(repr(result), repr(expected))

    def test_head(self):
        self.exchange.answer = (200, {"Content-Encoding": "gzip"}, b"1234")
        result, seen = self.send("HEAD", "/api/v1/ping")
        self.assertEqual((result, seen.method), (None, "HEAD"))
        self.exchange.answer = (404, {}, b"1234")
        self.assertIsNone(self.fails(bpx.APIError, "HEAD").body)

    def test_errors_of_the_exchange(self):
        for body, fields, text in ERRORS:
            with self.subTest(body[:30]):
                self.exchange.answer = (400, {"Retry-After": "7"}, body)
                error = self.fails(bpx.APIError, "GET", {"a": "b"})
                for each in (error, pickle.loads(pickle.dumps(error))):
                    self.assertEqual(each.status, 400)
                    if fields is not None:
                        self.assertEqual((each.code, each.message), fields)
                    self.assertEqual(each.headers["retry-after"], "7")
                    self.assertEqual(str(each), f"GET /api/v1/ping: {text}")
                    selector = each.request.selector
                    self.assertEqual(selector, "/api/v1/ping?a=b")
                    self.assertEqual(each.body, error.body)
                if body == b"x" * 999:
                    self.assertEqual(error.reason, "400 " + "x" * 300)

    def test_statuses(self):
        unknown = {408, 500, 503, 599, 999}
        for status in {300, 304, 400, 401, 404, 407, 409, 429, 499} | unknown:
            with self.subTest(status):
                self.exchange.answer = (status, {}, b"")
                error = self.fails(bpx.APIError)
                self.assertEqual(error.status, status)
                self.assertIs(error.outcome_unknown, status in unknown)

    def test_other_errors(self):
        options = {"instruction": "a", "secret_key": GUIDE_KEY}
        built = bpx.build_request("POST", "/api/v1/order", {}, **options)
        for name, unknown in ERROR_CLASSES.items():
            kind = getattr(bpx, name)
            self.assertTrue(issubclass(kind, bpx.BPXError))
            self.assertFalse(issubclass(kind, (OSError, ValueError)))
            self.assertIs(kind.outcome_unknown, unknown)
            if name != "APIError":
                error = kind(request=built, reason="a\nb\x1b" + "c" * 999)
                for each in (error, pickle.loads(pickle.dumps(error))):
                    text = "POST /api/v1/order: a b " + "c" * 276
                    self.assertEqual(str(each), text)
                    self.assertEqual(each.request.data, b"{}")

    def test_methods(self):
        for method in ("GET", "POST", "DELETE", "PATCH"):
            for timeout in (86400, type("Seconds", (float,), {})(5)):
                call = getattr(bpx, method.lower())
                options = {"base_url": self.exchange.url, "timeout": timeout}
                self.assertEqual(call("/p", {"a": "b"}, **options), {})
                seen = self.exchange.seen.pop()
                self.assertEqual((seen.method, seen.path), (method, "/p"))
                sent = dict(seen.pairs) if method == "GET" else seen.body
                self.assertEqual(sent, {"a": "b"})

    def test_options_are_passed_on(self):
        now = time.time_ns() // 10**6
        options = {"secret_key": GUIDE_KEY, "instruction": "other"}
        options.update(window=7000, headers={"X-Broker-Id": "5"})
        options.update(timestamp=now - 3000)
        _, seen = self.send("POST", "/api/v1/new", **options)
        verify(seen, "other")
        self.assertEqual(seen.headers["X-Timestamp"], str(now - 3000))
        self.assertEqual(seen.headers["X-Window"], "7000")
        self.assertEqual(seen.headers["X-Broker-Id"], "5")
        with mock.patch("bpx.send", wraps=bpx.send) as send:
            self.send("GET", "/p")
            self.send("GET", "/p", timeout=3)
        timeouts = [call[1]["timeout"] for call in send.call_args_list]
        self.assertEqual(timeouts, [10.0, 3])

    def test_send(self):
        built = bpx.build_request("GET", "/p", base_url=self.exchange.url)
        for status in (200, 404):
            self.exchange.answer = (status, {"X-Limit": "9\r8"}, b"[1]")
            response = bpx.send(built)
            self.assertIsInstance(response, bpx.Response)
            self.assertEqual(response, (status, response.headers, b"[1]"))
            self.assertEqual(response.headers["x-limit"], "9 8")
            self.assertIs(type(response.body), bytes)

    def test_memory_errors(self):
        with mock.patch("bpx.json.loads", side_effect=MemoryError):
            error = self.fails(bpx.UnknownOutcomeError)
        self.assertIsInstance(error.__cause__, MemoryError)
        self.assertEqual(str(error), "GET /api/v1/ping: MemoryError")
        with mock.patch("bpx.json.loads", side_effect=KeyboardInterrupt):
            self.fails(KeyboardInterrupt)


# --- 4: the transport ---

HEAD = b"HTTP/1.1 200 OK\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LENGTH = HEAD + b"Content-Length: %d\r\n\r\n"
REST = b"Content-Length: 2\r\n\r\n{}"
TWO = HEAD + REST
BLOCK = HEAD[:-2].ljust(8190 - len(REST)) + b"\r\n" + REST  # 8192 bytes
CLOSE = b"Connection: close\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + CHUNKS
LAST = b"0\r\n\r\n"
PACKED = b"Content-Encoding: gzip\r\n"
ONE = gzip.compress(b"1")
FULL = b'"%s"' % (b"1" * 99998)  # of MAX_BODY, which is 100000 bytes below
TUNNEL = b"HTTP/1.1 200 Connection established\r\n\r\n"
DRIP = [b"1", 0.05]


def sized(head, body):
    """A response of these first lines, and of this body with its length."""
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


# fmt: off
TLS, PROXY = "https://localhost:{tls}", "http://localhost:{plain}"
# Reason, base URL, https_proxy, script of the plain server, what the error says.
NOT_SENT = [
    ("refused", "http://127.0.0.1:1", "", [], r"ConnectionRefusedError: \[Errno \d+\] .+"),
    ("unknown host", "https://no.such.host.invalid", "", []),
    ("label over 63", f"https://{'a' * 70}.example", "", []),
    ("silence to TLS", "https://localhost:{plain}", "", []),
    ("proxy refused", TLS, "http://127.0.0.1:1", []),
    ("proxy, 302", TLS, PROXY, [b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n"], "OSError: the proxy responded with status 302"),
    ("proxy, not HTTP", TLS, PROXY, [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"]),
    *((f"proxy, {step.__name__}", TLS, PROXY, [step]) for step in (close, reset)),
    ("proxy, silence", TLS, PROXY, []),
    ("proxy, dripped header", TLS, PROXY, repeat_forever(HEAD, *DRIP)),
    ("proxy, silence to TLS", TLS, PROXY, [TUNNEL]),
    ("proxy, bytes that are not TLS", TLS, PROXY, [TUNNEL + b"SSH-2"], "SSLError: .+"),
    ("proxy, dripped TLS", TLS, PROXY, repeat_forever(TUNNEL + b"\x16\3\3\x40\0\2", *DRIP)),
]
# https_proxy, the address that is connected to, the Proxy-Authorization.
PROXIES = [
    ("http://127.0.0.1", ("127.0.0.1", 80), None),
    ("HTTP://127.0.0.1:5/", ("127.0.0.1", 5), None),
    ("127.0.0.1:65535", ("127.0.0.1", 65535), None),
    ("http://[::ffff:127.0.0.1]:5", ("::ffff:127.0.0.1", 5), None),
    ("http://me:a:b@c@proxy-1_b.example:5", ("proxy-1_b.example", 5), "Basic bWU6YTpiQGM="),  # me:a:b@c
    ("http://me@localhost", ("localhost", 80), "Basic bWU6"),  # me:
    ("http://:p@localhost", ("localhost", 80), "Basic OnA="),  # :p
    ("http://m%C3%A9:%3A@localhost", ("localhost", 80), "Basic bcOpOjo="),  # mé::
]
# https_proxy that is refused ({} is HOST:PORT of a server).
BAD_PROXIES = ["http://me:PASSWORD@{}\n"] + """
https://me:PASSWORD@{} socks5://me:PASSWORD@{} socks5h://{}
ftp://{} ://{} http:/me:PASSWORD@{}
http//me:PASSWORD@{} http://me:PASSWORD http://me:PASSWORD@
http://@{} http://me:PASSWORD@/ http://me:PASSWORD@{}/path
http://me:PASSWORD/{} http://{}:PASSWORD http://{}:1
http://{}// http://http://{} http://[]:1
http://localhost: http://localhost:x http://localhost:123456 http://[localhost]:1
""".split()
# Reason, a whole response, of which the server sends only the first bytes.
CUT = [
    ("length", sized(HEAD, b"[1]")),
    ("length 0", sized(HEAD, b"")),
    ("204", NO_CONTENT + b"\r\n"),
    ("chunks and a trailer", CHUNKED + b"2\r\n{}\r\n0\r\nA: b\r\n\r\n"),
    ("gzip", sized(HEAD + PACKED, ONE)),
    ("error", sized(BAD, b"[1]")),
    ("error in chunks", BAD + CHUNKS + b"3\r\n[1]\r\n" + LAST),
]
EOF = "EOFError: the connection was closed before the response ended"
TOO_LARGE = "HTTPException: the body is larger than MAX_BODY"
# Reason, script, what the error says. All are over at once, and no 2xx came back whole.
BROKEN = [
    ("closed", [close], EOF),
    ("reset", [reset]),
    ("half a body", [LENGTH % 4 + b"{}", close], EOF),
    ("half a body, reset", [LENGTH % 4 + b"{}", reset]),
    ("not HTTP", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"]),
    ("HTTP/2.0", [TWO.replace(b"1.1", b"2.0")]),
    ("status not a number", [TWO.replace(b"200", b"two")]),
    ("status 101", [b"HTTP/1.1 101 Switching\r\n\r\n"], "HTTPException: unexpected status 101"),
    ("status 199", [TWO.replace(b"200", b"199")], "HTTPException: unexpected status 199"),
    ("no length", [HEAD + b"\r\n{}"], "HTTPException: nothing shows where the body ends, so it could be incomplete"),
    ("no length, 299", [HEAD.replace(b"200", b"299") + b"\r\n{}", close]),
    ("length below 0", [LENGTH % -2 + b"{}", close]),
    ("length not a number", [TWO.replace(b": 2", b": two"), close]),
    ("lengths 2 and 2", [(LENGTH % 2)[:-2] + REST], "HTTPException: more than one header says where the body ends"),
    ("length and chunks", [HEAD + REST[:-4] + CHUNKS + b"2\r\n{}\r\n" + LAST]),
    ("gzip, not chunked", [CHUNKED.replace(b"chunked", b"gzip") + ONE, close]),
    ("chunk not a number", [CHUNKED + b"two\r\n{}\r\n" + LAST]),
    ("200 headers", [HEAD + b"A: b\r\n" * 200 + REST]),
    ("header of 70000 bytes", [HEAD + b"A: %070000d\r\n" % 0 + REST]),
    ("gzip without its end", [sized(HEAD + PACKED, ONE[:-1])]),
    ("gzip with a wrong sum", [sized(HEAD + PACKED, ONE[:-8] + bytes(8))]),
    ("more than gzip", [sized(HEAD + PACKED, ONE + b"1")]),
    ("two gzip members", [sized(HEAD + PACKED, ONE + ONE)], "HTTPException: the gzip data is cut off, or has extra bytes after its end"),
    ("zlib, not gzip", [sized(HEAD + PACKED, b"x\x9c3\x04\x00\x002\x002")]),
    *((f"header {line}", [HEAD + line + REST], "HTTPException: a header is malformed") for line in (b"bad line\r\n", b" A: b\r\n")),
    ("BR", [sized(HEAD + b"Content-Encoding: BR\r\n", b"{}")], "HTTPException: Content-Encoding br is not supported"),
    ("gzip twice", [sized(HEAD + PACKED * 2, gzip.compress(ONE))], "HTTPException: Content-Encoding gzip, gzip is not supported"),
    ("a byte too many", [sized(HEAD, FULL + b" ")], TOO_LARGE),
    ("a byte too many in chunks", [CHUNKED + b"186a1\r\n" + FULL + b" \r\n" + LAST], TOO_LARGE),
    ("a byte too many in gzip", [sized(HEAD + PACKED, gzip.compress(FULL + b" "))], TOO_LARGE),
    ("length 2**70", [LENGTH % 2**70 + b"1" * 200000], TOO_LARGE),
    ("many chunks", [CHUNKED + b"9\r\n123456789\r\n" * 20000], TOO_LARGE),
    ("chunk of 2**70", [CHUNKED + b"%x\r\n" % 2**70 + b"1" * 200000], TOO_LARGE),
    ("chunk of -1", [CHUNKED + b"-1\r\n" + b"1" * 200000]),
]
# Reason, script. All last longer than the timeout.
LATE = [
    ("a late response", [0.3, TWO]),
    ("dripped status line", repeat_forever(b"HTTP", *DRIP)),
    ("dripped header", repeat_forever(HEAD, *DRIP)),
    ("dripped body", repeat_forever(LENGTH % 99, *DRIP)),
    ("dripped chunk size", repeat_forever(CHUNKED, *DRIP)),
    ("endless trailers", repeat_forever(CHUNKED + b"0\r\n", b"A: b\r\n" * 99)),
    ("endless 100 Continue", repeat_forever(CONTINUE, CONTINUE * 99)),
]
# Scripts of requests that are interrupted.
INTERRUPTED = [
    [interrupt, 0.05, TWO],
    [LENGTH % 4 + b"{}", 0.05, interrupt],
    [sized(BAD, b"1234")[:-2], 0.05, interrupt],
]
# Reason, script, what is returned, the connection of the next request.
WHOLE = [
    ("length", [TWO], {}, 1),
    ("in pieces", [TWO[:20], 0.01, TWO[20:-1], 0.01, TWO[-1:]], {}, 1),
    ("odd case", [b"HTTP/1.1 200 \r\ncOnTeNt-lEnGtH:2\r\n\r\n{}"], {}, 1),
    ("carriage returns", [HEAD + b"A: b\rc\r\r\n" + REST], {}, 1),
    *((f"encoding {name}", [sized(HEAD + b"Content-Encoding: %b\r\n" % name, b"{}")], {}, 1) for name in (b"", b"Identity")),
    ("202, empty", [(LENGTH % 0).replace(b"200", b"202")], None, 1),
    ("204", [NO_CONTENT + b"\r\n"], None, 1),
    ("chunks, extension, trailer", [CHUNKED + b"1\r\n{\r\n01;a=b\r\n}\r\n0\r\nA: b\r\n\r\n"], {}, 1),
    ("100 Continue", [CONTINUE, 0.01, TWO], {}, 1),
    ("HTTP/1.0", [TWO.replace(b"1.1", b"1.0")], {}, 2),
    ("Connection: close", [HEAD + CLOSE + REST], {}, 2),
    ("close, late body", [HEAD + CLOSE + REST[:-1], 0.05, b"}", close], {}, 2),
    ("with a response", [TWO + TWO], {}, 1),
    ("with much surplus", [TWO + b" " * 10000], {}, 2),
    ("surplus in its TLS record", [BLOCK + b" "], {}, 2),
    ("gzip in chunks", [HEAD + PACKED + CHUNKS + b"%x\r\n" % len(ONE) + ONE + b"\r\n" + LAST], 1, 1),
    ("GZIP, far apart", [sized(HEAD + b"Content-Encoding: GZIP \r\n", gzip.compress(json.dumps((FAR := "".join(map(str, range(5000))) * 2)).encode()))], FAR, 1),
    ("gzip of nothing", [sized(HEAD + PACKED, gzip.compress(b""))], None, 1),
    ("nothing of gzip", [sized(HEAD + PACKED, b"")], None, 1),
    ("MAX_BODY", [sized(HEAD, FULL)], "1" * 99998, 1),
    ("MAX_BODY in chunks", [CHUNKED, b"186a0\r\n", FULL, b"\r\n", LAST], "1" * 99998, 1),
    ("MAX_BODY in gzip", [sized(HEAD + PACKED, gzip.compress(FULL))], "1" * 99998, 1),
]
# Reason, script, body of the APIError, the connection of the next request.
ERROR_RESPONSES = [
    ("length", [sized(BAD, b"[1]")], [1], 1),
    ("300, no length", [b"HTTP/1.1 300 No\r\n\r\nwhich", close], "which", 2),
    ("503, no length, late", [b"HTTP/1.1 503 No\r\n\r\nno", 0.05, b" server", close], "no server", 2),
    ("304", [b"HTTP/1.1 304 Not Modified\r\n\r\n"], None, 1),
    ("407", [sized(b"HTTP/1.1 407 No\r\n", b"[1]")], [1], 1),
    ("408", [sized(b"HTTP/1.1 408 Timeout\r\n", b"[1]")], [1], 2),
    ("gzip", [sized(BAD + PACKED, ONE)], 1, 1),
    ("gzip, no length", [BAD + PACKED + b"\r\n" + ONE, close], 1, 2),
    ("gzip, cut off", [sized(BAD + PACKED, ONE[:-1])], None, 2),
    ("br", [sized(BAD + b"Content-Encoding: br\r\n", b"{}")], None, 2),
    ("two lengths", [sized(BAD, b"")[:-2] + REST], None, 2),
    ("too large", [sized(BAD, FULL + b" ")], None, 2),
    ("too late", [sized(BAD, b"[1]")[:-1], 2], None, 2),
    ("no length, too late", [BAD + b"\r\nno", 2], None, 2),
]
# Reason, what the server does once its response was received.
SPOILT = [
    ("closed", [close]),
    ("reset", [reset]),
    ("half closed", [shut]),
    ("surplus", [b" "]),
    ("a response too many", [TWO]),
]
# Seconds, the connection of the request that is sent then.
IDLE = [(0, 1), (14.5, 1), (29, 1), (43.5, 1), (58.5, 2), (58.5, 2), (80, 3)]
CHILD = """
import atexit, bpx, os, sys, threading, time
def ask():
    for url in sys.argv[1:]:
        n = time.perf_counter_ns()
        answer = bpx.get("/api/v1/ping", {"n": n}, base_url=url, timeout=5)
        print(answer[0] if answer[1].endswith(str(n)) else answer, flush=True)
"""
# Reason, what the child does, connections of its requests to two servers.
CHILDREN = [
    ("end", "ask(); ask()", "1 1 1 1"),
    ("end of Python", "atexit.register(ask); ask()", "1 1 1 1"),
    ("end of a thread", "ask(); t = threading.Thread(target=ask); t.start(); t.join(); ask()", "1 1 2 2 1 1"),
    ("fork", "ask(); child = os.fork(); child and os.waitpid(child, 0); ask()", "1 1 2 2 1 1"),
]
# fmt: on
NUMBERS = itertools.count(1)  # so that no two requests are alike


class Transport(SecretsCase):
    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        none = {"https_proxy": "", "http_proxy": "", "no_proxy": ""}
        none["PYTHONMALLOC"] = "default"  # else -X dev breaks 3.8's own fork
        stack.enter_context(mock.patch.dict(os.environ, none))
        stack.enter_context(mock.patch.object(bpx, "MAX_BODY", 100000))
        catch = warnings.catch_warnings(record=True)
        self.warnings = stack.enter_context(catch)
        warnings.simplefilter("always")
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, handler)
        self.trust(PEM_FILE)

    def tearDown(self):
        gc.collect()
        self.assertEqual([str(each.message) for each in self.warnings], [])

    def trust(self, file):
        os.environ["SSL_CERT_FILE"] = file
        bpx._tls_context.cache_clear()  # made from it, when it is needed

    def ask(self, url):
        """The connection on which a request was answered by its own echo."""
        n, path = next(NUMBERS), "/api/v1/ping"
        answer = bpx.get(path, {"n": n}, base_url=url, timeout=5)
        self.assertEqual(answer[1:], [f"{path}?n={n}"])
        return answer[0]

    def order(self, url, timeout=5):
        params = {"clientId": 7}
        options = {"secret_key": GUIDE_KEY, "base_url": url}
        return bpx.post("/api/v1/order", params, timeout=timeout, **options)

    def fails(self, kind, url, text=".+", timeout=5, within=1):
        """The error of an order, which is raised within that many seconds."""
        began = time.perf_counter()
        with self.assertRaises(kind) as caught:
            self.order(url, timeout)
        self.assertLess(time.perf_counter() - began, within)
        text = rf"\APOST /api/v1/order: {text}\Z"
        self.assertRegex(str(caught.exception), text)
        if kind is not bpx.APIError:
            unknown = kind is bpx.UnknownOutcomeError
            self.assertIs(caught.exception.outcome_unknown, unknown)
            self.assertIsInstance(caught.exception.__cause__, Exception)
        try:
            return caught.exception
        finally:
            del caught  # Else the error would refer to itself by its frames.

    def test_not_sent(self):
        for reason, url, proxy, script, *text in NOT_SENT:
            with self.subTest(reason), ScriptedServer(script) as plain:
                with TLSScriptedServer() as tls, mock.patch(
                    "socket.create_connection", wraps=socket.create_connection
                ) as connect:
                    ports = {"plain": plain.port, "tls": tls.port}
                    os.environ["https_proxy"] = proxy.format(**ports)
                    url = url.format(**ports)
                    self.fails(bpx.NotSentError, url, *text, timeout=0.1)
                    self.assertEqual(connect.call_args[0][1], 0.1)
                    self.assertEqual(len(plain.seen), "{plain}" in proxy)
                    os.environ["https_proxy"] = ""
                    self.assertEqual(self.ask(tls.url), 1)
                    self.assertEqual(len(tls.seen), 1)

    def test_certificates(self):
        last = [HEAD + CLOSE + REST]
        text = "SSLCertVerificationError: .+"
        with TLSScriptedServer(last, [TWO], last) as tls:
            url = f"https://127.0.0.1:{tls.port}"  # which it is not for
            self.fails(bpx.NotSentError, url, text)
            self.trust(os.devnull)
            self.fails(bpx.NotSentError, tls.url, text)
            self.trust(PEM_FILE)
            self.order(tls.url)
            # Now nothing is trusted, but that is not read again.
            os.environ["SSL_CERT_FILE"] = os.devnull
            self.order(tls.url)
            self.order(tls.url)
            with ScriptedServer([TUNNEL, relay_to(tls.port)]) as proxy:
                os.environ["https_proxy"] = proxy.url
                self.assertEqual(self.ask(tls.url), 5)

    def test_proxies(self):
        for proxy, address, authorization in PROXIES:
            script = [b"HTTP/1.1 407 No\r\n\r\n", close]
            with self.subTest(proxy), ScriptedServer(script) as server:
                sock = socket.create_connection(("127.0.0.1", server.port), 5)
                with mock.patch(
                    "socket.create_connection", return_value=sock
                ) as connect:
                    os.environ["https_proxy"] = proxy
                    self.fails(bpx.NotSentError, "https://a.example")
                self.assertEqual(connect.call_args[0][0], address)
                line, headers = server.seen[0]
                self.assertEqual(line.split()[1], "a.example:443")
                self.assertEqual(headers["Proxy-Authorization"], authorization)

    def test_a_tunnel(self):
        url = "https://localhost:80"  # Port 80 is not the default of https.
        with TLSScriptedServer() as tls:
            script = [0.3, HEAD, 0.02, b"\r\n", 0.45, relay_to(tls.port)]
            with ScriptedServer(script) as proxy:
                os.environ["https_proxy"] = f"me:p%40ss@{proxy.url[7:]}"
                self.order(url, 0.6)
                self.assertEqual(self.ask(url), 1)
            ((line, headers),) = proxy.seen
            self.assertRegex(line, "^CONNECT localhost:80 ")
            sent = [("Host", "localhost:80")]
            sent.append(("Proxy-Authorization", "Basic bWU6cEBzcw=="))
            self.assertEqual(headers.items(), sent)
            for _, headers in tls.seen:
                self.assertEqual(headers["Host"], "localhost:80")
                self.assertNotIn("Proxy-Authorization", headers)

    def test_bad_proxies(self):
        text = (
            "ValueError: https_proxy: set it to http://HOST:PORT or to "
            "http://USER:PASSWORD@HOST:PORT; other proxies are not supported"
        )
        with ScriptedServer() as server:
            for proxy in BAD_PROXIES:
                with self.subTest(proxy):
                    address = f"localhost:{server.port}"
                    os.environ["https_proxy"] = proxy.format(address)
                    url = f"https://{address}"
                    error = self.fails(bpx.NotSentError, url, text)
                    shown = all_texts(error)
                    self.assertNotRegex(shown, "PASSWORD@localhost|me:")
            self.assertEqual(len(server.threads), 1)  # It accepts, no more.

    def test_no_proxy(self):
        os.environ["http_proxy"] = "socks5://localhost"
        os.environ["https_proxy"] = "socks5://localhost"
        with ScriptedServer() as server:  # For http, no proxy is used.
            self.assertEqual(self.ask(server.url), 1)
        os.environ["no_proxy"] = "localhost"
        with TLSScriptedServer() as server:
            self.assertEqual(self.ask(server.url), 1)

    def test_cut_responses(self):
        for reason, response in CUT:
            sizes = range(len(response))
            scripts = [[response[:size], close] for size in sizes]
            with self.subTest(reason), ScriptedServer(*scripts) as server:
                for size in sizes:
                    header_is_whole = b"\r\n\r\n" in response[:size]
                    if response.startswith(BAD) and header_is_whole:
                        error = self.fails(bpx.APIError, server.url)
                        self.assertIsNone(error.body)
                    else:
                        self.fails(bpx.UnknownOutcomeError, server.url, EOF)
                self.assertEqual(self.ask(server.url), len(response) + 1)

    def test_broken_responses(self):
        for kind, (reason, script, *text) in itertools.product(BOTH, BROKEN):
            with self.subTest(reason, kind=kind), kind(script) as server:
                self.fails(bpx.UnknownOutcomeError, server.url, *text)
                self.assertEqual(len(server.seen), 1)
                self.assertEqual(self.ask(server.url), 2)

    def test_late_responses(self):
        text = "(TimeoutError|timeout): timed out"
        for reason, script in LATE:
            with self.subTest(reason), ScriptedServer([TWO], script) as server:
                self.assertEqual(self.order(server.url), {})
                error = bpx.UnknownOutcomeError
                self.fails(error, server.url, text, timeout=0.1)
                self.assertEqual(len(server.seen), 2)
                self.assertEqual(self.ask(server.url), 2)

    def test_whole_responses(self):
        for kind, row in itertools.product(BOTH, WHOLE):
            reason, script, answer, connection = row
            with self.subTest(reason, kind=kind), kind(script) as server:
                self.assertEqual(self.order(server.url), answer)
                server.played.acquire(timeout=5)
                self.assertEqual(len(server.seen), 1)
                self.assertEqual(self.ask(server.url), connection)
                self.assertEqual(self.ask(server.url), connection)

    def test_error_responses(self):
        for reason, script, body, connection in ERROR_RESPONSES:
            with self.subTest(reason), ScriptedServer(script) as server:
                timeout = 0.1 if "too late" in reason else 5
                error = self.fails(bpx.APIError, server.url, timeout=timeout)
                status = int(script[0][9:12])
                self.assertEqual((error.status, error.body), (status, body))
                self.assertEqual(self.ask(server.url), connection)

    def test_redirects(self):
        for status in 301, 302, 303, 307, 308:
            with self.subTest(status), ScriptedServer() as other:
                head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/\r\n"
                with ScriptedServer([head.encode() + REST]) as server:
                    error = self.fails(bpx.APIError, server.url)
                    found = error.status, error.headers["location"]
                    self.assertEqual(found, (status, f"{other.url}/"))
                    self.assertEqual(self.ask(server.url), 1)
                self.assertEqual(other.seen, [])

    def test_memory_errors(self):
        with ScriptedServer([TWO], [sized(BAD, b"[1]")]) as server:
            with mock.patch("bpx._read_body", side_effect=MemoryError):
                self.fails(bpx.UnknownOutcomeError, server.url)
                error = self.fails(bpx.APIError, server.url)
            self.assertEqual((error.status, error.body), (400, None))
            self.assertEqual(self.ask(server.url), 3)

    def test_compression(self):
        unpack = mock.Mock(eof=True, unused_data=b"")
        unpack.decompress.return_value = b"1"
        with ScriptedServer([sized(HEAD + PACKED, ONE)]) as server:
            with mock.patch("zlib.decompressobj", return_value=unpack):
                self.assertEqual(self.order(server.url), 1)
            # One byte more than MAX_BODY is unpacked, and no more.
            unpack.decompress.assert_called_once_with(ONE, 100001)
            encodings = server.seen[0][1].get_all("Accept-Encoding")
            self.assertEqual(encodings, ["gzip"])

    def test_debugging(self):
        with mock.patch("http.client.HTTPConnection.debuglevel", 1):
            with ScriptedServer() as server:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    self.assertEqual(self.ask(server.url), 1)
        self.assertIn("reply: 'HTTP/1.1 200 OK", output.getvalue())

    def test_one_timeout_for_all_of_a_response(self):
        with ScriptedServer([HEAD, 0.3, b"A: b\r\n", 2]) as server:
            error = bpx.UnknownOutcomeError
            self.fails(error, server.url, timeout=0.4, within=0.65)

    def test_a_timeout_between_two_reads(self):
        error, text = bpx.UnknownOutcomeError, "TimeoutError: timed out"
        for step in 0.5, 100:
            clock = itertools.count(0, step)
            with self.subTest(step), ScriptedServer() as server:
                with mock.patch("time.monotonic", side_effect=clock):
                    self.fails(error, server.url, text, timeout=0.5)

    def test_each_request_has_its_own_timeout(self):
        large = {"a": "b" * 2**24}  # more than what is sent without reading
        scripts = [TWO], [0.2, TWO], [TWO, 0.2], [TWO, 2]
        with ScriptedServer(*scripts) as server:
            url = server.url
            built = bpx.build_request("POST", "/p", large, base_url=url)
            self.order(url, 0.1)
            self.order(url, 2)  # It is answered after 0.2 seconds.
            self.order(url, 0.1)
            bpx.send(built, timeout=5)  # It is read after 0.2 seconds.
            with self.assertRaises(bpx.UnknownOutcomeError):
                bpx.send(built, timeout=0.1)  # It is read after 2 seconds.

    def test_interrupts(self):
        for error, handler in [
            (KeyboardInterrupt, signal.default_int_handler),
            (SystemExit, lambda number, frame: sys.exit()),
        ]:
            signal.signal(signal.SIGINT, handler)
            for kind, script in itertools.product(BOTH, INTERRUPTED):
                with self.subTest(script, kind=kind), kind(script) as server:
                    try:
                        self.order(server.url)
                        self.fail("not interrupted")
                    except error:  # which keeps all that is left open
                        self.assertTrue(server.has_closed(1))
                    self.assertEqual(len(server.seen), 1)
                    self.assertEqual(self.ask(server.url), 2)

    def test_an_interrupt_while_connecting(self):
        with ScriptedServer() as plain:  # which never answers TLS
            thread = threading.Timer(0.1, interrupt, [None])
            thread.start()
            with self.assertRaises(KeyboardInterrupt):
                self.order(f"https{plain.url[4:]}")
            thread.join()
        gc.collect()
        del self.warnings[:]  # ssl itself leaves its socket open.
        with ScriptedServer([0.05, interrupt]) as proxy:
            os.environ["https_proxy"] = proxy.url
            with self.assertRaises(KeyboardInterrupt):
                self.order(f"https{plain.url[4:]}")
            self.assertTrue(proxy.has_closed(1))

    def test_spoilt_connections(self):
        for kind, (reason, steps) in itertools.product(BOTH, SPOILT):
            taken = threading.Event()
            script = [TWO, lambda sock: taken.wait(5), *steps]
            with self.subTest(reason, kind=kind), kind(script) as server:
                self.assertEqual(self.order(server.url), {})
                taken.set()
                server.played.acquire(timeout=5)
                self.assertEqual(self.ask(server.url), 2)
                self.assertTrue(server.has_closed(1))

    def test_restarted_server(self):
        for kind in BOTH:
            with self.subTest(kind):
                with kind() as server:
                    self.assertEqual(self.ask(server.url), 1)
                with kind(port=server.port) as server:
                    self.assertEqual(self.ask(server.url), 1)

    def test_max_idle(self):
        with mock.patch("time.monotonic") as clock, ScriptedServer() as server:
            for seconds, connection in IDLE:
                clock.return_value = seconds
                self.assertEqual(self.ask(server.url), connection)
            with mock.patch.object(bpx, "MAX_IDLE", 0):
                self.assertEqual(self.ask(server.url), 4)
            self.assertTrue(server.has_closed(1))

    def test_a_connection_that_cannot_be_checked_is_replaced(self):
        with ScriptedServer() as server:
            self.assertEqual(self.ask(server.url), 1)
            for connection, error in (2, OSError), (3, ValueError):
                with mock.patch(
                    "selectors.DefaultSelector", side_effect=error
                ):
                    self.assertEqual(self.ask(server.url), connection)
                self.assertEqual(self.ask(server.url), connection)

    def test_a_connection_for_each_origin(self):
        with ScriptedServer() as one, ScriptedServer() as two:
            with TLSScriptedServer() as tls:
                for server in (one, two, tls) * 2:
                    self.assertEqual(self.ask(server.url), 1)
                self.assertEqual(self.ask(f"http://127.0.0.1:{one.port}"), 2)
                url = f"https{one.url[4:]}"
                self.fails(bpx.NotSentError, url, timeout=0.1)
                self.assertEqual(self.ask(one.url), 1)

    def test_a_connection_for_each_thread(self):
        with ScriptedServer() as server:
            self.assertEqual(self.ask(server.url), 1)
            thread = threading.Thread(target=self.ask, args=[server.url])
            thread.start()
            thread.join(5)
            self.assertTrue(server.has_closed(2))
            self.assertEqual(self.ask(server.url), 1)

    def test_child_interpreters(self):
        python = [sys.executable, "-W", "error", "-X", "dev", "-c"]
        options = {"capture_output": True, "text": True, "timeout": 20}
        for reason, code, printed in CHILDREN:
            with self.subTest(reason), ScriptedServer() as plain:
                with TLSScriptedServer() as tls:
                    argv = [*python, CHILD + code, plain.url, tls.url]
                    child = subprocess.run(argv, cwd=HERE, **options)
                self.assertEqual(child.stderr, "")
                self.assertEqual(child.stdout.split(), printed.split())


# --- 6: the command line ---


def python(*argv, key="", stdin=None, stdout=-1, stderr=-1):
    """Run Python in the folder of bpx.py: (status, output, errors)."""
    variables = {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=str(HERE),
        env={**os.environ, **variables, "BPX_SECRET_KEY": key},
        input=stdin,
        stdout=stdout,
        stderr=stderr,
        encoding="utf-8",
        timeout=20,
    )
    return done.returncode, done.stdout or "", done.stderr or ""


CLOSED = io.StringIO()
CLOSED.close()
# fmt: off
REQUIRED = "the following arguments are required: "
UNKNOWN = "unrecognized arguments: "
PAIR = "ValueError: pass name=text or name:=json, not "
NOT_JSON = ": cannot use this JSON "
ONCE = "ValueError: pass the name {} only once"
# Arguments, how the line on standard error begins (a pattern).
USAGES = [
    ([], REQUIRED + "METHOD, PATH; usage: bpx.py "),
    (["GET"], REQUIRED + "PATH; usage: bpx.py "),
    *((["GET", "/p", pair], PAIR + f"'{pair}'$") for pair in ("symbol", "=5", ":=5")),
    *((["GET", "/p", key], text) for key, text in ((GUIDE_KEY, "ValueError: pass a shorter name; this one could be a secret key$"), (GUIDE_KEY[:-1], PAIR + ".a long text.$"))),
    (["GET", "/p", f"BPX_SECRET_KEY={GUIDE_KEY}"], "ValueError: pass BPX_SECRET_KEY in the environment, not as a parameter$"),
    (["GET", "/p", "--xy", "{}"], UNKNOWN + "--xy {}; usage"),
    (["GET", "/p", "--k", "k" * 42], UNKNOWN + "--k k{42}; usage"),
    *((["GET", "/p", "--k", key], UNKNOWN + "--k .a long text.; usage") for key in ("k" * 43, GUIDE_KEY)),
    (["GET", "/p", f"--window={GUIDE_KEY[:-1]}"], "argument --window: .*a long text"),
    (["GET", "/p", "--window", "x"], "argument --window: invalid int value"),
    *((["GET", "/p", f"n:={text}"], f"ValueError: n{NOT_JSON}.JSONDecodeError: ") for text in ("x", GUIDE_KEY)),
    *((["POST", "/p", "--json", text], f"ValueError: --json{NOT_JSON}.JSONDecodeError: ") for text in ("{", "")),
    (["POST", "/p", "--json", "[" * 100000], f"ValueError: --json{NOT_JSON}.*Recursion"),
    (["POST", "/p", "--json", "null"], "ValueError: --json: pass an object or a list, not null$"),
    (["POST", "/p", "--json", "-"], "ValueError: --json -: standard input is closed$"),
    (["POST", "/p", "--json", "5"], "TypeError: params: pass a mapping "),
    *((["POST", "/p", "a=b", "--json", text], "ValueError: pass name=text parameters or --json, not both$") for text in ("{}", "")),
    *((["POST", "/p", f"{name}=", f"{name}=c"], ONCE.format(repr(name)) + "$") for name in ("a", "k" * 42)),
    (["POST", "/p", 'a:={"b": 1, "c": 2, "b": 1}'], f"ValueError: a{NOT_JSON}.{ONCE.format(repr('b'))}.$"),
    (["POST", "/p", "--json", '[{"a": {"b": 1, "b": 2}}]'], f"ValueError: --json{NOT_JSON}.{ONCE.format(repr('b'))}.$"),
    (["POST", "/p", "--json", '{"%s": 1, "%s": 1}' % (GUIDE_KEY, GUIDE_KEY)], ".*" + ONCE.format(".a long text.")),
    (["POST", "/p", "a=\udcff"], f"ValueError: params.a{UTF_8}$"),
    (["POST", "/p", "price:=0.1"], "TypeError: params.price: pass a str "),
    (["GET", "/api/v1/order", "--window", "60001"], "ValueError: window: "),
    *((["GET", "/p", "--timeout", "0", *run], "ValueError: timeout: ") for run in ([], ["--dry-run"])),
    (["GET", "/p", "--base-url", "http://a.example"], "ValueError: base_url: "),
    (["GET", "/p?a=b"], "ValueError: path: pass the query as params, "),
]
FAILED = b'{"code":"C","message":"a\\nb\\u001b[1m"}'
EXECUTED = r" \(the request may have been executed\)$"
# Arguments, response; exit status, how the line on standard error begins (a pattern).
FAILURES = [
    *((argv, None, 2, pattern) for argv, pattern in USAGES),
    (["GET", "/p", "--base-url", "http://127.0.0.1:1"], None, 3, r"NotSentError: GET /p: .* \(nothing was sent\)$"),
    (["GET", "/p"], (400, {}, FAILED), 1, r"APIError: GET /p: 400 C a b \[1m$"),
    (["GET", "/p"], (408, {}, FAILED), 4, r"APIError: GET /p: 408 C a b \[1m" + EXECUTED),
    (["GET", "/p"], (503, {}, FAILED), 4, r"APIError: GET /p: 503 C a b \[1m" + EXECUTED),
    (["GET", "/p"], (200, {"Transfer-Encoding": "x"}, b""), 4, "UnknownOutcomeError: GET /p: .*" + EXECUTED),
]
DEFAULTS = ("orderExecute", "5000", 10.0)
# Arguments, standard input; the body that is sent; instruction, window and timeout.
GIVEN = [
    ([], "", {}, DEFAULTS),
    (["symbol=SOL_USDC", "a=b=c:=d", "e="], "", {"symbol": "SOL_USDC", "a": "b=c:=d", "e": ""}, DEFAULTS),
    (["n:=5", "b:=true", 'l:=["A","B"]', "u:=null", "é=ü"], "", {"n": 5, "b": True, "l": ["A", "B"], "é": "ü"}, DEFAULTS),
    (["--json", '{"symbol": "é", "n": [1]}'], "", {"symbol": "é", "n": [1]}, DEFAULTS),
    (["--json", "-"], '[{"symbol": "é"},\n{"symbol": "B"}]', [{"symbol": "é"}, {"symbol": "B"}], DEFAULTS),
    (["--instruction", "other", "a=b", "--window", "60000", "--timeout", "2.5", "c=d"], "", {"a": "b", "c": "d"}, ("other", "60000", 2.5)),
]
HELP = README.split("```text\n")[2].split("```")[0]
# Secret key, arguments; exit status, output, errors. The time is 1750793021519; the signatures are those of VECTORS.
PRINTED = [
    (GUIDE_KEY, ["--dry-run", "post", "/wapi/v1/capital/withdrawals", "address=rAddr?dt=1 x/+&%é", "blockchain=XRP", "quantity=10.00", "symbol=XRP"], 0, """\
POST URL/wapi/v1/capital/withdrawals
instruction=withdraw&address=rAddr?dt=1 x/+&%é&blockchain=XRP&quantity=10.00&symbol=XRP&timestamp=1750793021519&window=5000
User-Agent: bpx.py/VERSION
X-API-Key: 5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o=
X-Signature: Zv/poQOowbPYcDlpMG8QmseVCLHKBpvRk/jkT/B+i8+d/4G++akjRm3aUH4b1J/Bk2Jijwbifx2Vynqhu7c+DQ==
X-Timestamp: 1750793021519
X-Window: 5000
Content-Type: application/json; charset=utf-8
{"address":"rAddr?dt=1 x/+&%é","blockchain":"XRP","quantity":"10.00","symbol":"XRP"}
""", ""),
    (GUIDE_KEY, ["GET", "/p", "--instruction", "accountQuery", "--window", "60000", "--dry-run"], 0, """\
GET URL/p
instruction=accountQuery&timestamp=1750793021519&window=60000
User-Agent: bpx.py/VERSION
X-API-Key: 5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o=
X-Signature: g7E4vz90JXPe6V/SIQs3+wTl0hawzDWFcYkNE+TzIjHF31xuyme7Pd25Md+SP0mDR1sERzkPKpp63DKrBmZ8CA==
X-Timestamp: 1750793021519
X-Window: 60000
""", ""),
    (None, ["--dry-run", "GET", "/p", "a=b c"], 0, "GET URL/p?a=b%20c\nUser-Agent: bpx.py/VERSION\n", ""),
    *((key, ["GET", "/api/v1/ping"], 0, '"pong"\n', "") for key in (None, GUIDE_KEY, "broken")),
    (None, ["GET", "/api/v1/order"], 2, "", "bpx.py: ValueError: to sign this, set BPX_SECRET_KEY\n"),
    (BAD_KEYS[5][0], ["GET", "/api/v1/order"], 2, "", f"bpx.py: ValueError: {BAD_KEYS[5][1]}\n"),
    (None, ["--help"], 0, HELP, ""),
]
NOT_PRINTED = "bpx.py: cannot print: {}\n"
# What is replaced, by what, options; exit status, errors, file descriptors redirected to the null device.
REPLACED = [
    *(("sys.stdout", None, run, status, NOT_PRINTED.format("standard output is closed"), []) for run, status in (([], 4), (["--dry-run"], 2))),
    ("sys.stderr", None, ["--timeout", "0"], 2, "", []),
    ("sys.stderr", CLOSED, ["--timeout", "0"], 2, "", []),
    ("sys.stderr", mock.Mock(**{"write.side_effect": OSError}), ["--timeout", "0"], 2, "", [2]),
    ("sys.stdout", mock.Mock(**{"write.side_effect": BrokenPipeError}), [], 0, "", [1]),
    *(("sys.stdout", mock.Mock(**{"write.side_effect": error}), run, status, NOT_PRINTED.format(error.__name__), [1]) for error in (MemoryError, KeyboardInterrupt) for run, status in (([], 4), (["--dry-run"], 2))),
    *(("json.dumps", mock.Mock(side_effect=error), [], 4, NOT_PRINTED.format(error.__name__), []) for error in (MemoryError, KeyboardInterrupt)),
    ("json.dumps", mock.Mock(side_effect=SystemExit(7)), [], 7, "", []),
    ("time.time_ns", mock.Mock(side_effect=KeyboardInterrupt), ["--dry-run"], 2, "bpx.py: interrupted (nothing was sent)\n", []),
    ("bpx.request", mock.Mock(side_effect=MemoryError), [], 2, "bpx.py: MemoryError\n", []),
    ("bpx.request", mock.Mock(side_effect=KeyboardInterrupt), [], 4, "bpx.py: interrupted (the request may have been executed)\n", []),
    ("bpx.request", mock.Mock(side_effect=SystemExit(7)), [], 7, "", []),
    *(("json.loads", mock.Mock(side_effect=error), run, 2, f"bpx.py: {text}\n", []) for error, text in ((MemoryError, "MemoryError"), (KeyboardInterrupt, "interrupted (nothing was sent)")) for run in ([], ["--dry-run"])),
    *(("json.loads", mock.Mock(side_effect=SystemExit(7)), run, 7, "", []) for run in ([], ["--dry-run"])),
]
NO_SPACE = "bpx.py: cannot print: OSError: [Errno 28] No space left on device\n"
# Stream, what it is, options, bytes of the response; exit status, errors.
STREAMS = [
    *(("stdout", "closed pipe", options, size, 0, "") for options, size in (([], 1), ([], 10**6), (["--help"], 1), (["--version"], 1))),
    ("stdout", "full disk", [], 1, 4, NO_SPACE),
    *(("stdout", "full disk", options, 1, 2, NO_SPACE) for options in (["--dry-run"], ["--help"], ["--version"])),
    ("stderr", "full disk", ["--timeout", "0"], 1, 2, ""),
    ("stderr", "full disk", ["--base-url", "http://127.0.0.1:1"], 1, 3, ""),
]
# fmt: on


class CommandLine(ExchangeCase):
    def main(self, *argv, key=GUIDE_KEY, target="sys.stdin", new=None):
        """Run main while new replaces target: (status, output, errors)."""
        output, errors, status = io.StringIO(), io.StringIO(), 0
        with mock.patch.dict(os.environ, COLUMNS="80"):
            os.environ.pop("BPX_SECRET_KEY", None)
            if key is not None:
                os.environ["BPX_SECRET_KEY"] = key
            streams = mock.patch.multiple("sys", stdout=output, stderr=errors)
            with streams, mock.patch(target, new):
                try:
                    bpx.main(["--base-url", self.exchange.url, *argv])
                except SystemExit as error:
                    status = error.code
        self.assertNotIn(GUIDE_KEY, output.getvalue() + errors.getvalue())
        return status, output.getvalue(), errors.getvalue()

    def test_requests(self):
        self.exchange.answer = (200, {}, '{"id":"1","é":[]}'.encode())
        printed = '{\n  "id": "1",\n  "\\u00e9": []\n}\n'
        for argv, stdin, body, (instruction, window, timeout) in GIVEN:
            stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
            build = mock.patch("bpx.build_request", wraps=bpx.build_request)
            send = mock.patch("bpx.send", wraps=bpx.send)
            with self.subTest(argv), build as build, send as send:
                found = self.main("post", "/api/v1/orders", *argv, new=stdin)
                self.assertEqual(found, (0, printed, ""))
                seen = self.exchange.seen.pop()
                verify(seen, instruction)
                self.assertEqual(seen.body, body)
                self.assertEqual(seen.headers["X-Window"], window)
                self.assertEqual(send.call_args[1], {"timeout": timeout})
                self.assertEqual(build.call_count, 1)

    def test_printed(self):
        self.exchange.answer = (200, {}, b"pong")
        for key, argv, *expected in PRINTED:
            clock = itertools.count(1750793021519 * 10**6, 10**6)
            with self.subTest(argv, key=key):
                with mock.patch("time.time_ns", side_effect=clock):
                    status, output, errors = self.main(*argv, key=key)
                output = output.replace(self.exchange.url, "URL")
                output = output.replace(bpx.__version__, "VERSION")
                # Python 3.8 and 3.9 call the options optional arguments.
                output = output.replace("optional arguments:", "options:")
                self.assertEqual([status, output, errors], expected)
        # Only the three pings were sent, and without a key.
        seen = [each.headers["X-API-Key"] for each in self.exchange.seen]
        self.assertEqual(seen, [None, None, None])

    def test_failures(self):
        for argv, response, exit_status, pattern in FAILURES:
            with self.subTest(pattern, argv=repr(argv)[:60]):
                self.exchange.answer = response
                status, output, errors = self.main(*argv)
                self.assertEqual((status, output), (exit_status, ""))
                self.assertRegex(errors, rf"\Abpx\.py: {pattern}.*\n\Z")
                if response is None:
                    self.assertEqual(self.exchange.seen, [])

    def test_replaced(self):
        for target, new, options, status, errors, redirected in REPLACED:
            argv = ["POST", "/p", "a:=1", *options]
            dup2 = mock.Mock()
            with self.subTest(target, new=new, options=options):
                with mock.patch("os.dup2", dup2):
                    found = self.main(*argv, target=target, new=new)
                self.assertEqual(found, (status, "", errors))
                descriptors = [call[0][1] for call in dup2.call_args_list]
                self.assertEqual(descriptors, redirected)

    def test_streams(self):
        reading, writing = os.pipe()
        os.close(reading)
        argv = ["bpx.py", "GET", "/p", "--base-url", self.exchange.url]
        with open(writing, "wb") as pipe, open("/dev/full", "wb") as disk:
            files = {"closed pipe": pipe, "full disk": disk}
            for stream, file, options, size, status, errors in STREAMS:
                with self.subTest(stream, file=file, options=options):
                    self.exchange.answer = (200, {}, b"x" * size)
                    streams = {stream: files[file]}
                    found = python(*argv, *options, **streams)
                    self.assertEqual(found, (status, "", errors))

    def test_as_a_script(self):
        argv = ["bpx.py", "--base-url", self.exchange.url]
        found = python(*argv, "GET", "/api/v1/order", "é=b", key=GUIDE_KEY)
        self.assertEqual(found, (0, "{}\n", ""))
        found = python(*argv, "POST", "/p", "--json", "-", stdin='{"a":1}')
        self.assertEqual(found, (0, "{}\n", ""))
        self.assertEqual(self.exchange.seen[-1].body, {"a": 1})

    def test_as_main(self):
        with mock.patch("sys.argv", ["bpx.py", "--version"]):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                with self.assertRaises(SystemExit) as caught:
                    runpy.run_path(bpx.__file__, run_name="__main__")
        self.assertEqual(caught.exception.code, 0)
        self.assertEqual(output.getvalue(), f"bpx.py {bpx.__version__}\n")


# --- Restricted interpreters, and documents ---

# The URL of the exchange is the argument of this code.
PROBE = """
import os, sys, bpx
options = {"base_url": sys.argv[1]}
print(bpx.canonical_string("orderCancel", {"orderId": 28}, 5))
print(bpx.get("/api/v1/ping", **options))
options["secret_key"] = os.environ["BPX_SECRET_KEY"]
try:
    print(bpx.get("/api/v1/capital", **options))
except ImportError as error:
    print(error)
"""
WITHOUT_SSL = """
sys.modules['ssl'] = sys.modules['_ssl'] = None
import bpx
try:
    bpx.get("/api/v1/ping", base_url="https://127.0.0.1:1")
except bpx.NotSentError as error:
    print(error)
"""
# Nothing but finding and reading modules may be audited, and an environment
# that is not there cannot be read.
ONLY_IMPORTED = """
import argparse, decimal, http.client, json, os, selectors, urllib.request
os.environ = None
def hook(event, args):
    if event.startswith(("socket", "subprocess", "ssl", "os.")):
        if event != "os.listdir":
            raise SystemExit(event)
sys.addaudithook(hook)
import bpx
raise SystemExit("loaded: %s" % [n for n in sys.modules if "nacl" in n])
"""
READ_ONLY = os.path.join(FOLDER.name, "read-only")
ARCHIVE = os.path.join(READ_ONLY, "bpx.zip")
# fmt: off
PUBLIC = r"instruction=orderCancel&orderId=28&timestamp=5&window=5000\n\{\}\n"
SIGNED = PUBLIC + r"\{\}\n"
# Flags of Python, code before the probe; pattern of what is printed.
PROBES = [
    *((flags.split(), "", SIGNED) for flags in ("-O", "-OO", "-W error -X dev -bb")),
    (["-I", "-S", "-E"], "", PUBLIC + r"to sign requests, pip install PyNaCl\n"),  # nothing is installed
    *(([], f"sys.path.insert(0, {place!r})", SIGNED) for place in (READ_ONLY, ARCHIVE)),
    ([], "import _thread; _thread.start_new_thread = None", SIGNED),
    ([], "sys.modules['zlib'] = None", SIGNED),
    ([], WITHOUT_SSL, r"GET /api/v1/ping: ModuleNotFoundError: .*\n" + SIGNED),
    ([], ONLY_IMPORTED, r"loaded: \[\]\n"),
]
# fmt: on


class RestrictedPlaces(ExchangeCase):
    def test_probes(self):
        os.mkdir(READ_ONLY)
        shutil.copy(bpx.__file__, READ_ONLY)
        with zipfile.ZipFile(ARCHIVE, "w") as file:
            file.write(bpx.__file__, "bpx.py")
        os.chmod(READ_ONLY, 0o555)
        self.addCleanup(os.chmod, READ_ONLY, 0o755)
        for flags, before, printed in PROBES:
            code = f"import sys\nsys.path.insert(0, '')\n{before}\n{PROBE}"
            argv = [*flags, "-c", code, self.exchange.url]
            with self.subTest(flags, before=before):
                _, output, errors = python(*argv, key=GUIDE_KEY)
                self.assertRegex(output + errors, rf"\A{printed}\Z")

    def test_without_zlib(self):
        self.exchange.answer = (200, {"Content-Encoding": "gzip"}, ONE)
        with mock.patch.dict(sys.modules, zlib=None):
            names = runpy.run_path(bpx.__file__)
            with self.assertRaises(names["UnknownOutcomeError"]) as caught:
                names["get"]("/api/v1/ping", base_url=self.exchange.url)
        text = "HTTPException: Content-Encoding gzip is not supported"
        self.assertEqual(str(caught.exception), f"GET /api/v1/ping: {text}")
        headers = self.exchange.seen[0].headers
        self.assertEqual(headers["Accept-Encoding"], "identity")


# fmt: off
BUILT = bpx.build_request("GET", "/p")
NO_ANSWER, UNTRIED = [kind(BUILT, "lost") for kind in (bpx.UnknownOutcomeError, bpx.NotSentError)]
STATUS = {status: bpx.APIError(BUILT, status, None, {}) for status in (400, 404, 500, 503)}
FOUND = [{"clientId": 41}, {"clientId": 42, "status": "Filled"}]
FILLED = "clientId: 42\n{'clientId': 42, 'status': 'Filled'}\n"
# Outcome of the order, those of the queries; what the recipe of the README prints or raises.
FATES = [
    (NO_ANSWER, [{"id": "5"}], "clientId: 42\n{'id': '5'}\n"),
    (NO_ANSWER, [STATUS[404], FOUND], FILLED),
    (NO_ANSWER, [None, FOUND], FILLED),
    (NO_ANSWER, [STATUS[404], "<html>"], ValueError("this is not a list of orders: '<html>'")),
    ("<html>", [STATUS[404], FOUND], FILLED),
    (STATUS[503], [STATUS[404], FOUND[:1]], "clientId: 42\nNone\n"),
    (STATUS[503], [STATUS[500]], STATUS[500]),
    (STATUS[400], [], STATUS[400]),
    (UNTRIED, [], UNTRIED),
]
# fmt: on


class Documents(ExchangeCase):
    @mock.patch.dict(os.environ, BPX_SECRET_KEY=GUIDE_KEY)
    def run_block(self, block):
        """What a Python block of the README prints, run against the fake."""
        output, url = io.StringIO(), {"base_url": self.exchange.url}
        request = mock.patch.dict(bpx.request.__kwdefaults__, url)
        build = mock.patch.dict(bpx.build_request.__kwdefaults__, url)
        with request, build, contextlib.redirect_stdout(output):
            with mock.patch("time.sleep") as self.sleep:
                exec(compile(block, "README.md", "exec"), {})
        return output.getvalue()

    def test_module(self):
        self.assertEqual(doctest.testmod(bpx), (0, 8))
        text = (HERE / "bpx.py").read_text(encoding="utf-8")
        self.assertTrue(text.startswith(f"# bpx.py {bpx.__version__} - "))

    def test_readme(self):
        found = doctest.testfile("README.md", encoding="utf-8")
        self.assertEqual(found, (0, 7))
        self.exchange.answer = (200, {}, b"1750793021519")
        blocks = re.findall("```python\n(import.*?)```", README, re.S)
        self.assertEqual(len(blocks), 12)
        for block in blocks:
            with self.subTest(block[:60]):
                if re.search("import (asyncio|random)", block):
                    compile(block, "README.md", "exec")
                elif "from nacl" in block:
                    expected = f"X-API-Key: {API_KEYS[GUIDE_KEY]}\n"
                    expected += f"X-Signature: {VECTORS[3][-1]}\n"
                    self.assertEqual(self.run_block(block), expected)
                else:
                    self.assertIn("1750793021519", self.run_block(block))

    def test_the_fate_of_an_order(self):
        pattern = "```python\n([^`]*find_order.*?)```"
        (block,) = re.findall(pattern, README, re.S)
        for outcome, answers, expected in FATES:
            post = mock.Mock(side_effect=[outcome])
            get = mock.Mock(side_effect=answers)
            with self.subTest(outcome=outcome, answers=answers):
                with mock.patch.multiple("bpx", post=post, get=get):
                    with mock.patch("random.randrange", return_value=42):
                        try:
                            found = self.run_block(block)
                        except (bpx.BPXError, ValueError) as error:
                            found = error
                self.assertEqual(str(found), str(expected))
                self.assertEqual(type(found), type(expected))
                self.assertEqual(get.call_count, len(answers))
                slept = [mock.call(10)] if answers else []
                self.assertEqual(self.sleep.mock_calls, slept)

    def test_examples_of_the_readme(self):
        text = README.split("```text\n")[3].split("```")[0]
        examples = [each.splitlines() for each in text.strip().split("\n\n")]
        self.assertEqual(len(examples), 5)
        vectors = [row[1:] for row in VECTORS]
        for _, instruction, params, *signed in examples:
            row = (GUIDE_KEY, instruction, 1750793021519, 5000)
            self.assertIn((*row, json.loads(params), *signed), vectors)

    def test_the_two_commands(self):
        lines = re.findall("(?m)^python3 -m venv.*", README)
        self.assertEqual(len(lines), 2)
        argv = shlex.split(lines[0].split(".venv/bin/python ")[1])
        status, output, errors = python(*argv, key=GUIDE_KEY)
        self.assertEqual((status, errors), (0, ""))
        shown = re.escape(README.split("```text\n")[1].split("```")[0])
        self.assertRegex(output, rf"\A{shown.replace('…', '[^ ]+')}\Z")


if __name__ == "__main__":
    unittest.main()
