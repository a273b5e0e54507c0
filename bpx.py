# bpx.py 1.1.0 - sign and send requests to the Backpack Exchange REST API
# SPDX-License-Identifier: 0BSD
"""Sign and send requests to the Backpack Exchange REST API.

A request is signed with Ed25519. What is signed is a text, the canonical
string. It consists of name=value pairs joined by "&": first the instruction
(the exchange's name for the operation), then the parameters sorted by name,
then the timestamp and the window in milliseconds. The exchange accepts the
request until timestamp + window.

>>> secret_key = "TDSkv44jf/iD/QCKkyCdixO+p1sfLXxk+PZH7mW/ams="
>>> params = {"symbol": "BTC_USDT", "orderId": 28}
>>> text = canonical_string("orderCancel", params, 1614550000000)
>>> for pair in text.split("&"):
...     print(pair)
instruction=orderCancel
orderId=28
symbol=BTC_USDT
timestamp=1614550000000
window=5000
>>> headers = sign_request(
...     "orderCancel", params, secret_key, timestamp=1614550000000
... )
>>> headers["X-API-Key"]
'5+yQgwU0ZdJ/9s+GXfuPFfo7yQQpl9CgvQedJXne30o='
>>> headers["X-Signature"][:44]
'aKisDELOQeekrU+Up7rS/6gZBp0qunOsPwThvby1n5Ta'
>>> headers["X-Signature"][44:]
'ohLLP7NghvHoc4peKNGCg/rWC1gtiOKKSW2xNxCGAQ=='

This secret key is the example in the exchange's Python guide.

After the constants come the errors and their helpers, and then these six
parts. No part uses anything from a later part.

1. canonical_string returns the text that is signed.
2. sign_request returns the headers with the signature of that text.
3. build_request returns the whole request, which any HTTP client can send.
4. send sends the request once and returns the response.
5. request, get, post, delete and patch build and send a request, and return
   the decoded body of the response.
6. main is the command line.

To learn how requests are signed, read parts 1 to 3.

Timestamps and windows are in milliseconds, timeouts in seconds. Keys and
signatures are base64, and text is UTF-8. Pass prices and quantities as str or
Decimal, never as float. The file needs Python 3.8 or later, and PyNaCl for
signing.

There are no functions such as place_order: you pass the method and the path
of each operation. This module has no WebSocket streams and no rate limiter,
and it never repeats a request. It takes the proxy from the environment
variable https_proxy (except for the hosts in no_proxy), or else from the
settings of Windows or macOS. Python's ssl module also reads some variables,
such as SSL_CERT_FILE. The command line reads BPX_SECRET_KEY.
"""

import argparse
import binascii
import collections.abc
import functools
import http.client
import io
import json
import os
import re
import selectors
import sys
import threading
import time
import urllib.parse
import urllib.request
from decimal import Decimal
from enum import Enum
from typing import Any, Dict, List, Mapping, NamedTuple, NoReturn, Optional
from typing import Sequence, Tuple, Union
from urllib.request import Request

try:
    import zlib
except ImportError:  # Some Pythons are built without it.
    _HAS_ZLIB = False
else:
    _HAS_ZLIB = True

__version__ = "1.1.0"
__all__ = [
    "BASE_URL",
    "DEFAULT_WINDOW",
    "MAX_WINDOW",
    "DEFAULT_TIMEOUT",
    "MAX_IDLE",
    "MAX_BODY",
    "INSTRUCTIONS",
    "BPXError",
    "APIError",
    "NotSentError",
    "UnknownOutcomeError",
    "canonical_string",
    "sign_request",
    "build_request",
    "Response",
    "send",
    "request",
    "get",
    "post",
    "delete",
    "patch",
    "main",
]

BASE_URL = "https://api.backpack.exchange"
DEFAULT_WINDOW = 5000  # milliseconds for which a signed request is valid
MAX_WINDOW = 60000  # milliseconds, the exchange's limit
DEFAULT_TIMEOUT = 10.0  # seconds for each step of a request (see send)
MAX_IDLE = 15.0  # seconds after which an idle connection is not used again
MAX_BODY = 16 * 1024 * 1024  # bytes; a larger response body is refused

# Messages about arguments hide a text of this length or more, because it could
# be a secret key that was passed in the wrong place. A key has 44 characters,
# but its final "=" could be missing.
_MIN_HIDDEN_LENGTH = 43

# Long texts in errors are cut to this number of characters.
_MAX_SHOWN_LENGTH = 300

# The parameters of a request: None, a mapping of names to values, or (for a
# batch of orders) a list or tuple of such mappings.
#
# The type of a batch is Sequence and not List, because type checkers would not
# accept a List[Dict] as a List[Mapping].
Params = Union[Mapping[str, Any], Sequence[Mapping[str, Any]], None]

# Every signed operation in the exchange's documentation, in the same order.
# For an operation that is not in this table, pass its instruction yourself.
INSTRUCTIONS = {
    "GET /api/v1/account": "accountQuery",
    "PATCH /api/v1/account": "accountUpdate",
    "GET /api/v1/account/limits/borrow": "maxBorrowQuantity",
    "GET /api/v1/account/limits/order": "maxOrderQuantity",
    "GET /api/v1/account/limits/withdrawal": "maxWithdrawalQuantity",
    "POST /api/v1/borrowLend": "borrowLendExecute",
    "GET /api/v1/borrowLend/positions": "borrowLendPositionQuery",
    "GET /wapi/v1/history/borrowLend": "borrowHistoryQueryAll",
    "GET /wapi/v1/history/borrowLend/positions": (
        "borrowPositionHistoryQueryAll"
    ),
    "GET /wapi/v1/history/interest": "interestHistoryQueryAll",
    "POST /api/v1/account/convertDust": "convertDust",
    "GET /api/v1/capital": "balanceQuery",
    "GET /api/v1/capital/collateral": "collateralQuery",
    "GET /wapi/v1/capital/deposit/address": "depositAddressQuery",
    "GET /wapi/v1/capital/deposits": "depositQueryAll",
    "GET /wapi/v1/capital/withdrawals": "withdrawalQueryAll",
    "POST /wapi/v1/capital/withdrawals": "withdraw",
    "GET /wapi/v1/history/dust": "dustHistoryQueryAll",
    "GET /wapi/v1/history/settlement": "settlementHistoryQueryAll",
    "DELETE /api/v1/order": "orderCancel",
    "GET /api/v1/order": "orderQuery",
    "POST /api/v1/order": "orderExecute",
    "DELETE /api/v1/orders": "orderCancelAll",
    "GET /api/v1/orders": "orderQueryAll",
    "POST /api/v1/orders": "orderExecute",
    "GET /wapi/v1/history/fills": "fillHistoryQueryAll",
    "GET /wapi/v1/history/orders": "orderHistoryQueryAll",
    "GET /api/v1/position": "positionQuery",
    "GET /wapi/v1/history/funding": "fundingHistoryQueryAll",
    "GET /wapi/v1/history/position": "positionHistoryQueryAll",
    "POST /api/v1/rfq": "rfqSubmit",
    "POST /api/v1/rfq/accept": "quoteAccept",
    "POST /api/v1/rfq/cancel": "rfqCancel",
    "POST /api/v1/rfq/quote": "quoteSubmit",
    "POST /api/v1/rfq/refresh": "rfqRefresh",
    "GET /api/v1/rfqs": "rfqQuery",
    "GET /wapi/v1/history/quote": "quoteHistoryQueryAll",
    "GET /wapi/v1/history/quote/fill": "quoteFillHistoryQueryAll",
    "GET /wapi/v1/history/rfq": "rfqHistoryQueryAll",
    "GET /wapi/v1/history/rfq/fill": "rfqFillHistoryQueryAll",
    "DELETE /api/v1/strategies": "strategyCancelAll",
    "GET /api/v1/strategies": "strategyQueryAll",
    "DELETE /api/v1/strategy": "strategyCancel",
    "GET /api/v1/strategy": "strategyQuery",
    "POST /api/v1/strategy": "strategyCreate",
    "GET /wapi/v1/history/strategies": "strategyHistoryQueryAll",
    "POST /wapi/v1/user/2fa": "issueTwoFactorToken",
    "POST /api/v1/vault/mint": "vaultMint",
    "GET /api/v1/vault/nav": "vaultNavQuery",
    "DELETE /api/v1/vault/redeem": "vaultRedeemCancel",
    "POST /api/v1/vault/redeem": "vaultRedeemRequest",
    "GET /api/v1/vault/redeems/pending": "vaultPendingRedeemsQuery",
    "GET /wapi/v1/history/vault/mint": "vaultMintHistoryQueryAll",
    "GET /wapi/v1/history/vault/redeem": "vaultRedeemHistoryQueryAll",
}


