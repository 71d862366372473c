"""`tfm-guard demo`: the example served twice on this machine, and a key's life in requests."""

import asyncio
import http.client
import importlib.util
import json
import os
import socket
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import click

from tfm_guard.cli.failures import Failure, NotNow, failure, is_lasting
from tfm_guard.cli.signals import enter, take_signals
from tfm_guard.clock import SystemClock
from tfm_guard.errors import ConfigurationError, GuardError, SchemaError, Unavailable

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tfm_guard.guard import Guard
    from tfm_guard.http.sign_in import SignInLinks
    from tfm_guard.records import Person

T = TypeVar("T")

_ACCOUNT: Final = "demo"
_FILE: Final = "demo.db"  # no name that an application's own database is likely to have
_SECONDS: Final = 10.0  # within which a server answers, or the demo fails
_CLOSING_SECONDS: Final = 3  # within which others' requests end
_WIDEST_PATH: Final = 17

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
@click.option(
    "--redis",
    metavar="URL",
    show_default="none",
    help="A Redis for both servers. Without a password: others can read arguments.",
)
@click.option("--once", is_flag=True, help="Send the requests and end.")
def demo(folder: Path | None, port: int, redis: str | None, *, once: bool) -> None:
    """Serve the example and send it the requests of a key's life.

    Two servers share one database, as two processes of an application would. Each line shows where
    the server that answered found the key: in its memory, in Redis, or in the database.

    Needs no database and no TFM_GUARD_DATABASE_URL: it uses a SQLite file of its own. Ends with
    Ctrl-C; its exit code is 1 if a request was not answered as it must be.
    """
    with ExitStack() as undo:
        take_signals(undo)
        kept = "kept" if folder else "removed at the end"
        if folder is None:
            folder = Path(enter(undo, _temporary_folder))
        _make_folder(folder)
        listeners = [enter(undo, partial(_listen, number)) for number in (port, 0)]
        with _in_our_words(folder):
            _set_variables(folder, redis)
            managing_token = _run_apart(_make_managing_key())
            examples = [_load_example(), _load_example()]
        pairs = zip(examples, listeners, strict=True)
        servers = [enter(undo, partial(_serve, *pair)) for pair in pairs]
        addresses = [f"http://127.0.0.1:{where.getsockname()[1]}" for where in listeners]
        click.echo(
            f"Serving the example at {addresses[0]} and, a second server, at {addresses[1]},\n"
            f"with their database in {folder} ({kept}) and {_in_words_of_redis(redis)}.\n"
        )
        with ExitStack() as connections:
            first, second = [
                _Client(connections.enter_context(_connect(address)), example.guard)
                for address, example in zip(addresses, examples, strict=True)
            ]
            _live_through(first, second, managing_token)
        click.echo("\nAll eight were answered as they must be.")
        if not once:
            with suppress(KeyboardInterrupt):
                _run_apart(_make_up())
                link = examples[0].sign_in.new(_visitor())
                _say_what_next(addresses[0], managing_token, link)
                for ended in servers:
                    ended.wait()


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="tfm-guard-demo-")


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


@contextmanager
def _in_our_words(folder: Path) -> Iterator[None]:
    """Name what went wrong by the options of this command, not by settings nobody gave."""
    place = f"--folder {folder}: "
    try:
        yield
    except ConfigurationError as error:
        faults = [fault.replace("TFM_GUARD_REDIS_URL", "--redis") for fault in error.faults]
        raise Failure(*faults) from error
    except SchemaError as error:
        raise Failure(f"{place}{error}", "or choose another folder") from error
    except Unavailable as error:
        kind = Failure if is_lasting(error) else NotNow
        raise kind(f"{place}{error.reason}", "or choose another folder") from error
    except GuardError as error:
        raise failure(error) from error


def _set_variables(folder: Path, redis: str | None) -> None:
    """Set the variables from which the example reads where its database and its Redis are."""
    from sqlalchemy import URL

    url = URL.create("sqlite", database=str(folder.absolute() / _FILE))
    os.environ["TFM_GUARD_DATABASE_URL"] = url.render_as_string()
    os.environ.pop("TFM_GUARD_REDIS_URL", None)
    if redis is not None:
        os.environ["TFM_GUARD_REDIS_URL"] = redis


def _run_apart(work: Coroutine[Any, Any, T]) -> T:
    # In a thread: a signal then ends the wait for it, and not a coroutine in its middle.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()


def _visitor() -> "Person":
    from tfm_guard.records import Person

    return Person(account_id=_ACCOUNT, id="visitor of the demo", may_manage=True)


async def _make_up() -> None:
    from tfm_guard.cli.made_up import make_up

    await make_up(_ACCOUNT)


async def _make_managing_key() -> str:
    """Make the account's managing key, in place of those that earlier demos left in the folder."""
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        for left_over in await guard.keys.list(_ACCOUNT):
            await guard.keys.revoke(_ACCOUNT, left_over.id)
        created = await guard.keys.create(
            account_id=_ACCOUNT,
            name="Managing key of the demo",
            scopes=["api-keys:read", "api-keys:write", "send", "emails:read"],
            actor="command_line",
        )
        return created.token


class _Example(NamedTuple):
    app: "ASGIApp"
    guard: "Guard"
    sign_in: "SignInLinks"


