"""The link: changes as they are made, over Redis pub/sub.

Redis sends a subscriber what is published in order, and the answers to its own questions in the
same order. So the answer to a PING proves that everything published on that server before the
question has been handled here, and nothing else does: a connection may be dead for minutes without
a sign, and what is published while it is away is lost.

Whatever arrives is believed only under a seal, since anyone who can reach Redis can publish.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct

from tfm_guard.clock import Clock
from tfm_guard.counters import Counters
from tfm_guard.freshness import Freshness
from tfm_guard.records import Change
from tfm_guard.redis_access import TIMEOUT_SECONDS, Wire

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")
Connect = Callable[[], Awaitable[Wire]]
_Command = tuple[str, str, bytes]

_PING_SECONDS: Final = 0.5
# A question that has found no answer for so long ends the connection.
_SILENCE_SECONDS: Final = 1.0
# Between two attempts to connect: from about a tenth of a second, doubling, to about one.
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 1.0
_SEAL_BYTES: Final = 16
_CANCEL_SECONDS: Final = 0.1
# So many frames, of a flood of them, are handled before requests get their turn.
_FRAMES_IN_A_ROW: Final = 16
# Whose seals are prepared: our own two channels, and those on which others wait for answers.
_MOST_CHANNELS: Final = 256
# Between a failure to publish and the next attempt.
_PUBLISHER_PAUSE_SECONDS: Final = (0.15, 0.25)
# More than this to publish at once means that somebody floods us.
_MOST_WAITING: Final = 1_024


class Message(Struct, array_like=True, frozen=True):
    """What a process that changed something tells the others."""

    id: bytes  # random; acknowledgements name it
    changes: tuple[Change, ...]
    reply_to: str  # the channel to acknowledge them on
    struck_off: tuple[UUID, ...]  # processes that have no place in the register any more


class Acknowledgement(Struct, array_like=True, frozen=True):
    """A process says that it has handled the message with that id, and so all its changes."""

    worker_id: UUID
    message_id: bytes


class Seals:
    """Seals what is sent on a channel, with the newest of *keys*, and opens what was sealed."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)
        self._states = lru_cache(_MOST_CHANNELS)(self._new_states)
        # Names the newest key. Processes on different keys may not hear each other.
        self.id = blake2b(keys[0], digest_size=8, person=b"tfm-guard seal").hexdigest()

    def seal(self, channel: str, content: Struct) -> bytes:
        """Return *content* as it is sent on *channel*."""
        body = msgspec.msgpack.encode(content)
        return body + _mac(self._states(channel)[0], body)

    def open(self, channel: str, payload: bytes, kind: type[T]) -> T | None:
        """Return what was sent on *channel*; none unless it was sealed by one of us.

        Raises `msgspec.MsgspecError` if it was, by a release with other fields: what it says is
        not known then, and may not be passed over.
        """
        body, mac = payload[:-_SEAL_BYTES], payload[-_SEAL_BYTES:]
        for state in self._states(channel):
            if compare_digest(mac, _mac(state, body)):
                return msgspec.msgpack.decode(body, type=kind)
        return None

    def _new_states(self, channel: str) -> "list[blake2b]":
        # With the channel in it, what was sealed for one is a forgery on another.
        return [
            blake2b(channel.encode(), key=key, digest_size=_SEAL_BYTES, person=b"tfm-guard link")
            for key in self._keys
        ]


