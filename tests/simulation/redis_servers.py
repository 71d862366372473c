"""Redis servers, the client by which a process reads and fills, and who else may write there."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lupa.lua51 import LuaRuntime  # type: ignore[import-untyped]  # it has no annotations

from tests.simulation.network import Network, Postponed
from tests.simulation.timeline import Timeline
from tfm_guard.redis_access import TIMEOUT_SECONDS

if TYPE_CHECKING:
    from tests.simulation.process import Process

T = TypeVar("T")


@dataclass
class Value:
    """What is stored under a name, until *ends*. Anything but bytes is of another type."""

    content: bytes | list[bytes]
    ends: float


@dataclass
class RedisServer:
    """One server, whose commands are executed one by one."""

    name: str
    run_id: str
    timeline: Timeline
    role: str = "master"
    up: bool = True
    writes_paused_until: float = 0.0
    paused_until: float = 0.0
    values: dict[str, Value] = field(default_factory=dict)
    connections: "list[Connection]" = field(default_factory=list)
    published: list[tuple[bytes, bytes]] = field(default_factory=list)  # what anyone may have heard
    # Called with the name and the values before and after, when a script has written.
    on_fill: Callable[[str, bytes | None, bytes], None] = lambda _name, _old, _new: None

    def read(self, names: list[str]) -> list[bytes | None]:
        """Answer MGET."""
        self.check(writing=False)
        return [self._text(name) for name in names]

    def run_script(self, script: "Script", names: list[str], arguments: list[bytes]) -> None:
        """Answer EVALSHA."""
        self.check(writing=True)
        script.run(self, names, arguments)

    def describe(self) -> tuple[str, str]:
        """Answer ROLE and INFO: the role and the run id."""
        self.check(writing=False)
        return self.role, self.run_id

    def publish(self, channel: bytes, payload: bytes) -> int:
        """Answer PUBLISH."""
        self.published.append((channel, payload))
        del self.published[:-20]
        hearing = [connection for connection in self.connections if channel in connection.channels]
        for connection in hearing:
            connection.push([b"message", channel, payload])
        return len(hearing)

    def serve(self, connection: "Connection", command: tuple[bytes, ...]) -> list[Any]:
        """Answer a command that came on *connection* with frames."""
        name, *arguments = command
        self.check(writing=name == b"PUBLISH")
        if name == b"SUBSCRIBE":
            connection.channels += arguments
            return [[b"subscribe", c, n] for n, c in enumerate(connection.channels, start=1)]
        if name == b"PING":
            return [*arguments]
        if name == b"ROLE":
            return [[self.role.encode(), 0, []]]
        assert name == b"PUBLISH"
        return [self.publish(*arguments)]

    def stop(self) -> None:
        """Be killed: every connection is reset."""
        self.up = False
        for connection in list(self.connections):
            connection.reset()

    def get(self, name: str) -> "Value | None":
        """Return what is stored under *name* and has not ended."""
        value = self.values.get(name)
        if value is not None and value.ends <= self.timeline.now:
            del self.values[name]
            return None
        return value

    def set(self, name: str, content: bytes, milliseconds: int) -> None:
        """Store *content* under *name*, on behalf of a script."""
        old = self._text(name)
        self.values[name] = Value(content, self.timeline.now + milliseconds / 1000)
        self.on_fill(name, old, content)

    def restart(self, run_id: str, values: dict[str, Value]) -> None:
        """Come up as another server that has loaded *values*."""
        self.run_id = run_id
        self.values = values
        self.role = "master"
        self.up = True

    def check(self, *, writing: bool) -> None:
        """Raise what a command that comes now meets with in place of an answer."""
        if not self.up:
            raise ConnectionRefusedError("nobody listens")
        until = max(self.paused_until, self.writes_paused_until if writing else 0.0)
        if until > self.timeline.now:
            raise Postponed(until)
        if writing and self.role != "master":
            raise ConnectionError("READONLY You can't write against a read only replica.")

    def _text(self, name: str) -> bytes | None:
        value = self.get(name)
        return value.content if value is not None and isinstance(value.content, bytes) else None


class Script:
    """A Lua script, run as Redis runs it: its own text, not a likeness of it."""

    _runtime = LuaRuntime(encoding=None)  # text is bytes, as in Redis
    _compiled: dict[str, Any] = {}  # noqa: RUF012  # of all worlds

    def __init__(self, text: str) -> None:
        if text not in self._compiled:
            self._compiled[text] = self._runtime.eval(
                f"function(KEYS, ARGV, redis)\n{text}\nend".encode()
            )
        self._function = self._compiled[text]

    def run(self, server: RedisServer, names: list[str], arguments: list[bytes]) -> None:
        """Run it with these KEYS and ARGV."""
        table = self._runtime.table_from

        def call(command: bytes, name: bytes, *rest: Any) -> Any:
            if command == b"GET":
                value = server.get(name.decode())
                if value is None:
                    return False
                is_text = isinstance(value.content, bytes)
                return value.content if is_text else table({b"err": b"WRONGTYPE"})
            assert command == b"SET"
            assert rest[1] == b"PX"
            server.set(name.decode(), rest[0], int(rest[2]))
            return table({b"ok": b"OK"})

        redis = table({b"call": call, b"pcall": call, b"sha1hex": _sha1hex})
        self._function(table([name.encode() for name in names]), table(arguments), redis)


def _sha1hex(content: bytes) -> bytes:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest().encode()


class Deployment:
    """The servers there are, and which of them the URL leads to."""

    def __init__(self, timeline: Timeline, server_names: tuple[str, ...] = ("a", "b")) -> None:
        self._timeline = timeline
        self.servers = [RedisServer(name, self.new_run_id(), timeline) for name in server_names]
        for replica in self.servers[1:]:
            replica.role = "slave"
        self.primary = self.servers[0]
        self.stuck: dict[str, RedisServer] = {}  # processes that reach only that server
        self.snapshots: list[dict[str, Value]] = []  # what it held, the latest last

    def server_for(self, process: "Process") -> RedisServer:
        """Return where the URL leads a process."""
        return self.stuck.get(process.name, self.primary)

    def new_run_id(self) -> str:
        """Return what a server that starts calls itself."""
        return self._timeline.random.randbytes(20).hex()


class Connection:
    """One connection of a process: what is sent arrives in order, or it never does."""

    def __init__(
        self, process: "Process", server: RedisServer, network: Network, timeline: Timeline
    ) -> None:
        self.run_id = server.run_id
        self.channels: list[bytes] = []
        self._process = process
        self._loop = process.loop
        self._server = server
        self._network = network
        self._timeline = timeline
        self._dead = False  # half-open: nothing passes any more, and nobody has noticed
        self._over = False  # closed or reset, as far as the process can tell
        self._sent_until = 0.0
        self._answered_until = 0.0
        self._commands: deque[tuple[bytes, ...]] = deque()
        self._frames: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        server.connections.append(self)

    # As the process has it.

    async def send(self, *commands: Sequence[str | bytes]) -> None:
        if self._over:
            raise ConnectionResetError("the connection was lost")
        for command in commands:
            words = tuple(w.encode() if isinstance(w, str) else w for w in command)
            self._sent_until = self._travel(self._sent_until, self._arrive, words)

    async def receive(self) -> Any:
        while not self._frames:
            if self._over:
                raise ConnectionResetError("the connection was lost")
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._frames.popleft()

    async def close(self) -> None:
        self._over = True
        self._timeline.after(self._network.delay(), self.leave)

    # As the server has it.

    def push(self, frame: Any) -> None:
        """Send *frame* to the process."""
        self._answered_until = self._travel(self._answered_until, self._deliver, frame)

    def reset(self) -> None:
        """End it so that the process notices, if a message can still reach it."""
        self.leave()
        self._travel(self._answered_until, self._notice)

    def die(self) -> None:
        """Let nothing pass any more, in either direction, and nobody notice."""
        self._dead = True

    def leave(self) -> None:
        """Have the server forget it."""
        if self in self._server.connections:
            self._server.connections.remove(self)

    @property
    def process(self) -> "Process":
        """Whose it is."""
        return self._process

    def _travel(self, after: float, call: Callable[..., None], *args: Any) -> float:
        """Have *call* made when what is sent now arrives, which is not before *after*."""
        arrival = max(after, self._timeline.now + self._network.delay())
        self._timeline.at(arrival, self._pass, call, *args)
        return arrival

    def _pass(self, call: Callable[..., None], *args: Any) -> None:
        if self._dead or self._loop.is_closed():
            self.leave()
        elif (self._process.name, self._server.name) in self._network.refused:
            self.leave()
            self._notice()
        elif self._network.is_cut(self._process.name, self._server.name):
            self._dead = True  # whatever comes after it would have to come in order
        else:
            call(*args)

    def _arrive(self, words: tuple[bytes, ...]) -> None:
        self._commands.append(words)
        if len(self._commands) == 1:
            self._serve()

    def _serve(self) -> None:
        while self._commands and self in self._server.connections:
            try:
                frames = self._server.serve(self, self._commands[0])
            except Postponed as postponed:
                self._timeline.at(postponed.until, self._serve)
                return
            except ConnectionError:
                self.reset()
                return
            self._commands.popleft()
            for frame in frames:
                self.push(frame)

    def _deliver(self, frame: Any) -> None:
        if not self._over:
            self._frames.append(frame)
            self._wake()

    def _notice(self) -> None:
        self._over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._loop.is_closed():
            self._waiter.set_result(None)


class SimRedisAccess:
    """What one process has in the place of `RedisAccess`."""

    def __init__(
        self, process: "Process", deployment: Deployment, network: Network, timeline: Timeline
    ) -> None:
        self.client = SimRedis(process, deployment, network)
        self._process = process
        self._deployment = deployment
        self._network = network
        self._timeline = timeline

    async def connect(self) -> Connection:
        server = self._deployment.server_for(self._process)

        def accept() -> Connection:
            role, _ = server.describe()
            if role != "master":
                raise ConnectionError("this is no master")
            return Connection(self._process, server, self._network, self._timeline)

        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self._network.ask(self._process, server.name, accept)

    async def close(self) -> None:
        """Do nothing: there are no pooled connections to close."""


class SimRedis:
    """What one process has in the place of redis-py's client."""

    def __init__(self, process: "Process", deployment: Deployment, network: Network) -> None:
        self._process = process
        self._deployment = deployment
        self._network = network
        self._server: RedisServer | None = None  # to which it is connected

    async def mget(self, names: list[str]) -> list[bytes | None]:
        return await self._ask(lambda server: server.read(names))

    def register_script(self, text: str) -> Callable[..., Any]:
        script = Script(text)

        async def run(keys: list[str], args: list[Any]) -> None:
            arguments = [str(a).encode() if isinstance(a, int) else a for a in args]
            await self._ask(lambda server: server.run_script(script, keys, arguments))

        return run

    async def _ask(self, execute: Callable[[RedisServer], T]) -> T:
        if self._server is None:
            self._server = self._deployment.server_for(self._process)
        server = self._server
        try:
            return await self._network.ask(self._process, server.name, lambda: execute(server))
        except (OSError, asyncio.CancelledError):
            self._server = None  # the next command gets another connection
            raise
