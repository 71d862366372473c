"""Whatever breaks at whatever await of the guard: no request gets through that should not."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from starlette.types import Message, Receive, Scope, Send

from tests.http.disturbance import Disturbance, Place, disturbing, reachable
from tests.http.support import bearer, http_scope, make_guard, seed
from tests.support.guards import prepare, shared_of, written
from tests.support.redis import RedisServer
from tests.support.sql import execute
from tfm_guard import APIKeyMiddleware, Guard


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be patient with the database alone: what is broken off towards Redis ends by a limit."""
    for limit in ("READ_SECONDS", "_POOL_SECONDS"):
        monkeypatch.setattr(f"tfm_guard.store.database.{limit}", 10.0)


class _OneTurn:
    """Lets everything else run once."""

    def __await__(self) -> Generator[None, None, None]:
        yield


@dataclass
class Request:
    """One request into the middleware, on connections that wait a turn each time they are used."""

    scope: Scope
    sent: list[Message] = field(default_factory=list)

    async def receive(self) -> Message:
        await _OneTurn()
        return {"type": "websocket.connect"}

    async def send(self, message: Message) -> None:
        await _OneTurn()
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        """The status that was sent, if any was."""
        return self.sent[0].get("status") if self.sent else None


class Setting:
    """A guard that is not open yet, before an app that notes whom it was reached by."""

    def __init__(self, url: str, tokens: dict[str, bytes], redis: str | None) -> None:
        self.tokens = tokens
        self.reached: list[Scope] = []
        # One connection: a second request is answered only if the first has given it back.
        self.guard: Guard = make_guard(url, redis=redis, database_pool_size=1)
        self.app = APIKeyMiddleware(self._protected, guard=self.guard)

    async def _protected(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        self.reached.append(scope)

    def request(self, kind: str, **scope: Any) -> Request:
        """Return a request with the token of that kind."""
        return Request(http_scope(headers=bearer(self.tokens[kind]), **scope))

    async def answer(self, request: Request) -> None:
        """Let the middleware answer *request*."""
        await self.app(request.scope, request.receive, request.send)


@dataclass
class Kind:
    """A kind of request, as the first that a guard gets."""

    token: str
    accepted: bool = False
    # A database without tables, which the request has to make first.
    empty: bool = False
    # After another request, which is about to open the guard.
    second: bool = False
    websocket: bool = False
    # With Redis, which knows the key, or does not.
    shared: Literal["hit", "miss"] | None = None
    # Where the server cannot send an HTTP response to a WebSocket.
    extensions: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"websocket.http.response": {}}
    )


KINDS: Final = {
    "accepted": Kind("good", accepted=True),
    "revoked": Kind("revoked"),
    "second": Kind("good", accepted=True, second=True),
    "websocket": Kind("revoked", websocket=True),
    "websocket closed": Kind("revoked", websocket=True, extensions={}),
    "empty": Kind("good", empty=True),
    "shared hit": Kind("good", accepted=True, shared="hit"),
    "shared miss": Kind("good", accepted=True, shared="miss"),
}


