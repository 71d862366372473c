"""Facts about the link, on a real Redis: what arrives is in order and sealed, or it is not there.

Time is the tests': PINGs and pauses follow their clocks, while the answers take what they take.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol
from uuid import UUID, uuid4

import msgspec
import pytest

from tests.support.guards import LONG, installation_of, until
from tests.support.proxy import Proxy
from tests.support.redis import RedisServer
from tfm_guard.clock import SystemClock
from tfm_guard.counters import Counters
from tfm_guard.freshness import Freshness
from tfm_guard.link import Acknowledgement, Link, Message, Publisher, Seals
from tfm_guard.records import Change
from tfm_guard.redis_access import RedisAccess
from tfm_guard.store import Store
from tfm_guard.testing import ManualClock

NAMES = "tfm:here:v1:"
CHANNEL = f"{NAMES}changes"
MESSAGE_ID = bytes(16)
CHANGE = Change(7, "revoked", "00000001", 2)
SEALS = Seals([bytes(32)])
PAUSE = 1.6  # seconds; longer than any between two attempts to connect


class Listener(Freshness):
    """A process that notes what it is told, and when its link answered."""

    def __init__(self, store: Store, clock: ManualClock, counters: Counters) -> None:
        super().__init__(
            store=store,
            clock=clock,
            installation=installation_of(lease=2, poll_interval=LONG),
            random=lambda count: uuid4().bytes[:count],
            counters=counters,
        )
        self.log: list[Change | float] = []
        self.failing = False
        self.connected = False
        self.listen(on_change=self._hear, on_flush=lambda: None)

    @property
    def linked(self) -> bool:
        """Whether the link counts."""
        return "not linked" not in repr(self)

    def _hear(self, change: Change) -> None:
        if self.failing:
            raise RuntimeError("a test")
        self.log.append(change)

    def link_came(self, link: str) -> None:
        """Note it."""
        super().link_came(link)
        self.connected = True

    def link_went(self) -> None:
        """Note it."""
        super().link_went()
        self.connected = False

    def link_answered(self, asked: float) -> None:
        """Note it."""
        super().link_answered(asked)
        self.log.append(asked)


class Process:
    """What one process has of the link, with a clock of its own."""

    def __init__(self, database_url: str, url: str, seals: Seals) -> None:
        self.clock = ManualClock()
        self.counters = Counters()
        self.store = Store(database_url, pool_size=1, clock=self.clock)
        self.freshness = Listener(self.store, self.clock, self.counters)
        self.access = RedisAccess(url)
        self.link = Link(
            self.access.connect,
            names=NAMES,
            seals=seals,
            freshness=self.freshness,
            clock=self.clock,
            random=lambda count: uuid4().bytes[:count],
            counters=self.counters,
        )

    @property
    def replies(self) -> str:
        """The channel on which it is sent acknowledgements."""
        return self.link._replies  # noqa: SLF001  # it is told in no other way but to whom it asks

    async def start(self) -> None:
        """Open all that there is; the link connects meanwhile."""
        await self.store.open()
        await self.freshness.start()
        await self.link.start()

    async def stop(self) -> None:
        """Close all that there is."""
        await self.link.stop()
        await self.freshness.stop()
        await self.access.close()
        await self.store.close()

    async def is_linked(self) -> None:
        """Return when the link counts."""
        await until(lambda: self.freshness.linked, what="the link counts")

    async def is_cut_off(self) -> None:
        """Return when the link is found lost, and the next attempt to connect is waited for."""
        await until(lambda: not self.freshness.connected, what="the loss of the link")

    async def connects_again(self) -> None:
        """Let the pause before connecting again pass, as often as it takes."""
        while not self.freshness.connected:
            self.clock.advance(PAUSE)
            # Who sleeps: who reads the feed, and who sends PINGs or waits to connect.
            await self.clock.wait_for_sleepers(2)
        await self.is_linked()

    async def told(self, change: Change) -> None:
        """Return when it was told of *change*."""
        await until(lambda: change in self.freshness.log, what="the change")


class NewProcess(Protocol):
    """Starts processes, and returns when their link counts."""

    async def __call__(self, url: str, *, seals: Seals = SEALS) -> Process: ...


@pytest.fixture
async def new_process(sqlite_url: str) -> AsyncIterator[NewProcess]:
    """Start processes on one database, and stop them all in the end."""
    made: list[Process] = []

    async def make(url: str, *, seals: Seals = SEALS) -> Process:
        made.append(Process(sqlite_url, url, seals))
        await made[-1].start()
        await made[-1].is_linked()
        return made[-1]

    yield make
    for process in made:
        await process.stop()


@pytest.fixture
async def process(redis_server: RedisServer, new_process: NewProcess) -> Process:
    """Link one process."""
    return await new_process(redis_server.url)


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    """Run a proxy before Redis."""
    async with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def distant(proxy: Proxy, new_process: NewProcess) -> Process:
    """Link one process through the proxy."""
    return await new_process(f"redis://127.0.0.1:{proxy.port}/0")


def publish(server: RedisServer, channel: str, *payloads: bytes) -> None:
    """Publish past the library, to somebody."""
    with server.client() as client:
        for payload in payloads:
            assert client.publish(channel, payload) == 1


def kill(server: RedisServer, kind: str) -> None:
    """Close the connections of that kind but our own."""
    with server.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


def sealed(change: Change = CHANGE, *, seals: Seals = SEALS, reply_to: str = "nobody") -> bytes:
    """Return a message as it is sent."""
    return seals.seal(CHANNEL, Message(MESSAGE_ID, (change,), reply_to, ()))


async def test_what_was_published_is_handled_before_the_answer_to_a_later_question(
    distant: Process, process: Process, proxy: Proxy
) -> None:
    """A change that was published before a PING was sent is known when its PONG is believed."""
    proxy.stall()
    await process.link.tell(MESSAGE_ID, [CHANGE])
    distant.clock.advance(0.5)
    await distant.clock.wait_for_sleepers(2)
    asked = distant.clock.monotonic()
    log = distant.freshness.log
    assert CHANGE not in log
    assert asked not in log
    distant.clock.advance(0.25)  # and it is believed as of when it was asked for
    proxy.resume()
    await until(lambda: CHANGE in log and isinstance(log[-1], float), what="the answer")
    assert asked in log
    assert log.index(CHANGE) < log.index(asked)
    assert log.count(CHANGE) == 1
    assert distant.freshness.is_fresh()


async def test_a_second_of_silence_ends_the_connection(distant: Process, proxy: Proxy) -> None:
    """Half-open, a connection is given up after 1 s, and a new one is made when that is over."""
    proxy.stall()
    # The PINGs after half a second and a second find no answer.
    for _ in range(2):
        distant.clock.advance(0.5)
        await distant.clock.wait_for_sleepers(2)
        assert distant.freshness.linked
    distant.clock.advance(0.5)
    await distant.is_cut_off()
    before = proxy.connections
    proxy.resume()
    await distant.connects_again()
    assert proxy.connections > before
    assert distant.counters.flushes == 0


async def test_a_killed_connection_is_made_anew(
    process: Process, redis_server: RedisServer
) -> None:
    """Closed by the server, the link counts no more, and again once it was made anew."""
    for number in range(3):
        kill(redis_server, "pubsub")
        await process.is_cut_off()
        await process.connects_again()
        change = CHANGE._replace(version=2 + number)
        publish(redis_server, CHANNEL, sealed(change))
        await process.told(change)
    with redis_server.client() as client:
        assert len(client.client_list(_type="pubsub")) == 1


def unsealed(channel: str, content: Message | Acknowledgement) -> list[bytes]:
    """Return what may come on *channel* that nobody of us has sealed for it."""
    good = SEALS.seal(channel, content)
    return [
        b"",
        b"garbage",
        bytes(1_000_000),
        good[:-1],
        good[1:],
        good[:-16],
        good + b"x",
        Seals([b"k" * 32]).seal(channel, content),
        SEALS.seal(f"{channel}x", content),
        bytes([good[0] ^ 1]) + good[1:],
    ]


async def test_what_is_not_sealed_costs_nothing(
    process: Process, redis_server: RedisServer
) -> None:
    """Garbage, forgeries, and what is cut short or meant for another channel are counted."""
    messages = unsealed(CHANNEL, Message(MESSAGE_ID, (CHANGE,), process.replies, ()))
    with process.link.acknowledgements() as (message_id, acknowledged):
        answers = unsealed(process.replies, Acknowledgement(uuid4(), message_id))
        publish(redis_server, CHANNEL, *messages)
        publish(redis_server, process.replies, *answers)
        another = CHANGE._replace(version=3)
        publish(redis_server, CHANNEL, sealed(another))
        await process.told(another)
        assert acknowledged == set()
    assert process.counters.link_rejected == len(messages) + len(answers)
    assert CHANGE not in process.freshness.log
    assert process.freshness.linked
    assert process.counters.flushes == 0


async def test_a_message_twice_is_a_message_once(
    process: Process, redis_server: RedisServer
) -> None:
    """Replayed, it is acknowledged again, and that is all."""
    publish(redis_server, CHANNEL, *[sealed()] * 50, sealed(CHANGE._replace(prefix="00000002")))
    await process.told(CHANGE._replace(prefix="00000002"))
    assert process.freshness.log.count(CHANGE) == 1
    assert process.counters == Counters()


async def test_keys_that_were_replaced_are_still_heard(
    process: Process, redis_server: RedisServer, new_process: NewProcess
) -> None:
    """Who knows the older key too hears who seals with it; the names of their links differ."""
    newer = await new_process(redis_server.url, seals=Seals([b"n" * 32, bytes(32)]))
    link = await process.link.tell(MESSAGE_ID, [CHANGE])
    await newer.told(CHANGE)
    another = CHANGE._replace(version=3)
    assert await newer.link.tell(MESSAGE_ID, [another]) != link
    await newer.told(another)
    await until(lambda: process.counters.link_rejected > 0, what="the message of the newer")
    assert another not in process.freshness.log
    with redis_server.client() as client:
        assert link == f"{client.info('server')['run_id']}/{SEALS.id}"


async def test_a_sealed_message_that_cannot_be_read_has_everything_forgotten(
    process: Process, redis_server: RedisServer
) -> None:
    """One of us said something that this release does not understand: it may have been anything."""

    class Future(msgspec.Struct, array_like=True):
        changes: str = "of another form"

    publish(redis_server, CHANNEL, SEALS.seal(CHANNEL, Future()))
    await process.is_cut_off()
    assert process.counters.flushes == 1
    await process.connects_again()
    assert process.freshness.is_fresh()


async def test_a_handler_that_fails_leaves_no_trust(
    process: Process, redis_server: RedisServer, new_process: NewProcess
) -> None:
    """All is forgotten, nothing is acknowledged, and the link comes back by itself."""
    teller = await new_process(redis_server.url)
    process.freshness.failing = True
    with teller.link.acknowledgements() as (message_id, acknowledged):
        await teller.link.tell(message_id, [CHANGE])
        await process.is_cut_off()
        assert process.counters.flushes >= 1
        process.freshness.failing = False
        await process.connects_again()
        # What it answers now has overtaken nothing that it answered before.
        with teller.link.acknowledgements() as (later_id, later):
            await teller.link.tell(later_id, [CHANGE._replace(id=8)])
            await until(lambda: len(later) == 1, what="its acknowledgement")
        assert acknowledged == set()
    assert process.freshness.is_fresh()


async def test_an_acknowledgement_names_the_process_and_the_message(
    process: Process, redis_server: RedisServer, new_process: NewProcess
) -> None:
    """Everybody else who hears of it says so to the one who told it; of that very message alone."""
    teller, another = await new_process(redis_server.url), await new_process(redis_server.url)
    with (
        teller.link.acknowledgements() as (message_id, acknowledged),
        teller.link.acknowledgements() as (_, others),
        process.link.acknowledgements() as (_, elsewhere),
    ):
        await teller.link.tell(message_id, [CHANGE._replace(id=6, prefix="00000003"), CHANGE])
        await until(lambda: len(acknowledged) == 2, what="both acknowledgements")
        assert acknowledged == {each.freshness.worker_id for each in (process, another)}
        assert others == elsewhere == set()
    # Each had known both changes when it said so.
    assert [c.prefix for c in process.freshness.log if isinstance(c, Change)] == [
        "00000003",
        "00000001",
    ]


async def test_who_was_struck_off_is_told(
    process: Process, redis_server: RedisServer, new_process: NewProcess
) -> None:
    """Who is named forgets everything, and acknowledges after that; others go on as they were."""
    teller = await new_process(redis_server.url)
    worker_id = process.freshness.worker_id
    with teller.link.acknowledgements() as (message_id, acknowledged):
        await teller.link.tell(message_id, [CHANGE], struck_off={worker_id, UUID(int=1)})
        await until(lambda: worker_id in acknowledged, what="the acknowledgement")
        assert process.counters.flushes == 1
    assert teller.counters.flushes == 0


async def test_what_is_published_together_goes_together(redis_server: RedisServer) -> None:
    """A hundred messages asked for at once take one write, on one connection."""
    publisher = Publisher(RedisAccess(redis_server.url).connect, SystemClock())
    with redis_server.client() as client:
        client.config_resetstat()
        run_ids = await asyncio.gather(*(publisher.publish("x", b"y") for _ in range(100)))
        calls = client.info("commandstats")
        assert set(run_ids) == {client.info("server")["run_id"]}
    assert calls["cmdstat_publish"]["calls"] == 100
    # Once when it connects, and once before what it publishes.
    assert calls["cmdstat_role"]["calls"] == 2
    await publisher.close()


async def test_an_idle_connection_that_died_costs_nothing(redis_server: RedisServer) -> None:
    """Publishing on a connection that the server has closed is tried once more on a new one."""
    publisher = Publisher(RedisAccess(redis_server.url).connect, SystemClock())
    run_id = await publisher.publish("x", b"y")
    kill(redis_server, "normal")
    assert await publisher.publish("x", b"y") == run_id
    redis_server.restart()
    assert await publisher.publish("x", b"y") != run_id
    redis_server.stop()
    with pytest.raises(Exception, match=r"."):
        await publisher.publish("x", b"y")
    redis_server.start()
    await publisher.publish("x", b"y")
    await publisher.close()


async def test_a_demoted_server_publishes_nothing(redis_server: RedisServer) -> None:
    """What a replica publishes does not reach who listens to its master: that is a failure."""
    access = RedisAccess(redis_server.url)
    publisher = Publisher(access.connect, SystemClock())
    await publisher.publish("x", b"y")
    with redis_server.client() as client:
        client.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(ConnectionError, match="must lead to the master"):
                await publisher.publish("x", b"y")
            with pytest.raises(ConnectionError, match="must lead to the master"):
                await access.connect()
        finally:
            client.replicaof("no", "one")
    await publisher.publish("x", b"y")
    await publisher.close()


async def test_what_waits_to_be_published_is_bounded(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a Redis that does not answer 1,024 messages wait, and the next is refused at once."""
    monkeypatch.setattr("tfm_guard.link.TIMEOUT_SECONDS", 0.25)
    monkeypatch.setattr("tfm_guard.redis_access.TIMEOUT_SECONDS", 0.25)
    publisher = Publisher(RedisAccess(f"redis://127.0.0.1:{proxy.port}/0").connect, SystemClock())
    proxy.stall()
    waiting = [asyncio.create_task(publisher.publish("x", b"y")) for _ in range(1_025)]
    with pytest.raises(ConnectionError, match="too much is waiting"):
        await waiting[-1]
    outcomes = await asyncio.gather(*waiting[:-1], return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {TimeoutError}
    proxy.resume()
    await publisher.publish("x", b"y")
    await publisher.close()


async def test_closing_a_publisher_gives_up_what_waits(proxy: Proxy) -> None:
    """Nobody waits for ever for what is not published any more."""
    publisher = Publisher(RedisAccess(f"redis://127.0.0.1:{proxy.port}/0").connect, SystemClock())
    proxy.stall()
    first = asyncio.create_task(publisher.publish("x", b"y"))
    await until(lambda: proxy.connections == 1, what="a connection")
    second = asyncio.create_task(publisher.publish("x", b"y"))
    await asyncio.wait({first, second}, timeout=0)
    await publisher.close()
    for outcome in await asyncio.gather(first, second, return_exceptions=True):
        assert isinstance(outcome, asyncio.CancelledError | TimeoutError)


async def test_a_lost_wire_stays_lost(proxy: Proxy) -> None:
    """It never connects again by itself, which would hide that messages were lost."""
    wire = await RedisAccess(f"redis://127.0.0.1:{proxy.port}/0").connect()
    await wire.send(("PING", "x"))
    assert await wire.receive() == b"x"
    proxy.cut()
    with pytest.raises(Exception, match=r"."):
        await wire.receive()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="was lost"):
            await wire.send(("PING", "x"))
        with pytest.raises(ConnectionError, match="was lost"):
            await wire.receive()
    await wire.close()
    assert proxy.connections == 1