# --- Errors ---


class BPXError(Exception):
    """The base class of APIError, NotSentError and UnknownOutcomeError.

    Its attribute request is the urllib.request.Request that failed, and
    reason is a str that says what went wrong. If outcome_unknown is True, the
    exchange may have executed the request although there was an error. Before
    you repeat an order, read the docstring of UnknownOutcomeError.

    Do not log the headers of a signed request: anyone who knows them and the
    parameters can send the request again, until timestamp + window.
    """

    outcome_unknown = False

    def __init__(self, request: Request, reason: str) -> None:
        super().__init__(request, reason)
        self.request = request
        self.reason = reason

    def __str__(self) -> str:
        # selector is the path and the query; the query is not shown.
        path = self.request.selector.partition("?")[0]
        text = f"{self.request.get_method()} {path}: {self.reason}"
        return _one_line(text)


class APIError(BPXError):
    """The response has the status 300 or higher.

    status is an int, body is the decoded body, and headers are those of the
    response. If body is a dict, code and message are taken from it. Otherwise,
    code is None, and message is body.

    outcome_unknown is True for 408, and for 500 or higher: a gateway may send
    such a status even if the exchange has executed the request.
    """

    def __init__(
        self, request: Request, status: int, body: Any, headers: Any
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        if isinstance(body, dict):
            self.code = body.get("code")
            self.message = body.get("message")
        else:
            self.code = None
            self.message = body
        self.outcome_unknown = status == 408 or status >= 500
        reason = _describe_response(status, self.code, self.message)
        super().__init__(request, reason)
        # BPXError.__init__ has set args to (request, reason). But pickle
        # rebuilds an error by calling APIError(*self.args), so args must hold
        # these four arguments.
        self.args = (request, status, body, headers)


class NotSentError(BPXError):
    """No byte of the request was sent, so it is safe to repeat an order."""


class UnknownOutcomeError(BPXError):
    """Sending began, but the response could not be read or decoded.

    The exchange may have executed the request. An APIError with the status
    408 or 5xx is just as uncertain: it also has outcome_unknown = True.

    Give every order a clientId, so that you can find it. Before you repeat an
    order, find out whether it was executed:
    1. Until timestamp + window, the exchange may still accept the order. Wait
       until that time has passed, and some seconds more, because the clocks
       may differ. The timestamp and the window are in error.request.headers,
       with the names "X-timestamp" and "X-window" (urllib changes the case).
    2. Search for the clientId: GET /api/v1/order finds an order that is still
       open, and GET /wapi/v1/history/orders lists filled and cancelled orders.
       If neither has the order, look again later, because the history could be
       late.
    """

    outcome_unknown = True


# --- Helpers for error messages and checks ---


def _one_line(text: str) -> str:
    """Return the beginning of a text as one printable line."""
    text = text[:_MAX_SHOWN_LENGTH]
    printable = [c if c.isprintable() else " " for c in text]
    return " ".join("".join(printable).split())


def _describe_error(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _describe_response(status: int, code: Any, message: Any) -> str:
    """Return the status, the code and the message as one text."""
    words = [str(status)]
    for field in (code, message):
        # Leave out None, and also lists and dicts, which would be hard to
        # read. Cut long text, because the server may send a whole web page.
        if isinstance(field, (str, int, float)):
            words.append(str(field)[:_MAX_SHOWN_LENGTH])
    return " ".join(words)


def _describe_value(value: Any) -> str:
    """Describe a bad value for an error message.

    An int or a float is shown as it is. For any other value, only the type is
    shown, because the value could be a secret.
    """
    if isinstance(value, (int, float)):
        return repr(value)
    return type(value).__name__


def _is_long(text: str) -> bool:
    """Return whether a text is so long that it could be a secret key."""
    return len(text) >= _MIN_HIDDEN_LENGTH


def _hide_long(text: str) -> str:
    """Return the text, or "(a long text)" if it could be a secret key."""
    return "(a long text)" if _is_long(text) else text


def _quoted(text: str) -> str:
    """Return repr(text), or "(a long text)" if it could be a secret key."""
    return "(a long text)" if _is_long(text) else repr(text)


# Many functions have an argument named place. It says where a value is, for
# example params[0].price. Error messages begin with it.


def _check_str(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{place}: pass a str, not {type(value).__name__}")


def _plain_str(text: str) -> str:
    """Return a plain str with the same characters, even for a subclass of str.

    str(text) would call the __str__ of the subclass, which could return a
    different text from the one that was checked. str.__str__(text) always
    returns the characters of text itself, as a plain str.
    """
    return str.__str__(text)


# --- 1. Canonical string: needs no key and no clock ---
#
# First the parameters are normalized: they are converted to dict, list, str,
# int and bool, and every None is left out. The signed text and the request
# that is sent are both made from the normalized values, so they agree. There
# is one exception: an empty list is in the JSON body, but not in the signed
# text. (A list is signed as one pair for each item, so an empty list gives no
# pair.)

_INSTRUCTION_PATTERN = re.compile("[A-Za-z0-9]+")

# Used for the JSON body, and to sign a parameter whose value is a mapping.
_JSON_ENCODER = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), sort_keys=True
)


def _needs_no_conversion(mapping: Dict[Any, Any]) -> bool:
    """Return True if nothing needs to be converted or checked.

    This means that every name is an ASCII str, and that every value is an int,
    a bool or an ASCII str.
    """
    for name, value in mapping.items():
        # type() and not isinstance(), because a subclass needs conversion.
        # Text that is not ASCII could have surrogates, so _normalize_text must
        # check it.
        if type(name) is not str or not name.isascii():
            return False
        if type(value) is str:
            if not value.isascii():
                return False
        elif type(value) not in (int, bool):
            return False
    return True


def _normalize_mapping(mapping: object, place: str) -> Dict[str, Any]:
    """Return the normalized names and values of a mapping."""
    if not isinstance(mapping, collections.abc.Mapping):
        raise TypeError(
            f"{place}: pass a mapping of names to values, "
            f"not {type(mapping).__name__}"
        )
    if type(mapping) is dict:
        # Copy a plain dict, because another thread could change it. (Copying
        # is one step, which no other thread can interrupt.)
        mapping = dict(mapping)
        if _needs_no_conversion(mapping):  # a shortcut, for speed
            return mapping
    return _normalize_items(mapping, place)


def _normalize_items(mapping: Mapping[Any, Any], place: str) -> Dict[str, Any]:
    """Return normalized names and values, without values that are None."""
    names = set()  # all names, also those whose value is None
    normalized = {}
    for name, value in mapping.items():
        name = _normalize_name(name, place)
        # items() of a custom mapping, such as a multidict, may repeat a name.
        if name in names:
            raise ValueError(f"{place}: pass each name only once")
        names.add(name)
        value = _normalize_value(value, f"{place}.{_hide_long(name)}")
        if value is not None:
            normalized[name] = value
    return normalized


def _normalize_name(name: Any, place: str) -> str:
    """Return the normalized name of a parameter."""
    if not isinstance(name, str):
        raise TypeError(
            f"{place}: pass names as str, not {_describe_value(name)}"
        )
    return _normalize_text(name, f"{place}, name {_quoted(name)}")


def _normalize_value(value: Any, place: str) -> Any:
    """Return the normalized value, or None if it is to be left out."""
    # This test comes first, because an Enum member may also be a str or int.
    if isinstance(value, Enum):
        return _normalize_value(value.value, place)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _normalize_text(value, place)
    if isinstance(value, int):
        return int.__int__(value)  # a plain int (see _plain_str)
    if isinstance(value, Decimal):
        return _normalize_decimal(value, place)
    if isinstance(value, (list, tuple)):
        return _normalize_list(value, place)
    if isinstance(value, collections.abc.Mapping):
        return _normalize_mapping(value, place)
    if isinstance(value, float):
        raise TypeError(
            f"{place}: pass a str or Decimal, not the float {value!r}, "
            "because floats are not exact (0.1 + 0.2 is not 0.3)"
        )
    raise TypeError(
        f"{place}: pass a str, bool, int, Decimal, Enum member, list or "
        f"mapping, not {type(value).__name__}"
    )


def _normalize_text(text: str, place: str) -> str:
    """Return the text as a plain str; raise if UTF-8 cannot encode it."""
    text = _plain_str(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}: pass text that UTF-8 can encode, without surrogates"
        ) from None
    return text