# Where requests come in, and what is called for them by something that does not wait itself.
STARTS: Final = (
    "http.middleware.APIKeyMiddleware.__call__",
    "store.database._connect_sqlite",
    "coalescer.Coalescer._leave",
    "reader.KeyReader._fly",
    "shared_cache.SharedCache._probe",
)
# Functions of the same names as some that a request leads to.
ELSEWHERE: Final = {
    "http.lifespan.run_lifespan": "no request: the server starts or ends",
    "guard.Guard.open": "Store.open is meant",
    "keys.KeyManager.list": "the type is meant",
    "accounts.AccountManager.list": "the type is meant",
    "audit.AuditLog.list": "the type is meant",
    "keys.KeyManager.get": "a mapping's get is meant",
    "accounts.AccountManager.get": "a mapping's get is meant",
    "keys.KeyManager.change": "a change of the feed is meant",
    "keys.KeyManager.usage": "the counting of usage is meant",
    "imports.KeyImporter.add": "a set's add is meant",
    "cli.accounts._run.run": "what is run in a transaction is meant",
    "accounts.AccountManager._on.run": "the same",
    "store.usage.read": "Database.read is meant",
    "usage.Usage.close": "the others' close is meant",
    "http.console.app.ConsoleApp._rows": "the coalescer's is meant",
    "guard.Guard.console.form_keys": "the page alone has forms",
    "usage.Usage._write": "the shared cache's is meant",
    "http.management.ManagementApp._usage": "the verifier's counting is meant",
    "signs.Signs.stop": "it is started last, and so never stopped because opening failed",
    "store.store.Store.upgrade": "the function upgrade is meant",
    "confirmation.Confirmation.wait": "asyncio.wait is meant",
    "freshness.Freshness.poll": "Store.poll is meant",
    "store.feed.head": "the column is meant",
    "store.transaction.Transaction.head": "the column is meant",
    "guard.Guard.close": "the others' close is meant",
    "store.store.Store.close": "the guard's last close ends it",
    "store.database.Database.close": "the guard's last close ends it",
    "confirmation.Confirmation.close": "the others' close is meant",
    "live.LiveConnections.close": "the others' close is meant",
    "link.Publisher.close": "the others' close is meant",
    "http.live._Response.send": "the server's send is meant",
    "http.live._Socket.send": "the server's send is meant",
    "http.live._Socket.receive": "the server's receive is meant",
    "http.live._Socket.closed": "the breaker's closed is meant",
    "live.LiveConnection.check": "the SQLite file's check is meant",
    "link.Publisher._send": "the middleware's is meant",
    "link.Publisher._disconnect": "no request waits for it",
    "http.live._Socket._close": "the coalescer's is meant",
    "link.Link._read": "the shared cache's is meant",
    "link._end": "the reader's is meant",
    "redis_access._Wire.send": "ASGI's send is meant",
    "redis_access._Wire.receive": "ASGI's receive is meant",
    "link.Link.stop": "the link is started last, and so never stopped because opening failed",
    "http.middleware.APIKeyMiddleware._run_live": "the WebSockets here are refused",
    "guard.Guard.holds": "only live connections ask again",
    "verifier.Verifier.holds": "only live connections ask again",
    "clock.SystemClock.sleep": "only what goes on in the background sleeps",
    "testing.ManualClock.sleep": "only tests have it",
    "store.feed.state_and_record": "only PostgreSQL is asked so",
    "store.direct.DirectConnections.run": "only PostgreSQL is connected to so",
    "store.direct.DirectConnections._run": "the same",
    "store.direct.DirectConnections.close": "the same",
    "store.direct._Connection.run": "the same",
    "store.direct._connect": "the same",
    "store.direct._execute": "the same",
    "freshness.Freshness._poll_for_ever": "no request waits for it",
    "freshness.Freshness._record": "no request waits for it",
    "link.Link._stay_connected": "no request waits for it",
    "link.Publisher._send_all": "no request waits for it",
    "verifier.Verifier._renew_digest": "no request waits for it",
    "shared_cache.SharedCache._write_fills": "no request waits for it",
    "shared_cache.Breaker._probe_until_closed": "no request waits for it",
    "usage.Usage._flush_for_ever": "no request waits for it",
    "signs.Signs._look_for_ever": "no request waits for it",
}
# Where these requests never wait, and why.
NEVER: Final = {
    (
        "http.middleware.APIKeyMiddleware.__call__",
        "await self._pass_on(scope, receive, send)",
    ): "no request: the server starts or ends",
    (
        "http.middleware.APIKeyMiddleware._pass_on",
        "await run_lifespan(self.app, self._guard, scope, receive, send)",
    ): "no request: the server starts or ends",
    (
        "http.middleware.APIKeyMiddleware.__call__",
        "await self.app(scope, receive, send)",
    ): "the request has been let through; what waits is the app",
    (
        "http.middleware.APIKeyMiddleware.__call__",
        "await self._run_live(key, scope, receive, send)",
    ): "the WebSockets here are refused",
    (
        "guard.Guard._build",
        "await link.start()",
    ): "it starts a task",
    (
        "redis_access.RedisAccess.connect",
        "await connection.disconnect(nowait=True)",
    ): "it does not wait for that",
    (
        "redis_access._Wire.close",
        "await self._connection.disconnect(nowait=True)",
    ): "it does not wait for that",
    (
        "shared_cache.SharedCache._probe",
        "await wire.close()",
    ): "it does not wait for that",
    (
        "redis_access._checked_run_id",
        (
            "await connection.send_packed_command(connection.pack_commands(commands), "
            "check_health=False)"
        ),
    ): "what is sent is short",
    (
        "redis_access._checked_run_id",
        "await _read_reply(connection)",
    ): "the answers to what was sent together come together",
    (
        "redis_access.RedisAccess.close",
        "await self.client.aclose()",
    ): "nothing was sent over the pool when opening failed",
    (
        "guard.Guard._open_for_request",
        "async with asyncio.timeout(_OPENING_SECONDS):",
    ): "a timeout is entered and left at once",
    (
        "store.store.Store.register_worker.run",
        "await self._begin(connection)",
    ): "only PostgreSQL is asked for the time",
    (
        "store.store.Store.poll.run",
        "await feed.state_and_record(connection, worker_id, place)",
    ): "only PostgreSQL is asked so",
    (
        "verifier.Verifier._prove",
        "async with asyncio.timeout_at(end_of(since)):",
    ): "a timeout is entered and left at once",
    (
        "verifier.Verifier.close",
        "await asyncio.wait(self._renewals)",
    ): "a guard that did not open has proven no key",
    (
        "freshness.Freshness._join",
        "await self._store.unregister_worker(former)",
    ): "only who was struck off has had a place before",
    (
        "reader.KeyReader.find",
        "await self._landing(flight, since)",
    ): "the second of the kind: only for an unknown prefix that another asks for, too",
    (
        "shared_cache.SharedCache._read",
        "async with asyncio.timeout(TIMEOUT_SECONDS):",
    ): "a timeout is entered and left at once",
    (
        "redis_access.RedisAccess.connect",
        "async with asyncio.timeout(TIMEOUT_SECONDS):",
    ): "a timeout is entered and left at once",
    (
        "freshness.Freshness.stop",
        "await asyncio.wait(self._tasks)",
    ): "nothing runs before the last step of opening, which has succeeded",
    (
        "reader.KeyReader._fly",
        "await self._ask_store(left)",
    ): "the second of the kind: only where a change has overtaken the read",
    (
        "store.store.Store._begin",
        "await connection.execute(_LIMITS)",
    ): "only PostgreSQL has these limits",
    (
        "store.upgrade.upgrade.work",
        "await connection.execute(text(f'SELECT pg_advisory_xact_lock({_LOCK})'))",
    ): "only PostgreSQL needs this lock",
    (
        "store.upgrade._switch_to_wal",
        "await asyncio.sleep(0.01)",
    ): "only while another process switches, too",
}


