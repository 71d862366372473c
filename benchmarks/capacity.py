"""What each kind of call costs the servers: the figures that docs/scale.md reckons with.

Starts a PostgreSQL and a Redis or Valkey of its own, makes the calls that the library makes, one
after the other, and reads how long the servers' processes were on a processor meanwhile. That, and
not how long the calls took, says how many a server comes to: one core of it has a million
microseconds a second. PostgreSQL runs without syncs to disk.

    python -m benchmarks.capacity [--json]
"""

import argparse
import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import insert

from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.sql import engine_for
from tfm_guard import Guard
from tfm_guard.clock import SystemClock
from tfm_guard.coalescer import LIMIT
from tfm_guard.redis_access import RedisAccess
from tfm_guard.store import Place, Store, schema

KEYS = 100_000
PROCESSES = 1_000
SUBSCRIBERS = 200
CALLS = 400
ENTRY = b"x" * 250  # a sealed entry, with texts of 16 bytes
MESSAGE = b"x" * 180  # a sealed change
ACCOUNTS = 1_000
FLUSHED = 10_000
AT_ONCE = 50  # verifications
ROUNDS = 5

# So that argon2 costs nothing here.
CHEAP: dict[str, Any] = {
    "argon2_memory_kib": 8,
    "argon2_time_cost": 1,
    "plans": {"free": 2 * CALLS},
}

Figures = dict[str, float]


def cpu_seconds(pids: list[int]) -> float:
    """Return how long these processes were on a processor, since they began."""
    texts = [Path(f"/proc/{pid}/schedstat").read_text() for pid in pids]
    return sum(int(text.split()[0]) for text in texts) / 1e9


def fill(url: str) -> None:
    """Put keys and processes into the database."""
    now = datetime.now(UTC)
    columns = {
        "name": "sixteen letters.",
        "secret_hash": "$argon2id$v=19$m=19456,t=2,p=1$" + "x" * 66,
        "digest": bytes(16),
        "digest_key_id": "0" * 16,
        "scopes": "send",
        "version": 1,
        "created_at": now,
        "created_by": "command_line",
    }
    accounts = [{"id": f"account-{n:08}", "plan": "free"} for n in range(ACCOUNTS)]
    keys = [
        columns | {"id": uuid4(), "prefix": f"{n:08}", "account_id": f"account-{n % ACCOUNTS:08}"}
        for n in range(KEYS)
    ]
    workers = [
        {"id": UUID(int=n), "name": "host:1", "seen": 0, "turn": 0, "registered_at": now}
        for n in range(PROCESSES)
    ]
    used = [{"key_id": key["id"], "last_used_at": now} for key in keys]
    hours = [{"key_id": key["id"], "hour": now, "accepted": 1, "refused": 0} for key in keys]
    with engine_for(url).begin() as connection:
        for table, rows in (
            (schema.accounts, accounts),
            (schema.keys, keys),
            (schema.key_usage, used),
            (schema.usage_hours, hours),
            (schema.workers, workers),
        ):
            connection.execute(insert(table), rows)
    with engine_for(url).connect() as connection:
        connection.exec_driver_sql("ANALYZE")


def backends(url: str) -> list[int]:
    """Return the process ids of the server's ends of the library's connections."""
    wanted = "SELECT pid FROM pg_stat_activity WHERE application_name = 'tfm-guard'"
    with engine_for(url).connect() as connection:
        return [row.pid for row in connection.exec_driver_sql(wanted)]


async def cost(call: Callable[[int], Awaitable[object]], pids: Callable[[], list[int]]) -> float:
    """Return the microseconds that the server's processes are busy for one call."""
    for number in range(20):
        await call(number)
    busy = pids()
    before = cpu_seconds(busy)
    for number in range(CALLS):
        await call(number)
    return (cpu_seconds(busy) - before) / CALLS * 1e6


async def of_database(url: str) -> Figures:
    """Measure PostgreSQL."""
    store = Store(url, pool_size=1, clock=SystemClock())
    await store.open()
    await asyncio.to_thread(fill, url)

    def some(number: int) -> list[str]:
        return [f"{(number * 7919 + n * 389) % KEYS:08}" for n in range(LIMIT)]

    def pids() -> list[int]:
        return backends(url)

    calls: dict[str, Callable[[int], Awaitable[object]]] = {
        "poll": lambda n: store.poll(UUID(int=n), Place(0, None, n + 1)),
        "look-up of 1 key": lambda n: store.find_keys(some(n)[:1]),
        "look-up of 256 keys": lambda n: store.find_keys(some(n)),
        "register of 1,000": lambda _: store.read_register(),
    }
    figures = {name: await cost(call, pids) for name, call in calls.items()}
    # Its statements are of this one connection, and nearly all that they take is the server's.
    figures["flush, a key"] = await store.time_flush(FLUSHED) / FLUSHED * 1e6
    await store.close()
    return figures | sizes(url)


