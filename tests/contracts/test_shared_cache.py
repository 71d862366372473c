"""Facts about the shared cache: nothing in it is believed for being there."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import fakeredis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fake_redis import FakeAccess, fake_server
from tests.support.guards import written
from tests.support.redis import RedisServer
from tfm_guard.counters import Counters
from tfm_guard.records import CacheEntry
from tfm_guard.redis_access import RedisAccess
from tfm_guard.shared_cache import MAX_AGE_SECONDS, SharedCache
from tfm_guard.testing import ManualClock

NOW = 1_900_000_000.0
SEAL_KEY = b"a key to seal with, of 32 bytes!"
PREFIX = "0a1b2c3d"
NAME = f"tfm:here:v1:key:{PREFIX}"

MakeCache = Callable[..., Any]


class Place(NamedTuple):
    """A Redis: the library's way to it, and a client to look and to meddle."""

    access: RedisAccess
    raw: Any


@pytest.fixture(params=["redis", "fakeredis"])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Run the test on a real server and on fakeredis."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        access, client = RedisAccess(server.url), server.client()
    else:
        fake = fake_server()
        access, client = FakeAccess(fake), fakeredis.FakeRedis(server=fake)
    with client:
        yield Place(access, client)
    await access.close()


@pytest.fixture
def raw(redis: Place) -> Any:
    """Return a client to look and to meddle."""
    return redis.raw


@pytest.fixture
async def make_cache(redis: Place) -> AsyncIterator[MakeCache]:
    """Return what opens further caches on the same Redis."""
    opened = []

    async def make(*, installation: str = "here", seal_key: bytes = SEAL_KEY) -> SharedCache:
        cache = SharedCache(
            redis.access,
            names=f"tfm:{installation}:v1:key:",
            seal_key=seal_key,
            clock=ManualClock(),
            counters=Counters(),
        )
        opened.append(cache)
        await cache.open()
        return cache

    yield make
    for cache in opened:
        await cache.close()


@pytest.fixture
async def cache(make_cache: MakeCache) -> SharedCache:
    """Open a cache."""
    cache: SharedCache = await make_cache()
    return cache


def entry(
    version: int = 1, *, name: str = "CI", sealed_at: float = NOW, revoked: bool = False
) -> CacheEntry:
    """Return an entry as the reader makes them."""
    return CacheEntry(
        sealed_at=sealed_at,
        version=version,
        revoked=revoked,
        digest=b"sixteen bytes...",
        key_id=UUID(int=7),
        account_id="acme",
        name=name,
        scopes=("domains:write", "send"),
        expires_at=datetime(2040, 1, 1, tzinfo=UTC),
        replaced_at=None,
    )


async def find(cache: SharedCache, prefixes: list[str]) -> dict[str, CacheEntry]:
    """Return what *cache* has for *prefixes*, all of it believed if its seal holds."""
    return await cache.find(prefixes, counts=lambda _prefix, _entry: True)


async def get(cache: SharedCache, prefix: str) -> CacheEntry | None:
    """Return what *cache* has for *prefix*, believed if its seal holds."""
    return (await find(cache, [prefix])).get(prefix)


def counters_of(cache: SharedCache) -> Counters:
    """Return what *cache* counts."""
    return cache._counters  # noqa: SLF001


async def fill(cache: SharedCache, *entries: CacheEntry, prefix: str = PREFIX) -> None:
    """Put each of *entries* and wait until it has been written, or not."""
    for each in entries:
        cache.put(prefix, each)
        await written(cache)


async def value_of(cache: SharedCache, raw: Any, what: CacheEntry) -> bytes:
    """Return the value that *what* becomes, leaving Redis empty."""
    await fill(cache, what)
    value: bytes = raw.get(NAME)
    raw.delete(NAME)
    return value


async def assert_refused(cache: SharedCache) -> None:
    """Assert that what is there is a counted miss and no failure."""
    before = counters_of(cache).shared_rejected
    assert await get(cache, PREFIX) is None
    assert counters_of(cache).shared_rejected == before + 1
    assert counters_of(cache).shared_failures == 0


