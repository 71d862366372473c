"""A way from a client to a server that can be made worse in many manners while it is in use."""

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from typing import Final, Literal

from tests.support.background import Background

_TICK_SECONDS: Final = 0.005
_CHUNK_BYTES: Final = 65_536
# Closing then sends a reset in place of what is still to be sent.
_NO_LINGER: Final = struct.pack("ii", 1, 0)

# Connections that subscribe to a channel of Redis, the others, or both.
Kind = Literal["link", "data", "all"]


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How the way treats the connections of one *kind*."""

    kind: Kind = "all"
    delay: float = 0.0  # seconds, in each direction, and up to *jitter* more
    jitter: float = 0.0
    holds_requests: bool = False  # what the client sends does not arrive
    holds_answers: bool = False  # what the server sends does not arrive
    drops: bytes | None = None  # what the client sends with this in it is lost
    slice_bytes: int | None = None  # so many bytes at a time come back
    bytes_per_second: float | None = None  # and so fast
    resets_after: int | None = None  # bytes of an answer, the connection is reset
    refuses: bool = False  # new connections are reset


SMOOTH: Final = Conduct()
STALLED: Final = Conduct(holds_requests=True, holds_answers=True)


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_link: bool = False

    def reset(self) -> None:
        for writer in (self.client, self.server):
            with contextlib.suppress(OSError):
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            writer.transport.abort()


class RoughWay:
    """Listens on a port and passes bytes on to 127.0.0.1:*target*, as its *conduct* has it.

    Both may be changed at any time, by any thread.
    """

    def __init__(self, background: Background, target: int) -> None:
        self.target = target
        self.conduct = SMOOTH
        self.accepted = 0  # connections, ever
        self._background = background
        self._connections: set[_Connection] = set()
        self._server = background.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self, kind: Kind = "all") -> None:
        """Reset the present connections of one *kind*."""

        def reset() -> None:
            for connection in list(self._connections):
                if kind == "all" or (kind == "link") == connection.is_link:
                    connection.reset()

        self._background.call(reset)

    def close(self) -> None:
        """Listen no more, and reset all connections."""
        self._background.call(self._server.close)
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                if self.conduct.refuses:
                    raise ConnectionRefusedError
                there, server = await asyncio.open_connection("127.0.0.1", self.target)
            except OSError:
                client.transport.abort()
                return
            connection = _Connection(client, server)
            self._connections.add(connection)
            try:
                ways = (
                    self._pass_requests(reader, connection),
                    self._pass_answers(there, connection),
                )
                await asyncio.gather(*ways)
            finally:
                self._connections.discard(connection)
                client.transport.abort()
                server.transport.abort()

    def _conduct_for(self, connection: _Connection) -> Conduct:
        conduct = self.conduct
        if conduct.kind == "all" or (conduct.kind == "link") == connection.is_link:
            return conduct
        return SMOOTH

    async def _pass_requests(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            connection.is_link = connection.is_link or b"SUBSCRIBE" in data
            await self._delay(connection)
            await self._hold(connection, "holds_requests")
            drops = self._conduct_for(connection).drops
            if drops is not None and drops in data:
                continue
            connection.server.write(data)
            await connection.server.drain()
        if connection.server.can_write_eof():
            connection.server.write_eof()

    async def _pass_answers(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._delay(connection)
            await self._hold(connection, "holds_answers")
            conduct = self._conduct_for(connection)
            if conduct.resets_after is not None:
                connection.client.write(data[: conduct.resets_after])
                connection.reset()
                return
            size = conduct.slice_bytes or len(data)
            for start in range(0, len(data), size):
                connection.client.write(data[start : start + size])
                await connection.client.drain()
                if conduct.bytes_per_second is not None:
                    await asyncio.sleep(size / conduct.bytes_per_second)
        if connection.client.can_write_eof():
            connection.client.write_eof()

    async def _hold(self, connection: _Connection, what: str) -> None:
        # Not an event: the conduct is set by other threads, whole.
        while getattr(self._conduct_for(connection), what):  # noqa: ASYNC110
            await asyncio.sleep(_TICK_SECONDS)

    async def _delay(self, connection: _Connection) -> None:
        conduct = self._conduct_for(connection)
        if conduct.delay or conduct.jitter:
            await asyncio.sleep(conduct.delay + random.uniform(0, conduct.jitter))
