"""Facts about a Redis that fails: it costs a little time at first, and never a right answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis import Redis

from tests.support.guards import (
    Cost,
    cost_of,
    create,
    local_of,
    new_guard,
    prepare,
    refusal,
    shared_of,
    tagger_of,
    written,
)
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxy
from tests.support.redis import RedisServer
from tests.support.servers import free_port
from tfm_guard import Guard
from tfm_guard.errors import ConfigurationError, Unavailable
from tfm_guard.records import CreatedKey
from tfm_guard.shared_cache import Breaker
from tfm_guard.testing import ManualClock
from tfm_guard.token import RANDOM_BYTES

pytestmark = pytest.mark.alone

# Longer than any pause between two probes, in seconds.
PAUSE = 1.1


class Life:
    """A guard whose memory holds one key, so that nearly every request goes to Redis."""

    def __init__(self, guard: Guard, clock: ManualClock, keys: Sequence[CreatedKey]) -> None:
        self.guard = guard
        self.clock = clock
        self.keys = keys
        self._probed = 0

    async def requests(self, count: int = 12) -> list[float]:
        """Make requests with right and wrong tokens, check the answers, and time the right."""
        loop = asyncio.get_running_loop()
        seconds = []
        for number in range(count):
            created = self.keys[number % len(self.keys)]
            started = loop.time()
            assert (await self.guard.verify(created.token)).key_id == created.key.id
            seconds.append(loop.time() - started)
            self._probed += 1
            secret = self._probed.to_bytes(RANDOM_BYTES - 4, "big")
            wrong = tagger_of(self.guard).mint(bytes.fromhex(created.key.key_prefix) + secret)
            assert await refusal(self.guard, wrong) == "wrong secret"
            await written(shared_of(self.guard))
        return seconds

    async def is_left_aside(self) -> bool:
        """Tell whether requests do without Redis."""
        before = self.guard.counters.shared_reads
        await self.requests()
        return self.guard.counters.shared_reads == before

    async def is_in_use(self) -> bool:
        """Tell whether requests find keys in Redis."""
        await self.requests(2 * len(self.keys))
        before = self.guard.counters.shared_hits
        await self.requests(len(self.keys))
        return self.guard.counters.shared_hits > before

    async def heals(self) -> bool:
        """Tell whether Redis is in use after the next probes."""
        for _ in range(3):
            await self.clock.pass_time(PAUSE)
        return await self.is_in_use()


OpenLife = Callable[..., Any]


@pytest.fixture
async def open_life(sqlite_url: str) -> AsyncIterator[OpenLife]:
    """Return what opens a guard on a Redis."""
    await prepare(sqlite_url)
    async with AsyncExitStack() as guards:

        async def open_one(redis: str) -> Life:
            clock = ManualClock()
            guard = new_guard(sqlite_url, redis, clock=clock, local_cache_size=1)
            await guards.enter_async_context(guard)
            keys = [await create(guard, name=str(number)) for number in range(4)]
            return Life(guard, clock, keys)

        yield open_one


@pytest.fixture
async def life(open_life: OpenLife, redis_server: RedisServer) -> Life:
    """Open a guard on a Redis that works."""
    life: Life = await open_life(redis_server.url)
    assert await life.is_in_use()
    assert life.guard.counters.shared_failures == 0
    return life


@pytest.fixture
def raw(redis_server: RedisServer) -> Iterator[Redis]:
    """Return a client to change what may be set; the server comes back as it was."""
    with redis_server.client() as client:
        yield client
    redis_server.restart()


async def assert_given_up(life: Life) -> None:
    """Assert that Redis is asked three times, for at most 0.3 s each, and not from then on."""
    before = life.guard.counters.shared_reads
    seconds = await life.requests()
    assert Breaker.FAILURES == 3
    assert life.guard.counters.shared_reads - before == 3
    assert max(seconds) < 0.5
    assert await life.is_left_aside()


async def test_absent_at_the_start(open_life: OpenLife, redis_server: RedisServer) -> None:
    """Without Redis the guard opens all the same, serves, and uses Redis once it is there."""
    redis_server.stop()
    life = await open_life(redis_server.url)
    assert await life.is_left_aside()
    await life.clock.pass_time(3 * PAUSE)
    assert await life.is_left_aside()
    redis_server.start()
    assert await life.heals()


async def test_killed(life: Life, redis_server: RedisServer) -> None:
    """Killed, Redis is left aside; started again, empty, it is used again."""
    redis_server.kill()
    await assert_given_up(life)
    await life.clock.pass_time(3 * PAUSE)
    assert await life.is_left_aside()
    redis_server.start()
    assert await life.heals()


async def test_frozen(life: Life, redis_server: RedisServer) -> None:
    """Frozen, Redis costs a few requests 0.25 s; then it is left aside, and used when it thaws."""
    redis_server.freeze()
    await assert_given_up(life)
    await life.clock.pass_time(PAUSE)
    assert await life.is_left_aside()
    redis_server.thaw()
    assert await life.heals()


async def test_frozen_while_many_ask(life: Life, redis_server: RedisServer) -> None:
    """400 requests at once for a frozen Redis all get their answers, after some 0.3 s together."""
    redis_server.freeze()
    local_of(life.guard).clear()
    loop = asyncio.get_running_loop()
    started = loop.time()
    found = await asyncio.gather(*(life.guard.verify(life.keys[n % 4].token) for n in range(400)))
    assert [key.key_id for key in found] == [life.keys[n % 4].key.id for n in range(400)]
    assert loop.time() - started < 0.9


async def test_restarted_empty(life: Life, redis_server: RedisServer) -> None:
    """After a restart without its data Redis fills again, whether or not it was left aside."""
    redis_server.restart()
    await life.requests()
    assert await life.heals()


async def test_a_replica(life: Life, raw: Redis) -> None:
    """Turned into a replica that takes no writes, Redis is no reason to refuse a key."""
    raw.replicaof("127.0.0.1", free_port())
    raw.client_kill_filter(_type="normal", skipme=True)
    assert max(await life.requests()) < 0.5
    raw.replicaof("NO", "ONE")
    assert await life.heals()


async def test_a_replica_at_the_start(
    open_life: OpenLife, redis_server: RedisServer, raw: Redis
) -> None:
    """A replica is not used, for it may be behind; once it is the master it is."""
    raw.replicaof("127.0.0.1", free_port())
    life = await open_life(redis_server.url)
    assert await life.is_left_aside()
    await life.clock.pass_time(2 * PAUSE)
    assert await life.is_left_aside()
    raw.replicaof("NO", "ONE")
    assert await life.heals()


async def test_full(life: Life, raw: Redis) -> None:
    """Full and unwilling to evict, Redis takes no entries; keys are accepted without delay."""
    raw.flushall()
    raw.config_set("maxmemory-policy", "noeviction")
    raw.config_set("maxmemory", 1)
    assert max(await life.requests()) < 0.5
    assert life.guard.counters.shared_failures > 0
    assert raw.dbsize() == 0
    raw.config_set("maxmemory", 0)
    assert await life.heals()


async def test_the_password_changed(life: Life, raw: Redis) -> None:
    """With a password that is not ours Redis is left aside, and used when ours is good again."""
    raw.config_set("requirepass", "another one")
    raw.client_kill_filter(_type="normal", skipme=True)
    await assert_given_up(life)
    await life.clock.pass_time(2 * PAUSE)
    assert await life.is_left_aside()
    raw.config_set("requirepass", "")
    assert await life.heals()


async def test_values_of_another_type(life: Life, redis_server: RedisServer) -> None:
    """Lists under the names of entries are replaced; nobody notices."""
    with redis_server.client() as raw:
        names = raw.keys("tfm:*")
        assert len(names) == len(life.keys)
        for name in names:
            raw.delete(name)
            raw.lpush(name, "value")
        await life.requests()
        assert {raw.type(name) for name in names} == {b"string"}
    assert life.guard.counters.shared_failures == 0
    assert await life.is_in_use()


async def test_flushed_again_and_again(life: Life, redis_server: RedisServer) -> None:
    """Whoever empties Redis all the time costs queries, and nothing else."""
    with redis_server.client() as raw:
        for _ in range(20):
            raw.flushall()
            raw.script_flush()
            assert max(await life.requests(4)) < 0.5
    assert life.guard.counters.shared_failures == 0
    assert await life.is_in_use()


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    """Stand between the guard and its Redis."""
    async with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def distant(open_life: OpenLife, proxy: Proxy) -> Life:
    """Open a guard whose Redis is behind the proxy."""
    life: Life = await open_life(f"redis://127.0.0.1:{proxy.port}/0")
    assert await life.is_in_use()
    return life


async def test_slow(distant: Life, proxy: Proxy) -> None:
    """Slower than 0.25 s, Redis is left aside; at 20 ms it is used."""
    proxy.delay = 0.01
    assert await distant.is_in_use()
    proxy.delay = 0.4
    await assert_given_up(distant)
    proxy.delay = 0.0
    assert await distant.heals()


async def test_stalled(distant: Life, proxy: Proxy) -> None:
    """Connections that stay open and say nothing are given up, and made anew."""
    proxy.stall()
    await assert_given_up(distant)
    proxy.cut()
    proxy.resume()
    assert await distant.heals()


async def test_cut(distant: Life, proxy: Proxy) -> None:
    """Connections that are reset cost no more than a look-up each, and are made anew."""
    for _ in range(5):
        proxy.cut()
        assert max(await distant.requests(4)) < 0.5
    assert await distant.heals()


async def test_no_storm(life: Life, redis_server: RedisServer) -> None:
    """While Redis is away it is tried a few times a second, however many requests come."""
    redis_server.stop()
    port = redis_server.port
    tried = 0

    async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tried
        tried += 1
        writer.transport.abort()

    async with await asyncio.start_server(count, "127.0.0.1", port):
        await life.requests()
        first = tried
        for _ in range(10):
            await life.clock.pass_time(0.5)
            await life.requests(4)
    assert first <= 2 * Breaker.FAILURES
    # 5 seconds; the cache pauses for half a second at least, the link soon for about one.
    assert 6 <= tried - first <= 20
    redis_server.start()
    assert await life.heals()


class ClusterNode(RedisServer):
    """A node of a cluster of its own."""

    def command(self) -> Sequence[str]:
        # By default the nodes' own port is 10,000 above: where outgoing connections take theirs.
        cluster = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        return [*super().command(), *cluster]


async def test_a_cluster_is_refused(sqlite_url: str) -> None:
    """A guard on a node of a cluster does not open, and says what to use."""
    with ClusterNode() as node:
        guard = new_guard(sqlite_url, node.url)
        with pytest.raises(ConfigurationError, match="TFM_GUARD_REDIS_URL: Redis Cluster is not"):
            await guard.open()


@pytest.mark.parametrize(
    "url", ["hunter2", "http://guard:hunter2@localhost", "redis://:hunter2@h:p/0"]
)
async def test_a_faulty_url(sqlite_url: str, url: str) -> None:
    """A URL that cannot work is refused without showing its password."""
    with pytest.raises(ConfigurationError, match="TFM_GUARD_REDIS_URL") as caught:
        await new_guard(sqlite_url, url).open()
    assert "hunter2" not in str(caught.value)


async def test_both_gone(
    postgres_server: PostgresServer, postgres_url: str, redis_server: RedisServer
) -> None:
    """With database and Redis gone memory serves until the lease ends; then nothing is known."""
    await prepare(postgres_url, lease=2, poll=1)
    clock = ManualClock()
    async with new_guard(postgres_url, redis_server.url, clock=clock) as guard:
        warm, cold = await create(guard), await create(guard)
        await guard.verify(warm.token)
        await clock.wait_for_sleepers(2)
        redis_server.stop()
        postgres_server.stop()
        await clock.pass_time(1.9)
        for _ in range(10):
            assert await cost_of(guard, guard.verify(warm.token)) == Cost(0, 0, 0)
        with pytest.raises(Unavailable):
            await guard.verify(cold.token)
        await clock.pass_time(0.1)
        for created in (warm, cold):
            with pytest.raises(Unavailable):
                await guard.verify(created.token)
        postgres_server.start()
        await clock.pass_time(1.1)
        for created in (warm, cold):
            assert (await guard.verify(created.token)).key_id == created.key.id
        assert await cost_of(guard, guard.verify(warm.token)) == Cost(0, 0, 0)
