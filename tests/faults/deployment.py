"""Several servers on one database and one Redis, each behind ways of its own."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple

from tests.support.api import Answer, call
from tests.support.background import Background
from tests.support.guards import create, new_guard
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.rough_way import SMOOTH, Conduct, RoughWay
from tests.support.servers import wait_until
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard.store import schema

APP: Final = "tests.faults.worker_app:app"
_SCOPES: Final = ("send", "api-keys:read", "api-keys:write")


class Shape(NamedTuple):
    """What a fault is tried on."""

    workers: int = 3
    database: Literal["postgresql", "sqlite"] = "postgresql"
    redis: bool = True
    # With room for one key only, two keys asked for in turn are read from Redis every time.
    remembers: int = 100_000
    # Seconds that the link alone counts for; none: as installed.
    unfed: float | None = None
    # Without ways in between, which cost milliseconds: nothing can be done to the connections.
    direct: bool = False


class Key(NamedTuple):
    """A key as its owner knows it."""

    id: str
    token: str
    prefix: str


class Told(NamedTuple):
    """What came of one request."""

    began: float  # time.monotonic()
    returned: float
    status: int  # 0: no answer
    head: str

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.returned - self.began


class Servers:
    """The servers of one run: PostgreSQL and Redis."""

    def __init__(self, background: Background) -> None:
        self.background = background
        self.ending = contextlib.ExitStack()
        self.postgres = self.ending.enter_context(PostgresServer())
        self.redis = self.ending.enter_context(RedisServer())
        self._databases = 0

    def new_database(self) -> str:
        """Return the URL of a new, empty database."""
        self._databases += 1
        return self.postgres.create_database(f"faults_{self._databases}")

    def close(self) -> None:
        """Stop them."""
        self.ending.close()


class Worker(UvicornProcess):
    """One process that serves the application under test."""

    def __init__(self, env: Mapping[str, str], ways: dict[str, RoughWay]) -> None:
        quiet = ("--no-access-log", "--log-level", "warning", "--timeout-keep-alive", "600")
        super().__init__(APP, env=env, extra_args=quiet, ready_path="/control/state")
        self.ways = ways

    @property
    def name(self) -> str:
        """What it calls itself in the register."""
        return f"{socket.gethostname()}:{self.pid}"

    def call(self, method: str, path: str, token: str | None = None, body: object = None) -> Answer:
        """Send one request."""
        return call(self.url, method, path, token=token, body=body)

    def control(self, action: str, **options: object) -> Any:
        """Have it misbehave, or tell its state."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        answer = self.call("POST", f"/control/{action}?{query.replace(' ', '%20')}")
        assert answer.status == 200, answer
        return answer.json

    def state(self) -> Any:
        """Return its counters, and more."""
        return self.control("state")


