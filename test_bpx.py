"""What bpx.py does: literal tables first, then a class for each of its parts.

Run it with "python -m unittest", in an environment that has PyNaCl.
"""

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
    ("", [""], ""),
    ("170.50", ["170.50"], "170.50"),
    ("a b/c?d=e&f+g%20~é€😀", ["a b/c?d=e&f+g%20~é€😀"], "a b/c?d=e&f+g%20~é€😀"),
    ('"\\\n\x00', ['"\\\n\x00'], '"\\\n\x00'),
    (LyingStr("Bid"), ["Bid"], "Bid"),
    (LyingStr("é"), ["é"], "é"),
    (True, ["true"], True),
    (False, ["false"], False),
    (0, ["0"], 0),
    (-(10**30), ["-1" + "0" * 30], -(10**30)),
    (LyingInt(7), ["7"], 7),
    (D("170.50"), ["170.50"], "170.50"),
    (D("1E-8"), ["0.00000001"], "0.00000001"),
    (D("1E+3"), ["1000"], "1000"),
    (D("-0.0"), ["-0.0"], "-0.0"),
    (D("1E+999"), ["1" + "0" * 999], "1" + "0" * 999),
    (D("1E-999"), ["0." + "0" * 998 + "1"], "0." + "0" * 998 + "1"),
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
    ({"method": "get", "path": "/p", "params": {"symbol": "a b/+&%é", "type": ["SPOT", "PERP"], "to": 1}},
     "/p?symbol=a%20b%2F%2B%26%25%C3%A9&to=1&type=SPOT&type=PERP", None),
    ({"method": "post", "path": "/p", "params": {"symbol": "é", "price": D("1E1"), "a": None}},
     "/p", '{"price":"10","symbol":"é"}'.encode()),
    *(({"method": "GET", "path": "/p", "params": empty}, "/p", None) for empty in (None, {}, {"a": None}, {"a": []})),
    *(({"method": "PATCH", "path": "/p", "params": empty}, "/p", b"{}") for empty in (None, {}, {"a": None})),
    *(({"method": "GET", "path": path}, path, None) for path in ("/", "/a/b_c.d~e-f%20G0", "/a//b")),
    *(({"method": "GET", "path": "/p", "base_url": url}, "/p", None) for url in """
https://a.example https://a.example/ https://a.example/X https://a-1.b:8443/x/y_z.~ https://[2001:db8::1]:8443
https://[::1.2.3.4] https://a.example:1 https://a.example:65535/ http://localhost:1 http://127.0.0.1:1/ http://[::1]:1
""".split()),
    ({"method": LyingStr("get"), "path": LyingStr("/api/v1/capital"), "base_url": LyingStr("https://a.example/"),
      "secret_key": LyingStr(GUIDE_KEY)}, "/api/v1/capital", None),
]
# fmt: on

# --- Bad arguments: what is passed, and the whole message ---

LOOP = {}
LOOP["again"] = LOOP


class Repeating(dict):
    """A mapping that repeats a name, as some do that are no dict."""

    def items(self):
        return [("a", 1), ("é", 2), ("é", 3)]


# fmt: off
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
    *(({"p": D(text)}, "params.p" + RANGE + text) for text in "1E+999999999 0E-999999999 1E+1000 1E-1000".split()),
    ({"p": LyingDecimal("1E+1000")}, "params.p" + RANGE + "1E+1000"),
    ({"p": D("9" * 1001)}, "params.p" + RANGE + "(a long text)"),
    (Repeating(), "params: pass each name only once"),
    ({"p": Repeating()}, "params.p: pass each name only once"),
    ({"p": "\ud800"}, "params.p" + UTF_8),
    ({"p": ["a", LyingStr("\ud800")]}, "params.p[1]" + UTF_8),
    ({"\udfff": "x"}, "params, name '\\udfff'" + UTF_8),
    ({"k" * 42 + "\ud800": 0.1}, "params, name '(a long text)'" + UTF_8),
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
    *(({"instruction": value}, INSTRUCTION) for value in ("a&b=c", "a\n", " ", "", "é", "²", GUIDE_KEY)),
    *(({"instruction": value}, f"instruction: pass a str, not {type(value).__name__}") for value in (b"orderExecute", 5)),
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
LONG = "'(a long text)'"
METHOD = "method: pass a word, such as 'GET', not "
URL_AS_PATH = "path: pass only the path of the URL, such as '/api/v1/order'; pass the scheme and host as base_url"
QUERY_IN_PATH = "path: pass the query as params, not within "
SLASH = "path: begin with a slash, as in '/api/v1/order', not "
PATH = "path: use only letters, digits and - . _ ~ % /, not "
BASE_URL = "base_url: pass https://HOST, with a port and a path if needed"
HTTPS = "base_url: pass https; http is allowed only for localhost, 127.0.0.1 and [::1]"
PORT = "base_url: pass a port from 1 to 65535, not "
HEADER_NAMES = "headers: pass names of letters, digits and -"
RESERVED = "header {}: leave it out, because it is reserved"
HEADER_TEXT = "header X-A: pass printable ASCII text"
IN_QUERY = ": pass a single value, not a mapping, because GET sends it in a query"
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
    ({"headers": {"X-A": "1", "x-a": "1"}}, "header x-a: pass it only once"),
    ({"headers": {"A" * 42: 1}}, f"header {'A' * 42}: pass a str, not int"),
    ({"headers": {"A" * 43: 1}}, "header (a long text): pass a str, not int"),
    *(({"headers": {name: "5"}}, RESERVED.format(name)) for name in """
Accept-Encoding Content-Encoding content-length CONTENT-TYPE Host
Transfer-Encoding X-API-KEY X-Signature X-Timestamp x-window
""".split()),
    ({"secret_key": None}, NO_KEY.format("POST /api/v1/order")),
    ({"path": "/p", "secret_key": None, "instruction": "a"}, NO_KEY.format("POST /p")),
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

    def __enter__(self):
        serve = threading.Thread(target=self.serve_forever, args=(0.01,))
        serve.daemon = True  # An interrupt of the tests must end them.
        serve.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class FakeExchangeHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 5
    disable_nagle_algorithm = True

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


