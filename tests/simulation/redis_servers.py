"""Redis servers, the client by which a process reads and fills, and who else may write there."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lupa.lua51 import LuaRuntime

from tests.simulation.network import Network, Postponed
from tests.simulation.timeline import Timeline

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
    # Called with the name and the values before and after, when a script has written.
    on_fill: Callable[[str, bytes | None, bytes], None] = lambda _name, _old, _new: None

    def read(self, names: list[str]) -> list[bytes | None]:
        """Answer MGET."""
        self._answer(writing=False)
        return [self._text(name) for name in names]

    def run_script(self, script: "Script", names: list[str], arguments: list[bytes]) -> None:
        """Answer EVALSHA."""
        self._answer(writing=True)
        script.run(self, names, arguments)

    def describe(self) -> tuple[str, str]:
        """Answer ROLE and INFO: the role and the run id."""
        self._answer(writing=False)
        return self.role, self.run_id

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

    def _answer(self, *, writing: bool) -> None:
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

    _runtime = LuaRuntime(encoding=None)  # type: ignore[call-arg]  # text is bytes, as in Redis
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
        self.servers = [
            RedisServer(name, self.new_run_id(), timeline) for name in server_names
        ]
        for replica in self.servers[1:]:
            replica.role = "slave"
        self.primary = self.servers[0]
        self.snapshots: list[dict[str, Value]] = []  # what it held, the latest last

    def new_run_id(self) -> str:
        """Return what a server that starts calls itself."""
        return self._timeline.random.randbytes(20).hex()


class SimRedis:
    """What one process has in the place of redis-py's client."""

    def __init__(self, process: "Process", deployment: Deployment, network: Network) -> None:
        self._process = process
        self._deployment = deployment
        self._network = network
        self._server: RedisServer | None = None  # to which it is connected

    async def mget(self, names: list[str]) -> list[bytes | None]:
        return await self._ask(lambda server: server.read(names))

    async def role(self) -> list[Any]:
        role, _ = await self._ask(lambda server: server.describe())
        return [role.encode(), 0, []]

    async def info(self, _section: str) -> dict[str, Any]:
        _, run_id = await self._ask(lambda server: server.describe())
        return {"cluster_enabled": 0, "run_id": run_id}

    def register_script(self, text: str) -> Callable[..., Any]:
        script = Script(text)

        async def run(keys: list[str], args: list[Any]) -> None:
            arguments = [str(a).encode() if isinstance(a, int) else a for a in args]
            await self._ask(lambda server: server.run_script(script, keys, arguments))

        return run

    async def aclose(self) -> None:
        """Do nothing: there are no connections to close."""

    async def _ask(self, execute: Callable[[RedisServer], T]) -> T:
        if self._server is None:
            self._server = self._deployment.primary
        server = self._server
        try:
            return await self._network.ask(self._process, server.name, lambda: execute(server))
        except (OSError, asyncio.CancelledError):
            self._server = None  # the next command gets another connection
            raise