class Link:
    """One process's connections for hearing of changes and for telling of them.

    *names* begins the names of the channels; *seals* are those of the installation.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        names: str,
        seals: Seals,
        freshness: Freshness,
        clock: Clock,
        random: Callable[[int], bytes],
        counters: Counters,
    ) -> None:
        self._connect = connect
        self._changes = f"{names}changes"
        self._replies = f"{names}replies:{random(8).hex()}"
        self._changes_name = self._changes.encode()
        self._replies_name = self._replies.encode()
        self._seals = seals
        self._freshness = freshness
        self._clock = clock
        self._random = random
        self._counters = counters
        self._publisher = Publisher(connect, clock)
        self._asked: dict[bytes, float] = {}  # nonces of PINGs, and when each was sent, monotonic
        self._awaited: dict[bytes, Acknowledgements] = {}  # by the id of the message
        self._running: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Link({self._changes!r})"

    async def start(self) -> None:
        """Begin to connect, and to stay connected."""
        self._running = asyncio.get_running_loop().create_task(self._stay_connected())

    async def stop(self) -> None:
        """Close the connections."""
        if self._running is not None:
            await _end(self._running)
        await self._publisher.close()

    async def tell(
        self, message_id: bytes, changes: Sequence[Change], *, struck_off: Collection[UUID] = ()
    ) -> str:
        """Publish *changes* and who was *struck_off*; return the link that they went out on.

        They go out together, as they were made: who comes to listen in between could otherwise
        acknowledge the last without having heard of the first. Raises whatever keeps it from going
        out.
        """
        message = Message(message_id, tuple(changes), self._replies, tuple(sorted(struck_off)))
        payload = self._seals.seal(self._changes, message)
        return self._name_of(await self._publisher.publish(self._changes, payload))

    @contextlib.contextmanager
    def acknowledgements(self) -> "Iterator[tuple[bytes, Acknowledgements]]":
        """Give the id of a message to be told, and collect its acknowledgements meanwhile."""
        message_id = self._random(16)
        collected = self._awaited[message_id] = Acknowledgements()
        try:
            yield message_id, collected
        finally:
            del self._awaited[message_id]

    def _name_of(self, run_id: str) -> str:
        # Processes that seal with different keys do not understand each other for certain.
        return f"{run_id}/{self._seals.id}"

    async def _stay_connected(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = self._clock.monotonic()
            try:
                await self._serve_a_connection()
            except Exception as error:  # noqa: BLE001  # whatever it is, the next one may be better
                if self._clock.monotonic() - began > _LONGEST_PAUSE_SECONDS:
                    pause = _FIRST_PAUSE_SECONDS  # it had been good
                if pause == _FIRST_PAUSE_SECONDS:
                    _log.warning("changes do not arrive over Redis now: %r", error)
            finally:
                self._freshness.link_went()
            # Jittered, so that processes that lost Redis together do not return together.
            await self._clock.sleep(random.uniform(pause / 2, pause * 3 / 2))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _serve_a_connection(self) -> None:
        wire = await self._connect()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await self._subscribe(wire)
            self._freshness.link_came(self._name_of(wire.run_id))
            _log.info("changes arrive over Redis")
            self._asked.clear()
            lost = asyncio.Event()
            reading = asyncio.get_running_loop().create_task(self._read(wire))
            reading.add_done_callback(lambda _: lost.set())
            try:
                while not reading.done():
                    await self._ping(wire)
                    await self._clock.sleep(_PING_SECONDS, unless=lost)
            finally:
                reading.cancel()
                await asyncio.wait({reading})
            reading.result()
        finally:
            await wire.close()

    async def _subscribe(self, wire: Wire) -> None:
        channels = [self._changes, self._replies]
        await wire.send(("SUBSCRIBE", *channels))
        for number, channel in enumerate(channels, start=1):
            confirmation = await wire.receive()
            if confirmation != [b"subscribe", channel.encode(), number]:
                raise ConnectionError("Redis did not confirm the subscription")

    async def _ping(self, wire: Wire) -> None:
        now = self._clock.monotonic()
        if now - min(self._asked.values(), default=now) >= _SILENCE_SECONDS:
            raise ConnectionError(f"Redis was silent for {_SILENCE_SECONDS:g} s")
        nonce = self._random(8).hex().encode()
        self._asked[nonce] = now
        await wire.send(("PING", nonce))

    async def _read(self, wire: Wire) -> None:
        for number in itertools.count(1):
            frame = await wire.receive()
            try:
                answer = self._handle(frame)
            except Exception:
                # What it was about is unknown, so nothing that is remembered can be trusted.
                self._freshness.start_afresh()
                raise
            if answer is not None or number % _FRAMES_IN_A_ROW == 0:
                await asyncio.sleep(0)
            if answer is not None:
                # Behind the first steps of whatever that has set going: closing WebSockets.
                await wire.send(answer)

    def _handle(self, frame: Any) -> _Command | None:
        """Handle what Redis says; return what to say to it."""
        match frame:
            case [b"message", self._changes_name, bytes(payload)]:
                return self._handle_message(payload)
            case [b"message", self._replies_name, bytes(payload)]:
                self._handle_acknowledgement(payload)
            case bytes(nonce):
                asked = self._asked.pop(nonce, -math.inf)
                self._freshness.link_answered(asked)
            case int():
                pass  # so many have heard an acknowledgement
            case _:
                raise ConnectionError("the answer is not one that Redis gives")
        return None

    def _handle_message(self, payload: bytes) -> _Command | None:
        """Apply what the message says; return how to acknowledge it, if that is ours to do."""
        message = self._seals.open(self._changes, payload, Message)
        if message is None:
            self._counters.link_rejected += 1
            return None
        for change in message.changes:
            self._freshness.apply(change)
        if self._freshness.worker_id in message.struck_off:
            self._freshness.start_afresh()
        if message.reply_to == self._replies:
            return None  # who waits here knows of this process
        # It is sealed and names the message, so it says the same on whatever server: no ROLE here.
        acknowledgement = Acknowledgement(self._freshness.worker_id, message.id)
        return "PUBLISH", message.reply_to, self._seals.seal(message.reply_to, acknowledgement)

    def _handle_acknowledgement(self, payload: bytes) -> None:
        acknowledgement = self._seals.open(self._replies, payload, Acknowledgement)
        if acknowledgement is None:
            self._counters.link_rejected += 1
            return
        collected = self._awaited.get(acknowledgement.message_id)
        if collected is not None:
            collected.add(acknowledgement.worker_id)


class Acknowledgements(set[UUID]):
    """The processes that have acknowledged; *complete* is set when no expected one is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.complete = asyncio.Event()
        self._missing: set[UUID] = set()

    def expect(self, workers: Iterable[UUID]) -> None:
        """Wait for all of *workers*."""
        self._missing = set(workers) - self
        self.complete.clear()

    def add(self, worker_id: UUID) -> None:
        super().add(worker_id)
        self._missing.discard(worker_id)
        if not self._missing:
            self.complete.set()