@dataclass
class Outcome:
    """What came of a disturbed request."""

    request: Request
    reached: list[Scope]
    error: BaseException | None
    waits: list[tuple[Place, ...]]
    struck: tuple[Place, ...]  # where the error was thrown


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Fail if what happens inside leaves a task or a thread behind."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    yield
    assert asyncio.all_tasks() == tasks
    for thread in set(threading.enumerate()) - threads:
        if not thread.name.startswith("asyncio_"):  # the event loop's own, which end with it
            thread.join(10)
            assert not thread.is_alive()


class Stage:
    """Makes the same request again and again, each time with a new guard."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self._folder = folder
        self._redis = redis
        self._numbers = count()
        self._url = f"sqlite:///{folder}/keys.db"
        self._tokens: dict[str, bytes] = {}

    async def prepare(self) -> None:
        """Make the keys, one of which Redis knows."""
        await prepare(self._url)
        self._tokens = await seed(self._url)
        async with make_guard(self._url, redis=self._redis.url) as guard:
            await guard.verify(self._tokens["good"])
            await written(shared_of(guard))

    async def run(self, kind: Kind, disturbance: Disturbance) -> Outcome:
        """Make one request and disturb it, then see that the guard still works."""
        url = f"sqlite:///{self._folder}/{next(self._numbers)}.db" if kind.empty else self._url
        if not kind.empty:
            # So that argon2 has to decide, and the digest is to be stored.
            execute(url, "UPDATE tfm_keys SET digest = NULL, digest_key_id = NULL")
        if kind.shared == "miss":
            with self._redis.client() as client:
                client.flushall()
        async with nothing_left():
            setting = Setting(url, self._tokens, self._redis.url if kind.shared else None)
            outcome = await self._disturbed(setting, kind, disturbance)
            async with setting.guard:
                after = setting.request("good")
                await setting.answer(after)
        assert after.status == (401 if kind.empty else None)
        assert len(setting.reached) == (0 if kind.empty else 1)
        return outcome

    async def _disturbed(self, setting: Setting, kind: Kind, disturbance: Disturbance) -> Outcome:
        others = []
        if kind.second:
            others = [asyncio.create_task(setting.answer(setting.request("good")))]
            await _OneTurn()
        more = {"type": "websocket", "extensions": kind.extensions}
        request = setting.request(kind.token, **(more if kind.websocket else {}))
        with disturbing(disturbance):
            task = asyncio.create_task(setting.answer(request))
        await asyncio.wait([task])
        disturbance.over = True
        await asyncio.gather(*others)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        reached = [scope for scope in setting.reached if scope is request.scope]
        setting.reached.clear()
        return Outcome(request, reached, error, disturbance.waits, disturbance.struck)


@pytest.fixture
async def stage(tmp_path: Path, redis_server: RedisServer) -> Stage:
    """Make a database with keys, on which requests can be made."""
    stage = Stage(tmp_path, redis_server)
    await stage.prepare()
    return stage


def went_on(log: pytest.LogCaptureFixture) -> bool:
    """Tell whether somebody has said that the error was noted and did no harm.

    SQLAlchemy does when it only tidied up, and then gives the connection up; the shared cache does
    when it cannot be used, and goes without.
    """
    return any(
        record.name.startswith("sqlalchemy.pool")
        or record.name in ("tfm_guard.shared_cache", "tfm_guard.link")
        for record in log.records
        if record.levelno >= logging.WARNING
    )


def check_refused(outcome: Outcome, kind: Kind, log: pytest.LogCaptureFixture) -> None:
    """Fail unless an exception has led to 503, or has done no harm at all."""
    if outcome.error is not None:
        # The connection to the client itself is broken: there is no way to tell it anything.
        assert isinstance(outcome.error, InjectedError)
        assert not outcome.reached
        return
    if outcome.reached:
        assert kind.accepted
        assert outcome.request.sent == []
        # Whatever is wrong with Redis, the database is asked.
        assert went_on(log) or not {place.file for place in outcome.struck}.isdisjoint(REDIS)
    elif outcome.request.status != 503:
        assert kind.token == "revoked" or kind.empty
        if kind.extensions == {}:
            assert [message["type"] for message in outcome.request.sent] == ["websocket.close"]
        else:
            assert outcome.request.status == 401
            assert went_on(log)


# Where only Redis is dealt with, without which the database is asked.
REDIS: Final = {"shared_cache.py", "redis_access.py"}


class InjectedError(Exception):
    """What breaks."""


def nothing() -> Disturbance:
    """Return what disturbs nothing, and notes all waits."""
    return Disturbance(0, InjectedError)


# Tried wherever they wait.
EVERYWHERE: Final = (KINDS["revoked"], KINDS["accepted"])


async def numbers_to_try(
    stage: Stage, kind: Kind, waits: Sequence[tuple[Place, ...]]
) -> Sequence[int]:
    """Return which of *waits* to disturb: of those in one and the same place, the first and last.

    All kinds wait mostly where that with a revoked key does. But for that and the most common kind,
    only the places are tried in which they wait more often.
    """
    tried: Counter[tuple[Place, ...]] = Counter()
    if kind not in EVERYWHERE:
        tried.update((await stage.run(KINDS["revoked"], nothing())).waits)
    numbers = range(1, len(waits) + 1)
    last = dict(zip(waits, numbers, strict=True))
    first = dict(zip(reversed(waits), reversed(numbers), strict=True))
    return sorted({place[where] for where in Counter(waits) - tried for place in (first, last)})


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_an_exception_anywhere_lets_nothing_through(
    stage: Stage, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception at any await refuses the request with 503, and the next one is answered."""
    undisturbed = await stage.run(kind, nothing())
    refused = 0
    numbers = await numbers_to_try(stage, kind, undisturbed.waits)
    for number in numbers:
        caplog.clear()
        outcome = await stage.run(kind, Disturbance(number, InjectedError))
        if len(outcome.waits) < number:
            break
        check_refused(outcome, kind, caplog)
        refused += outcome.request.status == 503
    assert kind not in EVERYWHERE or refused > len(numbers) / 10
    assert len(undisturbed.reached) == kind.accepted


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_a_cancellation_anywhere_lets_nothing_through(stage: Stage, kind: Kind) -> None:
    """A cancellation at any await ends the request, or, of what it waits for, refuses it."""
    undisturbed = await stage.run(kind, nothing())
    for number in await numbers_to_try(stage, kind, undisturbed.waits):
        outcome = await stage.run(kind, Disturbance(number, asyncio.CancelledError))
        if len(outcome.waits) < number:
            break
        if isinstance(outcome.error, asyncio.CancelledError):
            assert not outcome.reached
            continue
        if outcome.reached:
            # As if Redis were not there: the database was asked.
            assert not {place.file for place in outcome.struck}.isdisjoint(REDIS)
            continue
        # Not the request was cancelled, but a task that it waits for.
        assert outcome.error is None
        assert "http/middleware.py" not in {place.file for place in outcome.struck}
        assert outcome.request.sent


