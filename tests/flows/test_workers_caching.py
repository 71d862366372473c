"""Facts about real servers that share keys: what one makes all accept, what one deletes none."""

import asyncio
import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from tests.support.guards import create, new_guard
from tests.support.redis import RedisServer
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard.records import CreatedKey

APP = "tests.support.whoami_api:app"


class Reply(NamedTuple):
    """A status and what came with it."""

    status: int
    content: Any


class Caller:
    """A connection that stays open, and so belongs to one process for good."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, method: str, path: str, token: str, body: object = None) -> Reply:
        """Send a request and read its answer."""
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, {"authorization": f"Bearer {token}"})
        response = self._connection.getresponse()
        answer = response.read()
        return Reply(response.status, json.loads(answer) if answer else None)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Fleet:
    """Some servers on one database, with *connections* to each of their *processes*."""

    def __init__(
        self, servers: Sequence[UvicornProcess], admin: str, *, processes: int, each: int = 4
    ) -> None:
        self.admin = admin
        callers: dict[int, list[Caller]] = {}
        with contextlib.ExitStack() as undo:
            # The kernel chooses the process for a new connection.
            for number in range(2000):
                caller = Caller(servers[number % len(servers)].port)
                undo.callback(caller.close)
                pid = caller.ask("GET", "/whoami", admin).content["pid"]
                callers.setdefault(pid, []).append(caller)
                if len(callers) == processes and min(map(len, callers.values())) >= each:
                    break
            assert len(callers) == processes
            undo.pop_all()
        self._by_process = {pid: some[:each] for pid, some in callers.items()}
        self.callers = [caller for some in self._by_process.values() for caller in some]
        for spare in (caller for some in callers.values() for caller in some[each:]):
            spare.close()
        self._threads = ThreadPoolExecutor(len(self.callers))

    def ask_all(self, token: str, *, times: int = 1) -> list[int]:
        """Ask on every connection at the same time, each *times*, and return the statuses."""

        def ask(caller: Caller) -> list[int]:
            return [caller.ask("GET", "/whoami", token).status for _ in range(times)]

        return [status for each in self._threads.map(ask, self.callers) for status in each]

    def one_of_each(self) -> list[Caller]:
        """Return a connection to each process."""
        return [some[0] for some in self._by_process.values()]

    def close(self) -> None:
        """Hang up all connections."""
        self._threads.shutdown()
        for caller in self.callers:
            caller.close()


async def first_key(url: str) -> CreatedKey:
    """Create the key that manages the others."""
    async with new_guard(url) as guard:
        return await create(guard, name="First", scopes=["send", "api-keys:write"])


@pytest.fixture
def workers_on_sqlite(sqlite_url: str) -> Iterator[Fleet]:
    """Serve from four workers of one server, on a file and without Redis."""
    admin = asyncio.run(first_key(sqlite_url)).token
    env = {"TFM_GUARD_DATABASE_URL": sqlite_url}
    with (
        UvicornProcess(APP, env=env, workers=4) as server,
        contextlib.closing(Fleet([server], admin, processes=4)) as fleet,
    ):
        yield fleet


@pytest.fixture
def servers_on_postgresql(postgres_url: str, redis_server: RedisServer) -> Iterator[Fleet]:
    """Serve from three servers on PostgreSQL and Redis."""
    admin = asyncio.run(first_key(postgres_url)).token
    env = {"TFM_GUARD_DATABASE_URL": postgres_url, "TFM_GUARD_REDIS_URL": redis_server.url}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(UvicornProcess(APP, env=env)) for _ in range(3)]
        yield stack.enter_context(contextlib.closing(Fleet(servers, admin, processes=3)))


@pytest.fixture(params=["workers_on_sqlite", "servers_on_postgresql"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """Run the test on each set-up."""
    fleet = request.getfixturevalue(request.param)
    assert isinstance(fleet, Fleet)
    return fleet


def test_keys_come_and_go_everywhere(fleet: Fleet) -> None:
    """A key made on one process is good on all at once; deleted, on none from the 204 on."""
    callers = fleet.one_of_each()
    for number, caller in enumerate(callers):
        made = caller.ask("POST", "/v1/api-keys/", fleet.admin, {"name": f"key {number}"})
        assert made.status == 201
        token = made.content["key"]
        for _ in range(3):  # the last two from memory
            assert set(fleet.ask_all(token, times=3)) == {200}
        deleter = callers[number - 1]
        path = f"/v1/api-keys/{made.content['id']}"
        assert deleter.ask("DELETE", path, fleet.admin).status == 204
        assert set(fleet.ask_all(token, times=25)) == {401}
        assert set(fleet.ask_all(fleet.admin, times=2)) == {200}


def test_a_key_goes_while_it_is_used(fleet: Fleet) -> None:
    """Used from all sides a key is accepted until it is deleted, and not once after the 204."""
    callers = fleet.one_of_each()
    made = callers[0].ask("POST", "/v1/api-keys/", fleet.admin, {"name": "in use"})
    token, path = made.content["key"], f"/v1/api-keys/{made.content['id']}"
    assert set(fleet.ask_all(token, times=5)) == {200}
    users = [caller for caller in fleet.callers if caller not in callers]
    deleted = False

    def use(caller: Caller) -> tuple[set[int], list[int]]:
        during: set[int] = set()
        while not deleted:
            during.add(caller.ask("GET", "/whoami", token).status)
        return during, [caller.ask("GET", "/whoami", token).status for _ in range(50)]

    with ThreadPoolExecutor(len(users)) as threads:
        using = [threads.submit(use, caller) for caller in users]
        try:
            status = callers[-1].ask("DELETE", path, fleet.admin).status
        finally:
            deleted = True
        answers = [future.result() for future in using]
    assert status == 204
    assert all(during <= {200, 401} for during, _ in answers)
    assert [code for _, after in answers for code in after] == [401] * (50 * len(users))
