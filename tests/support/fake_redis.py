"""fakeredis, as the way to Redis that the library takes, with what it leaves out of that."""

import hashlib
from typing import Any

import fakeredis

from tfm_guard.redis_access import RedisAccess, Wire


class FakeAccess(RedisAccess):
    """The way to a fakeredis *server*, which is a master and of no cluster."""

    def __init__(self, server: fakeredis.FakeServer) -> None:
        self.client = fakeredis.FakeAsyncRedis(server=server, protocol=2)

    async def connect(self) -> Wire:
        """Return a connection that is good for nothing but being there."""
        return FakeWire()


class FakeWire:
    """A connection on which nothing is ever said."""

    run_id = "fakeredis"

    async def send(self, *_: Any) -> None:
        """Do nothing."""

    async def receive(self) -> Any:
        """Return no reply."""
        raise ConnectionError("nothing is said here")

    async def close(self) -> None:
        """Do nothing."""


def fake_server() -> fakeredis.FakeServer:
    """Return a server whose scripts have `redis.sha1hex`."""
    server = fakeredis.FakeServer()
    with fakeredis.FakeRedis(server=server) as client:
        client.eval("return 1", 0)  # makes the interpreter
    runtime: Any = vars(server)["_lua_runtime"]
    runtime.globals()[b"redis"][b"sha1hex"] = _sha1hex
    return server


def _sha1hex(value: bytes) -> bytes:
    return hashlib.sha1(value, usedforsecurity=False).hexdigest().encode()