# For localhost only, its own authority, until 2120. The key is for tests.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg5lqaAY+ycNKSSrZr
8TDSVnRTK07eT+9XddHRaKzvHsyhRANCAAS8kh+uZSAmIzM40gBlNpTQtLohFJ9s
6AImScaMjti5AT04hYMbFnZ/MXWirhBG2dvfkFC7gVSplpOif3ZDDdwx
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkjCCATigAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLySH65lICYjMzjS
AGU2lNC0uiEUn2zoAiZJxoyO2LkBPTiFgxsWdn8xdaKuEEbZ29+QULuBVKmWk6J/
dkMN3DGjeTB3MA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1Ud
DgQWBBTDsQO3HiD+Uu8c1uzp/t8iDTJyrDAfBgNVHSMEGDAWgBTDsQO3HiD+Uu8c
1uzp/t8iDTJyrDAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwIDSAAw
RQIgXClWVA5U9PMfyc+jyfIEpkC2nUSYeoTMglg3ag0UU+4CIQDH1RVScza8Vuh6
urLkWqEH5wlIPtjUKdzoOlJSso9Fng==
-----END CERTIFICATE-----
"""
FOLDER = tempfile.TemporaryDirectory()
PEM_FILE = os.path.join(FOLDER.name, "localhost.pem")
SERVER_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def setUpModule():
    pathlib.Path(PEM_FILE).write_text(PEM)
    SERVER_CONTEXT.load_cert_chain(PEM_FILE)


def tearDownModule():
    FOLDER.cleanup()


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
            self.assert_no_secret(caught.exception, options.get("secret_key"))

    def assert_no_secret(self, error, *secrets):
        shown = all_texts(error)
        for secret in (GUIDE_KEY, "PASSWORD", *secrets):
            if isinstance(secret, str) and secret:
                self.assertNotIn(secret, shown)
                self.assertNotIn(secret[2:30] or secret, shown)


class ExchangeCase(SecretsCase):
    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.exchange = stack.enter_context(FakeExchange())

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
        for params, pairs in STRINGS:
            with self.subTest(repr(params)):
                before = repr(params)
                found = bpx.canonical_string("a", params, 5)
                expected = f"instruction=a{pairs}&timestamp=5&window=5000"
                self.assertEqual(found, expected)
                self.assertIs(type(found), str)
                self.assertEqual(repr(params), before)

    def test_instructions_and_times(self):
        for instruction, shown in (LyingStr("a"), "a"), (Market.SPOT, "SPOT"):
            for times in (0, 1), (2**63, 60000):
                found = bpx.canonical_string(instruction, None, *times)
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
            self.assert_refused(self.sign, {"key": key}, message)
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
                found = {n: "".join([v]) for n, v in built.header_items()}
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
    (b'{"code": "INVALID_SIGNATURE", "message": "Invalid\\n signature"}',
     ("INVALID_SIGNATURE", "Invalid\n signature"), "400 INVALID_SIGNATURE Invalid signature"),
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
OPTIONS = "secret_key=None instruction=None timestamp=None window=5000 base_url=https://api.backpack.exchange headers=None"
SIGNATURES = {
    "canonical_string": "instruction params timestamp window=5000",
    "sign_request": "instruction params secret_key * timestamp=None window=5000",
    "build_request": f"method path params=None * {OPTIONS}",
    "send": "request * timeout=10.0",
    "request": f"method path params=None * {OPTIONS} timeout=10.0",
    **dict.fromkeys(["get", "post", "delete", "patch"], "path params=None **options"),
    "main": "argv=None",
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
            shown, star = [], False
            parameters = inspect.signature(getattr(bpx, name)).parameters
            for each in parameters.values():
                if each.kind is each.KEYWORD_ONLY and not star:
                    star = True
                    shown.append("*")
                text = "**" * (each.kind is each.VAR_KEYWORD) + each.name
                if each.default is not each.empty:
                    text += f"={each.default}"
                shown.append(text)
            self.assertEqual(" ".join(shown), expected, name)
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
            for timeout in (86400, Seconds(5)):
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
            self.exchange.answer = (status, {"X-Limit": "9"}, b"[1]")
            response = bpx.send(built)
            self.assertIsInstance(response, bpx.Response)
            self.assertEqual(response, (status, response.headers, b"[1]"))
            self.assertEqual(response.headers["x-limit"], "9")
            self.assertIs(type(response.body), bytes)

    def test_memory_errors(self):
        with mock.patch("bpx.json.loads", side_effect=MemoryError):
            error = self.fails(bpx.UnknownOutcomeError)
        self.assertIsInstance(error.__cause__, MemoryError)
        self.assertEqual(str(error), "GET /api/v1/ping: MemoryError")
        with mock.patch("bpx.json.loads", side_effect=KeyError):
            self.fails(bpx.UnknownOutcomeError)
        with mock.patch("bpx.json.loads", side_effect=KeyboardInterrupt):
            self.fails(KeyboardInterrupt)


class Seconds(float):
    """A number that is neither a plain int nor a plain float."""


# --- 4: the transport ---

HEAD = b"HTTP/1.1 200 OK\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\n"
LENGTH = HEAD + b"Content-Length: %d\r\n\r\n"
REST = b"Content-Length: 2\r\n\r\n{}"
TWO = HEAD + REST
CLOSE = b"Connection: close\r\n"
BLOCK = HEAD[:-2].ljust(8190 - len(REST)) + b"\r\n" + REST  # 8192 bytes
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + CHUNKS
LAST = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n"
PACKED = b"Content-Encoding: gzip\r\n"
DRIP = [b"1", 0.05]


def sized(head, body):
    """A response of these first lines, and of this body with its length."""
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def packed(body, head=HEAD + PACKED):
    return sized(head, gzip.compress(body))


ONE = gzip.compress(b"1")
# fmt: off
# Reason, base URL, SSL_CERT_FILE if it is not that of the server.
NOT_SENT = [
    ("refused", "http://127.0.0.1:1"),
    ("unknown host", "https://no.such.host.invalid"),
    ("label over 63", f"https://{'a' * 70}.example"),
    ("untrusted certificate", "https://localhost:{tls}", os.devnull),
    ("another host's certificate", "https://127.0.0.1:{tls}"),
    ("silence to TLS", "https://localhost:{plain}"),
]
# Reason, https_proxy ({} is the URL of the server), what the proxy does.
NO_TUNNEL = [
    ("refused", "http://127.0.0.1:1", []),
    ("407", "{}", [b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"]),
    ("302", "{}", [b"HTTP/1.1 302 No\r\nLocation: /\r\n\r\n"]),
    ("not HTTP", "{}", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"]),
    ("closed", "{}", [close]),
    ("reset", "{}", [reset]),
    ("silence", "{}", []),
    ("dripped header", "{}", repeat_forever(HEAD, *DRIP)),
    ("silence to TLS", "{}", [HEAD + b"\r\n"]),
    ("dripped TLS", "{}", repeat_forever(HEAD + b"\r\n\x16\3\3\x40\0\2", *DRIP)),
]
# https_proxy; the address that is connected to.
PROXIES = [
    ("http://127.0.0.1", ("127.0.0.1", 80)),
    ("HTTP://127.0.0.1:5/", ("127.0.0.1", 5)),
    ("127.0.0.1:65535", ("127.0.0.1", 65535)),
    ("http://[::ffff:127.0.0.1]:5", ("::ffff:127.0.0.1", 5)),
    ("http://a:b@c@proxy-1_b.example:5", ("proxy-1_b.example", 5)),
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
# Reason, script. All are over at once, and no 2xx came back whole.
BROKEN = [
    ("closed", [close]),
    ("reset", [reset]),
    ("half a status line", [b"HTTP/1.1 20", close]),
    ("half a header", [HEAD + b"Content-Le", close]),
    ("no blank line, length 0", [(LENGTH % 0)[:-2], close]),
    ("no blank line, 204", [NO_CONTENT, close]),
    ("no blank line, 400", [sized(BAD, b"")[:-2], close]),
    ("no body", [LENGTH % 2, close]),
    ("half a body", [LENGTH % 4 + b"{}", close]),
    ("half a body, reset", [LENGTH % 4 + b"{}", reset]),
    ("half a body, half closed", [LENGTH % 4 + b"{}", shut]),
    ("half a chunk", [CHUNKED + b"4\r\n{}", close]),
    ("no last chunk", [CHUNKED + b"2\r\n{}\r\n", close]),
    ("0 of a size 0a", [CHUNKED + b"2\r\n{}\r\n0", close]),
    ("no blank line, chunks", [CHUNKED + b"2\r\n{}\r\n0\r\n", close]),
    ("not HTTP", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"]),
    ("HTTP/2.0", [TWO.replace(b"1.1", b"2.0")]),
    ("status not a number", [TWO.replace(b"200", b"two")]),
    ("status 99", [TWO.replace(b"200", b"99")]),
    ("status 101", [b"HTTP/1.1 101 Switching\r\n\r\n"]),
    ("status 103", [b"HTTP/1.1 103 Early Hints\r\n\r\n" + TWO]),
    ("status 199", [TWO.replace(b"200", b"199")]),
    ("no length", [HEAD + b"\r\n{}", close]),
    ("no length, 299", [HEAD.replace(b"200", b"299") + b"\r\n{}", close]),
    ("no length, HTTP/1.0", [b"HTTP/1.0 200 OK\r\n\r\n{}", close]),
    ("length below 0", [LENGTH % -2 + b"{}", close]),
    ("length not a number", [TWO.replace(b": 2", b": two"), close]),
    ("length 10**30", [LENGTH % 10**30 + b"{}", close]),
    ("length of 5000 digits", [TWO.replace(b": 2", b": 2" * 5000), close]),
    ("lengths 2 and 2", [(LENGTH % 2)[:-2] + REST]),
    ("lengths 4 and 2", [(LENGTH % 4)[:-2] + REST + b"  ", close]),
    ("length and chunks", [HEAD + REST[:-4] + CHUNKS + b"2\r\n{}\r\n" + LAST]),
    ("gzip, not chunked", [CHUNKED.replace(b"chunked", b"gzip") + ONE, close]),
    ("chunk of 2**70", [CHUNKED + b"%x\r\n{}" % 2**70, close]),
    ("chunk below 0", [CHUNKED + b"-2\r\n{}\r\n" + LAST, close]),
    ("chunk not a number", [CHUNKED + b"two\r\n{}\r\n" + LAST]),
    ("200 headers", [HEAD + b"A: b\r\n" * 200 + REST]),
    ("header of 70000 bytes", [HEAD + b"A: %070000d\r\n" % 0 + REST]),
    ("half of gzip", [sized(HEAD + PACKED, ONE[:-9])]),
    ("gzip without its end", [sized(HEAD + PACKED, ONE[:-1])]),
    ("gzip with a wrong sum", [sized(HEAD + PACKED, ONE[:-8] + bytes(8))]),
    ("more than gzip", [sized(HEAD + PACKED, ONE + b"1")]),
    ("no gzip", [sized(HEAD + PACKED, b"{}")]),
    ("br", [sized(HEAD + b"Content-Encoding: br\r\n", b"{}")]),
    ("two gzip members", [sized(HEAD + PACKED, ONE + ONE)]),
    ("malformed header", [HEAD + b"bad line\r\n" + REST]),
    ("gzip twice", [sized(HEAD + PACKED * 2, gzip.compress(ONE))]),
]
# Scripts of requests that are interrupted.
INTERRUPTED = [
    [interrupt],
    [interrupt, 0.05, TWO],
    [HEAD, interrupt],
    [LENGTH % 4 + b"{}", 0.05, interrupt],
    [sized(BAD, b"1234")[:-2], 0.05, interrupt],
]
# Reason, script. All last longer than the timeout.
LATE = [
    ("silence", []),
    ("a late response", [0.3, TWO]),
    ("dripped status line", repeat_forever(b"HTTP", *DRIP)),
    ("dripped header", repeat_forever(HEAD, *DRIP)),
    ("dripped body", repeat_forever(LENGTH % 99, *DRIP)),
    ("dripped chunk size", repeat_forever(CHUNKED, *DRIP)),
    ("dripped chunk", repeat_forever(CHUNKED + b"99\r\n", *DRIP)),
    ("endless trailers", repeat_forever(CHUNKED + b"0\r\n", b"A: b\r\n" * 99)),
    ("endless 100 Continue", repeat_forever(CONTINUE, CONTINUE * 99)),
]
# What the error says, script.
REASONS = [
    ("(TimeoutError|timeout): timed out", []),
    ("EOFError: the server closed before the end of the response", [HEAD, close]),
    ("HTTPException: without a Content-Length, the body could be incomplete", [HEAD + b"\r\n{}"]),
    ("HTTPException: more than one Content-Length or Transfer-Encoding", [(LENGTH % 4)[:-2] + REST]),
    ("HTTPException: the body is larger than MAX_BODY", [LENGTH % 100001 + bytes(100001)]),
    ("HTTPException: the body is larger than MAX_BODY", [packed(bytes(100001))]),
    ("HTTPException: Content-Encoding br is not supported", [sized(HEAD + b"Content-Encoding: BR\r\n", b"{}")]),
    ("HTTPException: Content-Encoding gzip, gzip is not supported", [sized(HEAD + PACKED * 2, b"")]),
    ("HTTPException: unexpected status 101", [b"HTTP/1.1 101 Switching\r\n\r\n"]),
]
# Reason, script, whether it comes back. MAX_BODY is 100000 bytes, which is
# more than one read takes.
SIZES = [
    ("length 100000", [LENGTH % 100000 + b"1" * 100000], True),
    ("length 100001", [LENGTH % 100001 + b"1" * 100001], False),
    ("100000 in chunks", [CHUNKED, *[b"c350\r\n" + b"1" * 50000 + b"\r\n"] * 2, LAST], True),
    ("100001 in chunks", [CHUNKED, *[b"c350\r\n" + b"1" * 50000 + b"\r\n"] * 2] + [b"1\r\n1\r\n" + LAST], False),
    ("gzip of 100000", [packed(b"1" * 100000)], True),
    ("gzip of 100001", [packed(b"1" * 100001)], False),
    ("gzip in 100001 bytes", [LENGTH % 1 + b"1"], True),
    ("gzip of 10**8", [packed(bytes(10**8))], False),
    ("endless, length", repeat_forever(LENGTH % 2**70, b"1" * 65536), False),
    ("endless, chunks", repeat_forever(CHUNKED, b"9\r\n123456789\r\n" * 999), False),
    ("endless chunk", repeat_forever(CHUNKED + b"%x\r\n" % 2**70, b"1" * 65536), False),
    ("endless chunk of size -1", repeat_forever(CHUNKED + b"-1\r\n", b"1" * 65536), False),
]
# Reason, script, what is returned, the connection of the next request.
WHOLE = [
    ("length", [TWO], {}, 1),
    ("in pieces", [TWO[:20], 0.01, TWO[20:-1], 0.01, TWO[-1:]], {}, 1),
    ("odd case", [b"HTTP/1.1 200 \r\ncOnTeNt-lEnGtH:2\r\n\r\n{}"], {}, 1),
    ("no encoding", [sized(HEAD + b"Content-Encoding: \r\n", b"{}")], {}, 1),
    ("202, empty", [(LENGTH % 0).replace(b"200", b"202")], None, 1),
    ("204", [NO_CONTENT + b"\r\n"], None, 1),
    ("chunks", [CHUNKED + b"1\r\n{\r\n01\r\n}\r\n" + LAST], {}, 1),
    ("extension", [CHUNKED + b"2;a=b\r\n{}\r\n" + LAST], {}, 1),
    ("trailer", [CHUNKED + b"2\r\n{}\r\n0\r\nA: b\r\n\r\n"], {}, 1),
    ("100 Continue", [CONTINUE, 0.01, TWO], {}, 1),
    ("HTTP/1.0", [TWO.replace(b"1.1", b"1.0")], {}, 2),
    ("Connection: close", [HEAD + CLOSE + REST], {}, 2),
    ("close, late body", [HEAD + CLOSE + REST[:-2], 0.05, b"{}"], {}, 2),
    ("close, later body", [HEAD + CLOSE + REST[:-1], 0.05, b"}", close], {}, 2),
    ("with surplus", [TWO + b" "], {}, 1),
    ("with a response", [TWO + TWO], {}, 1),
    ("with much surplus", [TWO + b" " * 10000], {}, 2),
    ("surplus in its TLS record", [BLOCK + b" "], {}, 2),
    ("chunks with surplus", [CHUNKED + LAST + b" "], None, 1),
    ("204 with surplus", [NO_CONTENT + b"\r\n{}"], None, 1),
    ("gzip", [packed(b'{"a": 1}')], {"a": 1}, 1),
    ("gzip in pieces", [packed(b'{"a": 1}')[:-9], 0.01, packed(b'{"a": 1}')[-9:]], {"a": 1}, 1),
    ("gzip in chunks", [HEAD + PACKED + CHUNKS + b"%x\r\n" % len(ONE) + ONE + b"\r\n" + LAST], 1, 1),
    ("GZIP", [packed(b"[]", HEAD + PACKED.replace(b"gzip", b"GZIP "))], [], 1),
    ("gzip of nothing", [packed(b"")], None, 1),
    ("nothing of gzip", [sized(HEAD + PACKED, b"")], None, 1),
    ("204 of gzip", [NO_CONTENT + PACKED + b"\r\n"], None, 1),
    ("identity", [sized(HEAD + b"Content-Encoding: Identity\r\n", b"{}")], {}, 1),
]
# Reason, script, body of the APIError, the connection of the next request.
ERROR_RESPONSES = [
    ("length", [sized(BAD, b"[1]")], [1], 1),
    ("no length", [BAD + b"\r\nno such symbol", close], "no such symbol", 2),
    ("no length, late", [BAD + b"\r\nno", 0.05, b" symbol", close], "no symbol", 2),
    ("no length, no body", [BAD + b"\r\n", close], None, 2),
    ("gzip", [packed(b"[1]", BAD + PACKED)], [1], 1),
    ("gzip, no length", [BAD + PACKED + b"\r\n" + ONE, close], 1, 2),
    ("cut off", [sized(BAD, b"[1]")[:-1], close], None, 2),
    ("cut off, chunks", [BAD + CHUNKS + b"9\r\n[1]", close], None, 2),
    ("cut off, gzip", [sized(BAD + PACKED, ONE[:-1])], None, 2),
    ("br", [sized(BAD + b"Content-Encoding: br\r\n", b"{}")], None, 2),
    ("two lengths", [sized(BAD, b"")[:-2] + REST], None, 2),
    ("too large", [sized(BAD, bytes(100001))], None, 2),
    ("too late", [sized(BAD, b"[1]")[:-1], 2], None, 2),
    ("no length, too late", [BAD + b"\r\nno", 2], None, 2),
    ("300, cut off", [b"HTTP/1.1 300 No\r\nContent-Length: 9\r\n\r\nwhich", close], None, 2),
    ("304", [b"HTTP/1.1 304 Not Modified\r\n\r\n"], None, 1),
    ("408", [sized(b"HTTP/1.1 408 Timeout\r\n", b"[1]")], [1], 2),
    ("407", [sized(b"HTTP/1.1 407 No\r\n", b"[1]")], [1], 1),
    ("503, no length", [b"HTTP/1.1 503 No\r\n\r\nwait", close], "wait", 2),
    ("300, no length", [b"HTTP/1.1 300 No\r\n\r\nwhich", close], "which", 2),
]
# Reason, what the server does once its response was received.
SPOILT = [
    ("closed", [close]),
    ("reset", [reset]),
    ("half closed", [shut]),
    ("surplus", [b" "]),
    ("a response too many", [TWO]),
]
# fmt: on
CHILD = """
import bpx, os, sys, threading, time
def ask(*urls):
    for url in urls or sys.argv[1:]:
        n = time.perf_counter_ns()
        try:
            answer = bpx.get("/api/v1/ping", {"n": n}, base_url=url, timeout=5)
            print(answer[0] if answer[1].endswith(str(n)) else answer)
        except bpx.BPXError as error:
            print(type(error).__name__)
    sys.stdout.flush()