def _normalize_decimal(value: Decimal, place: str) -> str:
    """Return the text of a Decimal: 0.00000001 and not 1E-8."""
    number = Decimal(value)  # a plain Decimal, even from a subclass
    if not number.is_finite():
        raise ValueError(f"{place}: pass a finite number, not {number}")
    # adjusted() is the exponent in scientific notation, for example 2 for 123
    # (1.23E+2). Without a limit, 1E+999999999 would become a billion digits.
    exponent = number.adjusted()
    if abs(exponent) >= 1000:
        raise ValueError(
            f"{place}: pass an exponent from -999 to +999, not {exponent:+}"
        )
    return format(number, "f")


def _normalize_list(items: Any, place: str) -> List[Any]:
    """Return the normalized items, without those that are None.

    Raise if an item is a list or a mapping.
    """
    normalized = []
    for index, item in enumerate(items):
        value = _normalize_value(item, f"{place}[{index}]")
        if isinstance(value, (list, dict)):
            raise TypeError(
                f"{place}[{index}]: pass only single values in a list, "
                f"not {type(item).__name__}"
            )
        if value is not None:
            normalized.append(value)
    return normalized


def _normalize_params(params: Any) -> List[Dict[str, Any]]:
    """Return the normalized params as a list of mappings.

    For a batch, the list has one mapping for each order. If params is not a
    batch, the list has exactly one mapping.
    """
    try:
        if isinstance(params, (list, tuple)):
            mappings = [
                _normalize_mapping(mapping, f"params[{index}]")
                for index, mapping in enumerate(params)
            ]
        else:
            mapping = {} if params is None else params
            mappings = [_normalize_mapping(mapping, "params")]
    except RecursionError:
        # RecursionError is caught first, because it is a RuntimeError, too.
        raise ValueError("params: pass fewer levels of nesting") from None
    except RuntimeError as error:
        # Most mappings raise RuntimeError if another thread changes them while
        # they are read. (A plain dict is safe, because _normalize_mapping
        # copies it.)
        raise ValueError(
            f"params: pass a copy that no other thread changes ({error})"
        ) from None
    if not mappings:
        raise ValueError("params: pass at least one order in a batch")
    return mappings


def _name_value_pairs(mapping: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Return (name, text) pairs, sorted by name.

    A list gives one pair for each item. Any other value gives one pair.
    """
    pairs = []
    for name in sorted(mapping):
        value = mapping[name]
        if isinstance(value, str):
            # Most values are str. It is faster not to call _value_text.
            pairs.append((name, value))
        elif isinstance(value, list):
            # The exchange does not document how a list is signed. This
            # implementation assumes one pair for each item: a=1&a=2. Public
            # operations take lists in this form, and most other clients sign
            # lists in this form.
            pairs.extend([(name, _value_text(item)) for item in value])
        else:
            pairs.append((name, _value_text(value)))
    return pairs


def _value_text(value: Any) -> str:
    """Return the text of a normalized value that is not a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # The exchange does not document how a mapping is signed. This
    # implementation assumes compact JSON, like the exchange's Rust client.
    return _JSON_ENCODER.encode(value)


def _make_canonical_string(
    instruction: str,
    mappings: List[Dict[str, Any]],
    timestamp: int,
    window: int,
) -> str:
    """Return the canonical string of normalized mappings."""
    if not (
        isinstance(instruction, str)
        and _INSTRUCTION_PATTERN.fullmatch(instruction)
    ):
        raise ValueError(
            "instruction: pass only letters and digits, as in 'orderExecute'"
        )
    instruction = _plain_str(instruction)
    if type(timestamp) is not int or timestamp < 0:
        raise ValueError(
            "timestamp: pass an int of milliseconds since 1970, "
            f"not {_describe_value(timestamp)}"
        )
    if type(window) is not int or not 1 <= window <= MAX_WINDOW:
        raise ValueError(
            f"window: pass an int from 1 to {MAX_WINDOW} milliseconds, "
            f"not {_describe_value(window)}"
        )
    # instruction=<instruction>&<name>=<value>&...&timestamp=<ms>&window=<ms>
    # In a batch, each order begins with its own instruction=<instruction>.
    parts = []
    for mapping in mappings:
        parts.append(f"instruction={instruction}")
        pairs = _name_value_pairs(mapping)
        parts += [f"{name}={text}" for name, text in pairs]
    parts.append(f"timestamp={timestamp}")
    parts.append(f"window={window}")
    return "&".join(parts)


def canonical_string(
    instruction: str,
    params: Params,
    timestamp: int,
    window: int = DEFAULT_WINDOW,
) -> str:
    """Return the text that is signed.

    instruction is the exchange's name for the operation, such as
    "orderExecute". params is a mapping, or a list of mappings for a batch of
    orders, or None if there are no parameters. A parameter that is None is
    left out, and so is a None in a list of values. timestamp (Unix time) and
    window are in milliseconds.

    In the text of a batch, each order has its own instruction=..., followed by
    its parameters. The timestamp and the window come once, at the end.

    The exchange does not document how a list or a mapping within params is
    signed; the form used here is an assumption.

    Nothing in the text is escaped. Therefore {"a": "1&b=2"} gives the same
    text as {"a": "1", "b": "2"}: never put untrusted text into names or
    values.

    Raises TypeError or ValueError for arguments that cannot be signed.
    Source: docs.backpack.exchange, "Signature Generation".
    """
    mappings = _normalize_params(params)
    return _make_canonical_string(instruction, mappings, timestamp, window)


# --- 2. Signature: needs the key, and the clock if no timestamp is passed ---


def _to_base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _from_base64(text: str) -> Optional[bytes]:
    """Return the bytes, or None if the text is not strictly base64."""
    try:
        data = binascii.a2b_base64(text)
    except ValueError:
        return None
    # a2b_base64 skips characters that are not base64. To detect that, encode
    # the data again and compare.
    return data if _to_base64(data) == text else None


# Cached, because loading a key takes as long as signing a request.
@functools.lru_cache(maxsize=8)
def _load_key(secret_key: str) -> Tuple[Any, str]:
    """Return the nacl.signing.SigningKey for a secret key, and the API key.

    The API key is the base64 of the public key.
    """
    try:
        from nacl.signing import SigningKey
    except ImportError as error:
        raise ImportError("to sign requests, pip install PyNaCl") from error
    seed = _from_base64(secret_key)
    if seed is None:
        raise ValueError(
            "secret_key: pass the base64 of 32 bytes; the "
            f"{len(secret_key)} characters that were passed are not base64"
        )
    if len(seed) != 32:
        raise ValueError(
            "secret_key: pass the base64 of 32 bytes; what was passed is the "
            f"base64 of {len(seed)} bytes"
        )
    signing_key = SigningKey(seed)
    return signing_key, _to_base64(bytes(signing_key.verify_key))


def _sign(
    instruction: str,
    mappings: List[Dict[str, Any]],
    secret_key: Any,
    timestamp: Optional[int],
    window: int,
) -> Dict[str, str]:
    """Return the four headers for normalized mappings."""
    if timestamp is None:
        timestamp = time.time_ns() // 1_000_000
    text = _make_canonical_string(instruction, mappings, timestamp, window)
    _check_str(secret_key, "secret_key")
    secret_key = _plain_str(secret_key).strip()
    signing_key, api_key = _load_key(secret_key)
    signature = signing_key.sign(text.encode()).signature
    return {
        "X-API-Key": api_key,
        "X-Signature": _to_base64(signature),
        "X-Timestamp": str(timestamp),
        "X-Window": str(window),
    }


def sign_request(
    instruction: str,
    params: Params,
    secret_key: str,
    *,
    timestamp: Optional[int] = None,
    window: int = DEFAULT_WINDOW,
) -> Dict[str, str]:
    """Return the headers X-API-Key, X-Signature, X-Timestamp and X-Window.

    secret_key is the base64 of the 32-byte Ed25519 seed, as the exchange's
    settings page shows it; white space around it is ignored. The API key is
    the base64 of the public key that belongs to this seed. The module keeps
    the last eight keys in memory. timestamp (by default now) and window are in
    milliseconds. For instruction and params, see canonical_string.

    If you build the request yourself, send exactly what was signed: write a
    Decimal as 0.00000001 and not as 1E-8, and leave out every parameter that
    is None. build_request does this for you.

    Raises TypeError or ValueError for arguments that cannot be signed, and
    for a bad secret_key. No error message contains secret_key. Raises
    ImportError if PyNaCl is not installed.

    Source: docs.backpack.exchange, "Signature Generation".
    """
    mappings = _normalize_params(params)
    return _sign(instruction, mappings, secret_key, timestamp, window)


# --- 3. Request: built here, and sent by send or by another client ---

_METHOD_PATTERN = re.compile("[A-Za-z]+")
_PATH_PATTERN = re.compile("[A-Za-z0-9_./~%-]+")
_BASE_URL_PATTERN = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])"  # a name or [IPv6 address]
    r"(:(?P<port>[0-9]{1,5}))?"
    r"(/[A-Za-z0-9_.~-]+)*"  # a path
    r"/?"
)
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HEADER_NAME_PATTERN = re.compile("[A-Za-z0-9-]+")
_HEADER_VALUE_PATTERN = re.compile("[ -~]*")  # printable ASCII
_RESERVED_HEADERS = (  # Callers must not set these.
    "accept-encoding",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "x-api-key",
    "x-signature",
    "x-timestamp",
    "x-window",
)


