"""The way to Redis or Valkey: pooled commands, and connections of one's own."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol
from urllib.parse import parse_qs, urlsplit

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tfm_guard.errors import ConfigurationError

# For a command and its answer, and for coming into connection.
TIMEOUT_SECONDS: Final = 0.25
# More than this that has come and is not yet handled, and the server has to wait.
_MOST_FRAMES: Final = 1_000
_NOTHING_YET: Final = object()
_pack: Final[Callable[..., bytes]] = hiredis.pack_command  # annotated for a single word


class Wire(Protocol):
    """One connection to one server, which does not come back when it is lost."""

    @property
    def run_id(self) -> str:
        """What the server calls itself since it started; no other ever has the same."""

    async def send(self, *commands: Sequence[str | bytes]) -> None:
        """Send *commands* together."""

    async def receive(self) -> Any:
        """Return the next reply or message, in the order in which the server sent them."""

    async def close(self) -> None:
        """End the connection."""


class RedisAccess:
    """The server at *url*, on up to *pool_size* connections beside those of `connect`.

    Raises `ConfigurationError` if that cannot be one.
    """

    def __init__(self, url: str, *, pool_size: int = 16) -> None:
        self._pool = _pool(url, pool_size)
        self.client = Redis.from_pool(self._pool)

    async def connect(self) -> Wire:
        """Return a new connection to a server that is a master, and of no cluster.

        Raises `ConfigurationError` if it is of a cluster, another exception if there is no
        connection to be had within `TIMEOUT_SECONDS`.
        """
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        # In version 3 of the protocol, who has subscribed may publish, too.
        connection.protocol = 3
        # Else the library would have a task of its own send each command.
        connection.socket_timeout = None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]
                run_id = await _checked_run_id(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Wire(connection, run_id)

    async def close(self) -> None:
        """Close the pooled connections."""
        await self.client.aclose()


def describe(error: BaseException) -> str:
    """Return *error* in a line that holds no password, its kind first."""
    first_line = next(iter(str(error).splitlines()), "")
    # A server that does not know a command quotes it with its arguments: of AUTH, the password.
    words = first_line.partition(", with args")[0]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class _Wire(asyncio.Protocol):
    """What is left of *connection* once it is made: its transport, without redis-py's layers.

    Each process runs through this for each message, so it is the cost of revoking and of a flood.
    """

    def __init__(self, connection: AbstractConnection, run_id: str) -> None:
        self.run_id = run_id
        self._connection = connection
        self._parser = hiredis.Reader(notEnoughData=_NOTHING_YET)
        self._frames: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._lost = False
        self._paused = False
        # The library has no way to hand them over.
        streams: Any = connection
        self._transport: asyncio.Transport = streams._writer.transport  # noqa: SLF001
        self._transport.set_protocol(self)
        self.data_received(bytes(streams._reader._buffer))  # noqa: SLF001

    async def send(self, *commands: Sequence[str | bytes]) -> None:
        if self._lost:
            raise ConnectionError("the connection was lost")
        # Whoever sends waits for an answer in its time, so nothing piles up in the transport.
        self._transport.write(b"".join(_pack((*words,)) for words in commands))

    async def receive(self) -> Any:
        while not self._frames:
            if self._lost:
                raise ConnectionError("the connection was lost")
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        frame = self._frames.popleft()
        if self._paused and not self._frames:
            self._paused = False
            self._transport.resume_reading()
        if isinstance(frame, Exception):
            raise frame
        return frame

    async def close(self) -> None:
        self._transport.abort()
        await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        """Take in what the transport has read."""
        self._parser.feed(data)
        try:
            while (frame := self._parser.gets()) is not _NOTHING_YET:
                self._frames.append(frame)
        except hiredis.ProtocolError:
            self._transport.abort()
        if len(self._frames) > _MOST_FRAMES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, _error: Exception | None) -> None:
        """Note that nothing more comes."""
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


async def _checked_run_id(connection: AbstractConnection) -> str:
    """Return the server's run id; raise unless it is a master, and of no cluster."""
    commands = [("ROLE",), ("INFO", "server"), ("INFO", "cluster")]
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    role = await _read_reply(connection)
    server = await _read_reply(connection)
    cluster = await _read_reply(connection)
    if _field(cluster, b"cluster_enabled") == "1":
        raise ConfigurationError(
            "TFM_GUARD_REDIS_URL: Redis Cluster is not supported; use a single master, with "
            "replicas and Sentinel if it must fail over"
        )
    if role[0] != b"master":
        raise ConnectionError(f"this Redis is a {role[0]!r}; the URL must lead to the master")
    return _field(server, b"run_id")


async def _read_reply(connection: AbstractConnection) -> Any:
    return await connection.read_response(
        disable_decoding=True, timeout=math.inf, push_request=True
    )


def _field(info: bytes, name: bytes) -> str:
    """Return one field of what INFO answers."""
    for line in info.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return value.decode("ascii")
    raise ConnectionError(f"this Redis does not tell its {name.decode()}")


def _pool(url: str, size: int) -> BlockingConnectionPool:
    options = parse_qs(urlsplit(url).query)
    if any(not option.startswith("ssl_") for option in options):
        raise ConfigurationError(
            "TFM_GUARD_REDIS_URL: only options for TLS, ssl_…, may follow the ?; the others are "
            "what this library depends on"
        )
    try:
        return BlockingConnectionPool.from_url(
            url,
            max_connections=size,
            timeout=TIMEOUT_SECONDS,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            # The deadline and the breaker are the only say in what is tried again.
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            client_name="tfm-guard",
        )
    except ValueError:
        # The message of the original may quote the URL, and with it a password.
        raise ConfigurationError(
            "TFM_GUARD_REDIS_URL is no URL of Redis; expected redis://HOST:PORT/0 or rediss://…"
        ) from None