async def test_an_entry_is_there_for_all(make_cache: MakeCache) -> None:
    """What one process puts another finds, in every detail, and only under its prefix."""
    one, another = await make_cache(), await make_cache()
    assert await get(another, PREFIX) is None
    await fill(one, entry(41))
    assert await get(another, PREFIX) == entry(41)
    assert await get(another, "ffffffff") is None
    assert counters_of(another) == Counters(shared_reads=3, shared_hits=1, shared_misses=2)


async def test_any_changed_byte_breaks_the_seal(cache: SharedCache, raw: Any) -> None:
    """An entry with any one byte changed is refused, be it of the format, the body or the seal."""
    value = await value_of(cache, raw, entry())
    for position in range(len(value)):
        changed = bytearray(value)
        changed[position] ^= 1
        raw.set(NAME, bytes(changed))
        await assert_refused(cache)
    raw.set(NAME, value)
    assert await get(cache, PREFIX) == entry()


async def test_a_truncated_entry_is_refused(cache: SharedCache, raw: Any) -> None:
    """Of an entry no beginning counts, and neither does the whole with something after it."""
    value = await value_of(cache, raw, entry())
    for part in (*(value[:length] for length in range(len(value))), value + b"\0", b"\0" + value):
        raw.set(NAME, part)
        await assert_refused(cache)


async def test_an_entry_under_another_name_is_refused(cache: SharedCache, raw: Any) -> None:
    """The entry of one key, copied under another's name, does not count there."""
    await fill(cache, entry(), prefix="ffffffff")
    raw.set(NAME, raw.get("tfm:here:v1:key:ffffffff"))
    await assert_refused(cache)


async def test_an_entry_of_another_installation_is_refused(make_cache: MakeCache, raw: Any) -> None:
    """Installations do not see each other's entries; copied over, they are refused."""
    here = await make_cache()
    await fill(await make_cache(installation="there"), entry())
    assert await get(here, PREFIX) is None
    raw.set(NAME, raw.get(f"tfm:there:v1:key:{PREFIX}"))
    await assert_refused(here)


async def test_an_entry_under_another_seal_is_refused(make_cache: MakeCache) -> None:
    """Who writes the right format without the key has written garbage."""
    here = await make_cache()
    await fill(await make_cache(seal_key=b"another key" + SEAL_KEY[11:]), entry())
    await assert_refused(here)


async def test_a_sealed_entry_of_other_fields_is_refused(cache: SharedCache, raw: Any) -> None:
    """What another release sealed under the same key, with other fields, is a miss."""
    for body in (b"\x90", b"\xc0", b"not msgpack"):
        value = b"1" + b"%016x" % 1 + body
        raw.set(NAME, value + cache._mac(PREFIX, value))  # noqa: SLF001  # as that release would
        await assert_refused(cache)


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"1", id="format alone"),
        pytest.param(b"1" + b"f" * 16, id="highest version"),
        pytest.param(b"1" + b"f" * 16 + bytes(200), id="highest version and zeros"),
        pytest.param(b"2" + bytes(200), id="another format"),
        pytest.param(bytes(10_000_000), id="10 MB"),
    ],
)
async def test_garbage_is_overwritten(cache: SharedCache, raw: Any, garbage: bytes) -> None:
    """Garbage that was read is a miss, and the next fill writes over it, whatever it claims."""
    raw.set(NAME, garbage)
    await assert_refused(cache)
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()


async def test_garbage_put_there_since_is_not_overwritten(cache: SharedCache, raw: Any) -> None:
    """Only the very garbage that was read goes: a later version that came meanwhile stays."""
    later = await value_of(cache, raw, entry(9))
    raw.set(NAME, b"1" + b"f" * 16)
    await assert_refused(cache)
    raw.set(NAME, later)
    await fill(cache, entry(8))
    assert await get(cache, PREFIX) == entry(9)


