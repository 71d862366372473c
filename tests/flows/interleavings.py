"""Changes of the same few keys at the same time, by several guards: what comes of them.

Each round is an account of its own. Whatever order the changes took place in, there must be one in
which, made one after the other, they have the same results and leave the same keys.
`python -m tests.flows.interleavings --rounds N --seed N` runs it for long, on both databases.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import select

from tests.support.guards import new_guard, prepare
from tests.support.postgres import PostgresServer
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import GuardError, KeyNotFound, NotConfirmed
from tfm_guard.records import CreatedKey
from tfm_guard.store import schema

PLAN = 3  # keys that an account may hold
GUARDS = 3
_SCOPES = ("send", "domains:read", "emails:read")
_LEASE = 2.0  # seconds
_MINTING = 16  # tokens that a guard makes at a time: of more it would refuse some
_MOST_TURNS = 200  # of the event loop that a change may begin later than others


class Act(NamedTuple):
    """A change: what, of which key, and the scopes to keep if it is narrowed."""

    what: str
    key: int = 0
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class State:
    """A key as it should be; *replaced_by* is the number of the act that made its successor."""

    scopes: frozenset[str]
    revoked: bool = False
    replaced_by: object = None


Keys = dict[object, State]  # by its number at first, or ("act", n) if act n made it
Names = dict[UUID | None, object]


class Round(NamedTuple):
    """What was done to an account that had these *keys*, and what came of it."""

    before: Keys
    acts: list[Act]
    results: list[str]
    after: Keys

    def is_serial(self) -> bool:
        """Tell whether some order of the acts explains all of it."""
        return any(self._explains(order) for order in itertools.permutations(range(len(self.acts))))

    def _explains(self, order: Sequence[int]) -> bool:
        keys = dict(self.before)
        for number in order:
            if perform(keys, self.acts[number], ("act", number)) != self.results[number]:
                return False
        return keys == self.after


def perform(keys: Keys, act: Act, made: object) -> str:
    """Do *act* to *keys* as it is to be done alone; return its result."""
    if refusal := _refusal(keys, act):
        return refusal
    key = keys[act.key]
    if act.what == "revoke":
        # Who revokes a key again joins the wait, or is told that it is gone already: the same here.
        keys[act.key] = replace(key, revoked=True)
    elif act.what == "narrow":
        keys[act.key] = replace(key, scopes=act.kept)
    elif act.what == "create":
        keys[made] = State(frozenset(_SCOPES))
    else:
        keys[made] = State(key.scopes)
        keys[act.key] = replace(key, replaced_by=made)
    return "done"


def _refusal(keys: Keys, act: Act) -> str:
    live = {name: key for name, key in keys.items() if not key.revoked}
    if act.what == "create":
        full = sum(key.replaced_by is None for key in live.values()) >= PLAN
        return "PlanLimitReached" if full else ""
    if act.what != "revoke" and act.key not in live:
        return "KeyNotFound"
    if act.what == "narrow":
        return "" if act.kept <= keys[act.key].scopes else "InvalidInput"
    if act.what == "rotate":
        paired = any(key.replaced_by == act.key for key in live.values())
        return "AlreadyReplaced" if paired or keys[act.key].replaced_by is not None else ""
    return ""


class Interleavings:
    """Rounds on the database at *url*, drawn by chance from one *seed*."""

    def __init__(self, url: str, *, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._url = url
        self._random = Random(seed)
        self._guards: list[tuple[Guard, asyncio.Semaphore]] = []

    async def run(self, *, rounds: int, at_once: int) -> None:
        """Run so many *rounds*, *at_once* at the same time."""
        await prepare(self._url, lease=_LEASE, poll=_LEASE / 40)
        async with AsyncExitStack() as stack:
            for _ in range(GUARDS):
                guard = new_guard(self._url, plans={"free": PLAN})
                await stack.enter_async_context(guard)
                self._guards.append((guard, asyncio.Semaphore(_MINTING)))
            for first in range(0, rounds, at_once):
                numbers = range(first, min(first + at_once, rounds))
                accounts = [f"account {number}" for number in numbers]
                played = await asyncio.gather(*map(self._round, accounts))
                self._judge(dict(zip(accounts, played, strict=True)))
        self._check_feed()

    async def _round(self, account_id: str) -> tuple[Round, Names]:
        random = self._random
        pair = random.random() < 0.3  # the first key is in its grace
        guard, minting = random.choice(self._guards)
        async with minting:
            made: list[CreatedKey] = [
                await guard.keys.create(account_id=account_id, name="0", scopes=_SCOPES)
            ]
            if pair:
                made.append(await guard.keys.rotate(account_id, made[0].key.id))
            else:
                create = guard.keys.create(account_id=account_id, name="1", scopes=_SCOPES)
                made.append(await create)
        first = State(frozenset(_SCOPES), replaced_by=1 if pair else None)
        before: Keys = {0: first, 1: State(frozenset(_SCOPES))}
        acts = [self._draw() for _ in range(random.choice((2, 3, 4, 4)))]
        ids = [created.key.id for created in made]
        done = await asyncio.gather(*(self._do(account_id, ids, act) for act in acts))
        names: Names = {None: None, ids[0]: 0, ids[1]: 1}
        names |= {key_id: ("act", n) for n, (_, key_id) in enumerate(done) if key_id is not None}
        results = [result for result, _ in done]
        self.counts.update(f"{act.what}: {what}" for act, what in zip(acts, results, strict=True))
        return Round(before, acts, results, {}), names

    def _judge(self, played: dict[str, tuple[Round, Names]]) -> None:
        """Look what keys these accounts have, and whether that is right."""
        columns = schema.keys.c
        rows = execute(self._url, select(schema.keys).where(columns.account_id.in_([*played])))
        for row in rows:
            one, names = played[row.account_id]
            one.after[names.get(row.id, row.id)] = State(
                frozenset(row.scopes.split()),
                row.revoked_at is not None,
                names.get(row.replaced_by, row.replaced_by),
            )
        for account_id, (one, _) in played.items():
            if "Unavailable" in one.results:
                self.counts["left out"] += 1  # nobody knows whether it was made
            elif not one.is_serial():
                self.faults.append(f"{account_id}: {one}")

    def _draw(self) -> Act:
        what = self._random.choice(("revoke", "rotate", "rotate", "narrow", "narrow", "create"))
        kept = frozenset(self._random.sample(_SCOPES, 2)) if what == "narrow" else frozenset()
        return Act(what, 0 if what == "create" else self._random.randrange(2), kept)

    async def _do(self, account_id: str, ids: list[UUID], act: Act) -> tuple[str, UUID | None]:
        """Do it through some guard, somewhat later than others; tell the result and the new key."""
        guard, minting = self._random.choice(self._guards)
        keys = guard.keys
        for _ in range(self._random.randrange(_MOST_TURNS)):
            await asyncio.sleep(0)
        made: CreatedKey | None = None
        try:
            if act.what == "create":
                async with minting:
                    made = await keys.create(account_id=account_id, name="new", scopes=_SCOPES)
            elif act.what == "rotate":
                async with minting:
                    made = await keys.rotate(account_id, ids[act.key])
            elif act.what == "narrow":
                await keys.change(account_id, ids[act.key], scopes=act.kept)
            else:
                await keys.revoke(account_id, ids[act.key])
        except NotConfirmed:
            pass  # it is made
        except KeyNotFound as error:
            return "done" if act.what == "revoke" else type(error).__name__, None
        except GuardError as error:
            return type(error).__name__, None
        return "done", None if made is None else made.key.id

    def _check_feed(self) -> None:
        """Check that each version of each key has one row in the feed, and that has no gaps."""
        changes = execute(self._url, select(schema.changes).order_by("id"))
        if [change.id for change in changes] != list(range(1, len(changes) + 1)):
            self.faults.append("the feed has gaps")
        versions = Counter((change.prefix, change.version) for change in changes)
        expected = Counter(
            (row.prefix, version)
            for row in execute(self._url, select(schema.keys))
            for version in range(1, row.version + 1)
        )
        if versions != expected:
            self.faults.append(f"the feed has {versions - expected}, lacks {expected - versions}")


def _explore(url: str, options: Any, at_once: int) -> int:
    began = time.monotonic()
    search = Interleavings(url, seed=options.seed)
    asyncio.run(search.run(rounds=options.rounds, at_once=at_once))
    seconds = time.monotonic() - began
    counts = ", ".join(f"{what}: {count}" for what, count in sorted(search.counts.items()))
    sys.stdout.write(f"{url.partition(':')[0]}: {options.rounds} rounds in {seconds:.0f} s\n")
    sys.stdout.write("\n".join([counts, *search.faults, ""]))
    sys.stdout.flush()
    return len(search.faults)


def main() -> int:
    """Run rounds on both databases; return the exit status."""
    parser = argparse.ArgumentParser(description="Change the same keys at the same time.")
    parser.add_argument("--rounds", type=int, default=10_000, help="how many, on each database")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as server:
        faults = _explore(server.create_database("interleavings"), options, at_once=24)
        faults += _explore(f"sqlite:///{folder}/keys.db", options, at_once=8)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