def _normalize_method(method: Any) -> str:
    """Return the method in upper case."""
    _check_str(method, "method")
    if not _METHOD_PATTERN.fullmatch(method):
        raise ValueError(
            f"method: pass a word, such as 'GET', not {_quoted(method)}"
        )
    return _plain_str(method).upper()


def _normalize_path(value: Any) -> str:
    """Return the path as a plain str; raise if it is not valid."""
    _check_str(value, "path")
    path = _plain_str(value)
    if "://" in path or path.startswith("//"):
        # The message does not show the URL, because it could hold a password.
        raise ValueError(
            "path: pass only the path of the URL, such as '/api/v1/order'; "
            "pass the scheme and host as base_url"
        )
    if "?" in path:
        raise ValueError(
            f"path: pass the query as params, not within {_quoted(path)}"
        )
    if not path.startswith("/"):
        raise ValueError(
            "path: begin with a slash, as in '/api/v1/order', "
            f"not {_quoted(path)}"
        )
    if not _PATH_PATTERN.fullmatch(path):
        raise ValueError(
            "path: use only letters, digits and -._~%/ in a path, "
            f"not {_quoted(path)}"
        )
    return path


def _normalize_base_url(base_url: Any) -> str:
    """Return the base URL without the slash at its end."""
    # No message shows the URL, because it could hold a password.
    _check_str(base_url, "base_url")
    match = _BASE_URL_PATTERN.fullmatch(base_url)
    if match is None:
        raise ValueError(
            "base_url: pass https://HOST, with a port and a path if needed"
        )
    if match["scheme"] == "http" and match["host"] not in _LOOPBACK_HOSTS:
        raise ValueError(
            "base_url: pass https; http is allowed only for localhost, "
            "127.0.0.1 and [::1]"
        )
    if match["port"] is not None and not 1 <= int(match["port"]) <= 65535:
        raise ValueError(
            f"base_url: pass a port from 1 to 65535, not {match['port']}"
        )
    return _plain_str(base_url).rstrip("/")


def _normalize_headers(headers: Any) -> Dict[str, str]:
    """Return the headers of the caller, with lower-case names."""
    if headers is None:
        return {}
    if not isinstance(headers, collections.abc.Mapping):
        raise TypeError(
            f"headers: pass a mapping, not {type(headers).__name__}"
        )
    normalized = {}
    # Read a copy, because another thread could change the headers.
    for name, value in list(headers.items()):
        # No message shows a value, because it could be a secret.
        if not (
            isinstance(name, str) and _HEADER_NAME_PATTERN.fullmatch(name)
        ):
            raise ValueError(
                "headers: pass names of letters, digits and hyphens"
            )
        place = f"header {_hide_long(name)}"
        lower_name = _plain_str(name).lower()
        if lower_name in _RESERVED_HEADERS:
            raise ValueError(f"{place}: leave it out, because it is reserved")
        if lower_name in normalized:
            raise ValueError(f"{place}: pass it only once")
        _check_str(value, place)
        if not _HEADER_VALUE_PATTERN.fullmatch(value):
            raise ValueError(f"{place}: pass printable ASCII text")
        normalized[lower_name] = _plain_str(value)
    return normalized


def _find_instruction(
    method: str, path: str, instruction: Optional[str]
) -> Optional[str]:
    """Return the instruction to sign with, or None for a public request."""
    if instruction is not None:
        return instruction
    return INSTRUCTIONS.get(f"{method} {path}")


def _check_key_use(
    method: str, path: str, instruction: Optional[str], secret_key: Any
) -> None:
    """Raise if a signed request has no key, or a public request has a key."""
    operation = f"{_hide_long(method)} {_hide_long(path)}"
    if instruction is not None and secret_key is None:
        raise ValueError(f"{operation} must be signed: pass secret_key")
    if instruction is None and secret_key is not None:
        raise ValueError(
            f"{operation} is not a known signed operation: "
            "pass instruction, or leave out secret_key"
        )


def _query_string(mapping: Dict[str, Any]) -> str:
    """Return "?" and the query, or "" if there are no parameters."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            raise TypeError(
                f"params.{_hide_long(name)}: pass a single value or a "
                "list, not a mapping, because GET sends it in a query"
            )
    pairs = _name_value_pairs(mapping)
    if not pairs:
        return ""
    # By default, urlencode writes a space as +. With quote, it writes %20.
    return "?" + urllib.parse.urlencode(pairs, quote_via=urllib.parse.quote)


def _make_request(
    method: str, url: str, headers: Dict[str, str], params_to_send: Any
) -> Request:
    """Return a request with params in its query (GET) or its JSON body.

    params_to_send is a dict, or a list for a batch (never with GET).
    """
    if method == "GET":
        return Request(url + _query_string(params_to_send), headers=headers)
    # If there are no params, params_to_send is {}, and the body is "{}".
    json_text = _JSON_ENCODER.encode(params_to_send)
    content_type = {"Content-Type": "application/json; charset=utf-8"}
    all_headers = {**headers, **content_type}
    return Request(url, json_text.encode(), all_headers, method=method)


def build_request(
    method: str,
    path: str,
    params: Params = None,
    *,
    secret_key: Optional[str] = None,
    instruction: Optional[str] = None,
    timestamp: Optional[int] = None,
    window: int = DEFAULT_WINDOW,
    base_url: str = BASE_URL,
    headers: Optional[Mapping[str, str]] = None,
) -> Request:
    """Return the whole request: its method, URL, headers and body.

    GET sends params in its query, every other method in a JSON body. If
    instruction is passed, or INSTRUCTIONS has one for method and path, the
    request is signed, and secret_key is required. Otherwise it is public:
    secret_key must be None, and timestamp and window are not used. base_url
    must be https, or http to this machine. The passed headers are not signed.
    Raises TypeError or ValueError for bad arguments, and ImportError if
    PyNaCl is needed and not installed.
    """
    method = _normalize_method(method)
    path = _normalize_path(path)
    url = _normalize_base_url(base_url) + path
    all_headers = _normalize_headers(headers)  # their names in lower case
    all_headers.setdefault("user-agent", f"bpx.py/{__version__}")
    mappings = _normalize_params(params)
    is_batch = isinstance(params, (list, tuple))
    if is_batch and method == "GET":
        raise TypeError("params: pass one mapping to GET, not a batch")
    instruction = _find_instruction(method, path, instruction)
    _check_key_use(method, path, instruction, secret_key)
    if instruction is not None:
        signed = _sign(instruction, mappings, secret_key, timestamp, window)
        all_headers.update(signed)
    # A batch is sent as a list, even if it has only one order. If params is
    # not a batch, mappings has exactly one item.
    params_to_send: Any = mappings if is_batch else mappings[0]
    return _make_request(method, url, all_headers, params_to_send)


# --- 4. Transport: sends a request once, and keeps the connection ---
#
# This part uses http.client and not urllib.request.urlopen, because urlopen
# - opens a new connection for each request, which takes two more round trips
#   (one for TCP and one for TLS),
# - follows redirects, and so could send the signature to another host,
# - has no limit for the total time of a response.
#
# Each thread keeps one idle connection for each scheme, host and port. It is
# closed when the thread ends. If it was idle for MAX_IDLE, or if the server
# has closed it or sent something on it, the next request closes it and opens
# another one. After a failure, a connection is never kept, because a late
# response could be mistaken for the response to the next request.
#
# Only the socket is kept. All other objects are new for each request:
#   sending:    request -> _RequestWriter -> socket
#   receiving:  socket -> _ResponseStream -> _ReadBuffer -> HTTPResponse
#
# A server could send extra bytes after a response. They must not be mistaken
# for the next response:
# - Extra bytes in the _ReadBuffer do no harm, because each response has its
#   own buffer, which is discarded after the response.
# - Extra bytes in the socket are found by _is_stale before the next request.
#   Then the connection is closed.
# One case remains: extra bytes that come after this check cannot be
# distinguished from the next response.


class Response(NamedTuple):
    """A response. Its status is 200 or higher.

    The names of headers are not case-sensitive. A compressed body is already
    decompressed, although the headers still have its Content-Encoding.
    """

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class _ResponseStream(io.RawIOBase):
    """The stream from which an HTTPResponse reads.

    socket -> _ResponseStream -> _ReadBuffer -> HTTPResponse

    It differs from sock.makefile() in two ways:
    - A single time limit covers the whole response. (With makefile(), the
      timeout is for each read, so a slow server could make a response last
      forever.)
    - If the server closes the connection before the response is complete,
      reading raises EOFError. (With makefile(), reading just ends, and
      http.client may accept a response that is cut off.)

    If a body has neither a Content-Length nor chunks, the server ends it by
    closing the connection. To receive such a body, call accept_close().

    HTTPResponse closes the stream at the end of the body. Closing the stream
    does not close the socket, so the socket can be used again.
    """

    def __init__(self, sock: Any, timeout: float) -> None:
        self._sock = sock
        self._deadline = time.monotonic() + timeout
        self._is_close_accepted = False

    def readable(self) -> bool:  # _ReadBuffer requires this.
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive bytes into the buffer, and return their number.

        _ReadBuffer calls this when it needs more bytes of the response. If the
        server has closed the connection, raise EOFError, or return 0 if
        accept_close() was called.
        """
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(remaining)
        size: int = self._sock.recv_into(buffer)
        if size == 0 and not self._is_close_accepted:
            raise EOFError(
                "the connection was closed before the response ended"
            )
        return size

    def accept_close(self) -> None:
        """From now on, treat a closed connection as the end of the body."""
        self._is_close_accepted = True


