"""docs/scale.md has what its script prints, and its formulas agree with what they stand for."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from benchmarks.scale import (
    LINKED_POLL_SECONDS,
    POLL_SECONDS,
    REQUESTS,
    SEED,
    SIMULATIONS,
    calls,
    entry_bytes,
    request_bytes,
    tables,
)
from benchmarks.scale_model import Load, on_paper, popularity, simulated
from tests.support.guards import new_guard, shared_of, written
from tests.support.redis import RedisServer
from tests.support.servers import ROOT
from tests.support.sql import execute
from tfm_guard import Guard

PAGE = (ROOT / "docs" / "scale.md").read_text()


def test_the_tables_are_those_that_the_script_prints() -> None:
    """Every table of the script stands in the page, and the page has no other one with figures."""
    printed = [rows for _, rows in tables()]
    assert [rows.splitlines()[0] for rows in printed if rows not in PAGE] == []
    assert PAGE.count("| ---: |") == sum(rows.count("| ---: |") for rows in printed)


@pytest.mark.parametrize("load", SIMULATIONS, ids=str)
def test_paper_and_simulation_agree(load: Load) -> None:
    """Hits within three hundredths of all requests, reads within a tenth, used keys within 4 %."""
    paper = on_paper(load)
    chance = simulated(load, requests=REQUESTS, seed=SEED)
    assert paper.hits == pytest.approx(chance.hits, abs=0.03)
    assert paper.reads == pytest.approx(chance.reads, rel=0.1)
    assert paper.used == pytest.approx(chance.used, rel=0.04)
    assert paper.hits < 0.99


def test_all_requests_are_spread_over_all_keys() -> None:
    """The parts of the keys add up to one, and there are as many keys as asked for."""
    for keys, exponent in ((10, 1.0), (10**6, 0.8), (10**9, 1.0)):
        groups = popularity(keys, exponent)
        assert sum(count for count, _ in groups) == keys
        assert sum(count * part for count, part in groups) == pytest.approx(1)
    assert popularity(10**6, 1.0)[0][1] / popularity(10**6, 1.0)[1][1] == pytest.approx(2, rel=0.1)


def test_nothing_is_found_more_often_with_less() -> None:
    """A smaller memory, more keys, or no Redis never means fewer reads of the database."""
    load = Load(keys=10**6, processes=10, rate=1000)
    reads = on_paper(load).reads
    assert on_paper(load._replace(cache=1000)).looked_up > on_paper(load).looked_up
    assert on_paper(load._replace(keys=10**7)).reads > reads
    assert on_paper(load._replace(redis=False)).reads > reads


def test_keys_share_calls() -> None:
    """Few keys a second need a call each, many share them, and none carries more than 256."""
    assert calls(1) == pytest.approx(1, rel=0.01)
    assert calls(10_000) == pytest.approx(1000, rel=0.01)
    assert calls(1_000_000) == pytest.approx(1_000_000 / 256)
    assert calls(0) == 0


def test_the_intervals_are_those_of_a_new_database(sqlite_url: str) -> None:
    """The script reckons with the poll intervals that new tables have."""
    asyncio.run(Guard.from_urls(database=sqlite_url).upgrade_schema())
    shared = dict(map(tuple, execute(sqlite_url, "SELECT name, value FROM tfm_settings")))
    assert float(shared["poll_seconds"]) == POLL_SECONDS
    assert float(shared["linked_poll_seconds"]) == LINKED_POLL_SECONDS


async def test_an_entry_is_as_long_as_is_reckoned_with(
    sqlite_url: str, redis_server: RedisServer
) -> None:
    """An entry in Redis, with texts of 16 letters and an expiry, and its name in a request."""
    async with new_guard(sqlite_url, redis_server.url) as guard:
        created = await guard.keys.create(
            account_id="a" * 16, name="n" * 16, expires_at=datetime(2040, 1, 1, tzinfo=UTC)
        )
        await guard.verify(created.token)
        await written(shared_of(guard))
    with redis_server.client() as client:
        (name,) = client.keys("*")
        value: Any = client.get(name)
    assert len(value) == entry_bytes()
    assert len(f"${len(name)}\r\n{name.decode()}\r\n") == request_bytes()