"""
LOST = "'http://127.0.0.1:1', 'https://127.0.0.1:1'"
THREAD = "t = threading.Thread(target=ask); t.start(); t.join()"
FORK = "child = os.fork(); child and os.waitpid(child, 0)"
# Reason, first script, what the child does, connections or errors.
CHILDREN = [
    ("end", [], "ask(); ask()", ["1"] * 4),
    ("end of a thread", [], f"{THREAD}; ask()", ["1", "1", "2", "2"]),
    ("fork", [], f"ask(); {FORK}; ask()", ["1", "1", "2", "2", "1", "1"]),
    (
        "end of Python",
        [],
        "import atexit; atexit.register(ask); ask()",
        ["1"] * 4,
    ),
    ("not sent", [], f"ask({LOST}); ask()", ["NotSentError"] * 2 + ["1"] * 2),
    ("closed", [[close]], "ask()", ["UnknownOutcomeError"] * 2),
]
NUMBERS = itertools.count(1)  # so that no two requests are alike


class Transport(SecretsCase):
    def setUp(self):
        none = {"https_proxy": "", "http_proxy": "", "no_proxy": ""}
        none["PYTHONMALLOC"] = "default"  # else -X dev breaks 3.8's own fork
        environ = mock.patch.dict(os.environ, none)
        environ.start()
        self.addCleanup(environ.stop)
        self.trust(PEM_FILE)
        handler = self.raise_on_interrupt()
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        catch = warnings.catch_warnings(record=True)
        self.warnings = catch.__enter__()
        self.addCleanup(catch.__exit__)
        warnings.simplefilter("always")

    def tearDown(self):
        gc.collect()
        self.assertEqual([str(each.message) for each in self.warnings], [])

    def raise_on_interrupt(self, error=KeyboardInterrupt):
        """Raise an error on an interrupt; return the handler before that."""

        def handler(number, frame):
            raise error

        return signal.signal(signal.SIGINT, handler)

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
        options = {"secret_key": GUIDE_KEY, "base_url": url}
        params = {"clientId": 7}
        return bpx.post("/api/v1/order", params, timeout=timeout, **options)

    def fails(self, error, url, timeout=5, within=1):
        """The error of an order, which is raised within that many seconds."""
        began = time.monotonic()
        with self.assertRaises(error) as caught:
            self.order(url, timeout)
        self.assertLess(time.monotonic() - began, within)
        self.assertEqual(caught.exception.request.selector, "/api/v1/order")
        try:
            return caught.exception
        finally:
            del caught  # Else the error would refer to itself by its frames.

    def test_not_sent(self):
        for reason, url, *file in NOT_SENT:
            with self.subTest(reason), ScriptedServer() as plain:
                with TLSScriptedServer() as tls:
                    self.trust(*file or [PEM_FILE])
                    url = url.format(plain=plain.port, tls=tls.port)
                    self.fails(bpx.NotSentError, url, 0.1)
                    self.assertEqual(plain.seen + tls.seen, [])
                    self.trust(PEM_FILE)
                    self.ask(tls.url)

    def test_not_sent_by_proxy(self):
        for reason, url, script in NO_TUNNEL:
            with self.subTest(reason), ScriptedServer(script) as proxy:
                with TLSScriptedServer() as tls:
                    os.environ["https_proxy"] = url.format(proxy.url)
                    self.fails(bpx.NotSentError, tls.url, 0.1)
                    self.assertEqual(len(proxy.seen), url == "{}")
                    self.assertEqual(tls.seen, [])
                    os.environ["https_proxy"] = ""
                    self.assertEqual(self.ask(tls.url), 1)

    def test_bad_proxies(self):
        text = (
            "GET /p: ValueError: https_proxy: set it to http://HOST:PORT or "
            "to http://USER:PASS@HOST:PORT; other proxies are not supported"
        )
        with ScriptedServer() as server:
            for proxy in BAD_PROXIES:
                with self.subTest(proxy):
                    address = f"localhost:{server.port}"
                    os.environ["https_proxy"] = proxy.format(address)
                    with self.assertRaises(bpx.NotSentError) as caught:
                        bpx.get("/p", base_url=f"https://{address}")
                    shown = str(caught.exception)
                    self.assertEqual(shown.replace("WORD", ""), text)
                    shown = all_texts(caught.exception)
                    self.assertNotRegex(shown, "PASSWORD@localhost|me:")
            self.assertEqual(server.seen, [])
            self.assertEqual(len(server.threads), 1)  # It accepts, no more.

    def test_addresses_of_proxies(self):
        for proxy, address in PROXIES:
            with self.subTest(proxy), mock.patch(
                "socket.create_connection", side_effect=OSError
            ) as connect:
                os.environ["https_proxy"] = proxy
                with self.assertRaises(bpx.NotSentError):
                    bpx.get("/p", timeout=3)
                self.assertEqual(connect.call_args[0][:2], (address, 3))
                os.environ["https_proxy"] = ""
                for scheme in ("http", "https"):
                    self.fails(bpx.NotSentError, f"{scheme}://localhost:5", 4)
                    expected = (("localhost", 5), 4)
                    self.assertEqual(connect.call_args[0][:2], expected)

    def test_broken_responses(self):
        for kind, (reason, script) in itertools.product(BOTH, BROKEN):
            with self.subTest(reason, kind=kind), kind(script) as server:
                self.fails(bpx.UnknownOutcomeError, server.url)
                self.assertEqual(len(server.seen), 1)
                self.assertEqual(self.ask(server.url), 2)

    def test_late_responses(self):
        for reason, script in LATE:
            with self.subTest(reason), ScriptedServer([TWO], script) as server:
                self.assertEqual(self.order(server.url), {})
                self.fails(bpx.UnknownOutcomeError, server.url, 0.1)
                self.assertEqual(len(server.seen), 2)
                self.assertEqual(self.ask(server.url), 2)

    def test_sizes(self):
        for reason, script, comes_back in SIZES:
            with self.subTest(reason), ScriptedServer(script) as server:
                with mock.patch.object(bpx, "MAX_BODY", 100000):
                    built = bpx.build_request("GET", "/p", base_url=server.url)
                    if comes_back:
                        body = bpx.send(built, timeout=5).body
                        self.assertEqual(set(body), {ord("1")})
                        self.assertIn(len(body), (1, 100000))
                    else:
                        with self.assertRaises(bpx.UnknownOutcomeError):
                            bpx.send(built, timeout=5)
                self.assertEqual(self.ask(server.url), 2 - comes_back)

    def test_no_more_than_needed_is_unpacked(self):
        unpack = mock.Mock(eof=True, unused_data=b"")
        unpack.decompress.return_value = b"1"
        with ScriptedServer([sized(HEAD + PACKED, ONE)]) as server:
            with mock.patch("zlib.decompressobj", return_value=unpack):
                self.assertEqual(self.order(server.url), 1)
        limit = 16 * 1024 * 1024 + 1
        unpack.decompress.assert_called_once_with(ONE, limit)

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
                with mock.patch.object(bpx, "MAX_BODY", 100000):
                    error = self.fails(bpx.APIError, server.url, timeout)
                status = int(reason[:3]) if reason[:3].isdigit() else 400
                self.assertEqual((error.status, error.body), (status, body))
                self.assertEqual(self.ask(server.url), connection)
        with ScriptedServer([BAD + b"\r\nno", close]) as server:
            built = bpx.build_request("GET", "/p", base_url=server.url)
            self.assertIs(type(bpx.send(built).body), bytes)

    def test_compression_is_asked_for(self):
        with ScriptedServer() as server:
            self.ask(server.url)
            encodings = server.seen[0][1].get_all("Accept-Encoding")
            self.assertEqual(encodings, ["gzip"])

    def test_spoilt_connections(self):
        for kind, (reason, steps) in itertools.product(BOTH, SPOILT):
            taken = threading.Event()
            script = [TWO, lambda sock: taken.wait(5), *steps]
            with self.subTest(reason, kind=kind), kind(script) as server:
                self.assertEqual(self.order(server.url), {})
                taken.set()
                server.played.acquire(timeout=5)
                self.assertEqual(self.ask(server.url), 2)

    def test_replaced_connections_are_closed_at_once(self):
        # A connection that is left to the garbage collector gives a
        # ResourceWarning, which tearDown finds.
        for max_idle, steps in [(15, [b" "]), (0, [])]:
            taken = threading.Event()
            script = [TWO, lambda sock: taken.wait(5), *steps]
            last = [HEAD + CLOSE + REST]
            limit = mock.patch.object(bpx, "MAX_IDLE", max_idle)
            with ScriptedServer(script, last) as server, limit:
                self.order(server.url)
                taken.set()
                server.played.acquire(timeout=5)
                self.order(server.url)
                self.assertEqual(len(server.threads), 3)
                self.assertTrue(server.has_closed(1))

    def test_restarted_server(self):
        for kind in BOTH:
            with self.subTest(kind):
                with kind() as server:
                    self.assertEqual(self.ask(server.url), 1)
                with kind(port=server.port) as server:
                    self.assertEqual(self.ask(server.url), 1)

    def test_max_idle(self):
        clock = mock.patch("time.monotonic")
        with clock as clock, ScriptedServer() as server:
            # The connection of the request that is sent at that second.
            for seconds, connection in [
                *((0, 1), (14.9, 1), (29.8, 1), (44.7, 1)),
                *((59.7, 2), (59.7, 2), (80, 3)),
            ]:
                clock.return_value = seconds
                self.assertEqual(self.ask(server.url), connection)
            with mock.patch.object(bpx, "MAX_IDLE", 0):
                self.assertEqual(self.ask(server.url), 4)
                self.assertEqual(self.ask(server.url), 5)

    def test_a_connection_that_cannot_be_checked_is_replaced(self):
        with ScriptedServer() as server:
            self.assertEqual(self.ask(server.url), 1)
            full = OSError("Too many open files")
            with mock.patch("selectors.DefaultSelector", side_effect=full):
                self.assertEqual(self.ask(server.url), 2)
            self.assertEqual(self.ask(server.url), 2)

    def test_a_connection_for_each_origin(self):
        with ScriptedServer() as one, ScriptedServer() as two:
            with TLSScriptedServer() as tls:
                for server in (one, two, tls) * 2:
                    self.assertEqual(self.ask(server.url), 1)
                self.assertEqual(self.ask(f"http://127.0.0.1:{one.port}"), 2)
                self.fails(bpx.NotSentError, f"https{one.url[4:]}", 0.1)
                self.assertEqual(self.ask(one.url), 1)

    def test_a_connection_for_each_thread(self):
        for kind in BOTH:
            with self.subTest(kind), kind() as server:
                found = [self.ask(server.url)]
                ask = lambda: found.append(self.ask(server.url))  # noqa: E731
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join(5)
                found.append(self.ask(server.url))
                self.assertEqual(found, [1, 2, 1])

    def test_interrupts(self):
        for error in (KeyboardInterrupt, SystemExit):
            self.raise_on_interrupt(error)
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

    def test_proxy(self):
        for user, password in [
            ("me:p%40ss@", ["Basic bWU6cEBzcw=="]),
            ("", None),
        ]:
            with TLSScriptedServer() as tls:
                script = [HEAD + b"\r\n", relay_to(tls.port)]
                with ScriptedServer(script) as proxy:
                    url = f"http://{user}localhost:{proxy.port}"
                    os.environ["https_proxy"] = url
                    self.assertEqual(self.ask(tls.url), 1)
                    self.order(tls.url)
                    (line, headers), *more = proxy.seen
                    self.assertRegex(line, f"^CONNECT localhost:{tls.port} ")
                    sent = headers.get_all("Proxy-Authorization")
                    self.assertEqual(sent, password)
                    names = {name.lower() for name in headers}
                    self.assertLessEqual(
                        names, {"host", "proxy-authorization"}
                    )
                    self.assertEqual(more, [])
                    for line, headers in tls.seen:
                        self.assertEqual(headers["Host"], tls.url[8:])
                        self.assertNotIn("Proxy-Authorization", headers)

    def test_credentials_of_a_proxy(self):
        for credentials, sent in [
            ("me:p%40ss", "me:p@ss"),
            ("me:a:b", "me:a:b"),
            ("me", "me:"),
            (":p", ":p"),
            ("m%C3%A9:%3A", "mé::"),
        ]:
            script = [b"HTTP/1.1 407 No\r\n\r\n", close]
            with ScriptedServer(script) as proxy:
                url = f"http://{credentials}@localhost:{proxy.port}"
                os.environ["https_proxy"] = url
                self.fails(bpx.NotSentError, "https://a.example")
                found = proxy.seen[0][1]["Proxy-Authorization"].split()
                self.assertEqual(found[0], "Basic")
                self.assertEqual(base64.b64decode(found[1]).decode(), sent)

    def test_no_proxy(self):
        for kind, no_proxy, url in [
            (ScriptedServer, "", "{}"),
            (TLSScriptedServer, "localhost", "{}"),
            (TLSScriptedServer, "localhost", "socks5://localhost"),
        ]:
            with kind() as server, ScriptedServer() as proxy:
                with self.subTest(kind, url=url):
                    url = url.format(proxy.url)
                    proxies = {"http_proxy": url, "https_proxy": url}
                    os.environ.update(proxies, no_proxy=no_proxy)
                    self.assertEqual(self.ask(server.url), 1)
                    self.assertEqual(proxy.seen, [])

    def test_debugging(self):
        with mock.patch("http.client.HTTPConnection.debuglevel", 1):
            with ScriptedServer() as server:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    self.assertEqual(self.ask(server.url), 1)
        self.assertIn("reply: 'HTTP/1.1 200 OK", output.getvalue())

    def test_one_timeout_for_all_of_a_response(self):
        with ScriptedServer([HEAD, 0.3, b"A: b\r\n", 2]) as server:
            self.fails(bpx.UnknownOutcomeError, server.url, 0.4, 0.65)

    def test_a_timeout_between_two_reads(self):
        text = r"\APOST /api/v1/order: TimeoutError: timed out\Z"
        for step in 0.5, 100:
            clock = itertools.count(0, step)
            with self.subTest(step), ScriptedServer() as server, mock.patch(
                "time.monotonic", side_effect=clock
            ):
                with self.assertRaisesRegex(bpx.UnknownOutcomeError, text):
                    self.order(server.url, 0.5)

    def test_each_request_has_its_own_timeout(self):
        with ScriptedServer([TWO], [0.2, TWO]) as server:
            self.order(server.url, 0.1)
            self.order(server.url, 2)
            self.assertEqual(self.ask(server.url), 1)

    def test_the_timeout_for_sending(self):
        params = {"a": "b" * 2**24}  # more than what is sent without reading
        for first, second, wait in [(0.1, 5, 0.2), (5, 0.1, 2)]:
            with ScriptedServer([TWO, wait]) as server:
                self.order(server.url, first)
                options = {"base_url": server.url, "timeout": second}
                if wait < second:
                    bpx.post("/p", params, **options)
                else:
                    began = time.monotonic()
                    with self.assertRaises(bpx.UnknownOutcomeError):
                        bpx.post("/p", params, **options)
                    self.assertLess(time.monotonic() - began, wait)

    def test_what_the_errors_say(self):
        for text, script in REASONS:
            with self.subTest(text), ScriptedServer(script) as server:
                with mock.patch.object(bpx, "MAX_BODY", 100000):
                    timeout = 5 if script else 0.1
                    error = self.fails(
                        bpx.UnknownOutcomeError, server.url, timeout
                    )
                text = rf"\APOST /api/v1/order: {text}\Z"
                self.assertRegex(str(error), text)
                self.assertIs(error.outcome_unknown, True)
                self.assertIsInstance(error.__cause__, Exception)
        error = self.fails(bpx.NotSentError, "http://127.0.0.1:1")
        text = (
            r"\APOST /api/v1/order: ConnectionRefusedError: \[Errno \d+\] .+\Z"
        )
        self.assertRegex(str(error), text)
        self.assertIs(error.outcome_unknown, False)
        self.assertIsInstance(error.__cause__, OSError)

    def test_certificates_are_loaded_once(self):
        last = [HEAD + CLOSE + REST]
        with TLSScriptedServer(last, [TWO], last) as tls:
            tunnel = [HEAD + b"\r\n", relay_to(tls.port)]
            with ScriptedServer(tunnel) as proxy:
                self.order(tls.url)
                # Now nothing is trusted, but that is not read again.
                os.environ["SSL_CERT_FILE"] = os.devnull
                self.order(tls.url)
                self.order(tls.url)
                os.environ["https_proxy"] = proxy.url
                self.assertEqual(self.ask(tls.url), 3)

    def test_redirects(self):
        for status in 301, 302, 303, 307, 308:
            with self.subTest(status), ScriptedServer() as other:
                head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/\r\n"
                with ScriptedServer([head.encode() + REST]) as server:
                    error = self.fails(bpx.APIError, server.url)
                    self.assertEqual(error.status, status)
                    location = error.headers["location"]
                    self.assertEqual(location, f"{other.url}/")
                    self.assertEqual(self.ask(server.url), 1)
                self.assertEqual(other.seen, [])

    def test_memory_errors(self):
        with ScriptedServer([TWO], [sized(BAD, b"[1]")]) as server:
            with mock.patch("bpx._read_body", side_effect=MemoryError):
                self.fails(bpx.UnknownOutcomeError, server.url)
                error = self.fails(bpx.APIError, server.url)
            self.assertEqual((error.status, error.body), (400, None))
            self.assertEqual(self.ask(server.url), 3)

    def test_child_interpreters(self):
        python = [sys.executable, "-W", "error", "-X", "dev", "-c"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        for reason, scripts, code, printed in CHILDREN:
            with self.subTest(reason), ScriptedServer(*scripts) as plain:
                with TLSScriptedServer(*scripts) as tls:
                    argv = [*python, CHILD + code, plain.url, tls.url]
                    child = subprocess.run(argv, timeout=20, cwd=HERE, **pipes)
                self.assertEqual(child.stderr.decode(), "")
                self.assertEqual(child.stdout.decode().split(), printed)


# --- 6: the command line ---


def command(*argv, key=None, stdin=None, stdout=-1, stderr=-1):
    """Run bpx.py as a shell does: (status, output, errors)."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONUNBUFFERED"] = ""
    environment.pop("BPX_SECRET_KEY", None)
    if key is not None:
        environment["BPX_SECRET_KEY"] = key
    done = subprocess.run(
        [sys.executable, "bpx.py", *argv],
        cwd=str(HERE),
        env=environment,
        input=stdin,
        stdout=stdout,
        stderr=stderr,
        timeout=20,
    )
    streams = [(each or b"").decode() for each in (done.stdout, done.stderr)]
    return (done.returncode, *streams)


