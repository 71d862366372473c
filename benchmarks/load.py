"""A generator of requests that is cheaper than the servers it loads.

On each of its connections one request is under way; the answer to it, of which only the length is
looked at, sends the next. Nothing is pipelined.
"""

import asyncio
import time
from pathlib import Path
from typing import NamedTuple, cast

SETTLING_SECONDS = 0.05  # before counting begins


class Load(NamedTuple):
    """What a server did under load."""

    per_second: float  # requests
    cpu: float  # seconds of its main thread for a request


class _Client(asyncio.Protocol):
    """One connection, whose first answer tells how long all of them are."""

    def __init__(self, request: bytes) -> None:
        self.answered = 0
        self._request = request
        self._missing = 0
        self._length = 0
        self.first = b""
        self._stopping = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._length:
            self.first += data
            self._length = self._missing = _length_of(self.first)
            data = self.first
        self._missing -= len(data)
        if self._length and not self._missing:
            self.answered += 1
            self._missing = self._length
            if self._transport is not None and not self._stopping:
                self._transport.write(self._request)

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None

    def stop(self) -> None:
        """Send nothing more."""
        self._stopping = True
        if self._transport is not None:
            self._transport.close()


def _length_of(answer: bytes) -> int:
    """Return how long an answer is of which this is the beginning; 0 if that cannot be told yet."""
    head, found, _ = answer.partition(b"\r\n\r\n")
    if not found:
        return 0
    _, has_body, after = head.lower().partition(b"content-length: ")
    return len(head) + 4 + (int(after.partition(b"\r\n")[0]) if has_body else 0)


def request_bytes(path: str, authorization: str) -> bytes:
    """Return a GET as a common client sends it."""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
        "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
        f"User-Agent: python-httpx/0.28.1\r\nAuthorization: {authorization}\r\n\r\n"
    ).encode()


def cpu_seconds(pid: int) -> float:
    """Return how long the main thread of *pid* has run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


async def load(port: int, pid: int, request: bytes, *, connections: int, seconds: float) -> Load:
    """Send *request* on so many *connections* for *seconds*, to the process *pid*."""
    loop = asyncio.get_running_loop()
    clients = [_Client(request) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.sleep(SETTLING_SECONDS)
    before, cpu = sum(client.answered for client in clients), cpu_seconds(pid)
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - started
    count, cpu = sum(client.answered for client in clients) - before, cpu_seconds(pid) - cpu
    for client in clients:
        client.stop()
    await asyncio.sleep(0)
    refused = [client.first for client in clients if not client.first.startswith(b"HTTP/1.1 2")]
    if refused or not count:
        raise SystemExit(f"{len(refused)} connections were not served: {refused[:1]}")
    return Load(count / took, cpu / count)