class Publisher:
    """Publishes on one connection, in order; what is asked for at the same time goes together."""

    def __init__(self, connect: Connect, clock: Clock) -> None:
        self._connect = connect
        self._clock = clock
        self._wire: Wire | None = None
        self._waiting: list[tuple[str, bytes, asyncio.Future[str]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def publish(self, channel: str, payload: bytes) -> str:
        """Publish and return the run id of the server that took it. Raises what went wrong."""
        if len(self._waiting) >= _MOST_WAITING:
            raise ConnectionError("too much is waiting to be published")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        # Seen, should nobody wait for it.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting.append((channel, payload, future))
        if self._sending is None:
            self._sending = loop.create_task(self._send_all())
        return await asyncio.shield(future)

    async def close(self) -> None:
        """Close the connection; what was still to be published is not."""
        if self._sending is not None:
            await _end(self._sending)
        await self._disconnect()

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                if not await self._send(batch):
                    # All who try again share the next attempt, however many they are.
                    await self._clock.sleep(random.uniform(*_PUBLISHER_PAUSE_SECONDS))  # noqa: S311
        finally:
            self._sending = None
            for *_, future in self._waiting:
                future.cancel()

    async def _send(self, batch: list[tuple[str, bytes, "asyncio.Future[str]"]]) -> bool:
        """Publish *batch*, tell those who wait, and return whether that went well."""
        commands = [("PUBLISH", channel, payload) for channel, payload, _ in batch]
        try:
            run_id = await self._send_twice(commands)
        except asyncio.CancelledError:
            for *_, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # it is for whoever waits
            for *_, future in batch:
                future.set_exception(error)
            return False
        for *_, future in batch:
            future.set_result(run_id)
        return True

    async def _send_twice(self, commands: list[_Command]) -> str:
        """Send *commands*; once more if a connection that had been left idle turns out dead."""
        if self._wire is not None:
            with contextlib.suppress(Exception):
                return await self._send_once(commands)
        return await self._send_once(commands)

    async def _send_once(self, commands: list[_Command]) -> str:
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                wire = self._wire = self._wire or await self._connect()
                # What is published on a replica does not reach who listens to the master.
                await wire.send(("ROLE",), *commands)
                role = await wire.receive()
                answers = [await wire.receive() for _ in commands]
            if role[0] != b"master" or not all(isinstance(answer, int) for answer in answers):
                raise ConnectionError("Redis is no master, or did not publish")  # noqa: TRY301
        except BaseException:
            await self._disconnect()
            raise
        return wire.run_id

    async def _disconnect(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel *task* until it has ended: redis-py can lose a cancellation (in a wait_for)."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_SECONDS)


def _mac(state: "blake2b", body: bytes) -> bytes:
    mac = state.copy()
    mac.update(body)
    return mac.digest()
