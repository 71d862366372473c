"""Deliberate breaks of the real code, in this process only: one for each rule that keeps it right.

A break changes one piece of one function. It fails to apply once that piece is not there any more,
so that none goes on testing what no longer exists.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.simulation import database
from tfm_guard import confirmation, freshness, keys, local_cache, reader, shared_cache, verifier
from tfm_guard.confirmation import Confirmation
from tfm_guard.freshness import Freshness
from tfm_guard.reader import KeyReader
from tfm_guard.shared_cache import SharedCache
from tfm_guard.verifier import Verifier

Undo = Callable[[], None]


@dataclass(frozen=True)
class Break:
    """In the source of *function* of *owner*, a module or a class, *old* becomes *new*."""

    owner: Any
    function: str
    old: str
    new: str

    def __call__(self) -> Undo:
        """Apply it; return what undoes it."""
        former = vars(self.owner)[self.function]
        source = textwrap.dedent(inspect.getsource(former))
        if source.count(self.old) != 1:
            raise LookupError(f"{self.function} does not hold this once: {self.old}")
        made: dict[str, Any] = {}
        code = compile(source.replace(self.old, self.new), inspect.getfile(former), "exec")
        exec(code, inspect.unwrap(former).__globals__, made)  # noqa: S102  # our own source
        setattr(self.owner, self.function, made[self.function])
        return lambda: setattr(self.owner, self.function, former)


@dataclass(frozen=True)
class Constant:
    """*name* of *owner* becomes *value*."""

    owner: Any
    name: str
    change: Callable[[Any], Any]

    def __call__(self) -> Undo:
        """Apply it; return what undoes it."""
        former = vars(self.owner)[self.name]
        setattr(self.owner, self.name, self.change(former))
        return lambda: setattr(self.owner, self.name, former)


# What is broken, in words, and how.
BREAKS: dict[str, Callable[[], Undo]] = {
    # Reading the feed, and what may be believed while it is read.
    "the lease never ends": Break(
        Freshness, "poll", "started + self._lease", "started + 1e9"
    ),
    "the lease begins when a poll ends": Break(
        Freshness, "poll", "started + self._lease", "self._clock.monotonic() + self._lease"
    ),
    "a process trusts memory as soon as it is registered": Break(
        Freshness,
        "_join",
        "    state = await self._store.poll(self.worker_id, 0)",
        "    self.fresh_until = started + self._lease\n"
        "    state = await self._store.poll(self.worker_id, 0)",
    ),
    "a process that was struck off goes on": Break(
        Freshness, "poll", "if state is None or changes is None:", "if state is None:\n        return\n    if changes is None:"
    ),
    "a gap in the feed is passed over": Break(
        Freshness, "_new_changes", "if len(changes) == state.head - self._seen:", "if True:"
    ),
    "what was seen is recorded before it is applied": Break(
        Freshness,
        "poll",
        "    changes = None if state is None",
        "    if state is not None:\n"
        "        await self._store.record_seen(self.worker_id, state.head)\n"
        "    changes = None if state is None",
    ),
    "a process that joins does not learn earlier changes": Break(
        Freshness, "_join", "for change in recent:", "for change in []:"
    ),
    "floors are dropped early": Break(
        Freshness, "apply", "FLOOR_SECONDS", "FLOOR_SECONDS / 8"
    ),
    "an applied change raises no floor": Break(
        Freshness, "apply", "max(change.version, self.floor(change.prefix))", "0"
    ),
    # Memory.
    "a change leaves memory as it is": Break(
        Verifier, "_apply", "self._local.drop(change.prefix.encode())", "pass"
    ),
    "a created key is not made known": Break(
        Verifier, "_apply", 'if change.kind == "created":', "if False:"
    ),
    "refusals are remembered without a lease": Break(
        Verifier,
        "look_up",
        "if self._freshness.is_fresh() and (reason",
        "if (reason",
    ),
    "a refusal is remembered after everything was forgotten": Break(
        Verifier, "_refusal", "and self._negative.epoch == negative_epoch", ""
    ),
    "forgetting everything keeps memory": Break(
        Verifier, "_forget_everything", "self._local.clear()", "pass"
    ),
    # Flights.
    "a read that was sent is joined without a lease": Break(
        KeyReader, "find", "sent_ones_too=self._freshness.is_fresh()", "sent_ones_too=True"
    ),
    "a change does not detach flights": Break(
        KeyReader, "detach", "self._flights.pop(prefix, None)", "pass"
    ),
    "nothing found by a read that was joined counts": Break(
        KeyReader, "find", "if found is None and joined:", "if False:"
    ),
    # Filling.
    "memory is filled although the floor moved": Break(
        KeyReader, "_still_stands", "and self._freshness.floor(prefix) == beginning.floor", ""
    ),
    "memory is filled although everything was forgotten": Break(
        KeyReader, "_still_stands", "and self._freshness.epoch == beginning.epoch", ""
    ),
    "memory is filled without a lease": Break(
        KeyReader, "_still_stands", "self._freshness.is_fresh()\n", "True\n"
    ),
    "an entry is sealed after its read": Break(
        KeyReader,
        "_know_row",
        "sealed_at=beginning.sealed_at",
        "sealed_at=self._freshness.database_time()",
    ),
    "an entry from Redis is remembered as if it were new": Break(
        KeyReader, "_know_entry", "MAX_AGE_SECONDS - age", "MAX_AGE_SECONDS"
    ),
    "who refused a revoked key may accept it": Break(
        KeyReader, "_learn", "entry.version > self._freshness.floor(prefix)", "False"
    ),
    "a row below the floor is believed": Break(
        KeyReader,
        "_fly",
        "        raise Unavailable(",
        "        pass\n    if row is None:\n        raise Unavailable(",
    ),
    "the end of a key is left out": Break(
        KeyReader, "_remember", "if entry.expires_at is not None:", "if False:"
    ),
    # Redis.
    "an entry from Redis counts below the floor": Break(
        KeyReader, "_counts", "entry.version >= self._freshness.floor(prefix)", "True"
    ),
    "an entry from Redis counts at any age": Break(
        KeyReader, "_counts", "age < MAX_AGE_SECONDS", "True"
    ),
    "an entry from Redis counts although everything was forgotten since": Break(
        KeyReader, "_counts", "entry.sealed_at >= self._freshness.sealed_after", "True"
    ),
    "an entry from Redis counts without a lease": Break(
        KeyReader, "_ask_shared", "return entry if self._freshness.is_fresh() else None", "return entry"
    ),
    "seals are not checked": Break(
        SharedCache, "_unseal", "or not compare_digest(seal, self._mac(prefix, body))", ""
    ),
    "seals do not hold the name": Break(
        SharedCache, "_mac", "name = (self._names + prefix).encode()", 'name = b""'
    ),
    "a fill overwrites whatever is there": Constant(
        shared_cache, "_FILL", lambda text: text.replace("if write then", "if true then")
    ),
    # Revoking.
    "revoking waits for nobody": Break(
        Confirmation, "wait", "if register and not behind:", "if True:"
    ),
    "revoking takes an unreadable register for an empty one": Break(
        Confirmation, "wait", "if register and not behind:", "if not behind:"
    ),
    "revoking waits for less than a lease": Break(
        Confirmation, "__init__", "_MARGIN * lease", "0.7 * lease"
    ),
    "revoking waits for exactly the lease": Break(
        Confirmation, "__init__", "_MARGIN * lease", "lease"
    ),
    "a silent process is struck off without a mark": Break(
        Confirmation, "wait", "self._strike_off(silent - marked, change.id, marked)", "self._strike_off(set(), change.id, silent)"
    ),
    "a change made here is not applied here": Break(
        Confirmation, "wait", "self._freshness.apply(change)", "pass"
    ),
    "changes are numbered before they are committed": Break(
        database.SimTransaction,
        "__init__",
        "self._number = 0",
        "tables.sequence += 1\n    self._number = tables.sequence",
    ),
}