# A carriage return that is followed by a byte other than a line feed.
_BARE_CARRIAGE_RETURN = re.compile(rb"\r(?=[^\n])")


class _ReadBuffer(io.BufferedReader):
    """The read buffer between a _ResponseStream and an HTTPResponse."""

    def readline(self, limit: Optional[int] = -1) -> bytes:
        """Return a line. Replace each bare carriage return in it by a space.

        readline ends a line at a line feed. http.client then passes the header
        lines to Python's e-mail parser, which would also end a line at a bare
        carriage return. So without the replacement, one header line could
        become two headers. RFC 9112, section 2.2, allows the replacement.

        HTTPResponse calls readline for the status line, the header lines and
        the lines between chunks. It reads the body with other methods, so the
        body is not changed.
        """
        return _BARE_CARRIAGE_RETURN.sub(b" ", super().readline(limit))


class _FakeSocket:
    """What an HTTPResponse gets in place of a socket.

    makefile is the only method of a socket that HTTPResponse uses.
    """

    def __init__(self, stream: _ResponseStream, buffer_size: int) -> None:
        self._stream = stream
        self._buffer_size = buffer_size

    def makefile(self, mode: str) -> _ReadBuffer:
        """Return the stream with a read buffer. (mode is always "rb".)"""
        return _ReadBuffer(self._stream, self._buffer_size)


def _make_http_response(
    stream: _ResponseStream,
    method: str,
    buffer_size: int = io.DEFAULT_BUFFER_SIZE,
) -> http.client.HTTPResponse:
    """Return a response that will be read from the stream."""
    fake_socket: Any = _FakeSocket(stream, buffer_size)
    # If a user sets HTTPConnection.debuglevel = 1, http.client prints each
    # request. Pass the level on, so that it prints responses, too.
    debuglevel = http.client.HTTPConnection.debuglevel
    return http.client.HTTPResponse(fake_socket, debuglevel, method)


class _RequestWriter(http.client.HTTPConnection):
    """Writes a request to a socket that is already connected.

    Call only request() on it. It never connects or closes the socket, and
    never reads from it. It is a plain HTTPConnection even for https, because
    the socket already does TLS.
    """

    def __init__(self, sock: Any) -> None:
        # The host does not matter, because the socket is already connected,
        # and _headers_to_send gives the header Host.
        super().__init__("unused")
        self.sock = sock  # HTTPConnection connects only if this is None.


def _headers_to_send(request: Request) -> Dict[str, str]:
    """Return the headers of a request, with Accept-Encoding and Host.

    build_request never sets these two headers, and does not let the caller set
    them (see _RESERVED_HEADERS). Without this function, http.client would send
    "Accept-Encoding: identity" and "Host: unused". http.client itself adds
    Content-Length.
    """
    return {
        **request.headers,
        "Accept-Encoding": "gzip" if _HAS_ZLIB else "identity",
        "Host": request.host,  # A _RequestWriter does not know the host.
    }


@functools.lru_cache()  # because loading certificates takes long
def _tls_context() -> Any:
    """Return the ssl.SSLContext for all connections."""
    import ssl  # Imported here, because some Pythons are built without it.

    return ssl.create_default_context()


_PROXY_PATTERN = re.compile(
    r"(http://)?"
    r"((?P<credentials>[^/]+)@)?"  # USER:PASSWORD, or only USER
    r"(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])"  # a name or [IPv6 address]
    r"(:(?P<port>[0-9]{1,5}))?"
    r"/?",
    re.IGNORECASE,
)


class _Proxy(NamedTuple):
    address: str  # HOST:PORT
    headers: Dict[str, str]  # sent to the proxy, and not to the exchange


def _find_proxy(host: str) -> Optional[_Proxy]:
    """Return the proxy for https requests to a host, or None for no proxy.

    host is HOST or HOST:PORT. The proxy comes from the environment or the
    settings of the system.
    """
    proxy_url = urllib.request.getproxies().get("https")
    if proxy_url is None or urllib.request.proxy_bypass(host):
        return None
    match = _PROXY_PATTERN.fullmatch(proxy_url)
    if match is None:
        # The message does not show the URL, because it could hold a password.
        raise ValueError(
            "https_proxy: set it to http://HOST:PORT or to "
            "http://USER:PASSWORD@HOST:PORT; other proxies are not supported"
        )
    headers = {}
    if match["credentials"]:
        user, _, password = match["credentials"].partition(":")
        user = urllib.parse.unquote(user)
        password = urllib.parse.unquote(password)
        basic = _to_base64(f"{user}:{password}".encode())
        headers["Proxy-Authorization"] = f"Basic {basic}"
    port = match["port"] or 80  # the port of http
    return _Proxy(f"{match['host']}:{port}", headers)


def _write_connect(
    connection: http.client.HTTPConnection, target: str, proxy: _Proxy
) -> None:
    """Send a CONNECT request for the target (HOST:PORT) to the proxy."""
    # putrequest would send the Host of the proxy. Skip it, and send the Host
    # of the target below.
    connection.putrequest(
        "CONNECT", target, skip_host=True, skip_accept_encoding=True
    )
    connection.putheader("Host", target)
    for name, value in proxy.headers.items():
        connection.putheader(name, value)
    connection.endheaders()


def _read_connect_status(sock: Any, timeout: float) -> int:
    """Return the status of the response to a CONNECT request."""
    stream = _ResponseStream(sock, timeout)
    # With a buffer of one byte, nothing after the headers is taken from the
    # socket. What follows belongs to TLS.
    response = _make_http_response(stream, "CONNECT", buffer_size=1)
    response.begin()  # receives the status and the headers
    # The body of the response is not needed. Deleting the response does not
    # close the socket.
    return response.status


def _host_and_port(request: Request) -> str:
    """Return HOST:PORT of an https request."""
    if urllib.parse.urlsplit(request.full_url).port is None:
        return f"{request.host}:443"
    return request.host  # already HOST:PORT


