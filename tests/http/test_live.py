"""What is live when its key is revoked: WebSockets always, responses where that is asked for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.http.support import Answer, bearer, call, http_scope, websocket_scope
from tests.support import sql
from tests.support.guards import create, freshness_of, new_guard
from tests.support.live import (
    ACCEPT,
    CONNECT,
    Echo,
    Peer,
    closed,
    disconnected,
    live_of,
    say,
    text,
    turns,
)
from tfm_guard import APIKeyMiddleware, Guard, VerifiedKey
from tfm_guard.errors import InvalidToken, Unavailable
from tfm_guard.link import Link, Seals
from tfm_guard.link import Message as LinkMessage
from tfm_guard.live import Ended, LiveConnection
from tfm_guard.records import Change, CreatedKey
from tfm_guard.testing import ManualClock

HIDE = "ALTER TABLE tfm_keys RENAME TO tfm_away"
SHOW = "ALTER TABLE tfm_away RENAME TO tfm_keys"


@pytest.fixture
def clock() -> ManualClock:
    """Stand still until moved."""
    return ManualClock()


@pytest.fixture
async def guard(sqlite_url: str, clock: ManualClock) -> AsyncIterator[Guard]:
    """Open a guard whose time is the test's; at its end nothing of it runs."""
    async with new_guard(sqlite_url, clock=clock) as guard:
        yield guard
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
async def created(guard: Guard) -> CreatedKey:
    """Create a key that the guard remembers."""
    created = await create(guard)
    await guard.verify(created.token)
    return created


def socket_scope(created: CreatedKey, *, denial: bool = True) -> Scope:
    """Return the scope of a WebSocket with that key."""
    return websocket_scope(bearer(created.token), denial=denial)


def stream_scope(created: CreatedKey) -> Scope:
    """Return the scope of a request with that key."""
    return http_scope(headers=bearer(created.token))


async def revoke(guard: Guard, created: CreatedKey) -> None:
    """Revoke that key."""
    await guard.keys.revoke("acme", created.key.id)


async def execute(url: str, statement: str) -> None:
    """Change the database past the library, while the guard, who may be writing, goes on."""
    await asyncio.to_thread(sql.execute, url, statement)


async def change(url: str, created: CreatedKey, what: str) -> None:
    """Change a key's row as no process ever hears of."""
    which = f"prefix = '{created.key.key_prefix}'"
    await execute(url, f"UPDATE tfm_keys SET {what} WHERE {which}")  # noqa: S608  # the test's own words


async def revoke_silently(url: str, created: CreatedKey) -> None:
    """Revoke a key so that no process hears of it."""
    await change(url, created, "revoked_at = created_at, version = 2")


# WebSockets


async def test_revoking_closes_a_websocket(guard: Guard, created: CreatedKey) -> None:
    """When revoking has returned it was closed with 1008, and the app was told and has ended."""
    app, peer = Echo(), Peer(CONNECT, text("one"))
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT, say("one"))
        await revoke(guard, created)
        assert peer.sent[2:] == [closed()]
        peer.incoming.put_nowait(text("two"))
        await running
    assert app.heard == [CONNECT, text("one"), disconnected()]
    assert peer.sent == [ACCEPT, say("one"), closed()]
    assert len(live_of(guard)) == 0


async def test_other_keys_websockets_stay(guard: Guard, created: CreatedKey) -> None:
    """Revoking one key closes no WebSocket of another of the same account."""
    other, peer = await create(guard), Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(Echo(), guard=guard), socket_scope(other)):
        await peer.sends(ACCEPT)
        await revoke(guard, created)
        peer.incoming.put_nowait(text("still here"))
        await peer.sends(ACCEPT, say("still here"))


async def test_what_came_before_is_not_heard_after(guard: Guard, created: CreatedKey) -> None:
    """A message that the server has, and the app has not, is lost with the revocation."""
    app, peer = Echo(), Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        # The app waits for this one already, and comes to run right after.
        peer.incoming.put_nowait(text("late"))
        freshness_of(guard).apply(Change(2, "revoked", created.key.key_prefix, 2))
        await running
    assert app.heard == [CONNECT, disconnected()]
    assert peer.sent == [ACCEPT, closed()]


