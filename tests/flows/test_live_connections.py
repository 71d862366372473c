"""Facts about connections that stay when their key is deleted, with real servers and clients.

Deleting a key blocks these tests' event loop, on purpose: what a client then finds in its socket
had been there when the answer to DELETE was read.
"""

import contextlib
import http.client
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from tests.support.api import call, first_token
from tests.support.redis import RedisServer
from tests.support.uvicorn_process import UvicornProcess

APP = "tests.support.live_api:app"
CLOSE_FRAME = b"\x88\x02\x03\xf0"  # RFC 6455 section 5.2: final, close, 2 bytes: 1008


class Key(NamedTuple):
    """A key as DELETE and its owner need it."""

    id: str
    token: str


class Api:
    """Some servers on one database, and who manages its keys."""

    def __init__(self, servers: Sequence[UvicornProcess], admin: str, processes: int) -> None:
        self.servers = servers
        self.processes = processes
        self._admin = admin

    def new_key(self) -> Key:
        """Create a key at the first server."""
        answer = call(
            self.servers[0].url, "POST", "/v1/api-keys/", token=self._admin, body={"name": "live"}
        )
        assert answer.status == 201
        return Key(answer.json["id"], answer.json["key"])

    def delete(self, key: Key) -> float:
        """Delete a key at the first server, and return the monotonic time of the answer."""
        url = self.servers[0].url
        answer = call(url, "DELETE", f"/v1/api-keys/{key.id}", token=self._admin)
        assert answer.status == 204
        return time.monotonic()

    @contextlib.asynccontextmanager
    async def sockets(self, key: Key, path: str) -> AsyncIterator[list[ClientConnection]]:
        """Connect to *path* until a WebSocket to each process is there."""
        async with contextlib.AsyncExitStack() as stack:
            found: dict[str, ClientConnection] = {}
            for number in range(200):
                server = self.servers[number % len(self.servers)]
                connection = await stack.enter_async_context(open_socket(server, key, path))
                found.setdefault((await words(connection))[0], connection)
                if len(found) == self.processes:
                    break
            assert len(found) == self.processes
            yield list(found.values())


def open_socket(server: UvicornProcess, key: Key, path: str) -> connect:
    """Return a WebSocket that is to be opened."""
    url = f"{server.url.replace('http', 'ws')}{path}"
    headers = {"Authorization": f"Bearer {key.token}"}
    return connect(url, additional_headers=headers, compression=None, ping_interval=None)


async def words(connection: ClientConnection) -> list[str]:
    """Return what the server says next: something, and when it said so."""
    message = await connection.recv()
    assert isinstance(message, str)
    return message.split()


async def rest(connection: ClientConnection) -> list[str]:
    """Return what else the server says until it closes with 1008, as it must."""
    said = []
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            said.append(str(await connection.recv()))
    assert connection.close_code == 1008
    return said


def in_socket(connection: ClientConnection) -> bytes:
    """Return what has come for a client that it has not read."""
    raw = connection.transport.get_extra_info("socket")
    with socket.fromfd(raw.fileno(), raw.family, raw.type) as copy:
        copy.setblocking(False)  # noqa: FBT003  # its name says it
        return copy.recv(65_536, socket.MSG_PEEK)


@contextlib.contextmanager
def streaming(server: UvicornProcess, key: Key, path: str) -> Iterator[http.client.HTTPResponse]:
    """Begin a response that goes on, and read its first line."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"authorization": f"Bearer {key.token}"})
        with connection.getresponse() as response:
            assert response.status == 200
            assert response.readline().startswith(b"tick ")
            yield response


def time_of(line: bytes | str) -> float:
    """Return when a line was sent."""
    return float(line.split()[1])


@contextlib.contextmanager
def serving(env: dict[str, str], servers: int, **options: Any) -> Iterator[Api]:
    """Run that many servers, each of its own kind."""
    admin = first_token(env["TFM_GUARD_DATABASE_URL"], "send", "api-keys:write")
    workers = options.get("workers", 1)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(UvicornProcess(APP, env=env, **options)) for _ in range(servers)
        ]
        yield Api(running, admin, servers * workers)


@pytest.fixture
def on_postgresql(postgres_url: str, redis_server: RedisServer) -> Iterator[Api]:
    """Serve from two servers on PostgreSQL and Redis."""
    env = {"TFM_GUARD_DATABASE_URL": postgres_url, "TFM_GUARD_REDIS_URL": redis_server.url}
    with serving(env, servers=2) as api:
        yield api


@pytest.fixture
def on_sqlite(sqlite_url: str) -> Iterator[Api]:
    """Serve from two workers on a file, over the older of uvicorn's WebSocket protocols."""
    with serving(
        {"TFM_GUARD_DATABASE_URL": sqlite_url},
        servers=1,
        workers=2,
        extra_args=("--ws", "websockets"),
    ) as api:
        yield api


@pytest.fixture(params=["on_postgresql", "on_sqlite"])
def api(request: pytest.FixtureRequest) -> Api:
    """Run the test with either."""
    fixture = request.getfixturevalue(request.param)
    assert isinstance(fixture, Api)
    return fixture


async def test_connections_end_with_their_key(api: Api) -> None:
    """When DELETE has answered, every process has closed and broken off, and nothing came after."""
    key, other = api.new_key(), api.new_key()
    async with (
        api.sockets(key, "/echo") as listening,
        api.sockets(other, "/echo") as others,
        contextlib.AsyncExitStack() as stack,
    ):
        pushing = [
            await stack.enter_async_context(open_socket(server, key, "/push"))
            for server in api.servers
        ]
        for connection in (*listening, *others):
            await connection.send("hello")
            assert (await words(connection))[0] == "hello"
        streams = {
            path: [stack.enter_context(streaming(server, key, path)) for server in api.servers]
            for path in ("/ended/stream", "/asking", "/stream")
        }
        deleted = api.delete(key)

        # The very next that the client reads is the end.
        assert [in_socket(connection) for connection in listening] == [CLOSE_FRAME] * len(listening)
        for connection in listening:
            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send("too late")
            assert await rest(connection) == []
        for connection in pushing:
            assert all(time_of(message) < deleted for message in await rest(connection))
        for connection in others:
            await connection.send("still here")
            assert (await words(connection))[:2] == ["still", "here"]

        for response in streams["/ended/stream"]:
            with pytest.raises(http.client.IncompleteRead) as broken:
                response.read()
            assert all(time_of(line) < deleted for line in broken.value.partial.splitlines())
        for response in streams["/asking"]:
            *ticks, over = response.read().splitlines()
            assert over.startswith(b"over ")
            assert all(time_of(line) < deleted for line in ticks)
        for response in streams["/stream"]:
            while time_of(response.readline()) < deleted:
                pass
