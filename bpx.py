# bpx.py - sign and send requests to the Backpack Exchange REST API
# SPDX-License-Identifier: 0BSD
# The whole of the distribution backpack-bpx: copy this file, or install that.
"""Sign and send requests to the Backpack Exchange REST API.

A request is signed by the Ed25519 signature of its canonical string: the
instruction (the operation's name), the parameters by name with their values
as they are, the time, and for how long from then the request is valid.

>>> key = "TDSkv44jf/iD/QCKkyCdixO+p1sfLXxk+PZH7mW/ams="  # the guide's example
>>> call = "orderCancel", {"symbol": "BTC_USDT", "orderId": 28}
>>> canonical_string(*call, 1614550000000).split("&symbol=BTC_USDT")
['instruction=orderCancel&orderId=28', '&timestamp=1614550000000&window=5000']
>>> sign_request(*call, key, timestamp=1614550000000)["X-Signature"][:40]
'aKisDELOQeekrU+Up7rS/6gZBp0qunOsPwThvby1'

Times are in ms, but timeouts in s; keys and signatures are base64, text is
UTF-8, prices and quantities str or Decimal. Left out on purpose: a method per
operation (its path is its name), streams, retries, rate limits.
"""

import argparse
import base64
import functools
import http.client
import json
import os
import re
import selectors
import sys
import threading
import time
import urllib.parse
import urllib.request
import weakref
from decimal import Decimal
from enum import Enum
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

__version__ = "1.0.0"
__all__ = ["canonical_string", "sign_request", "build_request", "request"]
__all__ += ["get", "post", "delete", "patch", "INSTRUCTIONS", "BASE_URL"]
__all__ += ["DEFAULT_WINDOW", "MAX_WINDOW", "DEFAULT_TIMEOUT", "MAX_IDLE"]
__all__ += ["MAX_BODY", "BPXError", "APIError", "NotSentError"]
__all__ += ["UnknownOutcomeError"]

BASE_URL = "https://api.backpack.exchange"
DEFAULT_WINDOW = 5000  # ms for which a signed request is valid
MAX_WINDOW = 60000  # ms, the exchange's limit
DEFAULT_TIMEOUT = 10.0  # s to connect, to send, and for the whole answer
MAX_IDLE = 15.0  # s for which a connection is kept between two requests
MAX_BODY = 16 * 1024 * 1024  # bytes of an answer
Params = Union[Mapping[str, Any], Sequence[Mapping[str, Any]], None]

# Every signed operation of the exchange, in the order of its documentation.
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
    """What request raises, other than for bad arguments."""


class APIError(BPXError):
    """The exchange answered with a status other than 2xx.

    body is the decoded answer, code and message are what it has, or None. A
    408 or 5xx may come from a gateway: what became of an order is unknown.
    """

    def __init__(self, status: int, body: Any, headers: Mapping[str, str]):
        super().__init__(status, body, headers)
        self.status, self.body, self.headers = status, body, headers
        said = body if isinstance(body, dict) else {"message": body}
        self.code, self.message = said.get("code"), said.get("message")

    def __str__(self) -> str:
        words = f"{self.status} {self.code or ''} {self.message or ''}"
        return " ".join(words.split())[:300]


class NotSentError(BPXError):
    """No byte of the request left: it is safe to repeat, an order too."""


class UnknownOutcomeError(BPXError):
    """The request was sent, and no whole answer came back.

    The exchange may have executed it, so an order must not be repeated. Once
    timestamp + window has passed it can no longer be accepted: ask for its
    clientId then, by GET /api/v1/order and /wapi/v1/history/orders.
    """


# --- Canonical string: pure text, no keys, no clock ---
_json = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), sort_keys=True
).encode
_TEXT: Dict[type, Any] = {str: str, int: str, bool: _json, dict: _json}