def _open_tunnel(
    request: Request, proxy: _Proxy, context: Any, timeout: float
) -> Any:
    """Return a TLS socket to the host of a request, through a proxy.

    HTTPConnection.set_tunnel is not used, because its timeout is for each
    read, so a slow proxy could take forever to respond.
    """
    # TLS needs the name of the host without its port.
    server_name = urllib.parse.urlsplit(request.full_url).hostname
    connection = http.client.HTTPConnection(proxy.address, timeout=timeout)
    connection.connect()
    sock = connection.sock
    try:
        _write_connect(connection, _host_and_port(request), proxy)
        status = _read_connect_status(sock, timeout)
        if status != 200:
            raise OSError(f"the proxy responded with status {status}")
        # Restore the socket's timeout, which _ResponseStream has shortened.
        sock.settimeout(timeout)
        return context.wrap_socket(sock, server_hostname=server_name)
    except BaseException:
        sock.close()
        raise


def _connect(request: Request, timeout: float) -> Any:
    """Return a socket that is connected to the host of a request."""
    if request.type == "http":
        # build_request allows http only to this machine, so http needs no TLS
        # and no proxy.
        connection = http.client.HTTPConnection(request.host, timeout=timeout)
    else:
        context = _tls_context()
        proxy = _find_proxy(request.host)
        if proxy is not None:
            return _open_tunnel(request, proxy, context, timeout)
        connection = http.client.HTTPSConnection(
            request.host, timeout=timeout, context=context
        )
    connection.connect()
    return connection.sock  # It stays open when the connection is deleted.


def _is_stale(sock: Any) -> bool:
    """Return True if an idle connection should not be used again.

    Nothing should arrive on an idle connection. If there is something to read,
    the reason is one of these:
    - The server has closed the connection.
    - The server has sent bytes that answer no request.
    - A TLS session ticket has come after the response. This is harmless, but
      cannot be distinguished from the other two. Opening another connection
      only costs some time.
    """
    # Only a TLS socket has pending(). Such a socket may hold decrypted bytes,
    # which a selector does not see.
    if hasattr(sock, "pending") and sock.pending():
        return True
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            readable = selector.select(timeout=0)  # does not wait
            return len(readable) > 0
    except (OSError, ValueError):
        # The check was not possible: the socket was closed elsewhere, or the
        # selector could not be opened, because too many files are open.
        return True


class _IdleConnections:
    """The idle connections of one thread, one for each endpoint.

    _ThreadLocal (below) creates this object for each thread. When the thread
    ends, Python deletes the object.

    An endpoint is the tuple (process id, scheme, HOST or HOST:PORT). The
    process id is there so that a forked child does not use the connections of
    its parent.
    """

    def __init__(self) -> None:
        # For each endpoint: the socket, and the time.monotonic() at which it
        # became idle.
        self._by_endpoint: Dict[Any, Tuple[Any, float]] = {}

    def take(self, endpoint: Any) -> Any:
        """Remove and return the socket for an endpoint.

        Return None if there is none. If the socket is too old or stale, close
        it and return None.
        """
        if endpoint not in self._by_endpoint:
            return None
        sock, idle_since = self._by_endpoint.pop(endpoint)
        idle_time = time.monotonic() - idle_since
        if idle_time >= MAX_IDLE or _is_stale(sock):
            sock.close()
            return None
        return sock

    def put(self, endpoint: Any, sock: Any) -> None:
        """Keep a connected socket for the next request to its endpoint."""
        # take() has already removed the previous socket of this endpoint.
        self._by_endpoint[endpoint] = (sock, time.monotonic())

    def __del__(self) -> None:
        # Python would close the sockets, too, but with a ResourceWarning.
        for sock, _ in self._by_endpoint.values():
            sock.close()


class _ThreadLocal(threading.local):
    """Gives each thread its own idle_connections."""

    def __init__(self) -> None:  # Python calls this once in each thread.
        self.idle_connections = _IdleConnections()


_thread_local = _ThreadLocal()


def _is_error(status: int) -> bool:
    """Return whether a response with this status is an error."""
    return status >= 300


def _check_body_size(body: Union[bytes, bytearray]) -> None:
    if len(body) > MAX_BODY:
        raise http.client.HTTPException("the body is larger than MAX_BODY")


def _check_header_lines(headers: http.client.HTTPMessage) -> None:
    """Raise if a header line is malformed.

    http.client does not raise for such a line. It adds an entry to
    headers.defects.
    """
    if headers.defects:
        raise http.client.HTTPException("a header is malformed")


def _check_length_headers(headers: http.client.HTTPMessage) -> None:
    """Raise if more than one header says where the body ends.

    Two such headers could contradict each other.
    """
    content_lengths = headers.get_all("Content-Length", [])
    transfer_encodings = headers.get_all("Transfer-Encoding", [])
    if len(content_lengths) + len(transfer_encodings) > 1:
        raise http.client.HTTPException(
            "more than one header says where the body ends"
        )


def _has_known_end(response: http.client.HTTPResponse) -> bool:
    """Return whether the response shows where its body ends.

    If it does not, the body ends when the server closes the connection, and
    nothing shows whether the body was cut off.
    """
    if response.chunked:
        return True
    # http.client sets length to 0 if there can be no body (as for a 204), to
    # None if Content-Length is missing or not valid, and otherwise to the
    # Content-Length.
    return response.length is not None


def _read_to_end(response: http.client.HTTPResponse) -> bytes:
    """Return all bytes of the body; raise if they are more than MAX_BODY."""
    body = bytearray()
    part = bytearray(65536)
    while True:
        size = response.readinto(part)
        # 0 means the end of the body. If the connection is closed before the
        # end, _ResponseStream raises EOFError. (After accept_close(), a closed
        # connection is the end of the body.)
        if size == 0:
            return bytes(body)
        body += part[:size]
        _check_body_size(body)


def _read_raw_body(
    response: http.client.HTTPResponse, stream: _ResponseStream
) -> bytes:
    """Return the body as it was received, perhaps compressed.

    Raise if a header is malformed, if more than one header says where the body
    ends, or if the body of a success has no known end.
    """
    _check_header_lines(response.headers)
    _check_length_headers(response.headers)
    if not _has_known_end(response):
        # The body ends when the server closes the connection, so it could be
        # cut off. That is acceptable for an error, but not for a success.
        if not _is_error(response.status):
            raise http.client.HTTPException(
                "nothing shows where the body ends, so it could be incomplete"
            )
        stream.accept_close()
    return _read_to_end(response)


def _decompress(data: bytes) -> bytes:
    """Return the decompressed bytes of one gzip stream.

    Bytes after its end are refused, even if they are a second stream.
    """
    decompressor = zlib.decompressobj(31)  # 31 selects the gzip format.
    # Decompress at most one byte more than the limit. This is enough to see
    # that a body is too large, without decompressing all of it.
    body = decompressor.decompress(data, MAX_BODY + 1)
    _check_body_size(body)
    if not decompressor.eof or decompressor.unused_data:
        raise http.client.HTTPException(
            "the gzip data is cut off, or has extra bytes after its end"
        )
    return body


def _read_body(
    response: http.client.HTTPResponse, stream: _ResponseStream
) -> bytes:
    """Return the decompressed body; raise an error if it cannot be read."""
    raw_body = _read_raw_body(response, stream)
    encodings = response.headers.get_all("Content-Encoding", [])
    # If there are several of these headers, they are joined. A text such as
    # "gzip, gzip" is refused below, because it is not "gzip".
    encoding = ", ".join(encodings).strip().lower()
    if encoding in ("", "identity"):
        return raw_body
    if encoding != "gzip" or not _HAS_ZLIB:
        raise http.client.HTTPException(
            f"Content-Encoding {encoding} is not supported"
        )
    if not raw_body:  # such as a 204 with a Content-Encoding
        return b""
    return _decompress(raw_body)


def _read_error_body(
    response: http.client.HTTPResponse, stream: _ResponseStream
) -> Optional[bytes]:
    """Return the body of an error, or None if it cannot be read.

    The status alone is enough to report the error.
    """
    try:
        return _read_body(response, stream)
    except Exception:
        return None


def _is_reusable(
    response: http.client.HTTPResponse, body: Optional[bytes]
) -> bool:
    """Return whether the connection can be used for another request."""
    if body is None:
        # The body could not be read. What remains of it could be mistaken for
        # the next response.
        return False
    if response.status == 408:
        # 408 implies that the server has decided to close the connection, even
        # if it does not say so with a header (RFC 7231, section 6.5.7).
        return False
    # will_close is True if the server has said that it closes the connection,
    # and also if the body has no known end (see _has_known_end).
    return not response.will_close


