"""fakeredis, with what it leaves out of what is used here."""

import hashlib
from typing import Any

import fakeredis


class FakeMaster(fakeredis.FakeAsyncRedis):
    """A client that is told of a master, and of no cluster."""

    async def role(self) -> list[Any]:
        """Answer as a master without replicas."""
        return [b"master", 0, []]

    async def info(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Answer for the section about clusters."""
        return {"cluster_enabled": 0}


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