def _plain(name: str, value: Any) -> Any:
    """A value in JSON's own types, so that it is sent as it is signed."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, (dict, Mapping)):
        plain = {}
        for key, item in value.items():
            if type(key) is not str:
                if not isinstance(key, str):
                    raise TypeError(f"{name}: pass names as str, not {key!r}")
                key = str.__str__(key)
            if type(item) is not str:
                item = _plain(key, item)
            if item is not None:
                plain[key] = item
        return plain
    if isinstance(value, Enum):
        return _plain(name, value.value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, Decimal) and value.is_finite():
        if abs(value.adjusted()) < 1000:  # 1E+999999999 would fill the memory
            return Decimal.__format__(value, "f")
    if isinstance(value, (list, tuple)):
        items = [_plain(name, item) for item in value]
        if not any(isinstance(item, (list, dict)) for item in items):
            return [item for item in items if item is not None]
    kinds = "str, bool, int, finite Decimal (not float: 0.1 + 0.2 is not 0.3)"
    kind = type(value).__name__
    raise TypeError(f"{name}: pass {kinds}, Enum, None, flat list; not {kind}")


def _plain_orders(params: Any) -> List[Dict[str, Any]]:
    """A batch's orders, or params as the only one, in JSON's own types."""
    params = {} if params is None else params
    orders = params if isinstance(params, (list, tuple)) else [params]
    try:
        plain = [_plain("params", order) for order in orders]
    except RecursionError:
        raise ValueError("params are nested too deeply") from None
    if not plain or [order for order in plain if type(order) is not dict]:
        raise TypeError("params must be a mapping, or a batch: a list of some")
    return plain


def _pairs(order: Dict[str, Any]) -> List[Tuple[str, str]]:
    """The names and texts of an order, as signed and as put into a query."""
    # Neither lists nor objects are documented. A list repeats its name, as in
    # most public clients; an object is compact JSON, as in the Rust client.
    pairs = []
    for name in sorted(order):
        value = order[name]
        if type(value) is str:  # most are: by itself for speed
            pairs.append((name, value))
        elif type(value) is list:
            pairs += [(name, _TEXT[type(item)](item)) for item in value]
        else:
            pairs.append((name, _TEXT[type(value)](value)))
    return pairs


def canonical_string(
    instruction: str,
    params: Params,
    timestamp: int,
    window: int = DEFAULT_WINDOW,
) -> str:
    """Return the text that is signed.

    timestamp (Unix time) and window are in ms; a list of params is a batch of
    orders. Raises TypeError or ValueError for what could not be sent as it is
    signed. Source: docs.backpack.exchange, Signature Generation.
    """
    if not isinstance(instruction, str) or not instruction.isalnum():
        raise ValueError("instruction must be a word, such as orderExecute")
    if type(timestamp) is not int or timestamp < 0:
        raise ValueError("timestamp must be an int, in ms since 1970")
    if type(window) is not int or not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window must be an int from 1 to {MAX_WINDOW} ms")
    # instruction=<instruction>&<name>=<value>&...&timestamp=<ms>&window=<ms>
    # and for each further order of a batch, all before the timestamp again.
    texts = []
    for order in _plain_orders(params):
        texts += ["instruction=" + instruction, *map("=".join, _pairs(order))]
    return "&".join(texts) + f"&timestamp={timestamp}&window={window}"


# --- Signature headers: need the key; read the clock if given no time ---
@functools.lru_cache(maxsize=8)  # deriving a key costs as much as a signature
def _signer(secret_key: str) -> Any:
    """The signing function and the API key of a secret key."""
    try:
        from nacl.bindings import crypto_sign, crypto_sign_seed_keypair
    except ImportError as error:
        raise ImportError("to sign requests, pip install PyNaCl") from error
    try:
        seed = base64.b64decode(secret_key)
    except ValueError:
        seed = b""  # and no raise in here: the context could show the key
    if len(seed) != 32 or base64.b64encode(seed).decode() != secret_key:
        found = f"{len(seed)} bytes in {len(secret_key)} characters"
        raise ValueError(f"secret_key must be base64 of 32 bytes, not {found}")
    public, secret = crypto_sign_seed_keypair(seed)
    api_key = base64.b64encode(public).decode()
    return lambda message: crypto_sign(message, secret)[:64], api_key


def sign_request(
    instruction: str,
    params: Params,
    secret_key: str,
    *,
    timestamp: Optional[int] = None,
    window: int = DEFAULT_WINDOW,
) -> Dict[str, str]:
    """Return the headers X-API-Key, X-Signature, X-Timestamp and X-Window.

    secret_key is the base64 of the 32-byte Ed25519 seed, as on the exchange's
    settings page; the API key is derived from it. timestamp is now if None.
    Raises as canonical_string does, ValueError for a bad key (never showing
    it), ImportError without PyNaCl.
    """
    if timestamp is None:
        timestamp = time.time_ns() // 1_000_000
    text = canonical_string(instruction, params, timestamp, window)
    if not isinstance(secret_key, str):
        raise TypeError("secret_key must be a str")
    sign, api_key = _signer(secret_key.strip())
    return {
        "X-API-Key": api_key,
        "X-Signature": base64.b64encode(sign(text.encode())).decode(),
        "X-Timestamp": str(timestamp),
        "X-Window": str(window),
    }


# --- Request: ready to send, by this module or another client; no I/O ---
_PATH = "/(?!/)[A-Za-z0-9_./~%-]*"
_BASE_URL = (
    r"(https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])|http://(localhost|\[::1\]"
    r"|127(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}))(:[0-9]{1,5})?"
    r"(/[A-Za-z0-9_.~-]+)*/?"
)
_OURS = "host|content-.*|.*-encoding|x-(api-key|signature|timestamp|window)"
_HEADER = rf"(?ai)(?!({_OURS})\n)[a-z0-9-]+\n[ -~]*"  # name, value


def _check(name: str, value: str, pattern: str, hint: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{name} must be {hint}")  # the value may be secret


def _query(plain: Any) -> str:
    if isinstance(plain, list) or dict in map(type, plain.values()):
        raise TypeError("params: GET takes one mapping, and none within")
    query = urllib.parse.urlencode(_pairs(plain), quote_via=urllib.parse.quote)
    return "?" + query if query else ""


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
) -> urllib.request.Request:
    """Return the whole request: method, URL, headers and body.

    GET sends params in the query, every other method in a JSON body. What has
    an instruction, here or in INSTRUCTIONS, is signed as by sign_request.
    base_url is https, or http on loopback. Raises as sign_request does, and
    ValueError for an instruction without secret_key or the reverse.
    """
    _check("method", method, "[A-Za-z]+", "a word, such as GET")
    _check("path", path, _PATH, "a path without a query")
    _check("base_url", base_url, _BASE_URL, "https, or http on loopback")
    sent = {"User-Agent": f"bpx.py/{__version__}", **(headers or {})}
    for header in sent.items():
        _check("a header", "\n".join(header), _HEADER, "ASCII, and not ours")
    method, url = method.upper(), base_url.rstrip("/") + path
    orders = _plain_orders(params)
    plain: Any = orders if isinstance(params, (list, tuple)) else orders[0]
    instruction = instruction or INSTRUCTIONS.get(method + " " + path)
    if instruction and secret_key is not None:
        times: Any = {"timestamp": timestamp, "window": window}
        sent.update(sign_request(instruction, orders, secret_key, **times))
    elif instruction or secret_key is not None:
        hint = "secret_key" if instruction else "instruction, or no secret_key"
        raise ValueError(f"{method} {path}: pass {hint}")
    if method == "GET":
        return urllib.request.Request(url + _query(plain), None, sent)
    sent["Content-Type"] = "application/json; charset=utf-8"
    body = _json(plain).encode()
    return urllib.request.Request(url, body, sent, method=method)


# --- Transport: sends a request once, over a connection that is kept ---
class _Transport(urllib.request.BaseHandler):
    """Keeps a connection per thread, process and host, unlike urllib's own."""

    idle, context = threading.local(), None

    def http_open(self, req: Any) -> Tuple[int, Mapping[str, str], bytes]:
        """Send a request once; return the status, headers and body."""
        idle, key = vars(self.idle), f"{os.getpid()} {req.type} {req.host}"
        failure: Any = NotSentError
        connection = idle.pop(key, None)
        try:
            if connection is None or not self.is_ready(connection):
                connection = self.prepare(req)
                connection.connect()
                # Else the garbage collector would warn of an open socket.
                weakref.finalize(connection, connection.sock.close)
            failure = UnknownOutcomeError
            connection.sock.settimeout(req.timeout)
            call = req.get_method(), req.selector, req.data, req.headers
            connection.request(*call)
            with connection.getresponse() as response:
                answer = response.status, response.headers, self.read(response)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, Exception):
                raise failure(repr(error)) from error
            raise
        if not response.will_close:
            connection.idle_since = time.monotonic()
            idle[key] = connection
        return answer

    https_open = http_open

    def prepare(self, req: Any) -> Any:
        """A connection to open, by the environment's proxy if it names one."""
        via = urllib.request.Request(req.full_url)
        connection: Any = http.client.HTTPConnection(req.host)
        if req.type == "https":
            import ssl  # here, as some Pythons are without it

            self.context = self.context or ssl.create_default_context()
            # The method is there only if the environment names a proxy.
            getattr(urllib.request.ProxyHandler(), "https_open", id)(via)
            tls: Any = {"context": self.context}
            connection = http.client.HTTPSConnection(via.host, **tls)
        if via.host != req.host:
            connection.set_tunnel(req.host, headers=via.headers)
        connection.timeout = req.timeout
        connection.response_class = self.respond
        return connection

    def is_ready(self, connection: Any) -> bool:
        """Whether it was used lately, and nothing can be read from it."""
        with selectors.DefaultSelector() as selector:
            selector.register(connection.sock, selectors.EVENT_READ)
            pending = getattr(connection.sock, "pending", int)  # of TLS
            age = time.monotonic() - connection.idle_since
            return not (age > MAX_IDLE or pending() or selector.select(0))

    def respond(self, sock: Any, *args: Any, **options: Any) -> Any:
        """An answer with one timeout for all its bytes, and no silent end."""
        response = http.client.HTTPResponse(sock, *args, **options)
        end = time.monotonic() + sock.gettimeout()

        def readinto(buffer: Any) -> int:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            sock.settimeout(left)
            size: int = sock.recv_into(buffer)
            if not size:  # which http.client takes for the end of the headers
                raise ConnectionError("closed before the answer was whole")
            return size

        raw: Any = response.fp.raw
        raw.readinto = readinto
        raw.readall = None  # to raise for a chunk of size -1, not to read all
        return response

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The whole body, if the answer says, once, where it ends."""
        declared = response.headers.get_all("Content-Length", [])
        declared += response.headers.get_all("Transfer-Encoding", [])
        if len(declared) > 1 or response.status < 200:
            raise http.client.HTTPException("an answer of unclear length")
        body = bytearray()
        for part in iter(lambda: response.read(65536), b""):
            body += part
            if len(body) > MAX_BODY:
                raise http.client.HTTPException("an answer over MAX_BODY")
        return bytes(body)


_opener = urllib.request.OpenerDirector()
_opener.add_handler(_Transport())


# --- Calls ---
def request(
    method: str,
    path: str,
    params: Params = None,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    **options: Any,
) -> Any:
    """Send a request once and return the decoded answer.

    That is decoded JSON, other text as it is, None if empty. timeout is in s
    for each step: to connect, to send, and to get the whole answer; options
    are build_request's. Raises APIError, NotSentError, UnknownOutcomeError
    and, before anything is sent, what build_request raises.
    """
    is_number = isinstance(timeout, (int, float)) and timeout is not True
    if not is_number or not 0 < timeout <= 86400:
        raise ValueError("timeout must be a number of seconds, at most a day")
    built = build_request(method, path, params, **options)
    status, headers, body = _opener.open(built, timeout=timeout)
    text = body.decode("utf-8-sig", "replace")
    try:
        answer = json.loads(text) if text else None
    except (ValueError, RecursionError):
        answer = text
    if not 200 <= status < 300:
        raise APIError(status, answer, headers)
    return answer


# As request(path, params=None, *, timeout=..., **options), method filled in.
get = functools.partial(request, "GET")
post = functools.partial(request, "POST")
delete = functools.partial(request, "DELETE")
patch = functools.partial(request, "PATCH")


# --- Command line ---
def _pair(text: str) -> Tuple[str, Any]:
    name, value = text.split("=", 1)
    typed = name.endswith(":")
    return (name[:-1], json.loads(value)) if typed else (name, value)


def _run(method: str, path: str, pairs: Any, **options: Any) -> Any:
    """The answer, or for a dry run the text of the request."""
    text, timeout = options.pop("json"), options.pop("timeout")
    dry_run, params = options.pop("dry_run"), dict(pairs)
    if len(params) < len(pairs) or params and text is not None:
        raise ValueError("pass each parameter once, as name=text or in --json")
    if text is not None:
        params = json.loads(sys.stdin.buffer.read() if text == "-" else text)
    known = INSTRUCTIONS.get(f"{method} {path}")
    instruction = options["instruction"] or known
    if instruction:
        if "BPX_SECRET_KEY" not in os.environ:
            raise ValueError("to sign this, set BPX_SECRET_KEY")
        options["secret_key"] = os.environ["BPX_SECRET_KEY"]
    if not dry_run:
        return request(method, path, params, timeout=timeout, **options)
    built: Any = build_request(method, path, params, **options)
    lines = [f"{method} {built.full_url}"]
    if instruction:
        times = int(built.headers["X-timestamp"]), options["window"]
        lines.append(canonical_string(instruction, params, *times))
    for name, value in built.header_items():  # which urllib has capitalized
        lines.append(f"{name.title().replace('Api', 'API')}: {value}")
    return "\n".join(lines + ([built.data.decode()] if built.data else []))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line: exit with 0, or as the README says with 1 to 4."""
    usage = "bpx.py [options] METHOD PATH [name=text | name:=json]..."
    parser = argparse.ArgumentParser(
        "bpx.py", usage=argparse.SUPPRESS, description=usage
    )
    parser.add_argument("method", type=str.upper)
    parser.add_argument("path")
    parser.add_argument("pairs", nargs="*", type=_pair, metavar="name=text")
    parser.add_argument("--json", help="all parameters; - is standard input")
    parser.add_argument("--dry-run", action="store_true", help="send nothing")
    parser.add_argument("--instruction", help="where the path has none known")
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW)
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT)
    parser.add_argument("--base-url", default=BASE_URL)
    statuses: Dict[type, int] = {APIError: 1, NotSentError: 3}
    statuses[UnknownOutcomeError] = statuses[KeyboardInterrupt] = 4
    status = 2
    try:
        args = parser.parse_intermixed_args(argv)
        answer = _run(**vars(args))
        status = 2 if args.dry_run else 4  # as now it was sent
        text = answer if args.dry_run else json.dumps(answer, indent=2)
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
    except (Exception, KeyboardInterrupt) as error:
        text = " ".join(f"bpx.py: {type(error).__name__}: {error}".split())
        parser.exit(statuses.get(type(error), status), text + "\n")


if __name__ == "__main__":
    main()