BOTH_WAYS = "ValueError: pass name=text parameters or --json, not both"
# fmt: off
# Arguments, pattern of the line on standard error.
USAGES = [
    ([], "the following arguments are required: METHOD, PATH; usage: bpx.py "),
    (["GET"], ".*required: PATH; usage: bpx.py "),
    (["GET", "/p", "symbol"], "ValueError: pass name=text or .*, not 'symbol'$"),
    (["GET", "/p", "=5"], "ValueError: pass name=text or .*, not '=5'$"),
    (["GET", "/p", ":=5"], "ValueError: pass name=text or .*, not ':=5'$"),
    (["GET", "/p", GUIDE_KEY], "ValueError: .*, not '.a long text.'$"),
    (["GET", "/p", GUIDE_KEY[:-1]], ".*, not '.a long text.'$"),
    (["GET", "/p", f"BPX_SECRET_KEY={GUIDE_KEY}"], "ValueError: pass BPX_SECRET_KEY in the environment, not as a parameter$"),
    (["GET", "/p", f"n:={GUIDE_KEY}"], "ValueError: n: this JSON is not valid "),
    (["GET", "/p", "--key", GUIDE_KEY], "unrecognized arguments: --key .a long text.; usage"),
    (["GET", "/p", "--k", "k" * 42], "unrecognized arguments: --k k{42}; usage"),
    (["GET", "/p", "--k", "k" * 43], "unrecognized arguments: --k .a long text.; usage"),
    (["GET", "/p", "k" * 42 + "=", "k" * 42 + "="], "ValueError: pass the name 'k{42}' only once$"),
    (["GET", "/p", "--json", '{"%s": 1, "%s": 1}' % (GUIDE_KEY, GUIDE_KEY)], ".* the name '.a long text.' only once"),
    (["GET", "/p", f"--window={GUIDE_KEY[:-1]}"], "argument --window: .*a long text"),
    (["POST", "/p", "--json", "null"], "ValueError: --json: pass an object or a list, not null$"),
    (["GET", "/p", "n:=x"], "ValueError: n: this JSON is not valid .JSONDecodeError: "),
    (["POST", "/p", "--json", "{"], "ValueError: --json: this JSON is not valid .JSOND"),
    (["POST", "/p", "--json", ""], "ValueError: --json: this JSON is not valid .JSOND"),
    (["POST", "/p", "--json", "[" * 100000], ".*--json: .*Recursion"),
    (["POST", "/p", "--json", "5"], "TypeError: params: pass a mapping "),
    (
        ["POST", "/p", "--json", '[{"a": {"b": 1, "b": 2}}]'],
        "ValueError: --json: this JSON is not valid .ValueError: pass the name 'b' only once.$",
    ),
    (
        ["POST", "/p", 'a:={"b": 1, "c": 2, "b": 1}'],
        "ValueError: a: this JSON is not valid .ValueError: pass the name 'b' only once.$",
    ),
    (["POST", "/p", "price:=0.1"], "TypeError: params.price: pass a str "),
    (["GET", "/p", "--xy", "{}"], "unrecognized arguments: --xy"),
    (["GET", "/p", "--window", "x"], "argument --window: invalid int value"),
    (["GET", "/api/v1/order", "--window", "60001"], "ValueError: window: "),
    (["GET", "/p", "--timeout", "0"], "ValueError: timeout: "),
    (["GET", "/p", "--timeout", "0", "--dry-run"], "ValueError: timeout: "),
    (["GET", "/p", "--base-url", "http://a.example"], "ValueError: base_url: "),
    (["GET", "/p?a=b"], "ValueError: path: pass the query as params, "),
    (["POST", "/p", "a=b", "--json", "{}"], BOTH_WAYS + "$"),
    (["POST", "/p", "a=b", "--json", ""], BOTH_WAYS + "$"),
    (["POST", "/p", "a=b", "a=c"], "ValueError: pass the name 'a' only once$"),
]
# Arguments, standard input; the body that is sent.
GIVEN_PARAMS = [
    ([], "", {}),
    (["symbol=SOL_USDC", "a=b=c:=d", "e="], "", {"symbol": "SOL_USDC", "a": "b=c:=d", "e": ""}),
    (["n:=5", "b:=true", 'l:=["A","B"]', "u:=null", "é=ü"], "", {"n": 5, "b": True, "l": ["A", "B"], "é": "ü"}),
    (["--json", '{"symbol": "é", "n": [1]}'], "", {"symbol": "é", "n": [1]}),
    (["--json", "-"], '[{"symbol": "é"}, {"symbol": "B"}]', [{"symbol": "é"}, {"symbol": "B"}]),
]
# Secret key, arguments; what is printed at 1750793021519, with signatures of VECTORS.
DRY_RUNS = [
    (GUIDE_KEY, ["post", "/wapi/v1/capital/withdrawals", "address=rAddr?dt=1 x/+&%é", "blockchain=XRP", "quantity=10.00", "symbol=XRP"], """\
POST URL/wapi/v1/capital/withdrawals
instruction=withdraw&address=rAddr?dt=1 x/+&%é&blockchain=XRP&quantity=10.00&symbol=XRP&timestamp=1750793021519&window=5000
User-Agent: bpx.py/VERSION
X-API-Key: 5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o=
X-Signature: Zv/poQOowbPYcDlpMG8QmseVCLHKBpvRk/jkT/B+i8+d/4G++akjRm3aUH4b1J/Bk2Jijwbifx2Vynqhu7c+DQ==
X-Timestamp: 1750793021519
X-Window: 5000
Content-Type: application/json; charset=utf-8
{"address":"rAddr?dt=1 x/+&%é","blockchain":"XRP","quantity":"10.00","symbol":"XRP"}
"""),
    (GUIDE_KEY, ["GET", "/p", "--instruction", "accountQuery", "--window", "60000"], """\
GET URL/p
instruction=accountQuery&timestamp=1750793021519&window=60000
User-Agent: bpx.py/VERSION
X-API-Key: 5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o=
X-Signature: g7E4vz90JXPe6V/SIQs3+wTl0hawzDWFcYkNE+TzIjHF31xuyme7Pd25Md+SP0mDR1sERzkPKpp63DKrBmZ8CA==
X-Timestamp: 1750793021519
X-Window: 60000
"""),
    (None, ["GET", "/p", "a=b c"], "GET URL/p?a=b%20c\nUser-Agent: bpx.py/VERSION\n"),
]
# Response, arguments; exit status, pattern of the line on standard error.
FAILED = b'{"code":"C","message":"a\\nb\\u001b[1m"}'
EXECUTED = r" \(the request may have been executed\)"
FAILURES = [
    ((400, {}, FAILED), [], 1, r"APIError: GET /p: 400 C a b \[1m"),
    ((408, {}, FAILED), [], 4, rf"APIError: GET /p: 408 C a b \[1m{EXECUTED}"),
    ((503, {}, FAILED), [], 4, rf"APIError: GET /p: 503 C a b \[1m{EXECUTED}"),
    ((200, {"Transfer-Encoding": "x"}, b""), [], 4, rf"UnknownOutcomeError: GET /p: .*{EXECUTED}"),
    (None, ["--base-url", "http://127.0.0.1:1"], 3, r"NotSentError: GET /p: .* \(nothing was sent\)"),
]
# fmt: on