@pytest.mark.parametrize("command", ["lpush", "sadd", "hset"])
async def test_a_value_of_another_type_is_overwritten(
    cache: SharedCache, raw: Any, command: str
) -> None:
    """A list, set or hash under our name is a miss, no error, and the next fill replaces it."""
    getattr(raw, command)(NAME, *(["field"] if command == "hset" else []), "value")
    assert await get(cache, PREFIX) is None
    assert counters_of(cache) == Counters(shared_reads=1, shared_misses=1)
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()
    assert counters_of(cache).shared_failures == 0


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    garbage=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=200).map(lambda tail: b"1" + b"%016x" % 5 + tail),
    )
)
async def test_random_bytes_are_a_miss(cache: SharedCache, raw: Any, garbage: bytes) -> None:
    """Whatever bytes are there, they are refused without an error and overwritten."""
    raw.set(NAME, garbage)
    await assert_refused(cache)
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()


async def test_a_fill_never_goes_back(cache: SharedCache, raw: Any) -> None:
    """A lower version is overwritten; the same or a later one stays, also over digit boundaries."""
    for version in (1, 9, 10, 15, 16, 255, 256, 2**40):
        await fill(cache, entry(version), entry(version - 1), entry(version, name="again"))
        assert await get(cache, PREFIX) == entry(version)


async def test_a_tombstone_stays(cache: SharedCache) -> None:
    """A revoked entry is kept like any other, and no earlier version brings its key back."""
    tombstone = entry(2, revoked=True)
    await fill(cache, entry(1), tombstone, entry(1), entry(2))
    assert await get(cache, PREFIX) == tombstone


async def test_an_entry_ends_by_itself(cache: SharedCache, raw: Any) -> None:
    """Redis drops an entry when it would no longer count."""
    await fill(cache, entry())
    assert MAX_AGE_SECONDS == 600
    assert 590_000 < raw.pttl(NAME) <= 600_000


async def test_what_does_not_count_is_overwritten(cache: SharedCache) -> None:
    """An entry that the reader does not believe is a counted miss, and gives way to its like."""
    await fill(cache, entry(name="doubtful"))
    before = counters_of(cache).shared_rejected
    assert not await cache.find([PREFIX], counts=lambda _, found: found.name != "doubtful")
    assert counters_of(cache).shared_rejected == before + 1
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()


async def test_look_ups_travel_together(cache: SharedCache) -> None:
    """256 look-ups are one command, and each gets its own entry."""
    prefixes = [f"{number:08x}" for number in range(256)]
    for number, prefix in enumerate(prefixes):
        cache.put(prefix, entry(number + 1))
    await written(cache)
    found = await find(cache, [*prefixes, "ffffffff"])
    assert found == {prefix: entry(number + 1) for number, prefix in enumerate(prefixes)}
    assert counters_of(cache) == Counters(shared_reads=1, shared_hits=256, shared_misses=1)


async def test_fills_are_bounded(cache: SharedCache, raw: Any) -> None:
    """Of 1,500 fills at once 1,024 are written and the others counted as left out."""
    for number in range(1500):
        cache.put(f"{number:08x}", entry())
    await written(cache)
    assert counters_of(cache) == Counters(shared_fills_dropped=1500 - 1024)
    assert raw.dbsize() == 1024
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()


async def test_fills_travel_together(redis_server: RedisServer) -> None:
    """512 fills are 2 commands on a real server, once it knows the script."""
    access = RedisAccess(redis_server.url)
    cache = SharedCache(
        access,
        names="tfm:here:v1:key:",
        seal_key=SEAL_KEY,
        clock=ManualClock(),
        counters=Counters(),
    )
    await cache.open()
    await fill(cache, entry())
    with redis_server.client() as raw:
        raw.config_resetstat()
        for number in range(512):
            cache.put(f"{number:08x}", entry())
        await written(cache)
        assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] == 2
        assert raw.dbsize() == 513
    await cache.close()
    await access.close()


async def test_garbage_that_nobody_overwrites_is_forgotten(cache: SharedCache, raw: Any) -> None:
    """Garbage under names without a key does not use up what is noted to be overwritten."""
    names = [f"tfm:here:v1:key:{number:08x}" for number in range(1500)]
    raw.mset(dict.fromkeys(names, b"1" + b"f" * 16))
    assert not await find(cache, [name[-8:] for name in names])
    assert counters_of(cache).shared_rejected == 1500
    raw.set(NAME, b"1" + b"f" * 16)
    await assert_refused(cache)
    await fill(cache, entry())
    assert await get(cache, PREFIX) == entry()