class Deployment:
    """Workers of one *shape*, with keys of one account."""

    def __init__(self, servers: Servers, shape: Shape) -> None:
        self.servers = servers
        self.shape = shape
        self.background = servers.background
        self._ending = contextlib.ExitStack()
        self._folder = Path(self._ending.enter_context(TemporaryDirectory(prefix="tfm-guard-")))
        # They start the workers, and must live as long as these: see PrivateServer.
        self._threads = self._ending.enter_context(ThreadPoolExecutor(shape.workers))
        self.url = (
            servers.new_database()
            if shape.database == "postgresql"
            else f"sqlite:///{self._folder}/tfm_guard.db"
        )
        self.workers = [self._new_worker() for _ in range(shape.workers)]

    @property
    def redis(self) -> RedisServer:
        """The Redis that it was set up with."""
        return self.servers.redis

    @property
    def postgres(self) -> PostgresServer:
        """Its PostgreSQL."""
        return self.servers.postgres

    def start(self) -> None:
        """Make the database and its first key, and start all workers."""
        self.admin = self.background.run(self._prepare())
        list(self._threads.map(Worker.start, self.workers))
        for worker in self.workers:
            self._ending.callback(worker.close)

    def close(self) -> None:
        """End all of it. Raises `ServerFailed` if a worker does not end when it is told to."""
        for worker in self.workers:
            for way in worker.ways.values():
                way.conduct = SMOOTH
            worker.thaw()
        try:
            list(self._threads.map(UvicornProcess.close, self.workers))
        finally:
            self._ending.close()
            for worker in self.workers:
                for way in worker.ways.values():
                    way.close()

    def restart(self, worker: Worker) -> None:
        """Start a worker that has died, or has been stopped, with the breaks that it had."""
        self._threads.submit(worker.start).result()

    def break_all(self, name: str) -> None:
        """Take a defence out of all workers, until they are mended."""
        self.on_all("break", name=name)
        for worker in self.workers:
            worker.env["TFM_GUARD_TEST_BREAKS"] = name

    def redis_name(self, key: Key) -> str:
        """Return where the shared cache keeps a key."""
        (row,) = execute(
            self.url,
            schema.settings.select().where(schema.settings.c.name == "installation_id"),
        )
        return f"tfm:{row.value}:v1:key:{key.prefix}"

    def is_revoked(self, key: Key) -> bool:
        """Tell whether the key's row in the database says so."""
        (row,) = execute(self.url, schema.keys.select().where(schema.keys.c.prefix == key.prefix))
        return row.revoked_at is not None

    def create_key(self, by: int = 0) -> Key:
        """Create a key through a worker."""
        body = {"name": "key under test"}
        answer = self.workers[by].call("POST", "/v1/api-keys/", self.admin, body)
        assert answer.status == 201, answer
        return Key(answer.json["id"], answer.json["key"], answer.json["key_prefix"])

    def delete(self, key: Key, by: int = 0, token: str | None = None) -> Told:
        """Delete a key through a worker, with *token* if it is of another account."""
        path = f"/v1/api-keys/{key.id}"
        # In the loop that sends the load, so that "started after" is exact.
        port = self.workers[by].port
        return self.background.run(_send(port, "DELETE", path, token or self.admin, 30.0))

    def ask(self, worker: int, token: str, patience: float = 3.0) -> Told:
        """Send one request with *token*, and wait no longer than *patience* for its answer."""
        port = self.workers[worker].port
        return self.background.run(_send(port, "GET", "/whoami", token, patience))

    def to_redis(self, conduct: Conduct, workers: Iterable[int] | None = None) -> None:
        """Set how the ways to Redis treat what passes: all, or those of some *workers*."""
        self._set("redis", conduct, workers)

    def to_database(self, conduct: Conduct, workers: Iterable[int] | None = None) -> None:
        """Set how the ways to the database treat what passes."""
        self._set("database", conduct, workers)

    def on_all(self, action: str, **options: object) -> list[Any]:
        """Have all workers do something."""
        return [worker.control(action, **options) for worker in self.workers]

    def total(self, counter: str) -> int:
        """Return the sum of one counter over all workers."""
        return sum(worker.state()[counter] for worker in self.workers)

    def mend(self) -> None:
        """Undo what was done to servers, ways and workers."""
        (self.redis.folder / "dump.rdb").unlink(missing_ok=True)
        for worker in self.workers:
            worker.thaw()
            worker.env.pop("TFM_GUARD_TEST_BREAKS", None)
            for name, way in worker.ways.items():
                way.conduct = SMOOTH
                way.target = (self.redis if name == "redis" else self.postgres).port
        self.redis.start()
        self.postgres.start()
        for worker in self.workers:
            if not worker.running:
                self.restart(worker)
        self.on_all("mend")
        # Those that were killed: whoever revokes a key next would wait for them in vain.
        alive = [worker.name for worker in self.workers]
        execute(self.url, schema.workers.delete().where(schema.workers.c.name.not_in(alive)))

    def is_well(self, token: str) -> bool:
        """Tell whether every worker accepts *token*, is fresh, and has its link if there is one."""
        for worker in self.workers:
            state = worker.state()
            with_redis = {state["redis_in_use"], state["linked"]}
            if not state["fresh"] or with_redis != {self.shape.redis}:
                return False
            if worker.call("GET", "/whoami", token).status != 200:
                return False
        return True

    async def _prepare(self) -> str:
        async with new_guard(self.url) as guard:
            first = await create(guard, scopes=_SCOPES)
        if self.shape.unfed is not None:
            row = schema.settings.c.name == "unfed_seconds"
            execute(
                self.url, schema.settings.update().where(row).values(value=str(self.shape.unfed))
            )
        return first.token

    def _new_worker(self) -> Worker:
        env = {"TFM_GUARD_LOCAL_CACHE_SIZE": str(self.shape.remembers)}
        urls = {"database": self.url}
        targets = {"database": self.postgres.port}
        if self.shape.redis:
            urls["redis"], targets["redis"] = self.redis.url, self.redis.port
        ways = {}
        for name, url in urls.items():
            env[f"TFM_GUARD_{name.upper()}_URL"] = url
            if url.startswith("sqlite:") or self.shape.direct:
                continue
            way = ways[name] = RoughWay(self.background, targets[name])
            env[f"TFM_GUARD_{name.upper()}_URL"] = url.replace(
                f":{targets[name]}/", f":{way.port}/"
            )
        return Worker(env, ways)

    def _set(self, way: str, conduct: Conduct, workers: Iterable[int] | None) -> None:
        for number in range(len(self.workers)) if workers is None else workers:
            self.workers[number].ways[way].conduct = conduct


async def _send(port: int, method: str, path: str, token: str, patience: float) -> Told:
    began, status, head = time.monotonic(), 0, ""
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
                f"authorization: Bearer {token}\r\n\r\n".encode()
            )
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                status = int(head.split()[1])
            finally:
                writer.transport.abort()
    except (OSError, EOFError, TimeoutError):
        pass
    return Told(began, time.monotonic(), status, head)


def until(condition: Callable[[], bool], what: str, seconds: float) -> bool:
    """Tell whether *condition* came to hold within *seconds*."""
    try:
        wait_until(condition, what=what, seconds=seconds)
    except TimeoutError:
        return False
    return True