class CommandLine(ExchangeCase):
    def main(self, *argv, key=GUIDE_KEY, stdin=b""):
        """The same within this process: (status, output, errors)."""
        output, errors = io.StringIO(), io.StringIO()
        environment = {} if key is None else {"BPX_SECRET_KEY": key}
        argv = ["--base-url", self.exchange.url, *argv]
        with contextlib.ExitStack() as stack:
            for context in (
                mock.patch.dict(os.environ, environment),
                mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(errors),
            ):
                stack.enter_context(context)
            if key is None:
                os.environ.pop("BPX_SECRET_KEY", None)
            try:
                bpx.main(argv)
                status = 0
            except SystemExit as error:
                status = error.code
        self.assertNotIn(GUIDE_KEY, output.getvalue() + errors.getvalue())
        return status or 0, output.getvalue(), errors.getvalue()

    def test_params(self):
        self.exchange.answer = (200, {}, '{"id":"1","é":[]}'.encode())
        for argv, stdin, params in GIVEN_PARAMS:
            with self.subTest(argv):
                argv = ("post", "/api/v1/orders", *argv)
                found = self.main(*argv, stdin=stdin.encode())
                expected = '{\n  "id": "1",\n  "\\u00e9": []\n}\n'
                self.assertEqual(found, (0, expected, ""))
                seen = self.exchange.seen.pop()
                verify(seen, "orderExecute")
                self.assertEqual(seen.body, params)

    def test_options(self):
        argv = ("GET", "/api/v1/new", "--instruction", "other", "a=b")
        argv += ("--window", "60000", "--timeout", "2.5", "c=d")
        build = mock.patch("bpx.build_request", wraps=bpx.build_request)
        send = mock.patch("bpx.send", wraps=bpx.send)
        with build as build, send as send:
            self.assertEqual(self.main(*argv), (0, "{}\n", ""))
            self.assertEqual(build.call_count, 1)
            self.assertEqual(send.call_args[1], {"timeout": 2.5})
            verify(self.exchange.seen[0], "other")
            headers = self.exchange.seen.pop().headers
            self.assertEqual(headers["X-Window"], "60000")
            self.main("GET", "/api/v1/order")
            self.assertEqual(send.call_args[1], {"timeout": 10.0})
            headers = self.exchange.seen.pop().headers
            self.assertEqual(headers["X-Window"], "5000")
        with mock.patch("bpx.request", return_value=None) as request:
            with contextlib.redirect_stdout(io.StringIO()):
                bpx.main(["GET", "/p"])
            base_url = request.call_args[1]["base_url"]
            self.assertEqual(base_url, "https://api.backpack.exchange")

    def test_a_public_request_needs_no_key(self):
        self.exchange.answer = (200, {}, b"pong")
        for key in (None, GUIDE_KEY, "broken"):
            found = self.main("GET", "/api/v1/ping", key=key)
            self.assertEqual(found, (0, '"pong"\n', ""))
            self.assertIsNone(self.exchange.seen.pop().headers["X-API-Key"])

    def test_dry_runs(self):
        for key, argv, expected in DRY_RUNS:
            clock = itertools.count(1750793021519 * 10**6, 10**6)
            with mock.patch("time.time_ns", side_effect=clock):
                found = self.main("--dry-run", *argv, key=key)
            expected = expected.replace("URL", self.exchange.url)
            expected = expected.replace("VERSION", bpx.__version__)
            self.assertEqual(found, (0, expected, ""))
            self.assertEqual(self.exchange.seen, [])

    def test_usage(self):
        for argv, pattern in USAGES:
            with self.subTest(pattern):
                status, output, errors = self.main(*argv)
                self.assertEqual((status, output), (2, ""))
                self.assertRegex(errors, r"\A[^\n]*\n\Z")
                self.assertRegex(errors[:-1], r"\Abpx\.py: " + pattern)
        for key, text in (None, "to sign this, set BPX_SECRET_KEY"), BAD_KEYS[
            5
        ]:
            found = self.main("GET", "/api/v1/order", key=key)
            self.assertEqual(found, (2, "", f"bpx.py: ValueError: {text}\n"))
        with mock.patch("io.TextIOWrapper", lambda _: None):
            found = self.main("POST", "/p", "--json", "-")
        text = "bpx.py: ValueError: --json -: standard input is closed\n"
        self.assertEqual(found, (2, "", text))
        self.assertEqual(self.exchange.seen, [])

    def test_failures(self):
        for answer, argv, status, pattern in FAILURES:
            self.exchange.answer = answer
            found = self.main("GET", "/p", *argv)
            self.assertEqual(found[:2], (status, ""))
            self.assertRegex(found[2], rf"\Abpx\.py: {pattern}\n\Z")

    def test_help(self):
        with mock.patch.dict(os.environ, COLUMNS="80"):
            status, output, errors = self.main("--help")
        self.assertEqual((status, errors), (0, ""))
        output = output.replace("optional arguments:", "options:")  # 3.8, 3.9
        self.assertIn(f"```text\n{output}```", README)
        found = self.main("--version")
        self.assertEqual(found, (0, f"bpx.py {bpx.__version__}\n", ""))

    def test_as_a_script(self):
        url = ("--base-url", self.exchange.url)
        found = command("GET", "/api/v1/order", *url, "é=b", key=GUIDE_KEY)
        self.assertEqual(found, (0, "{}\n", ""))
        found = command("POST", "/p", "--json", "-", *url, stdin=b'{"a":1}')
        self.assertEqual(found, (0, "{}\n", ""))
        self.assertEqual(self.exchange.seen[-1].body, {"a": 1})
        found = command("GET", "/p", "a=\udcff", *url)
        self.assertEqual(found[:2], (2, ""))
        self.assertRegex(found[2], r"\Abpx\.py: .*\n\Z")

    def test_as_main(self):
        with mock.patch("sys.argv", ["bpx.py", "--help"]):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                with self.assertRaises(SystemExit) as caught:
                    runpy.run_path(bpx.__file__, run_name="__main__")
        self.assertEqual(caught.exception.code, 0)
        self.assertIn("METHOD PATH", output.getvalue())

    def test_a_closed_pipe(self):
        url = ("--base-url", self.exchange.url)
        for size in (1, 10**6):
            self.exchange.answer = (200, {}, b'["%s"]' % (b"x" * size))
            reading, writing = os.pipe()
            os.close(reading)
            found = command("GET", "/p", *url, stdout=writing)
            os.close(writing)
            self.assertEqual(found, (0, "", ""))

    def test_a_full_disk(self):
        sent, closed = self.exchange.url, "http://127.0.0.1:1"
        text = r"\Abpx\.py: cannot print: OSError: .*\n\Z"
        for stream, base_url, argv, status, pattern in [
            ("stdout", sent, ["/p"], 4, text),
            ("stdout", sent, ["/p", "--dry-run"], 2, text),
            ("stderr", closed, ["/p?"], 2, r"\A\Z"),
            ("stderr", closed, ["/p"], 3, r"\A\Z"),
        ]:
            with self.subTest(argv), open("/dev/full", "wb") as full:
                argv = ["GET", *argv, "--base-url", base_url]
                found = command(*argv, **{stream: full})
                self.assertEqual(found[:2], (status, ""))
                self.assertRegex(found[2], pattern)

    def test_closed_streams(self):
        url = ("--base-url", self.exchange.url)
        text = "bpx.py: cannot print: standard output is closed\n"
        broken = mock.Mock(write=mock.Mock(side_effect=OSError))
        closed = io.StringIO()
        closed.close()
        # Output, errors, options, status, what is printed to the other one,
        # the file descriptor that is redirected.
        for output, errors, options, status, printed, descriptor in [
            (None, io.StringIO(), [], 4, text, None),
            (None, io.StringIO(), ["--dry-run"], 2, text, None),
            (io.StringIO(), broken, ["--timeout", "0"], 2, "", 2),
            (io.StringIO(), None, ["--timeout", "0"], 2, "", None),
            (io.StringIO(), closed, ["--timeout", "0"], 2, "", 2),
        ]:
            streams = {"stdout": output, "stderr": errors}
            with self.subTest(options, status=status), mock.patch.multiple(
                "sys", **streams
            ), mock.patch("os.dup2") as dup2:
                with self.assertRaises(SystemExit) as caught:
                    bpx.main(["GET", "/p", *url, *options])
            self.assertEqual(caught.exception.code, status)
            self.assertEqual((output or errors).getvalue(), printed)
            self.assert_redirected(dup2, descriptor)

    def assert_redirected(self, dup2, descriptor):
        """The null device was put in the place of that descriptor, or none."""
        found = [call[0][1] for call in dup2.call_args_list]
        self.assertEqual(found, [] if descriptor is None else [descriptor])
        for call in dup2.call_args_list:
            os.close(call[0][0])

    def test_what_was_sent_is_not_called_untried(self):
        for error, status in [
            (MemoryError, 4),
            (KeyboardInterrupt, 4),
            (BrokenPipeError, 0),
        ]:
            text = (
                f"bpx.py: cannot print: {error.__name__}\n" if status else ""
            )
            with mock.patch("json.dumps", side_effect=error):
                with mock.patch("os.dup2") as dup2:
                    found = self.main("GET", "/p")
            self.assertEqual(found, (status, "", text))
            self.assert_redirected(dup2, 1)

    def test_interrupts(self):
        sent = "bpx.py: interrupted (the request may have been executed)\n"
        unsent = "bpx.py: interrupted (nothing was sent)\n"
        memory = "bpx.py: MemoryError\n"
        # Error, status and message where sending or reading params fails.
        for error, while_sending, before in [
            (KeyboardInterrupt, (4, "", sent), (2, "", unsent)),
            (SystemExit(7), (7, "", ""), (7, "", "")),
            (MemoryError, (2, "", memory), (2, "", memory)),
        ]:
            argv = ("POST", "/p", "a:=1")
            with mock.patch("bpx.request", side_effect=error):
                self.assertEqual(self.main(*argv), while_sending)
            with mock.patch("json.loads", side_effect=error):
                self.assertEqual(self.main(*argv), before)
                self.assertEqual(self.main(*argv, "--dry-run"), before)
        with mock.patch("json.dumps", side_effect=SystemExit(7)):
            self.assertEqual(self.main("GET", "/p"), (7, "", ""))


