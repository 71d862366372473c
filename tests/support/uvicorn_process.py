"""An application served by uvicorn in processes of its own."""

import contextlib
import http.client
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from tests.support.servers import ROOT, PrivateServer

HttpParser = Literal["httptools", "h11"]


class UvicornProcess(PrivateServer):
    """``python -m uvicorn`` for *app*, with *env* added to the environment.

    Ready means that all *workers* have started and one has answered, whatever the status, a GET of
    *ready_path*.
    """

    working_folder = ROOT

    def __init__(
        self,
        app: str = "examples.mail_api:app",
        *,
        env: Mapping[str, str] | None = None,
        workers: int = 1,
        http: HttpParser = "httptools",
        extra_args: Sequence[str] = (),
        ready_path: str = "/healthz",
    ) -> None:
        super().__init__()
        self.app = app
        self.env = dict(env or {})
        self.workers = workers
        self.http = http
        self.extra_args = tuple(extra_args)
        self.ready_path = ready_path

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        """Return uvicorn's command line."""
        return [
            *(sys.executable, "-m", "uvicorn", self.app),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", str(self.workers), "--http", self.http),
            *self.extra_args,
        ]

    def environment(self) -> Mapping[str, str]:
        """Return our variables and those of *env*; what is printed comes out at once."""
        return {**super().environment(), "PYTHONUNBUFFERED": "1", **self.env}

    def answers(self) -> bool:
        """Tell whether all workers are up and one answers."""
        started = self.output_since_start.count("Application startup complete.")
        if self.workers > 1 and started < self.workers:
            return False
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            try:
                connection.request("GET", self.ready_path)
                return connection.getresponse().status > 0
            except (OSError, http.client.HTTPException):
                return False
