"""A deployment of a few lines, honest in itself, whose subclasses do not keep their word."""

import http.server
import json
import ssl
import threading
import time
from pathlib import Path
from typing import Any, Self

MANAGING = "tfm_k_managing"
NEW = "tfm_k_new"
KEY_ID = "11111111-2222-3333-4444-555555555555"

# For 127.0.0.1 and localhost, signed by itself, good until 2125.
CERTIFICATE = Path(__file__).with_name("loopback.pem")

Reply = tuple[int, str, dict[str, str]]  # status, code, headers

OK: Reply = (200, "", {})
NO_CONTENT: Reply = (204, "", {})
NOT_FOUND: Reply = (404, "not_found", {})
REFUSED: Reply = (401, "invalid_token", {"www-authenticate": 'Bearer error="invalid_token"'})
UNAVAILABLE: Reply = (503, "unavailable", {"retry-after": "0"})
UNCONFIRMED: Reply = (503, "unconfirmed", {"retry-after": "0"})


class Deployment(http.server.ThreadingHTTPServer):
    """It has a managing key and can have one more. A subclass lies by overriding a method."""

    request_queue_size = 128

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        self.deletions = 0
        self.deleted_at = float("inf")
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def since_deletion(self) -> float:
        """Seconds since the first DELETE came; negative before."""
        return time.monotonic() - self.deleted_at

    def create(self, body: dict[str, Any]) -> tuple[Reply, object]:
        """Answer to POST, with its content."""
        self.created.append(body)
        made = {"id": KEY_ID, "key_prefix": "newnewne", "key": NEW}
        return (201, "", {}), made

    def delete(self) -> Reply:
        """Answer to DELETE; *deletions* counts this one too."""
        return NO_CONTENT

    def managing(self) -> Reply:
        """Answer to a GET with the managing key."""
        return OK

    def new(self) -> Reply:
        """Answer to a GET with the new key."""
        return OK if self.created and self.since_deletion < 0 else REFUSED

    def other(self) -> Reply:
        """Answer to a GET with any other key."""
        return REFUSED


class _Handler(http.server.BaseHTTPRequestHandler):
    """Reads requests and writes what the deployment says."""

    server: Deployment
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:  # the library's name
        """Answer by the key."""
        self.server.paths.add(self.path)
        answers = {MANAGING: self.server.managing, NEW: self.server.new}
        self._answer(answers.get(self._token(), self.server.other)())

    def do_POST(self) -> None:  # as above
        """Create the key."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._token() == MANAGING:
            self._answer(*self.server.create(body))
        else:
            self._answer(REFUSED)

    def do_DELETE(self) -> None:  # as above
        """Delete the key; a status of 0 means to hang up without an answer."""
        assert (self._token(), self.path.rpartition("/")[2]) == (MANAGING, KEY_ID)
        self.server.deletions += 1
        self.server.deleted_at = min(self.server.deleted_at, time.monotonic())
        self._answer(self.server.delete())

    def _token(self) -> str:
        return self.headers["authorization"].removeprefix("Bearer ")

    def _answer(self, reply: Reply, content: object = None) -> None:
        status, code, headers = reply
        if not status:
            self.close_connection = True
            return
        if code:
            content = {"detail": {"code": code, "message": f"This is {code}."}}
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != NO_CONTENT[0]:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
