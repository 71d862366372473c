"""A proxy between a client and a server that makes the way between them worse."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Self


class Proxy:
    """Passes bytes on to 127.0.0.1:*port*: later by *delay* seconds, or, stalled, not at all."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self.connections = 0  # ever accepted
        self._lost: tuple[bytes, bytes] | None = None
        self._target = port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.resume()
        self.cut()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stall(self) -> None:
        """Let connections be, and pass nothing on."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on what was held back, and what comes."""
        self._flowing.set()

    def lose_answer(self, to: bytes, *, after: bytes) -> None:
        """Pass on the next *to* that a connection sends *after* that; reset it when answered."""
        self._lost = to, after

    def cut(self) -> None:
        """Reset all connections; new ones are let in."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        ends = {writer, back}
        self._writers |= ends
        with contextlib.suppress(ConnectionError):
            losing = asyncio.Event()
            await asyncio.gather(
                self._pass_on(self._watched(reader, losing), back),
                self._pass_on(self._unless(losing, there), writer),
            )
        for end in ends:
            end.transport.abort()
        self._writers -= ends

    async def _watched(
        self, reader: asyncio.StreamReader, losing: asyncio.Event
    ) -> AsyncIterator[bytes]:
        """Yield what a client sends; set *losing* before what is not to be answered."""
        begun = False
        while data := await reader.read(65_536):
            if self._lost is not None:
                to, after = self._lost
                begun = begun or after in data
                if begun and to in data:
                    self._lost = None
                    losing.set()
            yield data

    async def _unless(
        self, losing: asyncio.Event, reader: asyncio.StreamReader
    ) -> AsyncIterator[bytes]:
        """Yield what a server answers, as long as that is not to be lost."""
        while data := await reader.read(65_536):
            if losing.is_set():
                raise ConnectionResetError
            yield data

    async def _pass_on(self, source: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
        async for data in source:
            await asyncio.sleep(self.delay)  # the fault itself: no test waits for anything so
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