def _receive(sock: Any, method: str, timeout: float) -> Tuple[Response, bool]:
    """Receive a response to a request with this method.

    Return the response, and whether the connection can be used again.
    """
    stream = _ResponseStream(sock, timeout)
    response = _make_http_response(stream, method)
    response.begin()  # receives the status and the headers
    if response.status < 200:
        # http.client skips the status 100, but not the other 1xx.
        raise http.client.HTTPException(f"unexpected status {response.status}")
    if _is_error(response.status):
        body = _read_error_body(response, stream)
    else:
        body = _read_body(response, stream)
    # If the body could not be read (None), the caller gets b"".
    result = Response(response.status, response.headers, body or b"")
    return result, _is_reusable(response, body)


def _send_and_receive(
    sock: Any, request: Request, timeout: float
) -> Tuple[Response, bool]:
    """Send a request once, and receive its response.

    Return the response, and whether the connection can be used again.
    """
    try:
        method = request.get_method()
        headers = _headers_to_send(request)
        writer = _RequestWriter(sock)
        sock.settimeout(timeout)
        # This sends the headers, and then the body. The timeout starts again
        # for the body.
        writer.request(method, request.selector, request.data, headers)
        return _receive(sock, method, timeout)
    except BaseException:
        sock.close()  # After a failure, a connection is never kept.
        raise


def _check_timeout(timeout: Any) -> None:
    is_bool = isinstance(timeout, bool)  # True and False are also int.
    is_number = isinstance(timeout, (int, float)) and not is_bool
    if not is_number or not 0 < timeout <= 86400:
        raise ValueError(
            "timeout: pass a number of seconds above 0 and at most 86400, "
            f"not {_describe_value(timeout)}"
        )


def send(request: Request, *, timeout: float = DEFAULT_TIMEOUT) -> Response:
    """Send a request once, and return the response.

    Pass the result of build_request. The status is 200 or higher. The body of
    a 2xx response is always complete. For any other status, the body may be
    incomplete or empty.

    timeout is in seconds. It limits each of these steps, not the whole call:
    - connect (the timeout starts again for each address that is tried)
    - send CONNECT to the proxy, if there is one
    - receive the response of the proxy
    - begin TLS, if the URL is https
    - send the headers
    - send the body (over https, the timeout starts again for each 16 KB)
    - receive the whole response
    Looking up the addresses of the host has no timeout.

    Raises NotSentError or UnknownOutcomeError. Raises ValueError if timeout is
    not a number above 0 and at most 86400 (a day). After a KeyboardInterrupt,
    the request may have been executed.
    """
    _check_timeout(timeout)
    endpoint = (os.getpid(), request.type, request.host)
    idle_connections = _thread_local.idle_connections
    try:
        sock = idle_connections.take(endpoint)
        if sock is None:
            sock = _connect(request, timeout)
    except Exception as error:
        raise NotSentError(request, _describe_error(error)) from error
    try:
        response, is_reusable = _send_and_receive(sock, request, timeout)
        if is_reusable:
            idle_connections.put(endpoint, sock)
        else:
            sock.close()
    except Exception as error:
        raise UnknownOutcomeError(request, _describe_error(error)) from error
    return response


# --- 5. Calls: build, send and decode ---


def _decode(body: bytes) -> Any:
    """Return the decoded JSON, or None for an empty body.

    If the body is not JSON, return its text.
    """
    # utf-8-sig removes a byte order mark.
    text = body.decode("utf-8-sig", "replace")
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _decode_or_raise(built: Request, response: Response) -> Any:
    """Return the decoded body of a response, or raise a BPXError."""
    try:
        body = _decode(response.body)
    except Exception as error:  # such as MemoryError
        # The request has been sent, so raise an error that says this.
        raise UnknownOutcomeError(built, _describe_error(error)) from error
    if _is_error(response.status):
        raise APIError(built, response.status, body, response.headers)
    return body