# --- Restricted interpreters, and documents ---

PROBE = """
import sys
{before}
import bpx
text = bpx.canonical_string("orderCancel", {{"orderId": 28}}, 5)
if text != "instruction=orderCancel&orderId=28&timestamp=5&window=5000":
    raise SystemExit("canonical string: " + text)
if bpx.get("/api/v1/ping", base_url={url!r}) != {{}}:
    raise SystemExit("public request")
try:
    bpx.get("/api/v1/capital", base_url={url!r}, secret_key={key!r})
except ImportError as error:
    if "pip install PyNaCl" not in str(error):
        raise
    print("unsigned")
else:
    print("signed")
"""


class RestrictedPlaces(ExchangeCase):
    def probe(self, *flags, folder=HERE, before=""):
        """What an interpreter with these flags prints after the probe."""
        before = f"sys.path.insert(0, {str(folder)!r})\n{before}"
        url = self.exchange.url
        code = PROBE.format(before=before, url=url, key=GUIDE_KEY)
        argv = [sys.executable, *flags, "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(argv, timeout=20, **pipes)
        return done.stdout.decode().strip()

    def test_flags(self):
        for flags, printed in [
            (["-O"], "signed"),
            (["-OO"], "signed"),
            (["-W", "error", "-X", "dev", "-bb"], "signed"),
            (["-I", "-S", "-E"], "unsigned"),  # nothing is installed
        ]:
            with self.subTest(flags):
                self.assertEqual(self.probe(*flags), printed)

    def test_places(self):
        with tempfile.TemporaryDirectory() as folder:
            archive = os.path.join(folder, "bpx.zip")
            with zipfile.ZipFile(archive, "w") as file:
                file.write(str(HERE / "bpx.py"), "bpx.py")
            self.assertEqual(self.probe(folder=archive), "signed")
            shutil.copy(str(HERE / "bpx.py"), folder)
            os.chmod(folder, 0o555)
            self.assertEqual(self.probe(folder=folder), "signed")
            os.chmod(folder, 0o755)

    def test_without_ssl(self):
        before = """
sys.modules['ssl'] = sys.modules['_ssl'] = None
import bpx
try:
    bpx.get("/api/v1/ping", base_url="https://127.0.0.1:1")
except bpx.NotSentError as error:
    print(error)
"""
        pattern = r"\AGET /api/v1/ping: ModuleNotFoundError: .*\nsigned\Z"
        self.assertRegex(self.probe(before=before), pattern)

    def test_without_zlib(self):
        before = "sys.modules['zlib'] = None"
        self.assertEqual(self.probe(before=before), "signed")
        seen = self.exchange.seen[-1]
        self.assertEqual(seen.headers["Accept-Encoding"], "identity")
        self.exchange.answer = (200, {"Content-Encoding": "gzip"}, ONE)
        self.assertIn(
            "UnknownOutcomeError: GET /api/v1/ping: HTTPException: "
            "Content-Encoding gzip is not supported",
            self.probe(before=before),
        )
        with mock.patch.dict(sys.modules, {"zlib": None}):
            names = runpy.run_path(bpx.__file__)
        self.assertIs(names["_HAS_ZLIB"], False)

    def test_where_no_thread_can_be_started(self):
        before = "import _thread; _thread.start_new_thread = None"
        self.assertEqual(self.probe(before=before), "signed")

    def test_import_does_nothing(self):
        # Nothing but finding and reading modules may be audited, and an
        # environment that is not there cannot be read.
        before = """
import argparse, decimal, gzip, http.client, json, os, selectors
import urllib.request
os.environ = None
def hook(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "ssl", "os"):
        if event != "os.listdir":
            raise SystemExit(event)
sys.addaudithook(hook)
import bpx
raise SystemExit("loaded: %s" % [n for n in sys.modules if "nacl" in n])
"""
        self.assertEqual(self.probe(before=before), "loaded: []")


# fmt: off
# Outcome of the order, those of the queries; what the recipe of the README prints or raises.
FOUND = [{"clientId": 41}, {"clientId": 42, "status": "Filled"}]
FATES = [
    (bpx.UnknownOutcomeError, [{"id": "5"}], "{'id': '5'}"),
    (bpx.UnknownOutcomeError, [404, FOUND], "{'clientId': 42, 'status': 'Filled'}"),
    (503, [404, FOUND[:1]], "None"),
    ("<html>", [404, FOUND], "{'clientId': 42, 'status': 'Filled'}"),
    (400, [], bpx.APIError),
    (503, [500], bpx.APIError),
    (bpx.NotSentError, [], bpx.NotSentError),
]
# fmt: on


class Documents(ExchangeCase):
    def test_module(self):
        result = doctest.testmod(bpx)
        self.assertEqual(result.failed, 0)
        self.assertGreater(result.attempted, 5)
        line = (HERE / "bpx.py").read_text(encoding="utf-8").splitlines()[0]
        self.assertTrue(line.startswith(f"# bpx.py {bpx.__version__} - "))

    def run_block(self, block):
        """What a Python block of the README prints, run against the fake."""
        output, url = io.StringIO(), {"base_url": self.exchange.url}
        with contextlib.ExitStack() as stack:
            for call in (bpx.request, bpx.build_request):
                stack.enter_context(mock.patch.dict(call.__kwdefaults__, url))
            key = mock.patch.dict(os.environ, BPX_SECRET_KEY=GUIDE_KEY)
            stack.enter_context(key)
            self.sleep = stack.enter_context(mock.patch("time.sleep"))
            stack.enter_context(contextlib.redirect_stdout(output))
            exec(compile(block, "README.md", "exec"), {})
        return output.getvalue()

    def test_readme(self):
        blocks = re.findall("```python\n(.*?)```", README, re.S)
        self.assertEqual(len(blocks), 12)
        for block in blocks:
            with self.subTest(block[:60]):
                self.exchange.answer = (200, {}, b"1750793021519")
                if block.startswith(">>>"):
                    parser = doctest.DocTestParser()
                    test = parser.get_doctest(block, {}, "README", None, 0)
                    self.assertEqual(doctest.DocTestRunner().run(test), (0, 7))
                elif "import nacl" in block or "from nacl" in block:
                    expected = f"X-API-Key: {API_KEYS[GUIDE_KEY]}\n"
                    expected += f"X-Signature: {VECTORS[3][-1]}\n"
                    self.assertEqual(self.run_block(block), expected)
                elif re.search("import (aiohttp|httpx|websockets)", block):
                    compile(block, "README.md", "exec")
                else:
                    self.assertIn("1750793021519", self.run_block(block))

    def test_the_fate_of_an_order(self):
        pattern = "```python\n([^`]*find_order.*?)```"
        (block,) = re.findall(pattern, README, re.S)
        built = bpx.build_request("GET", "/p")

        def effect(outcome):
            """What a call returns or raises, for a status or an error."""
            if outcome in (bpx.UnknownOutcomeError, bpx.NotSentError):
                return outcome(built, "lost")
            if isinstance(outcome, int):
                return bpx.APIError(built, outcome, None, {})
            return outcome

        for post, get, printed in FATES:
            with self.subTest(post=post, get=get), mock.patch(
                "bpx.post", side_effect=[effect(post)]
            ), mock.patch("bpx.get", side_effect=map(effect, get)) as called:
                with mock.patch("random.randrange", return_value=42):
                    if isinstance(printed, str):
                        printed = f"clientId: 42\n{printed}\n"
                        self.assertEqual(self.run_block(block), printed)
                        self.sleep.assert_called_once_with(10)
                    else:
                        with self.assertRaises(printed):
                            self.run_block(block)
            self.assertEqual(called.call_count, len(get))

    def test_examples_of_the_readme(self):
        text = README.split("```text\n")[3].split("```")[0]
        examples = [each.splitlines() for each in text.strip().split("\n\n")]
        self.assertEqual(len(examples), 5)
        for _, instruction, params, canonical, signature in examples:
            with self.subTest(canonical):
                (row,) = [row for row in VECTORS if row[6] == canonical]
                self.assertEqual(row[1:3], (GUIDE_KEY, instruction))
                self.assertEqual(row[3:5], (1750793021519, 5000))
                self.assertEqual(row[5], json.loads(params))
                self.assertEqual(row[7], signature)

    def test_the_two_commands(self):
        lines = re.findall("(?m)^python3 -m venv.*", README)
        self.assertEqual(len(lines), 2)
        argv = shlex.split(lines[0].split(".venv/bin/python bpx.py ")[1])
        status, output, errors = command(*argv, key=GUIDE_KEY)
        self.assertEqual((status, errors), (0, ""))
        shown = re.escape(README.split("```text\n")[1].split("```")[0])
        self.assertRegex(output, rf"\A{shown.replace('…', '[^ ]+')}\Z")


if __name__ == "__main__":
    unittest.main()