async def test_every_await_of_the_guard_is_among_them(stage: Stage) -> None:
    """The requests wait at every await that the middleware leads to, but for those named here."""
    waits: set[tuple[Place, ...]] = set()
    for kind in KINDS.values():
        undisturbed = await stage.run(kind, nothing())
        waits.update(undisturbed.waits)
    # And where only a request waits that something has gone wrong for.
    for kind in (KINDS["accepted"], KINDS["shared miss"]):
        undisturbed = await stage.run(kind, nothing())
        for place in dict.fromkeys(undisturbed.waits):
            number = undisturbed.waits.index(place) + 1
            waits.update((await stage.run(kind, Disturbance(number, InjectedError))).waits)
    seen = {place for places in waits for place in places}
    functions = reachable(*STARTS, stop=set(ELSEWHERE))
    places = {
        place: (path, source)
        for path, function in functions.items()
        for place, source in function.waits.items()
    }
    unknown = {place for place in seen if not any(outer.holds(place) for outer in places)}
    assert unknown == set()
    waited = {min((outer for outer in places if outer.holds(place)), key=extent) for place in seen}
    left = {places[place] for place in places.keys() - waited}
    assert left - set(NEVER) == set()
    assert set(NEVER) - left == set()


def extent(place: Place) -> tuple[int, int]:
    """Return how many lines and columns *place* goes over."""
    return place.last[0] - place.first[0], place.last[1] - place.first[1]