def _load_example() -> _Example:
    """Import the example anew, with a guard of its own."""
    path = next((path for path in _EXAMPLES if path.exists()), None)
    spec = path and importlib.util.spec_from_file_location("tfm_guard_example", path)
    if not spec or not spec.loader:
        raise Failure("the example, mail_api.py, is not part of this installation")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _Example(module.app, module.guard, module.sign_in)


def _in_words_of_redis(redis: str | None) -> str:
    if redis is None:
        return "no Redis"
    url = urlsplit(redis)  # which may hold a password all the same
    return f"Redis at {url.hostname}:{url.port or 6379}"


def _connect(address: str) -> "closing[http.client.HTTPConnection]":
    url = urlsplit(address)
    return closing(http.client.HTTPConnection(str(url.hostname), url.port, timeout=_SECONDS))


@contextmanager
def _serve(example: _Example, listener: socket.socket) -> Iterator[threading.Event]:
    """Serve *example* on *listener* from a thread until the end; yield what tells that it ended."""
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise Failure(
            "the demo needs a server, uvicorn: pip install 'tfm-guard[server]'"
        ) from error
    config = uvicorn.Config(
        example.app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            # Requests wait in the listener's queue until the server takes them; if it does not
            # start, this is how they learn.
            listener.close()
            ended.set()

    # Who waits for this can be interrupted. After an interrupted join of Python 3.11, the thread
    # passes for ended, and its database would be removed under it.
    ended = threading.Event()
    thread = threading.Thread(target=run, name="tfm-guard-demo")
    thread.start()
    try:
        yield ended
    finally:
        server.should_exit = True
        ended.wait()
        thread.join()


def _live_through(first: "_Client", second: "_Client", managing_token: str) -> None:
    """Send the eight requests, in the order that makes the point."""
    email = {
        "from_": {"email": "shop@example.com"},
        "to": [{"email": "customer@example.com"}],
        "subject": "Your receipt",
        "text": "Thank you.",
    }
    for client in (first, second):
        client.exchange("GET", "/healthz")  # answered when the server is up, and exempt
    send = ("POST", "/v1/emails/", email)
    first.show("An email, without a key", *send, expect=(401, "missing_credentials"))
    key = first.show(
        "A new key, by the managing key",
        *("POST", "/v1/api-keys/", {"name": "Shop", "permissions": ["send"]}, managing_token),
        expect=(201, None),
    )
    first.show("The email, with the new key", *send, key["key"], expect=(202, None))
    first.show("The same again", *send, key["key"], expect=(202, None))
    second.show("At the second server", *send, key["key"], expect=(202, None))
    path = f"/v1/api-keys/{key['id']}"
    first.show("The new key is deleted", "DELETE", path, None, managing_token, expect=(204, None))
    first.show("The email, with that key", *send, key["key"], expect=(401, "invalid_token"))
    second.show("At the second server", *send, key["key"], expect=(401, "invalid_token"))


class _Client:
    """Sends requests over one *connection* to the server that *guard* stands in."""

    def __init__(self, connection: http.client.HTTPConnection, guard: "Guard") -> None:
        self._connection = connection
        self._counters = guard.counters
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
        before = self._asked()
        started = self._clock.monotonic()
        response, content = self.exchange(method, path, body, token)
        milliseconds = (self._clock.monotonic() - started) * 1000
        answer = json.loads(content) if content.startswith(b"{") else {}
        came = (response.status, answer["detail"]["code"] if "detail" in answer else None)
        request = f"{method} {path if len(path) < _WIDEST_PATH else path[: _WIDEST_PATH - 1] + '…'}"
        # A change is always made in the database, wherever the managing key was found.
        source = "database" if "/api-keys/" in path else _source(before, self._asked())
        status = click.style(str(response.status), fg="green" if came == expect else "red")
        outcome = response.headers["www-authenticate"] or _outcome(answer)
        click.echo(f"{what:32}{request:26}{status}{milliseconds:8.1f} ms   {source:10}{outcome}")
        if came != expect:
            raise Failure(f"{what}: expected {_in_words(expect)}, got {_in_words(came)}")
        return answer

    def _asked(self) -> tuple[int, int]:
        """Return how often the database was asked about keys, and how often Redis knew one."""
        return self._counters.store_reads, self._counters.shared_hits

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


def _source(before: tuple[int, int], after: tuple[int, int]) -> str:
    (reads, hits), (reads_after, hits_after) = before, after
    if reads_after > reads:
        return "database"
    return "Redis" if hits_after > hits else "memory"


def _in_words(answer: tuple[int, str | None]) -> str:
    return " ".join(str(part) for part in answer if part)


def _outcome(answer: Any) -> str:
    if "key" in answer:
        return f"key {answer['key_prefix']}, may {' '.join(answer['permissions'])}"
    if "detail" in answer:
        return str(answer["detail"]["message"])
    return f"email {answer['status']}" if "status" in answer else "refused everywhere"


def _say_what_next(address: str, managing_token: str, link: str) -> None:
    click.echo(
        f"""
Try it yourself, with the managing key (Ctrl-C ends the demo):

  curl {address}/v1/api-keys/ \\
    -H 'Authorization: Bearer {managing_token}' \\
    -H 'Content-Type: application/json' -d '{{"name": "Mine", "permissions": ["send"]}}'

Settings → API Keys, with a few days of made-up use; the link signs you in once:

  {address}/sign-in/{link}
"""
    )