def request(
    method: str,
    path: str,
    params: Params = None,
    *,
    secret_key: Optional[str] = None,
    instruction: Optional[str] = None,
    timestamp: Optional[int] = None,
    window: int = DEFAULT_WINDOW,
    base_url: str = BASE_URL,
    headers: Optional[Mapping[str, str]] = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> Any:
    """Send a request once and return the decoded body of its response.

    Returns the decoded JSON, or a str if the body is not JSON, or None if it
    is empty. timeout is that of send; all other arguments are those of
    build_request.

    If nothing is raised, the status was 2xx. Some orders of a batch may have
    failed even then, so look at each item of the result.

    Raises APIError, NotSentError or UnknownOutcomeError: before you repeat an
    order, look at the attribute outcome_unknown of the error. Any other
    Exception, such as a ValueError for a bad argument, means that nothing was
    sent. After a KeyboardInterrupt, the request may have been executed.
    """
    built = build_request(
        method,
        path,
        params,
        secret_key=secret_key,
        instruction=instruction,
        timestamp=timestamp,
        window=window,
        base_url=base_url,
        headers=headers,
    )
    response = send(built, timeout=timeout)
    return _decode_or_raise(built, response)


def get(path: str, params: Params = None, **options: Any) -> Any:
    """Send a GET request. Options, result and errors: see request."""
    return request("GET", path, params, **options)


def post(path: str, params: Params = None, **options: Any) -> Any:
    """Send a POST request. Options, result and errors: see request."""
    return request("POST", path, params, **options)


def delete(path: str, params: Params = None, **options: Any) -> Any:
    """Send a DELETE request. Options, result and errors: see request."""
    return request("DELETE", path, params, **options)


def patch(path: str, params: Params = None, **options: Any) -> Any:
    """Send a PATCH request. Options, result and errors: see request."""
    return request("PATCH", path, params, **options)


# --- 6. Command line ---

_USAGE = "bpx.py [options] METHOD PATH [name=text | name:=json]..."
_EPILOG = """\
name=text sends a parameter as text. name:=json sends it as a JSON value, and
name:=null leaves it out. Write prices and quantities as text. A request that
must be signed is signed with the secret key in the environment variable
BPX_SECRET_KEY. The body of the response is printed as JSON.

Do not share what --dry-run prints: until timestamp + window has passed, anyone
who has it can send the request.

example:
  python bpx.py --dry-run POST /api/v1/order symbol=SOL_USDC side=Bid \\
      orderType=Limit price=170.50 quantity=1.0 postOnly:=true

exit status:
  0  The HTTP status was 2xx (orders of a batch may have failed even then), or
     a dry run succeeded.
  1  APIError with the HTTP status 3xx or 4xx, but not 408. The request was not
     executed.
  2  Nothing was sent: a wrong argument, a missing key or module, a dry run
     that failed, or an interrupt while the input was read.
  3  NotSentError: the connection could not be made, so nothing was sent.
  4  The exchange may have executed the request: UnknownOutcomeError, APIError
     with the HTTP status 408 or 5xx, an interrupt during the request, or a
     response that could not be printed.
"""
_SHOWN_HEADERS = (
    "User-Agent",
    "X-API-Key",
    "X-Signature",
    "X-Timestamp",
    "X-Window",
    "Content-Type",
)

# File descriptors, as numbers, because sys.stdout.fileno() raises if the
# stream is closed.
_STANDARD_OUTPUT = 1
_STANDARD_ERROR = 2


def _redirect_to_null_device(descriptor: int) -> None:
    """Make a file descriptor discard what is written to it.

    Call this if printing has failed. The text is then still in a buffer.
    Without this call, Python would try to print it once more at exit, fail
    again, and exit with the status 120. Python's documentation recommends such
    a redirection in "Note on SIGPIPE" (module signal).
    """
    with open(os.devnull, "wb") as null_device:
        os.dup2(null_device.fileno(), descriptor)


def _fail(status: int, message: str) -> NoReturn:
    """Print one line on standard error, and exit with a status."""
    line = "bpx.py: " + " ".join(message.split())
    try:
        # sys.stderr is None if it was closed before Python started.
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    except ValueError:
        pass  # sys.stderr was closed after Python started.
    except OSError:
        _redirect_to_null_device(_STANDARD_ERROR)
    sys.exit(status)


def _print_text(text: str, failure_status: int) -> None:
    """Print a text; if that fails, exit with failure_status.

    If the program that reads the text (such as head) has closed the pipe, that
    is not a failure.
    """
    # sys.stdout is None if it was closed before Python started.
    if sys.stdout is None:
        _fail(failure_status, "cannot print: standard output is closed")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _redirect_to_null_device(_STANDARD_OUTPUT)
    except (Exception, KeyboardInterrupt) as error:
        # Text may still be in the buffer.
        _redirect_to_null_device(_STANDARD_OUTPUT)
        _fail(failure_status, f"cannot print: {_describe_error(error)}")


class _ArgumentParser(argparse.ArgumentParser):
    """A parser that prints with _fail and _print_text."""

    def error(self, message: str) -> NoReturn:
        # One of the words could be a secret key.
        words = [_hide_long(word) for word in message.split()]
        _fail(2, f"{' '.join(words)}; usage: {_USAGE}")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse calls this for --help and --version, which both print to
        # standard output, so file is ignored. Errors go through error().
        _print_text(message.rstrip(), failure_status=2)


def _make_parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        usage=_USAGE,
        description="Send a request to Backpack Exchange.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("method", metavar="METHOD", type=str.upper, help="such as GET")
    add("path", metavar="PATH", help="such as /api/v1/order")
    add(
        "pairs", metavar="name=text", nargs="*", default=[], help="a parameter"
    )
    add(
        "--json",
        help="all parameters as a JSON object, or a batch of orders as a "
        "JSON list; pass - to read the JSON from standard input",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the request and its canonical string; send nothing",
    )
    add("--version", action="version", version=f"bpx.py {__version__}")
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of build_request and send."""
    add = parser.add_argument
    add(
        "--instruction",
        metavar="NAME",
        help="sign with this instruction (default: looked up by METHOD and "
        "PATH)",
    )
    add(
        "--window",
        metavar="MS",
        type=int,
        default=DEFAULT_WINDOW,
        help="milliseconds for which a signed request is valid, at most "
        f"{MAX_WINDOW} (default: %(default)s)",
    )
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=DEFAULT_TIMEOUT,
        help="seconds for each step: to connect, to send and to receive "
        "(default: %(default)s)",
    )
    add(
        "--base-url",
        metavar="URL",
        default=BASE_URL,
        help="where to send (default: %(default)s)",
    )


def _dict_of_unique_names(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """Return the dict of these pairs; raise if a name is repeated.

    This is used for the name=text pairs and for each object in JSON. (By
    default, json.loads silently uses the last value of a repeated name.)
    """
    mapping = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"pass the name {_quoted(name)} only once")
        mapping[name] = value
    return mapping


def _parse_json(source: str, text: Union[str, bytes]) -> Any:
    """Return decoded JSON.

    Raise ValueError if it is not valid, has too many levels of nesting, or
    repeats a name in an object.

    source says where the JSON came from; error messages begin with it.
    """
    try:
        return json.loads(text, object_pairs_hook=_dict_of_unique_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{source}: cannot use this JSON ({_describe_error(error)})"
        ) from error


def _parse_pair(pair: str) -> Tuple[str, Any]:
    """Return the name and the value of name=text or name:=json."""
    # Split at the first "=". In name:=json, the name then ends with ":".
    name, separator, text = pair.partition("=")
    is_json = name.endswith(":")
    if is_json:
        name = name[:-1]
    if not name or not separator:
        raise ValueError(f"pass name=text or name:=json, not {_quoted(pair)}")
    # A secret key has 44 characters, and the last one is "=". If a key is
    # passed by mistake, its first 43 characters become the name.
    if _is_long(name):
        raise ValueError("pass a shorter name; this one could be a secret key")
    if name == "BPX_SECRET_KEY":
        raise ValueError(
            "pass BPX_SECRET_KEY in the environment, not as a parameter"
        )
    value = _parse_json(name, text) if is_json else text
    return name, value


def _read_params(args: argparse.Namespace) -> Any:
    """Return the parameters: the pairs, or the value of --json."""
    if args.json is None:
        return _dict_of_unique_names(
            [_parse_pair(pair) for pair in args.pairs]
        )
    if args.pairs:
        raise ValueError("pass name=text parameters or --json, not both")
    text = args.json
    if text == "-":
        if sys.stdin is None:
            raise ValueError("--json -: standard input is closed")
        text = sys.stdin.buffer.read()
    params = _parse_json("--json", text)
    # build_request would treat null like no parameters.
    if params is None:
        raise ValueError("--json: pass an object or a list, not null")
    return params


def _read_secret_key(args: argparse.Namespace) -> Optional[str]:
    """Return the key in BPX_SECRET_KEY, or None for a public request."""
    if _find_instruction(args.method, args.path, args.instruction) is None:
        return None
    if "BPX_SECRET_KEY" not in os.environ:
        raise ValueError("to sign this, set BPX_SECRET_KEY")
    return os.environ["BPX_SECRET_KEY"]


def _read_inputs(args: argparse.Namespace) -> Tuple[Any, Optional[str]]:
    """Return the parameters and the secret key; exit with 2 if that fails."""
    try:
        return _read_params(args), _read_secret_key(args)
    except KeyboardInterrupt:
        _fail(2, "interrupted (nothing was sent)")
    except Exception as error:
        _fail(2, _describe_error(error))


def _format_request(
    args: argparse.Namespace, params: Any, secret_key: Optional[str]
) -> str:
    """Return the request as text, with its canonical string."""
    _check_timeout(args.timeout)  # as a real run would do
    timestamp = time.time_ns() // 1_000_000
    built = build_request(
        args.method,
        args.path,
        params,
        secret_key=secret_key,
        instruction=args.instruction,
        timestamp=timestamp,
        window=args.window,
        base_url=args.base_url,
    )
    lines = [f"{args.method} {built.full_url}"]
    instruction = _find_instruction(args.method, args.path, args.instruction)
    if instruction is not None:
        lines.append(
            canonical_string(instruction, params, timestamp, args.window)
        )
    for name in _SHOWN_HEADERS:
        # urllib.request stores X-API-Key as "X-api-key".
        value = built.get_header(name.capitalize())
        if value is not None:
            lines.append(f"{name}: {value}")
    if isinstance(built.data, bytes):  # It is None for GET.
        lines.append(built.data.decode())
    return "\n".join(lines)


def _dry_run(
    args: argparse.Namespace, params: Any, secret_key: Optional[str]
) -> str:
    """Return the request as text; exit with 2 if that fails."""
    try:
        return _format_request(args, params, secret_key)
    except KeyboardInterrupt:
        _fail(2, "interrupted (nothing was sent)")
    except Exception as error:
        _fail(2, _describe_error(error))


def _run(
    args: argparse.Namespace, params: Any, secret_key: Optional[str]
) -> Any:
    """Send the request and return the decoded body of its response.

    If that fails, exit with one of the statuses that --help lists.
    """
    try:
        return request(
            args.method,
            args.path,
            params,
            secret_key=secret_key,
            instruction=args.instruction,
            window=args.window,
            base_url=args.base_url,
            timeout=args.timeout,
        )
    except NotSentError as error:
        _fail(3, f"{_describe_error(error)} (nothing was sent)")
    except BPXError as error:
        text = _describe_error(error)
        if error.outcome_unknown:
            _fail(4, f"{text} (the request may have been executed)")
        else:
            _fail(1, text)
    except KeyboardInterrupt:
        _fail(4, "interrupted (the request may have been executed)")
    except Exception as error:
        # Any error other than a BPXError means that nothing was sent (see the
        # docstring of request).
        _fail(2, _describe_error(error))


def _to_json(body: Any) -> str:
    """Return a decoded body as JSON; exit with 4 if that fails."""
    try:
        return json.dumps(body, indent=2)
    except (Exception, KeyboardInterrupt) as error:  # such as MemoryError
        _fail(4, f"cannot print: {_describe_error(error)}")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line; if it fails, exit with a status that --help lists.

    argv is a list of str, by default sys.argv[1:]. If printing to standard
    output or standard error fails, that stream may be redirected to the null
    device for the rest of the process.
    """
    # parse_intermixed_args allows options between the parameters.
    args = _make_parser().parse_intermixed_args(argv)
    # Each function that is called below exits if it fails.
    params, secret_key = _read_inputs(args)
    if args.dry_run:
        text = _dry_run(args, params, secret_key)
        _print_text(text, failure_status=2)
    else:
        body = _run(args, params, secret_key)
        _print_text(_to_json(body), failure_status=4)


if __name__ == "__main__":
    main()