def sizes(url: str) -> Figures:
    """Return the bytes of a row with its part of the indexes."""
    found = {}
    with engine_for(url).connect() as connection:
        for table in (schema.keys, schema.key_usage, schema.usage_hours):
            wanted = f"SELECT pg_total_relation_size('{table.name}')"
            found[f"bytes in {table.name}"] = connection.exec_driver_sql(wanted).scalar_one() / KEYS
    return found


async def of_changes(url: str) -> Figures:
    """Measure creating a key and revoking it, in one process, with what follows."""
    async with Guard.from_urls(database=url, **CHEAP) as guard:

        async def change(_: int) -> None:
            created = await guard.keys.create(account_id="changing", name="sixteen letters.")
            await guard.keys.revoke("changing", created.key.id)

        return {"creating and revoking": await cost(change, lambda: backends(url))}


async def of_process(url: str, redis: str) -> Figures:
    """Measure what a process itself spends on a key that its memory does not know."""
    found = {}
    async with Guard.from_urls(database=url, redis=redis, **CHEAP) as guard:
        made = [await guard.keys.create(account_id="verifying", name="key") for _ in range(CALLS)]
        tokens = [created.token for created in made]
        await asyncio.gather(*map(guard.verify, tokens))  # which puts them into Redis
    for name, server in (("from the database", None), ("from Redis", redis)):
        async with Guard.from_urls(database=url, redis=server, local_cache_size=1) as guard:
            await asyncio.gather(*map(guard.verify, tokens[:AT_ONCE]))
            before = time.process_time()
            for _ in range(ROUNDS):
                for start in range(0, CALLS, AT_ONCE):
                    await asyncio.gather(*map(guard.verify, tokens[start : start + AT_ONCE]))
            seconds = time.process_time() - before
            found[f"process: a key {name}"] = seconds / ROUNDS / CALLS * 1e6
    return found


async def of_redis(server: RedisServer, pid: int) -> Figures:
    """Measure Redis."""
    redis = RedisAccess(server.url)
    client: Any = redis.client
    names = [f"tfm:{'0' * 32}:v1:key:{n:08}" for n in range(KEYS)]
    empty = int((await client.info("memory"))["used_memory"])
    for start in range(0, KEYS, 1000):
        await client.mset(dict.fromkeys(names[start : start + 1000], ENTRY))
    full = int((await client.info("memory"))["used_memory"])

    def some(number: int) -> list[str]:
        return [names[(number * 7919 + n * 389) % KEYS] for n in range(LIMIT)]

    figures = {
        "MGET of 1": await cost(lambda n: client.mget(some(n)[:1]), lambda: [pid]),
        "MGET of 256": await cost(lambda n: client.mget(some(n)), lambda: [pid]),
        "SET": await cost(lambda n: client.set(names[n], ENTRY, px=600_000), lambda: [pid]),
        "PING": await cost(lambda _: client.ping(), lambda: [pid]),
    }
    nobody = await cost(lambda _: client.publish("nobody", MESSAGE), lambda: [pid])
    subscribers = [subscribed(server.port) for _ in range(SUBSCRIBERS)]
    busy = await cost(lambda _: client.publish("changes", MESSAGE), lambda: [pid])
    for subscriber in subscribers:
        subscriber.close()
    await redis.close()
    return {
        **figures,
        "PUBLISH": nobody,
        "delivery to one process": (busy - nobody) / SUBSCRIBERS,
        "bytes of an entry": (full - empty) / KEYS,
    }


def subscribed(port: int) -> socket.socket:
    """Return a connection that is subscribed, and whose reader lets the system buffer it all."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    connection.sendall(b"SUBSCRIBE changes\r\n")
    connection.recv(100)
    return connection


def measure() -> Figures:
    """Return microseconds of a server's processor, by what they are spent on, and bytes."""
    with PostgresServer() as postgres, RedisServer() as redis:
        figures = asyncio.run(of_database(postgres.create_database("capacity")))
        figures |= asyncio.run(of_changes(postgres.create_database("changes")))
        figures |= asyncio.run(of_process(postgres.create_database("process"), redis.url))
        with redis.client() as client:
            pid = int(client.info("server")["process_id"])
        return figures | asyncio.run(of_redis(redis, pid))


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"microseconds of a server's core, of {os.cpu_count()}; or bytes\n")
    for name, microseconds in figures.items():
        print(f"{name:28} {microseconds:10.1f}")


if __name__ == "__main__":
    main()
