"""One connection to a deployment, over which `tfm-guard prove` asks and reads the clock."""

import http.client
import json
import re
import ssl
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from tfm_guard.cli.failures import Failure, NotNow
from tfm_guard.clock import SystemClock

KEYS_PATH: Final = "/v1/api-keys/"
_SERVER_ERRORS: Final = HTTPStatus.INTERNAL_SERVER_ERROR  # and above

_SECONDS: Final = 10.0  # within which an answer must come; a DELETE may take 5
_MOST_SHOWN: Final = 200  # characters of what the server says
_ERROR: Final = re.compile(r'error="([a-z_]+)"')


class Address(NamedTuple):
    """Where a deployment is reached: *text* as it was typed, without a slash at its end."""

    text: str
    tls: bool
    host: str
    port: int | None
    base: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read http://HOST[:PORT][/BASE] or https://…; raise ValueError for anything else."""
        url = urlsplit(text)
        if (
            url.scheme not in ("http", "https")
            or not url.hostname
            or "@" in url.netloc
            or url.query
            or url.fragment
            or not is_visible_ascii(text)
        ):
            raise ValueError(text)
        base = url.path.rstrip("/")
        return cls(text.rstrip("/"), url.scheme == "https", url.hostname, url.port, base)


class Answer(NamedTuple):
    """What came back, and when: *started* was read before the first byte was sent."""

    started: float
    ended: float
    status: int
    code: str
    message: str
    retry_after: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.code}".rstrip()

    @property
    def passing(self) -> bool:
        """Whether it may be another one in a moment: overload, or an error of the server."""
        return self.status == HTTPStatus.TOO_MANY_REQUESTS or self.status >= _SERVER_ERRORS

    def read_json(self) -> Any:
        """Return what its content says, None where that is no JSON."""
        return _read_json(self.content)


class Lost(Exception):
    """No answer came; the text says why. *passing*: one may come the next time."""

    def __init__(self, text: str, *, passing: bool = True) -> None:
        super().__init__(text)
        self.passing = passing

    def at(self, address: Address) -> Failure:
        """Return what to tell about it."""
        if not self.passing:
            return Failure(
                f"{address.text}: {self}",
                "if the certificate is of an authority of your own, name that one's file: "
                "export SSL_CERT_FILE=ca.pem",
            )
        return NotNow(
            f"{address.text}: {self}", "check that it is up and that the address is right"
        )


class Connection:
    """A connection to *address* that is opened when it is first used, and again when it was lost.

    *tls* is used for https. Count *opened* to know how many there were.
    """

    def __init__(self, address: Address, tls: ssl.SSLContext) -> None:
        self.address = address
        self.opened = 0
        self._clock = SystemClock()
        self._http = (
            http.client.HTTPSConnection(address.host, address.port, timeout=_SECONDS, context=tls)
            if address.tls
            else http.client.HTTPConnection(address.host, address.port, timeout=_SECONDS)
        )

    def ask(self, method: str, path: str, token: str, body: object = None) -> Answer:
        """Send a request with *token* and return its answer; raise `Lost` if none came.

        A connection that the server has closed meanwhile, as it may between any two requests, is
        opened again and a GET is sent once more.
        """
        kept = self._http.sock is not None
        try:
            return self._exchange(method, path, token, body)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if not (kept and isinstance(error, ConnectionError) and method == "GET"):
                raise _lost(error) from error
        try:
            return self._exchange(method, path, token, body)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _lost(error) from error

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def _exchange(self, method: str, path: str, token: str, body: object) -> Answer:
        headers = {"authorization": f"Bearer {token}", "user-agent": "tfm-guard prove"}
        if body is not None:
            headers["content-type"] = "application/json"
        content = None if body is None else json.dumps(body)
        self.opened += self._http.sock is None
        started = self._clock.monotonic()
        self._http.request(method, self.address.base + path, content, headers)
        response = self._http.getresponse()
        answer = response.read()
        ended = self._clock.monotonic()
        code, message = _detail(answer)
        # The challenge says it too, also where something on the way has replaced the content.
        if error := _ERROR.search(response.headers.get("www-authenticate", "")):
            code = error[1]
        retry_after = response.headers.get("retry-after", "")
        return Answer(started, ended, response.status, code, message, retry_after, answer)


def is_visible_ascii(text: str) -> bool:
    """Tell whether *text* is one word that a header or a request line can hold."""
    return bool(text) and all("!" <= character <= "~" for character in text)


def _read_json(content: bytes) -> Any:
    with suppress(ValueError):
        return json.loads(content)
    return None


def _detail(content: bytes) -> tuple[str, str]:
    """Return code and message of a refusal, each empty where there is none."""
    answer = _read_json(content)
    detail = answer.get("detail") if isinstance(answer, dict) else None
    if not isinstance(detail, dict):
        return "", ""
    return _shown(detail.get("code")), _shown(detail.get("message"))


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(filter(str.isprintable, text))[:_MOST_SHOWN]


def _lost(error: Exception) -> Lost:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Lost(f"its certificate cannot be verified: {error.verify_message}", passing=False)
    if isinstance(error, TimeoutError):
        return Lost(f"no answer within {_SECONDS:g} s")
    if isinstance(error, http.client.RemoteDisconnected):
        return Lost("it hung up without an answer")
    if isinstance(error, OSError):
        return Lost(error.strerror or str(error))
    return Lost(f"what came is no HTTP answer ({type(error).__name__})")