async def test_a_rotated_password_ends_the_link(
    process: Process, redis_server: RedisServer
) -> None:
    """While Redis lets nobody in there is no link, and soon after it does there is."""
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "resetpass", ">secret")
        try:
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await process.is_cut_off()
            process.clock.advance(PAUSE)
            with pytest.raises(Exception, match=r"(?i)auth"):
                await process.access.connect()
            assert not process.freshness.linked
        finally:
            client.execute_command("ACL", "SETUSER", "default", "nopass")
    await process.connects_again()


@pytest.mark.parametrize("command", ["hello", "subscribe", "publish"])
async def test_what_redis_does_not_permit_is_not_there(
    process: Process, redis_server: RedisServer, command: str
) -> None:
    """Without HELLO or SUBSCRIBE there is no link; without PUBLISH it is known that none hears."""
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", f"-{command}")
        try:
            if command == "publish":
                with pytest.raises(Exception, match=r"(?i)perm"):
                    await process.link.tell(MESSAGE_ID, [CHANGE])
                assert process.freshness.linked
            else:
                kill(redis_server, "pubsub")
                await process.is_cut_off()
                process.clock.advance(PAUSE)
                await process.clock.wait_for_sleepers(2)
                assert not process.freshness.linked
        finally:
            client.execute_command("ACL", "SETUSER", "default", f"+{command}")
    process.clock.advance(0.3)  # the longest that is waited after a failure to publish
    await process.connects_again()
    await process.link.tell(MESSAGE_ID, [CHANGE])


async def test_a_stopped_link_leaves_nothing(redis_server: RedisServer, sqlite_url: str) -> None:
    """Neither tasks nor connections remain, whether it was linked or still trying to be."""
    tasks = asyncio.all_tasks()
    process = Process(sqlite_url, redis_server.url, SEALS)
    alone = Process(sqlite_url, "redis://127.0.0.1:1/0", SEALS)
    for each in (process, alone):
        await each.start()
    await process.is_linked()
    await process.link.tell(MESSAGE_ID, [CHANGE])

    def connections() -> int:
        with redis_server.client() as client:
            return [each["name"] for each in client.client_list()].count("tfm-guard")

    assert connections() == 2
    for each in (process, alone):
        await each.stop()
    await until(lambda: connections() == 0, what="the end of the connections")
    assert asyncio.all_tasks() <= tasks
