"""What must hold after every step, told by one who sees everything.

The numbers are those of the list in the documentation of the simulation, `README.md` beside this.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from tests.simulation.database import KeyRow, is_active
from tests.simulation.timeline import START
from tfm_guard.bearer import as_headers
from tfm_guard.errors import InvalidToken
from tfm_guard.records import CacheEntry, Change, Tally, VerifiedKey
from tfm_guard.shared_cache import SKEW_SECONDS

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.world import World

# By how much of a second the clock of a process may be wrong about a second.
_DRIFT = 0.011
_IDLE_TASKS = 7  # polling, usage, the link's three, and two of what may be going on right now
_WATCHED = 8  # how many of the keys last changed are looked for in every memory after every step
_TAKING = {"revoked", "narrowed", "replaced", "suspended"}


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: int, what: str) -> None:
        self.invariant = invariant
        self.what = what
        super().__init__(f"invariant {invariant}: {what}")


@dataclass(eq=False)
class Limit:
    """What a key may do at most, and until when, from a change on."""

    scopes: frozenset[str]
    expires: float  # seconds
    committed: float  # when the change was, in seconds
    returned: int | None = None  # the step in which it was said to hold everywhere


@dataclass(eq=False)
class AccountFacts:
    """What is true of an account: how often it was suspended, and since when it is or is not."""

    suspensions: int = 0
    suspended: float = float("inf")  # when its present suspension was committed, in seconds
    returned: int | None = None  # the step in which suspending it so returned
    resumed: float = -1.0  # when it was resumed last, in seconds


@dataclass(eq=False)
class KeyFacts:
    """What is true of one key, whatever any process believes."""

    token: bytes
    prefix: str
    key_id: UUID
    account_id: str
    scopes: frozenset[str]  # at first
    created: int  # the step in which creating it returned
    expires: float  # seconds
    limits: list["Limit"] = field(default_factory=list)  # what was taken from it, bit by bit
    committed: float = float("inf")  # when its revocation was, in seconds
    returned: int | None = None  # the step in which revoking it returned
    early: float = -1.0  # until when processes may not know of it, having been asked too early
    refused: dict[str, int] = field(default_factory=dict)  # process to step: first told it is over
    successors: int = 0

    def __post_init__(self) -> None:
        self.headers = as_headers(self.token)
        self.name = self.prefix.encode()
        self.digest = b""

    def __repr__(self) -> str:
        return self.prefix

    @property
    def ends(self) -> float:
        """When it ends if it is not revoked, in seconds."""
        return min([self.expires, *(limit.expires for limit in self.limits)])

    @property
    def scopes_left(self) -> frozenset[str]:
        """What it may still do."""
        return self.scopes.intersection(*(limit.scopes for limit in self.limits))


class Oracle:
    """Knows every key, and compares what processes answer with it."""

    def __init__(self, world: "World") -> None:
        self.keys: dict[str, KeyFacts] = {}
        self.accounts: defaultdict[str, AccountFacts] = defaultdict(AccountFacts)
        self._watched: list[KeyFacts] = []
        self._world = world
        self._recorded: dict[UUID, int] = {}
        self._genuine: set[tuple[str, bytes]] = set()
        times = world.installation
        longest = times.unfed if world.with_redis else times.lease
        self._stale_after = longest * (1 + _DRIFT) + 1e-6
        world.database.on_commit.append(self._committed)
        world.database.on_recorded.append(self._check_applied)
        world.database.on_used.append(self._check_usage)
        for server in world.deployment.servers:
            server.on_fill = self._check_fill

    def created(self, token: bytes, key: Any, *, asked_before: bool) -> KeyFacts:
        """Note a new key, which whoever asks from now on must be told is good.

        Who was *asked before* about its token may have to learn of it first, within the lease.
        """
        expires = float("inf")
        if key.expires_at is not None:
            expires = (key.expires_at - START).total_seconds()
        about = token, key.key_prefix, key.id, key.account_id, key.scopes
        facts = KeyFacts(*about, self._world.steps, expires)
        if asked_before:
            facts.early = self._world.timeline.now + self._stale_after
        facts.digest = self._world.digest_keys.current.digest(token)
        self.keys[key.key_prefix] = facts
        return facts

    def returned(self, facts: KeyFacts) -> None:
        """Note that revoking a key has returned: from now on nobody accepts it."""
        row = self._world.database.tables.keys[facts.prefix]
        if row.revoked_at is None:
            self._world.fail(1, f"revoking {facts} returned, and its row is active")
        if facts.returned is None:
            facts.returned = self._world.steps

    def narrowed(self, facts: KeyFacts, scopes: Iterable[str]) -> None:
        """Note that narrowing a key to *scopes* has returned: it can do no more, anywhere."""
        limit = Limit(frozenset(scopes), facts.expires, self._world.timeline.now)
        limit.returned = self._world.steps
        facts.limits.append(limit)

    def rotated(self, facts: KeyFacts) -> None:
        """Note that rotating a key has returned, and said that its end is known everywhere."""
        row = self._world.database.tables.keys[facts.prefix]
        if row.replaced_by is None:
            self._world.fail(14, f"rotating {facts} returned, and nothing replaces it")
        for limit in facts.limits:
            if limit.expires == self._end_of(row):
                limit.returned = limit.returned or self._world.steps

    def suspended(self, account_id: str, suspension: int) -> None:
        """Note that the account's suspension with that number, if it still lasts, is in force."""
        facts = self.accounts[account_id]
        lasts = facts.suspended < float("inf") and facts.suspensions == suspension
        if lasts and facts.returned is None:
            facts.returned = self._world.steps

    def accepted(
        self, process: "Process", facts: KeyFacts, key: VerifiedKey, began: int, at: float
    ) -> None:
        """Check that a verification that began in that step, then, was right to accept."""
        self._check_lawful(process, facts, key, began, at)
        row = self._world.database.tables.keys[facts.prefix]
        same = (key.key_id, key.key_prefix, key.account_id) == (row.id, row.prefix, row.account_id)
        if not same or not key.scopes <= facts.scopes or key.record[:16] != facts.digest:
            self._world.fail(6, f"{process} accepts {facts} as {key!r}")

    def refused(
        self,
        process: "Process",
        facts: KeyFacts,
        reason: str,
        *,
        began: int,
        at: float,
        from_memory: bool,
    ) -> None:
        """Check that a verification that began in that step, then, was right to refuse."""
        now = self._world.timeline.now
        good = facts.created < began and facts.committed > now and facts.ends > now + 1.0
        account = self.accounts[facts.account_id]
        good = good and account.suspended > now and account.resumed < at
        if good and not (from_memory and reason == "unknown prefix" and at <= facts.early):
            self._world.fail(9, f"{process} refuses {facts}, which is good, as {reason}")
        if reason in {"revoked", "expired"}:
            facts.refused.setdefault(process.name, self._world.steps)

    def accepted_unknown(self, process: "Process", token: bytes) -> None:
        """Check that a token that nobody was given was made a key's meanwhile."""
        row = self._world.database.tables.keys.get(token[6:14].decode())
        facts = self.keys.get(token[6:14].decode())
        if row is None or (facts is not None and facts.token != token):
            self._world.fail(6, f"{process} accepts a wrong secret")

    def check_memories(self) -> None:
        """Check that no memory would accept what was revoked, were it asked now."""
        world = self._world
        for process in world.processes:
            parts = process.parts
            if not process.running or parts is None:
                continue
            entries = parts.verifier._local.entries  # noqa: SLF001
            for facts in self._watched:
                if facts.name in entries and (key := self._recalled(process, facts)):
                    now = world.timeline.now
                    self._check_lawful(process, facts, key, world.steps + 1, now)

    def check_bounds(self) -> None:
        """Check that nothing piles up."""
        for process in self._world.processes:
            count = len(process.loop.live_tasks()) if process.running else 0
            if count > 400:
                self._world.fail(16, f"{process} has {count} tasks")

    def check_recovery(self) -> None:
        """Check that every process has come to the head of the feed."""
        tables = self._world.database.tables
        for process in self._world.processes:
            if process.parts is None:
                self._world.fail(19, f"{process} is not open")
                continue
            freshness = process.freshness
            # What it writes of that into the register may have been lost just before.
            seen = freshness._seen  # noqa: SLF001
            if freshness.worker_id not in tables.workers or seen != tables.head:
                self._world.fail(19, f"{process} is at {seen} of {tables.head}")
            silence = process.clock.monotonic() - freshness._heard  # noqa: SLF001
            linked = freshness._link_counts and silence < self._world.installation.lease  # noqa: SLF001
            if self._world.with_redis and not linked:
                self._world.fail(19, f"{process} has no link that counts")

    def check_idle(self) -> None:
        """Check that nobody waits for anything while nothing is asked."""
        for process in self._world.processes:
            reader: Any = process.parts.verifier._reader  # noqa: SLF001
            waiting = len(reader._flights) + len(reader._departures._next or ())  # noqa: SLF001
            coroutines: list[Any] = [task.get_coro() for task in process.loop.live_tasks()]
            tasks = sorted(coroutine.__qualname__ for coroutine in coroutines)
            if waiting or len(tasks) > _IDLE_TASKS:
                self._world.fail(16, f"{process} is idle, and {waiting} wait: {tasks}")

    def some_remembered_key(self) -> KeyFacts | None:
        """Return a good key that the last victim of a fault remembers, or else somebody."""
        good, victim = self.good_keys(), self._world.victim
        for processes in ([victim] if victim else [], self._world.processes):
            memories = [
                process.parts.verifier._local.entries  # noqa: SLF001
                for process in processes
                if process.running and process.parts is not None
            ]
            if found := [f for f in good if any(f.name in memory for memory in memories)]:
                return self._world.random.choice(found)
        return None

    def good_keys(self) -> list[KeyFacts]:
        """Return the keys that are good, and for some time to come."""
        later = self._world.timeline.now + 5.0
        return [
            facts
            for facts in self.keys.values()
            if facts.committed > later
            and facts.ends > later
            and self.accounts[facts.account_id].suspended > later
        ]

    def _recalled(self, process: "Process", facts: KeyFacts) -> VerifiedKey | None:
        try:
            return process.guard.recall(facts.headers)
        except InvalidToken:
            return None

    def _check_lawful(
        self, process: "Process", facts: KeyFacts, key: VerifiedKey, began: int, at: float
    ) -> None:
        world = self._world
        if facts.returned is not None and began > facts.returned:
            world.fail(1, f"{process} accepts {facts} after revoking it returned")
        if facts.refused.get(process.name, began) < began:
            world.fail(2, f"{process} accepts {facts} again after it refused it as over")
        if at > facts.committed + self._stale_after:
            world.fail(5, f"{process} accepts {facts} longer than the lease after its revocation")
        if at > facts.expires + 0.06:
            world.fail(7, f"{process} accepts {facts} after its expiry")
        for limit in facts.limits:
            if self._is_known(limit.committed, limit.returned, began, at):
                self._check_limit(process, facts, key, limit, at)
        account = self.accounts[facts.account_id]
        if self._is_known(account.suspended, account.returned, began, at):
            world.fail(7, f"{process} accepts {facts} although its account is suspended")

    def _is_known(self, committed: float, returned: int | None, began: int, at: float) -> bool:
        """Tell whether every process must know of a change by the time a verification begins."""
        return (returned is not None and began > returned) or at > committed + self._stale_after

    def _check_limit(
        self, process: "Process", facts: KeyFacts, key: VerifiedKey, limit: Limit, at: float
    ) -> None:
        if not key.scopes <= limit.scopes:
            removed = ", ".join(sorted(key.scopes - limit.scopes))
            self._world.fail(7, f"{process} grants {facts} what it has lost: {removed}")
        if at > limit.expires + 0.06:
            self._world.fail(7, f"{process} accepts {facts} after its end, which was moved nearer")

    def _committed(self, changes: list[Change]) -> None:
        now = self._world.timeline.now
        for change in changes:
            facts = self.keys.get(change.prefix)
            if facts is None:
                continue
            if change.kind == "revoked":
                facts.committed = min(facts.committed, now)
            elif change.kind in {"narrowed", "replaced"}:
                row = self._world.database.tables.keys[change.prefix]
                facts.limits.append(Limit(row.scopes, self._end_of(row), now))
            if change.kind in _TAKING:
                self._watched = [*self._watched[1 - _WATCHED :], facts]
            if change.kind == "replaced":
                self._check_chain(facts)
        self._note_suspensions()
        self._check_plans()

    def _note_suspensions(self) -> None:
        tables, now = self._world.database.tables, self._world.timeline.now
        for account_id in tables.plans:
            facts = self.accounts[account_id]
            was, is_now = facts.suspended < float("inf"), account_id in tables.suspended
            if is_now and not was:
                facts.suspensions += 1
                facts.suspended, facts.returned = now, None
            elif was and not is_now:
                facts.suspended, facts.returned, facts.resumed = float("inf"), None, now

    def _check_chain(self, facts: KeyFacts) -> None:
        """Check that a key that was just replaced has no predecessor that works on."""
        tables, now = self._world.database.tables, self._world.database.now
        facts.successors += 1
        if facts.successors > 1:
            self._world.fail(14, f"{facts} was replaced {facts.successors} times")
        for row in tables.keys.values():
            if row.replaced_by == facts.key_id and is_active(row, now):
                self._world.fail(14, f"{facts} is replaced in the grace of {row.prefix}")

    @staticmethod
    def _end_of(row: KeyRow) -> float:
        return float("inf") if row.expires_at is None else (row.expires_at - START).total_seconds()

    def _check_plans(self) -> None:
        tables = self._world.database.tables
        for account_id, plan in tables.plans.items():
            active = tables.count_active(account_id, self._world.database.now)
            if active > self._world.settings.plans[plan]:
                self._world.fail(13, f"{account_id} has {active} active keys")

    def _check_applied(self, worker_id: UUID, seen: int) -> None:
        """Check that who says to have seen so far has applied every change up to there."""
        for process in self._world.processes:
            if process.parts is None or process.freshness.worker_id != worker_id:
                continue
            checked = self._recorded.get(worker_id, 0)
            for change, at in self._world.database.tables.changes:
                if not checked < change.id <= seen:
                    continue
                age = (self._world.database.now - at).total_seconds()
                floor = process.floor(change.prefix)
                if floor < change.version and age < self._world.max_age:
                    self._world.fail(15, f"{process} says it has seen {change}; floor {floor}")
            self._recorded[worker_id] = max(checked, seen)

    def _check_usage(self, tallies: Sequence[Tally]) -> None:
        """Check that what is written of keys is of keys that there are, and not of the future.

        What a process takes for the database's time may be ahead of it.
        """
        known = {row.id.bytes for row in self._world.database.tables.keys.values()}
        now = self._world.database.now.timestamp()
        for tally in tallies:
            latest = tally.hour * 3600.0 if tally.used_at is None else tally.used_at
            if tally.key_id not in known or latest > now + SKEW_SECONDS:
                self._world.fail(17, f"{tally!r} is written at {now}")
        self._world.count("usage")

    def _check_fill(self, name: str, old: bytes | None, new: bytes) -> None:
        """Check that a fill neither lowers a version, nor ends a revocation, nor lies about age."""
        entry = _read_entry(new)
        prefix = name.rpartition(":")[2]
        executed = self._world.database.last_reads.get(prefix, -1.0)
        sealed_at = entry.sealed_at - START.timestamp()
        if sealed_at > executed + 1e-6:
            self._world.fail(4, f"the entry of {prefix} was sealed after the last read of its row")
        genuine = old is not None and (name, old) in self._genuine
        self._genuine.add((name, new))
        if not genuine:
            return
        before = _read_entry(old or b"")
        if entry.version < before.version or (before.revoked and not entry.revoked):
            self._world.fail(3, f"a fill replaced {before!r} by {entry!r}")

    def check_believed(self, process: "Process", entry: CacheEntry) -> None:
        """Check that what is believed of Redis is not too old for that."""
        age = self._world.timeline.now + START.timestamp() - entry.sealed_at
        if age > self._world.max_age + 2 * SKEW_SECONDS:
            self._world.fail(4, f"{process} believes {entry!r}, which is {age:.1f} s old")

    def check_remembered(self, process: "Process", entry: CacheEntry, ends: float) -> None:
        """Check that memory keeps what was sealed then for no longer than its age allows."""
        lasts = entry.sealed_at - START.timestamp() + self._world.max_age + SKEW_SECONDS
        slack = 2 * _DRIFT * self._world.max_age
        if process.clock.time_of(ends) > lasts + slack:
            self._world.fail(4, f"{process} remembers {entry!r} too long")


def _read_entry(value: bytes) -> CacheEntry:
    return msgspec.msgpack.decode(value[17:-16], type=CacheEntry)
