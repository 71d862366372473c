"""Ways into an open guard that nothing but a benchmark needs, and keys that are made for it."""

import asyncio
import random
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from tests.support.sql import engine_for
from tfm_guard import Guard
from tfm_guard.freshness import Freshness
from tfm_guard.local_cache import LocalCache
from tfm_guard.shared_cache import SharedCache
from tfm_guard.store import schema
from tfm_guard.token import DigestKey, Tagger, prefix_of

NO_LIMIT = {"free": 10_000_000}  # as `plans`
SEED = 1
ACCOUNTS = 10_000
_SPREADING = 2_654_435_769  # 2^32 divided by the golden ratio


class MadeKey(NamedTuple):
    """A token that was minted here, without argon2, and what is known of it."""

    token: bytes
    prefix: str
    digest: bytes
    id: UUID
    account_id: str
    name: str


def verifier_of(guard: Guard) -> Any:
    """Return the verifier of an open guard."""
    if guard._parts is None:  # noqa: SLF001  # nothing else leads inside
        raise SystemExit("the guard is not open")
    return guard._parts.verifier  # noqa: SLF001


def local_of(guard: Guard) -> LocalCache:
    """Return what an open guard remembers."""
    local: LocalCache = verifier_of(guard)._local  # noqa: SLF001
    return local


def shared_of(guard: Guard) -> SharedCache:
    """Return an open guard's way to Redis."""
    shared: SharedCache = verifier_of(guard)._reader._shared  # noqa: SLF001
    return shared


def freshness_of(guard: Guard) -> Freshness:
    """Return an open guard's place in the feed."""
    freshness: Freshness = verifier_of(guard)._freshness  # noqa: SLF001
    return freshness


def is_linked(guard: Guard) -> bool:
    """Tell whether changes arrive over Redis, and that counts."""
    return freshness_of(guard)._link_counts  # noqa: SLF001


async def linked(guard: Guard) -> None:
    """Return once changes arrive over Redis."""
    while not is_linked(guard):  # noqa: ASYNC110  # no event tells
        await asyncio.sleep(0.01)


def digest_key_of(guard: Guard) -> DigestKey:
    """Return the key of the digests of an open guard's installation."""
    key: DigestKey = verifier_of(guard)._digest_keys.current  # noqa: SLF001
    return key


def make_keys(guard: Guard, count: int) -> Iterator[MadeKey]:
    """Yield keys of an open guard's installation that are yet to be inserted or remembered."""
    dice = random.Random(SEED)  # noqa: S311  # they protect nothing
    tagger: Tagger = verifier_of(guard)._tagger  # noqa: SLF001
    digest = digest_key_of(guard).digest
    for number in range(count):
        # Odd, so that no prefix comes twice; nothing has to be kept for that, in a process whose
        # memory is measured.
        prefix = number * _SPREADING % 2**32
        token = tagger.mint(prefix.to_bytes(4, "big") + dice.randbytes(16))
        account = f"account-{prefix % ACCOUNTS}"
        key_id = UUID(bytes=dice.randbytes(16), version=4)
        yield MadeKey(token, prefix_of(token), digest(token), key_id, account, f"CI {prefix}")


async def insert(guard: Guard, keys: Iterable[MadeKey], *, secret_hash: str | None = None) -> None:
    """Insert *keys* into the database of *guard*, with digests, or else with *secret_hash*."""
    now = datetime.now(UTC)
    common = {
        "secret_hash": secret_hash or "",
        "digest_key_id": digest_key_of(guard).id if secret_hash is None else None,
        "scopes": "send",
        "version": 1,
        "created_at": now,
        "created_by": "a benchmark",
    }
    rows = [
        {
            **common,
            "id": key.id,
            "account_id": key.account_id,
            "name": key.name,
            "prefix": key.prefix,
            "digest": key.digest if secret_hash is None else None,
        }
        for key in keys
    ]
    accounts = [{"id": each, "plan": "free"} for each in {row["account_id"] for row in rows}]

    def run() -> None:
        with engine_for(guard.settings.database_url).begin() as connection:
            connection.execute(schema.accounts.insert(), accounts)
            connection.execute(schema.keys.insert(), rows)

    # Not in the event loop, which the guard's own transactions need to come to an end.
    await asyncio.to_thread(run)
