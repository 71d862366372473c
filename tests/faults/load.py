"""Load on several servers: steady, on time whatever they do, and recorded request by request."""

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections import Counter
from typing import Final, NamedTuple

from tests.support.background import Background

# Per server and second. A fault counts as tried only from 200 on.
ASKED_PER_SECOND: Final = 250.0
# Every so many requests with the key that is to be revoked there is one with another key.
_VALID_EVERY: Final = 3
_MOST_LINES: Final = 500  # connections to one server
_RESTING_LINES: Final = 300
_LATEST_SECONDS: Final = 0.25  # what is more overdue than this is left out

REVOKED: Final = "revoked"
VALID: Final = "valid"


class Answer(NamedTuple):
    """A request to one server: which key it came with, when, and how it ended."""

    server: int
    key: str
    started: float  # time.monotonic()
    ended: float
    status: int  # 0: the connection was lost


class Load:
    """Asks each server on *ports* until it is stopped: with a key to revoke, and two *valid* ones.

    Of two, so that where memory has room for one key only, they drive each other out.
    """

    def __init__(
        self, background: Background, ports: list[int], *, revoked: str, valid: tuple[str, str]
    ) -> None:
        self.answers: list[Answer] = []
        self._background = background
        requests = _request(revoked), [_request(token) for token in valid]
        self._sources = [
            _Source(number, port, *requests, self.answers) for number, port in enumerate(ports)
        ]
        self._tasks = background.call(
            lambda: [background.loop.create_task(source.run()) for source in self._sources]
        )

    def stop(self) -> None:
        """Ask no more, and hang up."""

        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for source in self._sources:
                source.hang_up()

        self._background.run(end())

    def rest(self, server: int) -> None:
        """Ask one server nothing until `go_on`, and be connected to it many times meanwhile.

        A server that stands still would otherwise hold nothing but old requests when it goes on.
        """
        self._background.run(self._sources[server].rest())

    def go_on(self, server: int) -> None:
        """Ask a server again that had been left alone."""
        self._sources[server].resting = False

    def started_since(self, moment: float, server: int, key: str) -> int:
        """Return how many requests have been sent to *server* since *moment*, answered or not."""
        sent = self._sources[server].sent[key]
        return len(sent) - bisect_left(sent, moment)

    def count(self, server: int, key: str, status: int) -> int:
        """Return how many answers of that kind there have been."""
        return self._sources[server].counts[key, status]


class _Source:
    def __init__(
        self, server: int, port: int, revoked: bytes, valid: list[bytes], answers: list[Answer]
    ) -> None:
        self.sent: dict[str, list[float]] = {REVOKED: [], VALID: []}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.idle: list[_Line] = []
        self.lines: set[_Line] = set()
        self.resting = False
        self._server = server
        self._port = port
        self._revoked = revoked
        self._valid = valid
        self._answers = answers
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        due, number = time.monotonic(), 0
        while True:
            if not self.resting:
                self._ask(REVOKED, self._revoked)
            if not self.resting and number % _VALID_EVERY == 0:
                self._ask(VALID, self._valid[number // _VALID_EVERY % len(self._valid)])
            number += 1
            due = max(due + 1 / ASKED_PER_SECOND, time.monotonic() - _LATEST_SECONDS)
            await asyncio.sleep(max(due - time.monotonic(), 0))

    async def rest(self) -> None:
        self.resting = True
        loop = asyncio.get_running_loop()
        for _ in range(_RESTING_LINES):
            _, line = await loop.create_connection(lambda: _Line(self), "127.0.0.1", self._port)
            self.idle.append(line)

    def hang_up(self) -> None:
        for line in list(self.lines):
            line.close()

    def ended(self, key: str, started: float, status: int) -> None:
        self.counts[key, status] += 1
        self._answers.append(Answer(self._server, key, started, time.monotonic(), status))

    def _ask(self, key: str, request: bytes) -> None:
        if not self.idle and len(self.lines) + len(self._connecting) >= _MOST_LINES:
            return
        started = time.monotonic()
        self.sent[key].append(started)
        if self.idle:
            self.idle.pop().send(key, started, request)
        else:
            task = asyncio.get_running_loop().create_task(self._connect(key, started, request))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, key: str, started: float, request: bytes) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, line = await loop.create_connection(lambda: _Line(self), "127.0.0.1", self._port)
        except OSError:
            self.ended(key, started, 0)
        else:
            line.send(key, started, request)


class _Line(asyncio.Protocol):
    """One connection, which carries one request at a time."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._transport: asyncio.Transport | None = None
        self._asked: tuple[str, float] | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._source.lines.add(self)

    def send(self, key: str, started: float, request: bytes) -> None:
        assert self._transport is not None
        self._asked = key, started
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._asked is not None and (status := _status(self._buffer)):
            self._buffer = b""
            (key, started), self._asked = self._asked, None
            self._source.ended(key, started, status)
            self._source.idle.append(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self._source.lines.discard(self)
        with contextlib.suppress(ValueError):
            self._source.idle.remove(self)
        if self._asked is not None:
            self._source.ended(*self._asked, 0)

    def close(self) -> None:
        self._asked = None
        if self._transport is not None:
            self._transport.abort()


def _request(token: str) -> bytes:
    return (
        f"GET /whoami HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n\r\n"
    ).encode()


def _status(buffer: bytes) -> int:
    """Return the status of a complete answer; 0 as long as it is not all there."""
    head, found, body = buffer.partition(b"\r\n\r\n")
    if not found:
        return 0
    _, _, rest = head.lower().partition(b"content-length: ")
    length = int(rest.partition(b"\r\n")[0] or b"0")
    return int(head[9:12]) if len(body) >= length else 0