async def test_what_a_slow_client_has_not_taken_is_not_sent(
    guard: Guard, created: CreatedKey
) -> None:
    """A message that waits for the client to read is broken off by the revocation."""
    errors: list[Exception] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        peer.slow = True
        try:
            await send(say("too late"))
        except OSError as error:
            errors.append(error)

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await turns(lambda: peer.slow)
        await revoke(guard, created)
        await turns(lambda: errors)
        assert peer.sent == [ACCEPT]
        peer.slow = False
        await running
    assert peer.sent == [ACCEPT, closed()]


async def test_an_app_that_only_sends_gets_errors(guard: Guard, created: CreatedKey) -> None:
    """After the revocation each attempt to send raises OSError, and nothing goes out."""
    asked: asyncio.Queue[str] = asyncio.Queue()
    errors: list[OSError] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        while len(errors) < 3:
            try:
                await send(say(await asked.get()))
            except OSError as error:
                errors.append(error)

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        asked.put_nowait("before")
        await peer.sends(ACCEPT, say("before"))
        await revoke(guard, created)
        for _ in range(3):
            asked.put_nowait("after")
        await running
    assert peer.sent == [ACCEPT, say("before"), closed()]


async def test_an_app_that_does_neither_is_let_be(guard: Guard, created: CreatedKey) -> None:
    """The client is told although the app neither receives nor sends; the app, when it asks."""
    done = asyncio.Event()
    heard: list[Message] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await receive()
        await done.wait()
        heard.extend([await receive(), await receive()])

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        await revoke(guard, created)
        assert peer.sent == [ACCEPT, closed()]
        assert not running.done()
        done.set()
        await running
    assert heard == [disconnected(), disconnected()]


async def test_the_server_is_spared_our_own_error(guard: Guard, created: CreatedKey) -> None:
    """An app that lets the error of sending through has ended, as with the server's own error."""
    asked = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await asked.wait()
        await send(say("after"))

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        await revoke(guard, created)
        asked.set()
        await running
    assert peer.sent == [ACCEPT, closed()]


@pytest.mark.parametrize("revoked", [True, False])
async def test_errors_of_the_app_are_the_app_s(
    guard: Guard,
    created: CreatedKey,
    revoked: bool,  # noqa: FBT001
) -> None:
    """What the app raises passes through, also while it cleans up after a revocation."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await receive()
        await receive()
        raise ValueError("of the app")

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        if revoked:
            await revoke(guard, created)
        else:
            peer.incoming.put_nowait(text("go"))
        with pytest.raises(ValueError, match="of the app"):
            await running


async def test_a_revocation_meets_a_client_that_goes(guard: Guard, created: CreatedKey) -> None:
    """Whoever comes first, the app is told once that it is over, and nothing fails."""
    for client_first in (True, False):
        key, app, peer = await create(guard), Echo(), Peer(CONNECT)
        gone = {"type": "websocket.disconnect", "code": 1001, "reason": "away"}
        async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(key)) as running:
            await peer.sends(ACCEPT)
            peer.incoming.put_nowait(gone)
            if client_first:
                await running
            freshness_of(guard).apply(Change(2, "revoked", key.key.key_prefix, 2))
            await running
        assert app.heard == [CONNECT, gone]
        assert peer.sent == ([ACCEPT] if client_first else [ACCEPT, closed()])


async def test_a_server_that_cannot_close_is_no_fault(guard: Guard, created: CreatedKey) -> None:
    """Where the connection is lost before it can be closed, the app is told all the same."""

    class Lost(Peer):
        async def send(self, message: Message) -> None:
            if message["type"] == "websocket.close":
                raise OSError("the client has gone")
            await super().send(message)

    app, peer = Echo(), Lost(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        await revoke(guard, created)
        await running
    assert app.heard == [CONNECT, disconnected()]


async def test_after_the_app_s_own_close_there_is_none(guard: Guard, created: CreatedKey) -> None:
    """A WebSocket that the app has closed is not closed again."""
    done = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await send(closed(4000))
        await done.wait()

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT, closed(4000))
        await revoke(guard, created)
        done.set()
        await running
    assert peer.sent == [ACCEPT, closed(4000)]


@pytest.mark.parametrize("denial", [True, False])
async def test_before_it_is_accepted_it_is_turned_down(
    guard: Guard,
    created: CreatedKey,
    denial: bool,  # noqa: FBT001
) -> None:
    """A WebSocket that waits to be accepted gets the answer that a revoked key gets."""
    asked = asyncio.Event()

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked.set()
        await receive()
        with pytest.raises(OSError, match="ended by the guard"):
            await send(ACCEPT)

    peer = Peer(CONNECT)
    guarded = APIKeyMiddleware(app, guard=guard)
    async with peer.runs(guarded, socket_scope(created, denial=denial)) as running:
        await asked.wait()
        await revoke(guard, created)
        await running
    if not denial:
        assert peer.sent == [closed()]
        return
    start, body = peer.sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    answer = await call(guarded, http_scope(headers=bearer(created.token)))
    assert Answer(start["status"], tuple(start["headers"]), body["body"]) == answer


async def test_an_answer_in_its_place_is_broken_off(guard: Guard, created: CreatedKey) -> None:
    """Of an app's own answer to a WebSocket that it does not accept, nothing more is sent."""
    start = {"type": "websocket.http.response.start", "status": 403, "headers": []}
    part = {"type": "websocket.http.response.body", "body": b"no", "more_body": True}

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send(part)
        await receive()
        await receive()
        await send(part)

    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(start, part)
        await revoke(guard, created)
        await running
    assert peer.sent == [start, part]


