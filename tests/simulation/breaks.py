"""Deliberate breaks of the real code, in this process only: one for each rule that keeps it right.

A break changes one piece of one function. It fails to apply once that piece is not there any more,
so that none goes on testing what no longer exists.
"""

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tests.simulation import database, faults
from tests.simulation.faults import Fault
from tests.support.servers import ROOT
from tfm_guard import confirmation, keys, link, shared_cache
from tfm_guard.accounts import AccountManager
from tfm_guard.confirmation import Confirmation, Watch
from tfm_guard.freshness import Freshness
from tfm_guard.keys import KeyManager
from tfm_guard.link import Link, Seals
from tfm_guard.reader import KeyReader
from tfm_guard.shared_cache import SharedCache
from tfm_guard.store import feed, revoking
from tfm_guard.verifier import Verifier

Undo = Callable[[], None]
_TEST_SECONDS: Final = 120.0
_NONSENSE: Final = (AttributeError, NameError, TypeError)


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


class Directed(NamedTuple):
    """Without what *breaks* takes away, *test* of *file* fails."""

    file: str
    test: str
    breaks: Callable[[], Undo]

    def fault(self, name: str) -> str:
        """Run the test without the rule called *name*; return what is wrong, if anything is."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "tests.simulation.broken"),
                *("-p", "no:cacheprovider", "--tb=no", f"{self.file}::{self.test}"),
            ],
            cwd=ROOT,
            env={**os.environ, "TFM_GUARD_TEST_BREAK": name, "COLUMNS": "500"},
            capture_output=True,
            text=True,
            timeout=_TEST_SECONDS,
            check=False,
        )
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if done.returncode != 1 or len(failures) != 1:
            return f"the test did not fail:\n{done.stdout}{done.stderr}"
        # A break that makes no sense any more fails whatever runs.
        nonsense = [error.__name__ for error in _NONSENSE if f" - {error.__name__}" in failures[0]]
        return f"the break is broken: {failures[0]}" if nonsense else ""


_LONELY = (faults.split, faults.cut_from_both, faults.cut_from_database)
_LINKS = (*_LONELY, faults.isolate_primary, faults.kill_subscribers, faults.leave_half_open)
_FORGERS = (faults.forge, faults.cut_from_database)
_WRITERS = (faults.replay, faults.vandalize, faults.restore_redis, faults.fail_over)
_STOPS = (faults.pause, faults.crash, faults.restart, faults.cut_from_database)

# What is broken, in words, and how.
BREAKS: dict[str, Callable[[], Undo]] = {
    # Reading the feed, and what may be believed while it is read.
    "a read of the feed counts for ever": Break(
        Freshness, "_renew", "until = self._feed + times.lease", "until = self._feed + 1e9"
    ),
    "a read of the feed counts from its end": Break(
        Freshness,
        "_advance",
        "self._feed = started",
        "self._feed = self._clock.monotonic()",
    ),
    "a process that was struck off goes on": Break(
        Freshness,
        "poll",
        "        if state is None or changes is None:\n",
        "        if state is None:\n"
        "            self._feed = started\n"
        "            return self._renew()\n"
        "        if changes is None:\n",
    ),
    "what was seen is recorded before it is applied": Break(
        Freshness,
        "poll",
        "        changes = None if state is None",
        "        if state is not None:\n"
        "            at_once = Place(state.head, self._link, self._next_turn())\n"
        "            await self._store.record_place(self.worker_id, at_once)\n"
        "        changes = None if state is None",
    ),
    "a process that joins does not learn earlier changes": Break(
        Freshness, "_join", "for change in recent:", "for change in []:"
    ),
    "floors are dropped early": Break(Freshness, "apply", "FLOOR_SECONDS", "FLOOR_SECONDS / 8"),
    "an applied change raises no floor": Break(
        Freshness, "apply", "= change.version, end", "= 0, end"
    ),
    "changes are numbered before they are committed": Break(
        database.SimTransaction,
        "__init__",
        "self._number = 0",
        "tables.sequence += 1\n    self._number = tables.sequence",
    ),
    # The link.
    "an answer on the link counts for ever": Break(
        Freshness,
        "_renew",
        "min(self._heard + times.lease, self._feed + times.unfed)",
        "self._heard + 1e9",
    ),
    "the link counts without the feed": Break(
        Freshness,
        "_renew",
        "min(self._heard + times.lease, self._feed + times.unfed)",
        "self._heard + times.lease",
    ),
    "the link counts as soon as it is there": Break(
        Freshness, "link_came", "self._discount_link()", "self._link_counts = True"
    ),
    "the register's link is whatever server the URL led to": Break(
        Link, "_name_of", 'f"{run_id}/{self._seals.id}"', '"redis"'
    ),
    "silence on the link is borne": Break(Link, "_ping", ">= _SILENCE_SECONDS", ">= 1e9"),
    "a message is acknowledged before it is applied": Break(
        Link, "_handle_message", "for change in message.changes:", "for change in []:"
    ),
    "messages need no seal": Break(
        Seals,
        "open",
        "if compare_digest(mac, _mac(state, body)):",
        "if True:",
    ),
    # Memory.
    "a change leaves memory as it is": Break(
        Verifier, "_apply", "self._local.drop(change.prefix.encode())", "pass"
    ),
    "a created key is not made known": Break(
        Verifier, "_apply", 'if change.kind not in {"revoked", "suspended"}:', "if False:"
    ),
    "refusals are remembered without a lease": Break(
        Verifier,
        "look_up",
        "if self._freshness.is_fresh() and (denial",
        "if (denial",
    ),
    # Flights.
    "nothing found by a read that was joined counts": Break(
        KeyReader, "_may_differ_now", "return True  # nobody", "return False  # nobody"
    ),
    # Filling.
    "memory is filled although the floor moved": Break(
        KeyReader, "_still_stands", "and self._freshness.floor(prefix) == beginning.floor", ""
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
        KeyReader, "_learn", "(ended or changed)", "False and (ended)"
    ),
    "a row below the floor is believed": Break(
        KeyReader,
        "_ask_store",
        "elif row.version < self._freshness.floor(flight.prefix):",
        "elif False:",
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
    "seals are not checked": Break(
        SharedCache, "_unseal", "or not compare_digest(seal, self._mac(prefix, body))", ""
    ),
    "seals do not hold the name": Break(SharedCache, "_mac", "mac.update(prefix.encode())", "pass"),
    "a fill overwrites whatever is there": Constant(
        shared_cache, "_FILL", lambda text: text.replace("if write then", "if true then")
    ),
    # Revoking.
    "revoking waits for nobody": Break(
        Watch,
        "look",
        "return max(map(self._end_of_trust, behind), default=-math.inf)",
        "return -math.inf",
    ),
    "revoking takes an unreadable register for an empty one": Break(
        Watch, "look", "return self.started + self._unfed_wait", "return -math.inf"
    ),
    "revoking takes no lease to be long enough": Break(
        Watch, "__init__", "lease * (1 + _MARGIN)", "lease * 0.4"
    ),
    "revoking takes every link to have been told": Break(
        Watch,
        "_end_of_trust",
        "unfed if told is None else",
        "self.started + self._wait if told is None else",
    ),
    # What else takes something away.
    "narrowing waits for nobody": Break(
        KeyManager, "change", "await self._confirmation.wait(changes or [unchanged])", "pass"
    ),
    "revoking again names no change": Break(revoking, "_again", "Change(head,", "Change(0,"),
    "rotating waits for nobody": Break(
        KeyManager,
        "rotate",
        "await self._confirmation.wait(changes)",
        "await self._confirmation.wait([])",
    ),
    "suspending waits for nobody": Break(
        AccountManager,
        "suspend",
        "self._confirmation.wait([*others, *changes])",
        "self._confirmation.wait([])",
    ),
    "suspending again does not join the wait": Break(
        AccountManager, "suspend", "wait([*others, *changes])", "wait(changes)"
    ),
    "suspending changes no key": Break(
        AccountManager,
        "suspend",
        'await transaction.change_active_keys("suspended", account_id)',
        "pass",
    ),
    "a key of a suspended account is remembered": Break(
        KeyReader, "_know_row", "if not known.suspended and self", "if self"
    ),
    "who joined a read learns late of an account that was resumed": Break(
        KeyReader, "_may_differ_now", "if found.suspended:", "if False:"
    ),
    "a key in its grace is rotated again": Break(
        keys, "_check_not_replaced", "if row.replaced_by is not None:", "if False:"
    ),
}

# Broken so, nothing is noticed in 250,000 steps: another rule covers for it, or what it is for
# happens more rarely than that, or is none of these faults. A test of its own fails instead.
DIRECTED: dict[str, Directed] = {
    "a revocation takes the version that it saw before it waited": Directed(
        "tests/contracts/test_revoking.py",
        "test_who_waited_revokes_what_the_key_has_become",
        Constant(
            revoking,
            "_REVOKE",
            lambda text: text.replace("version = found.version + 1", "version = 2"),
        ),
    ),
    "a key that ended since a read that was joined is good": Directed(
        "tests/flows/test_flights.py",
        "test_a_request_after_the_end_of_a_key_gets_no_answer_from_before",
        Break(
            KeyReader,
            "_may_differ_now",
            "expires_at.timestamp() - self._freshness.database_time() < SKEW_SECONDS",
            "False",
        ),
    ),
    "a read of the feed counts however long it took": Directed(
        "tests/contracts/test_feed.py",
        "test_a_poll_that_took_too_long_does_not_make_a_link_count[sqlite]",
        Break(
            Freshness,
            "poll",
            "if self._clock.monotonic() - started > self._installation.lease:",
            "if False:",
        ),
    ),
    "a process trusts memory before it has read the feed": Directed(
        "tests/contracts/test_feed.py",
        "test_a_process_registers_before_it_polls[sqlite]",
        Break(
            Freshness,
            "_join",
            "    state = await self._store.poll(",
            "    self.fresh_until = started + self._installation.lease\n"
            "    state = await self._store.poll(",
        ),
    ),
    "a process reads the feed before it is in the register": Directed(
        "tests/contracts/test_feed.py",
        "test_a_process_registers_before_it_polls[sqlite]",
        Break(
            Freshness,
            "_join",
            "    worker_id = await self._enter_register()\n"
            "    started = self._clock.monotonic()\n"
            "    state = await self._store.poll("
            "worker_id, Place(0, self._link, self._next_turn()))\n",
            "    started = self._clock.monotonic()\n"
            "    head = (await self._store.read_register()).head\n"
            "    state = FeedState(head, self._clock.now(), 0)\n"
            "    worker_id = await self._enter_register()\n",
        ),
    ),
    "a gap in the feed is passed over": Directed(
        "tests/contracts/test_feed.py",
        "test_a_gap_forgets_everything[sqlite]",
        Break(Freshness, "_new_changes", "if len(changes) == state.head - self._seen:", "if True:"),
    ),
    "a late write to the register undoes a later one": Directed(
        "tests/contracts/test_feed.py",
        "test_a_write_that_comes_late_changes_nothing[sqlite]",
        Break(feed, "record", "in_turn = workers.turn < place.turn", "in_turn = true()"),
    ),
    "an answer on the link counts from its arrival": Directed(
        "tests/contracts/test_link.py",
        "test_what_was_published_is_handled_before_the_answer_to_a_later_question",
        Break(
            Link,
            "_handle",
            "self._freshness.link_answered(asked)",
            "self._freshness.link_answered(self._clock.monotonic())",
        ),
    ),
    "the link counts although the register does not have it": Directed(
        "tests/contracts/test_feed.py",
        "test_a_poll_from_before_the_link_does_not_make_it_count[sqlite]",
        Break(Freshness, "_advance", "and state.turn >= self._link_turn", ""),
    ),
    "messages are sealed for any channel": Directed(
        "tests/contracts/test_link.py",
        "test_what_is_not_sealed_costs_nothing",
        Constant(link, "_mac", lambda mac: lambda key, _channel, body: mac(key, "", body)),
    ),
    "any acknowledgement counts": Directed(
        "tests/contracts/test_link.py",
        "test_an_acknowledgement_names_the_process_and_the_message",
        Break(
            Link,
            "_handle_acknowledgement",
            "if collected is not None:",
            "for collected in self._awaited.values():",
        ),
    ),
    "who was struck off is not told on the link": Directed(
        "tests/contracts/test_link.py",
        "test_who_was_struck_off_is_told",
        Break(
            Link,
            "_handle_message",
            "if self._freshness.worker_id in message.struck_off:",
            "if False:",
        ),
    ),
    "a refusal is remembered after everything was forgotten": Directed(
        "tests/flows/test_flights.py",
        "test_a_wrong_answer_from_before_a_creation_is_not_kept[sqlite]",
        Break(Verifier, "_refusal", "and self._negative.epoch == negative_epoch", ""),
    ),
    "forgetting everything keeps memory": Directed(
        "tests/flows/test_revocation.py",
        "test_a_process_that_was_struck_off_starts_afresh[sqlite]",
        Break(Verifier, "_forget_everything", "self._local.clear()", "pass"),
    ),
    "a read that was sent is joined without a lease": Directed(
        "tests/flows/test_flights.py",
        "test_requests_share_the_next_read_while_not_fresh[sqlite]",
        Break(KeyReader, "find", "sent_ones_too=self._freshness.is_fresh()", "sent_ones_too=True"),
    ),
    "a change does not detach flights": Directed(
        "tests/flows/test_flights.py",
        "test_a_request_after_revoking_gets_no_answer_from_before[sqlite]",
        Break(KeyReader, "detach", "self._flights.pop(prefix, None)", "pass"),
    ),
    "memory is filled although everything was forgotten": Directed(
        "tests/flows/test_flights.py",
        "test_a_read_from_before_a_flush_is_not_kept[sqlite]",
        Break(KeyReader, "_still_stands", "and self._freshness.epoch == beginning.epoch", ""),
    ),
    "memory is filled without a lease": Directed(
        "tests/flows/test_caching.py",
        "test_what_is_not_fresh_asks_the_database[sqlite]",
        Break(KeyReader, "_still_stands", "self._freshness.is_fresh()\n", "True\n"),
    ),
    "an entry from Redis counts although everything was forgotten since": Directed(
        "tests/flows/test_caching.py",
        "test_a_process_that_forgot_believes_nothing_older[sqlite]",
        Break(KeyReader, "_counts", "entry.sealed_at >= self._freshness.sealed_after", "True"),
    ),
    "an entry from Redis counts without a lease": Directed(
        "tests/flows/test_flights.py",
        "test_an_answer_of_redis_after_the_lease_is_not_believed",
        Break(
            KeyReader,
            "_ask_shared",
            "    if not self._freshness.is_fresh():",
            "    if False:",
        ),
    ),
    "a change made here is not applied here": Directed(
        "tests/flows/test_revocation.py",
        "test_revoking_again_elsewhere_is_as_good[sqlite]",
        Break(Confirmation, "wait", "self._freshness.apply(change)", "pass"),
    ),
    "revoking waits for exactly the lease": Directed(
        "tests/domain/test_watch.py",
        "test_without_a_link_a_process_is_waited_for_a_lease_and_a_half",
        Constant(confirmation, "_MARGIN", lambda _: 0.0),
    ),
    "revoking counts a lease from telling on a link that the register did not have then": Directed(
        "tests/domain/test_watch.py",
        "test_a_link_that_changes_while_revoking_waits_begins_the_wait_anew",
        Break(Watch, "_end_of_trust", "max(told, since)", "told"),
    ),
    "revoking waits from the commit, not from telling": Directed(
        "tests/domain/test_watch.py",
        "test_with_a_link_the_wait_is_counted_from_publishing",
        Break(Watch, "_end_of_trust", "max(told, since) + self._wait", "self.started + self._wait"),
    ),
    "revoking believes a register that was read too early": Directed(
        "tests/flows/test_revocation.py",
        "test_the_register_is_read_once_more_when_the_wait_is_over",
        Break(Confirmation, "_watch", "if end <= asked:", "if end <= self._clock.monotonic():"),
    ),
    "a silent process is removed without a mark": Directed(
        "tests/flows/test_revocation.py",
        "test_a_dead_process_delays_two_revocations[sqlite]",
        Break(
            Confirmation,
            "_strike_off",
            "watch.silent - watch.marked, watch.change_id, marked=watch.silent & watch.marked",
            "[], watch.change_id, marked=watch.silent",
        ),
    ),
    "a marked process is not told that it is struck off": Directed(
        "tests/domain/test_watch.py",
        "test_a_marked_process_is_told_so_and_waited_for",
        Break(Watch, "_end_of_trust", "worker if worker in self.marked else None", "None"),
    ),
    "narrowing again does not join the wait": Directed(
        "tests/flows/test_taking.py",
        "test_what_cannot_be_shown_is_not_confirmed[sqlite-narrow]",
        Break(KeyManager, "change", "wait(changes or [unchanged])", "wait(changes)"),
    ),
    "what was read of a key that ended is not learned": Directed(
        "tests/flows/test_taking.py",
        "test_who_has_read_of_an_end_knows_it[sqlite]",
        Break(KeyReader, "_learn", "or known.suspended or known.expired", ""),
    ),
    "what was read of a key that changed is not learned": Directed(
        "tests/flows/test_taking.py",
        "test_who_has_read_of_a_narrowing_knows_it[sqlite]",
        Break(KeyReader, "_learn", "(ended or changed)", "ended"),
    ),
    "a key is rotated in the grace of its predecessor": Directed(
        "tests/flows/test_rotation.py",
        "test_one_predecessor_at_a_time[sqlite]",
        Break(
            keys,
            "_check_not_replaced",
            "if await transaction.has_active_predecessor(row.account_id, row.id):",
            "if False:",
        ),
    ),
}

# What a search meets only once in some 100,000 steps or more; `make breaks` is for these.
RARE: Final = {
    "a key in its grace is rotated again",
    "revoking takes an unreadable register for an empty one",
    "suspending again does not join the wait",
    "the register's link is whatever server the URL led to",
    "a created key is not made known",
    "a read of the feed counts from its end",
    "a row below the floor is believed",
    "an entry from Redis counts at any age",
    "memory is filled although the floor moved",
    "nothing found by a read that was joined counts",
    "refusals are remembered without a lease",
    "revoking takes every link to have been told",
    "revoking takes no lease to be long enough",
    "seals are not checked",
    "seals do not hold the name",
    "the end of a key is left out",
    "the link counts as soon as it is there",
    "the link counts without the feed",
    "who joined a read learns late of an account that was resumed",
    "who refused a revoked key may accept it",
}

# The faults that show what a rule is for, where all of them together show it rarely.
FOCUS: dict[str, tuple[Fault, ...]] = {
    "a read of the feed counts from its end": (faults.pause, faults.cut_from_database),
    "an answer on the link counts for ever": _LONELY,
    "the link counts without the feed": (faults.split,),
    "the link counts as soon as it is there": (faults.split,),
    "the register's link is whatever server the URL led to": (faults.isolate_primary,),
    "silence on the link is borne": (faults.leave_half_open,),
    "messages need no seal": (faults.forge, faults.pause),
    "an entry from Redis counts at any age": (faults.replay, faults.restore_redis),
    "seals are not checked": (faults.vandalize,),
    "seals do not hold the name": (faults.vandalize,),
    "a fill overwrites whatever is there": (faults.pause_writes, faults.freeze_redis),
    "revoking takes an unreadable register for an empty one": (faults.stop_database, *_LONELY),
    "revoking takes no lease to be long enough": (faults.pause, faults.cut_from_database),
    "a read of the feed counts for ever": (faults.cut_from_database,),
    "refusals are remembered without a lease": (faults.cut_from_database,),
    "memory is filled although the floor moved": (faults.pause,),
    "who refused a revoked key may accept it": (faults.pause,),
    "revoking takes every link to have been told": _LONELY,
}
