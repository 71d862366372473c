"""`tfm-guard demo`: the example served on this machine, and a key's life in five requests."""

import asyncio
import http.client
import importlib.util
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tfm_guard.cli.failures import Failure
from tfm_guard.clock import SystemClock

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_ACCOUNT: Final = "demo"
_SECONDS: Final = 10.0  # within which the server answers, or the demo fails
_WIDEST_PATH: Final = 21

# The example is one file. In a clone it stands in examples/, from where users copy it; building
# the wheel puts that same file beside this one ("force-include" in pyproject.toml).
_EXAMPLES: Final = (
    Path(__file__).with_name("mail_api.py"),
    Path(__file__).parents[3] / "examples" / "mail_api.py",
)


@click.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="a temporary one, removed at the end",
    help="Where to keep the database.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=0,
    show_default="a free one",
    help="The port to serve on, at 127.0.0.1.",
)
@click.option("--once", is_flag=True, help="Send the requests and end.")
def demo(folder: Path | None, port: int, *, once: bool) -> None:
    """Serve the example and send it the requests of a key's life.

    Needs no database and no TFM_GUARD_DATABASE_URL: it uses a SQLite file of its own. Ends with
    Ctrl-C; its exit code is 1 if a request was not answered as it must be.
    """
    # Ended in any way that can be noticed, it leaves nothing behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as undo:
        kept = "kept" if folder else "removed at the end"
        if folder is None:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tfm-guard-demo-")))
        _make_folder(folder)
        url = f"sqlite:///{folder.absolute()}/tfm_guard.db"
        listener = undo.enter_context(_listen(port))
        host, port = listener.getsockname()
        managing_token = asyncio.run(_managing_token(url))
        server = undo.enter_context(_serve(_load_example(url), listener))
        address = f"http://{host}:{port}"
        click.echo(f"Serving the example at {address}, with its database in {folder} ({kept}).\n")
        with closing(http.client.HTTPConnection(host, port, timeout=_SECONDS)) as connection:
            _live_through(_Client(connection), managing_token)
        click.echo("\nAll five were answered as they must be.")
        if not once:
            _say_what_next(address, managing_token)
            with suppress(KeyboardInterrupt):
                server.join()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"--folder {folder}: {error.strerror}") from error


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise Failure(
            f"port {port} cannot be used: {os.strerror(error.errno or 0)}; choose another: --port N"
        ) from error


async def _managing_token(url: str) -> str:
    """Make the account's managing key, in place of those that earlier demos left in the folder."""
    from tfm_guard import Guard

    async with Guard.from_urls(database=url) as guard:
        for left_over in await guard.keys.list(_ACCOUNT):
            await guard.keys.revoke(_ACCOUNT, left_over.id)
        created = await guard.keys.create(
            account_id=_ACCOUNT,
            name="Managing key of the demo",
            scopes=["api-keys:read", "api-keys:write", "send", "emails:read"],
            actor="command_line",
        )
        return created.token


def _load_example(url: str) -> "ASGIApp":
    """Import the example, which reads where its database is from the environment."""
    os.environ["TFM_GUARD_DATABASE_URL"] = url
    path = next((path for path in _EXAMPLES if path.exists()), None)
    spec = path and importlib.util.spec_from_file_location("tfm_guard_example", path)
    if not spec or not spec.loader:
        raise Failure("the example, mail_api.py, is not part of this installation")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: ASGIApp = module.app
    return app


@contextmanager
def _serve(app: "ASGIApp", listener: socket.socket) -> Iterator[threading.Thread]:
    """Serve *app* on *listener* from a thread until the end."""
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise Failure(
            "the demo needs a server, uvicorn: pip install 'tfm-guard[server]'"
        ) from error
    config = uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False)
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            # Requests wait in the listener's queue until the server takes them; if it does not
            # start, this is how they learn.
            listener.close()

    thread = threading.Thread(target=run, name="tfm-guard-demo")
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def _live_through(client: "_Client", managing_token: str) -> None:
    """Send the five requests, in the order that makes the point."""
    email = {
        "from_": {"email": "shop@example.com"},
        "to": [{"email": "customer@example.com"}],
        "subject": "Your receipt",
        "text": "Thank you.",
    }
    client.exchange("GET", "/healthz")  # answered when the server is up, and exempt
    send_email = ("POST", "/v1/emails/", email)
    client.show("An email, without a key", *send_email, expect=(401, "missing_credentials"))
    key = client.show(
        "A new key, with the managing key",
        *("POST", "/v1/api-keys/", {"name": "Shop", "permissions": ["send"]}, managing_token),
        expect=(201, None),
    )
    client.show("The email, with the new key", *send_email, key["key"], expect=(202, None))
    path = f"/v1/api-keys/{key['id']}"
    client.show("The new key is deleted", "DELETE", path, None, managing_token, expect=(204, None))
    client.show(
        "The email again, with that key", *send_email, key["key"], expect=(401, "invalid_token")
    )


class _Client:
    """Sends requests to the demo's server over one *connection*."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._clock = SystemClock()

    def show(
        self,
        what: str,
        method: str,
        path: str,
        body: object,
        token: str | None = None,
        *,
        expect: tuple[int, str | None],
    ) -> Any:
        """Send a request, show the answer on a line, and return the JSON in it.

        Fails unless the status and, if it is an error, its code are those of *expect*.
        """
        started = self._clock.monotonic()
        response, content = self.exchange(method, path, body, token)
        milliseconds = (self._clock.monotonic() - started) * 1000
        answer = json.loads(content) if content.startswith(b"{") else {}
        came = (response.status, answer["detail"]["code"] if "detail" in answer else None)
        request = f"{method} {path if len(path) < _WIDEST_PATH else path[: _WIDEST_PATH - 1] + '…'}"
        status = click.style(str(response.status), fg="green" if came == expect else "red")
        outcome = response.headers["www-authenticate"] or _outcome(answer)
        click.echo(f"{what:34}{request:29}{status}{milliseconds:8.1f} ms   {outcome}")
        if came != expect:
            raise Failure(f"{what}: expected {_in_words(expect)}, got {_in_words(came)}")
        return answer

    def exchange(
        self, method: str, path: str, body: object = None, token: str | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request and return its answer and the content of that."""
        headers = {"content-type": "application/json"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        try:
            self._connection.request(method, path, json.dumps(body) if body else None, headers)
            response = self._connection.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{method} {path}: the server did not answer: {error}") from error


def _in_words(answer: tuple[int, str | None]) -> str:
    return " ".join(str(part) for part in answer if part)


def _outcome(answer: Any) -> str:
    if "key" in answer:
        return f"key {answer['key_prefix']}, may {' '.join(answer['permissions'])}"
    if "detail" in answer:
        return str(answer["detail"]["message"])
    return f"email {answer['status']}" if "status" in answer else "refused from now on"


def _say_what_next(address: str, managing_token: str) -> None:
    click.echo(
        f"""
Try it yourself, with the managing key (Ctrl-C ends the demo):

  curl {address}/v1/api-keys/ \\
    -H 'Authorization: Bearer {managing_token}' \\
    -H 'Content-Type: application/json' -d '{{"name": "Mine", "permissions": ["send"]}}'
"""
    )