async def test_starlette_cleans_up(guard: Guard, created: CreatedKey) -> None:
    """A Starlette endpoint sees `WebSocketDisconnect`, whether it receives or sends."""
    seen: list[int] = []
    asked = asyncio.Event()

    async def receiving(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as error:
            seen.append(error.code)

    async def sending(websocket: WebSocket) -> None:
        await websocket.accept()
        await asked.wait()
        try:
            await websocket.send_text("after")
        except WebSocketDisconnect as error:
            seen.append(error.code)

    routes = [WebSocketRoute("/receiving", receiving), WebSocketRoute("/sending", sending)]
    guarded = APIKeyMiddleware(Starlette(routes=routes), guard=guard)
    async with contextlib.AsyncExitStack() as stack:
        running = []
        for path in ("/receiving", "/sending"):
            peer = Peer(CONNECT)
            scope = websocket_scope(bearer(created.token), denial=True, path=path)
            running.append(await stack.enter_async_context(peer.runs(guarded, scope)))
            await peer.has_sent(1)
        await revoke(guard, created)
        asked.set()
        await asyncio.gather(*running)
    assert sorted(seen) == [1006, 1008]


class Revoking(Guard):
    """A guard in whose process each key is revoked right after it was verified."""

    async def verify(self, token: str | bytes) -> VerifiedKey:
        """Verify, then revoke."""
        key = await super().verify(token)
        await self.keys.revoke(key.account_id, key.key_id)
        return key


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_revoked_between_verifying_and_watching(sqlite_url: str, kind: str) -> None:
    """A key that was revoked when it had just been verified gets nowhere."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError

    async with new_guard(sqlite_url) as guard:
        created = await create(guard)
        revoking = Revoking(guard.settings)
        async with revoking:
            guarded = APIKeyMiddleware(app, guard=revoking, end_responses=True)
            peer = Peer(CONNECT)
            scope = stream_scope(created) if kind == "http" else socket_scope(created)
            await guarded(scope, peer.receive, peer.send)
            assert peer.sent[0]["status"] == 401
            assert len(live_of(revoking)) == 0


# Before it is acknowledged


class ScriptedWire:
    """A connection to a Redis that confirms subscriptions, and says what it is told to.

    Acknowledgements that leave on it are noted in *events*.
    """

    run_id = "scripted"

    def __init__(self, events: list[str]) -> None:
        self.incoming: asyncio.Queue[object] = asyncio.Queue()
        self.received = 0
        self._events = events

    async def send(self, *commands: Sequence[str | bytes]) -> None:
        """Answer what can be answered at once."""
        for name, *arguments in commands:
            if name == "SUBSCRIBE":
                for number, channel in enumerate(map(str, arguments), start=1):
                    self.incoming.put_nowait([b"subscribe", channel.encode(), number])
            elif name == "PUBLISH" and arguments[0] == "replies":
                self._events.append("acknowledged")

    async def receive(self) -> object:
        """Return what is next."""
        reply = await self.incoming.get()
        self.received += 1
        return reply

    async def close(self) -> None:
        """Do nothing."""


async def test_it_is_closed_before_it_is_acknowledged(
    guard: Guard, created: CreatedKey, clock: ManualClock
) -> None:
    """An acknowledgement leaves after the server was told to close."""
    events: list[str] = []
    wires: list[ScriptedWire] = []

    class Noting(Peer):
        async def send(self, message: Message) -> None:
            if message == closed():
                events.append("closed")
            await super().send(message)

    async def connect() -> ScriptedWire:
        wires.append(ScriptedWire(events))
        return wires[-1]

    seals = Seals([b"the key of all"])
    link = Link(
        connect,
        names="tfm:",
        seals=seals,
        freshness=freshness_of(guard),
        clock=clock,
        random=bytes,
        counters=guard.counters,
    )
    await link.start()
    await turns(lambda: wires and wires[0].received == 2)  # subscribed
    news = LinkMessage(bytes(16), (Change(2, "revoked", created.key.key_prefix, 2),), "replies", ())
    peer = Noting(CONNECT)
    async with peer.runs(APIKeyMiddleware(Echo(), guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        wires[0].incoming.put_nowait([b"message", b"tfm:changes", seals.seal("tfm:changes", news)])
        await turns(lambda: len(events) == 2)
        await running
    assert events == ["closed", "acknowledged"]
    await link.stop()


# Where this process cannot be sure


async def test_news_of_the_creation_closes_nothing(guard: Guard, sqlite_url: str) -> None:
    """A WebSocket whose key another process made is looked into when that is heard, and stays."""
    other_clock = ManualClock()
    async with new_guard(sqlite_url, clock=other_clock) as other:
        created = await create(guard)
        peer = Peer(CONNECT)
        async with peer.runs(APIKeyMiddleware(Echo(), guard=other), socket_scope(created)):
            await peer.sends(ACCEPT)
            reads = other.counters.store_reads
            await freshness_of(other).poll()
            await turns(lambda: other.counters.store_reads == reads + 1)
            peer.incoming.put_nowait(text("still here"))
            await peer.sends(ACCEPT, say("still here"))
            revoking = asyncio.create_task(revoke(guard, created))
            while freshness_of(other).floor(created.key.key_prefix) < 2:
                await freshness_of(other).poll()
            await peer.sends(ACCEPT, say("still here"), closed())
            revoking.cancel()


async def test_without_a_lease_each_message_is_looked_into(
    guard: Guard, created: CreatedKey, clock: ManualClock, sqlite_url: str
) -> None:
    """Where memory does not count, a message costs a query; after a revocation none passes."""
    app, peer = Echo(), Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        reads = guard.counters.store_reads
        peer.incoming.put_nowait(text("fresh"))
        await peer.sends(ACCEPT, say("fresh"))
        assert guard.counters.store_reads == reads

        freshness_of(guard).fresh_until = clock.monotonic()
        peer.incoming.put_nowait(text("stale"))
        await peer.sends(ACCEPT, say("fresh"), say("stale"))
        assert guard.counters.store_reads == reads + 2  # heard, and said

        await revoke_silently(sqlite_url, created)
        peer.incoming.put_nowait(text("revoked"))
        await running
    assert app.heard == [CONNECT, text("fresh"), text("stale"), disconnected()]
    assert peer.sent == [ACCEPT, say("fresh"), say("stale"), closed()]


async def test_where_nothing_can_be_known_it_is_closed_with_1013(
    guard: Guard, created: CreatedKey, sqlite_url: str, clock: ManualClock
) -> None:
    """Without lease and database no message passes, and the client may come again."""
    app, peer = Echo(), Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        freshness_of(guard).fresh_until = clock.monotonic()
        await execute(sqlite_url, HIDE)
        peer.incoming.put_nowait(text("unknown"))
        await running
    await execute(sqlite_url, SHOW)
    assert app.heard == [CONNECT, disconnected(1013)]
    assert peer.sent == [ACCEPT, closed(1013)]
    # That was no no.
    peer = Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(Echo(), guard=guard), socket_scope(created)):
        await peer.sends(ACCEPT)


async def test_a_message_that_is_looked_into_is_not_lost(
    guard: Guard, created: CreatedKey, clock: ManualClock
) -> None:
    """An app that gives up waiting while its message is checked is given it the next time."""
    heard: list[Message] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        freshness_of(guard).fresh_until = clock.monotonic()
        waiting = asyncio.ensure_future(receive())
        await turns(peer.incoming.empty)  # it has it, and has asked about the key
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        heard.append(await receive())

    peer = Peer(CONNECT, text("one"))
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await running
    assert heard == [text("one")]


async def test_idle_ones_are_looked_into_after_a_flush(
    guard: Guard, created: CreatedKey, sqlite_url: str, clock: ManualClock
) -> None:
    """When all is forgotten each key is asked about until it is known, also for who is idle."""
    kept, peer, other = await create(guard), Peer(CONNECT), Peer(CONNECT)
    guarded = APIKeyMiddleware(Echo(), guard=guard)
    async with (
        peer.runs(guarded, socket_scope(created)) as running,
        other.runs(guarded, socket_scope(kept)) as staying,
    ):
        await peer.sends(ACCEPT)
        await other.sends(ACCEPT)
        await revoke_silently(sqlite_url, created)
        await execute(sqlite_url, HIDE)
        freshness_of(guard).start_afresh()
        # The poll, what writes usage, both that look, and who looks for signs of trouble.
        await clock.wait_for_sleepers(5)
        assert peer.sent == [ACCEPT]
        await execute(sqlite_url, SHOW)
        await clock.pass_time(1)
        await running
        assert peer.sent == [ACCEPT, closed()]
        assert not staying.done()
        assert other.sent == [ACCEPT]


async def test_a_key_that_expires_ends_with_the_next_message(
    guard: Guard, clock: ManualClock
) -> None:
    """From its expiry on nothing passes, whatever the lease."""
    created = await create(guard, expires_at=clock.now() + timedelta(seconds=60))
    app, peer = Echo(), Peer(CONNECT)
    async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
        await peer.sends(ACCEPT)
        await clock.pass_time(59.5)
        peer.incoming.put_nowait(text("in time"))
        await peer.sends(ACCEPT, say("in time"))
        await clock.pass_time(0.5)
        peer.incoming.put_nowait(text("expired"))
        await running
    assert app.heard == [CONNECT, text("in time"), disconnected()]
    assert peer.sent == [ACCEPT, say("in time"), closed()]


async def test_closing_the_guard_closes_them(sqlite_url: str) -> None:
    """With the guard its WebSockets are closed with 1013, and come back when it does."""
    async with new_guard(sqlite_url) as guard:
        created = await create(guard)
        app, peer = Echo(), Peer(CONNECT)
        guarded = APIKeyMiddleware(app, guard=guard)
        task = asyncio.create_task(guarded(socket_scope(created), peer.receive, peer.send))
        await peer.sends(ACCEPT)
    async with asyncio.timeout(10):
        await task
    assert app.heard == [CONNECT, disconnected(1013)]
    assert peer.sent == [ACCEPT, closed(1013)]
    key = VerifiedKey.pack(
        digest=bytes(16),
        key_id=created.key.id,
        key_prefix=created.key.key_prefix,
        account_id="acme",
        name="CI",
        expires_at=None,
        replaced_at=None,
        credentials=None,  # type: ignore[arg-type]  # not looked at
    )
    with pytest.raises(Unavailable):
        guard.watch(key)


async def test_a_change_during_a_look_is_looked_into(guard: Guard, created: CreatedKey) -> None:
    """An answer counts only for what was asked after the last change; a revocation counts more."""
    may_answer = asyncio.Semaphore(0)
    asked = 0

    async def holds(_key: VerifiedKey) -> bool:
        nonlocal asked
        asked += 1
        return await may_answer.acquire()

    key = await guard.verify(created.token)
    connection = LiveConnection(key, freshness_of(guard), holds)
    checking = asyncio.create_task(connection.check())
    await turns(lambda: asked == 1)
    connection.doubt()
    may_answer.release()
    await turns(lambda: asked == 2)
    meanwhile = connection.doubtful
    assert not checking.done()
    may_answer.release()
    await checking
    assert (meanwhile, connection.doubtful) == (True, False)

    connection.doubt()
    checking = asyncio.create_task(connection.check())
    await turns(lambda: asked == 3)
    connection.end(InvalidToken("revoked"))
    may_answer.release()
    with pytest.raises(Ended, match="revoked"):
        await checking


# Responses


class Stream:
    """An app that streams: a part whenever it is *asked*, until it is broken off.

    With *stubborn* it does not take that from anybody, and tries to send on.
    """

    def __init__(self, *, stubborn: bool = False) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.ended: list[str] = []
        self._stubborn = stubborn

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            try:
                await send(part(await self.asked.get()))
            except (asyncio.CancelledError, OSError) as error:
                self.ended.append(type(error).__name__)
                if not self._stubborn or len(self.ended) == 3:
                    raise


START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def part(content: str) -> Message:
    """Return a part of a body that goes on."""
    return {"type": "http.response.body", "body": content.encode(), "more_body": True}


async def test_a_response_is_broken_off(guard: Guard, created: CreatedKey) -> None:
    """With *end_responses* the app is cancelled where it waits, and nothing more is sent."""
    app, peer = Stream(), Peer()
    guarded = APIKeyMiddleware(app, guard=guard, end_responses=True)
    async with peer.runs(guarded, stream_scope(created)) as running:
        app.asked.put_nowait("one")
        await peer.sends(START, part("one"))
        await revoke(guard, created)
        await running
    assert app.ended == ["CancelledError"]
    assert peer.sent == [START, part("one")]


async def test_a_stubborn_app_sends_nothing_more(guard: Guard, created: CreatedKey) -> None:
    """An app that goes on after it was cancelled gets OSError for whatever it sends."""
    app, peer = Stream(stubborn=True), Peer()
    guarded = APIKeyMiddleware(app, guard=guard, end_responses=True)
    async with peer.runs(guarded, stream_scope(created)) as running:
        app.asked.put_nowait("one")
        await peer.sends(START, part("one"))
        for more in ("two", "three"):
            app.asked.put_nowait(more)
        freshness_of(guard).apply(Change(2, "revoked", created.key.key_prefix, 2))
        await asyncio.wait({running})
    assert sorted(app.ended) == ["CancelledError", "Ended", "Ended"]
    assert peer.sent == [START, part("one")]


async def test_without_being_asked_to_responses_go_on(guard: Guard, created: CreatedKey) -> None:
    """By default a response that was let through may finish, and is not checked."""
    app, peer = Stream(), Peer()
    async with peer.runs(APIKeyMiddleware(app, guard=guard), stream_scope(created)):
        app.asked.put_nowait("one")
        await peer.sends(START, part("one"))
        await revoke(guard, created)
        app.asked.put_nowait("two")
        await peer.sends(START, part("one"), part("two"))
        assert len(live_of(guard)) == 0


@pytest.mark.parametrize("database", [True, False])
async def test_one_that_has_not_begun_becomes_a_refusal(
    guard: Guard,
    created: CreatedKey,
    clock: ManualClock,
    sqlite_url: str,
    database: bool,  # noqa: FBT001
) -> None:
    """Who gets no answer from the app gets 401, or 503 where nothing can be known."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await go_on.wait()
        await PlainTextResponse("too late")(scope, receive, send)

    peer = Peer()
    guarded = APIKeyMiddleware(app, guard=guard, end_responses=True)
    async with peer.runs(guarded, stream_scope(created)) as running:
        await begun.wait()
        if database:
            await revoke(guard, created)
        else:
            freshness_of(guard).fresh_until = clock.monotonic()
            await execute(sqlite_url, HIDE)
            go_on.set()
        await running
    start, _ = peer.sent
    assert start["status"] == (401 if database else 503)


async def test_without_a_lease_each_part_is_looked_into(
    guard: Guard, created: CreatedKey, clock: ManualClock, sqlite_url: str
) -> None:
    """Where memory does not count, a response is broken off before the next part passes."""
    app, peer = Stream(), Peer()
    guarded = APIKeyMiddleware(app, guard=guard, end_responses=True)
    async with peer.runs(guarded, stream_scope(created)) as running:
        app.asked.put_nowait("one")
        await peer.sends(START, part("one"))
        freshness_of(guard).fresh_until = clock.monotonic()
        await revoke_silently(sqlite_url, created)
        app.asked.put_nowait("two")
        await running
    assert peer.sent == [START, part("one")]


async def test_what_comes_after_the_response_goes_on(guard: Guard, created: CreatedKey) -> None:
    """Once the whole response is sent, revoking the key interrupts nothing, and hides no error."""
    go_on, finished = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        finished.set()
        raise ValueError("of the app")

    async def endpoint(_request: Request) -> Response:
        return PlainTextResponse("done", background=BackgroundTask(work))

    peer = Peer()
    inner = Starlette(routes=[Route("/", endpoint)])
    guarded = APIKeyMiddleware(inner, guard=guard, end_responses=True)
    scope = http_scope(path="/", headers=bearer(created.token))
    async with peer.runs(guarded, scope) as running:
        await turns(lambda: len(peer.sent) == 2)
        await revoke(guard, created)
        go_on.set()
        with pytest.raises(ValueError, match="of the app"):
            await running
    assert finished.is_set()


@pytest.mark.parametrize("error", [TimeoutError("of the app"), OSError("of the app")])
async def test_errors_of_a_response_are_the_app_s(
    guard: Guard, created: CreatedKey, error: Exception
) -> None:
    """While the key holds, what the app raises passes through untouched."""

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    guarded = APIKeyMiddleware(app, guard=guard, end_responses=True)
    with pytest.raises(type(error)) as raised:
        await call(guarded, stream_scope(created))
    assert raised.value is error


async def test_starlette_s_streams_are_broken_off(guard: Guard, created: CreatedKey) -> None:
    """A streaming response of Starlette runs its cleanup, under either version of ASGI."""
    cleaned: list[str] = []

    async def ticks() -> AsyncIterator[str]:
        try:
            yield "one"
            await asyncio.Event().wait()
        finally:
            cleaned.append("yes")

    async def endpoint(_request: Request) -> Response:
        return StreamingResponse(ticks())

    inner = Starlette(routes=[Mount("/", routes=[Route("/", endpoint)])])
    guarded = APIKeyMiddleware(inner, guard=guard, end_responses=True)
    for version in ("2.3", "2.4"):
        key, peer = await create(guard), Peer()
        scope = http_scope(path="/", headers=bearer(key.token))
        scope["asgi"] = {"version": "3.0", "spec_version": version}
        async with peer.runs(guarded, scope) as running:
            await peer.has_sent(2)
            await revoke(guard, key)
            await running
        assert peer.sent[1:] == [part("one")]
    assert cleaned == ["yes", "yes"]


# Guard.holds


async def test_holds_while_it_is_active(guard: Guard, created: CreatedKey) -> None:
    """A verified key holds, from memory, until it is revoked."""
    key = await guard.verify(created.token)
    reads = guard.counters.store_reads
    assert await guard.holds(key)
    assert guard.counters.store_reads == reads
    await revoke(guard, created)
    assert not await guard.holds(key)


async def test_holds_until_it_expires(guard: Guard, clock: ManualClock) -> None:
    """A key holds until its expiry, and not a moment longer."""
    created = await create(guard, expires_at=clock.now() + timedelta(seconds=60))
    key = await guard.verify(created.token)
    await clock.pass_time(59.9)
    assert await guard.holds(key)
    await clock.pass_time(0.1)
    assert not await guard.holds(key)


@pytest.mark.parametrize(
    ("what", "holding"),
    [
        ("name = 'other'", True),
        ("digest_key_id = 'another'", True),
        ("digest_key_id = 'another', revoked_at = created_at", False),
        ("digest_key_id = 'another', expires_at = created_at", False),
        ("expires_at = created_at", False),
        ("scopes = 'domains:write emails:read send'", True),
        ("scopes = 'send'", False),
        ("digest_key_id = 'another', scopes = ''", False),
        ("id = '00000000-0000-0000-0000-000000000001'", False),
    ],
)
async def test_holds_as_the_database_has_it(
    guard: Guard, clock: ManualClock, sqlite_url: str, what: str, *, holding: bool
) -> None:
    """Without a lease the row decides: active, the same key, and no scope less."""
    created = await create(guard, scopes=["send", "domains:write"])
    key = await guard.verify(created.token)
    freshness_of(guard).fresh_until = clock.monotonic()
    await change(sqlite_url, created, what)
    assert await guard.holds(key) == holding


@pytest.mark.parametrize(
    "breakage", [HIDE, "UPDATE tfm_keys SET expires_at = 'whenever'", "DROP TABLE tfm_accounts"]
)
async def test_holds_says_when_it_cannot_know(
    guard: Guard, created: CreatedKey, clock: ManualClock, sqlite_url: str, breakage: str
) -> None:
    """Where the database does not tell, or tells nonsense, it is `Unavailable`, and no no."""
    key = await guard.verify(created.token)
    freshness_of(guard).fresh_until = clock.monotonic()
    await execute(sqlite_url, breakage)
    with pytest.raises(Unavailable):
        await guard.holds(key)


async def test_holds_opens_the_guard(sqlite_url: str) -> None:
    """A guard that is not open yet opens to be asked; one that was closed does not know."""
    async with new_guard(sqlite_url) as guard:
        key = await guard.verify((await create(guard)).token)
    with pytest.raises(Unavailable):
        await guard.holds(key)
    fresh = new_guard(sqlite_url)
    assert await fresh.holds(key)
    await fresh.close()
