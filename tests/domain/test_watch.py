"""Facts about who is waited for, and until when: the decision that revoking is made of."""

import math
from collections.abc import Collection, Iterable
from typing import Any
from uuid import UUID

import pytest

from tfm_guard.confirmation import Telling, Watch
from tfm_guard.store import MARKED, Member, Register
from tfm_guard.testing import ManualClock

LEASE, UNFED = 2.0, 60.0
WAIT, LONGEST = 3.0, 61.0  # 1.5 leases; and half a lease more than `unfed`
CHANGE = 7
NOBODY_LEFT = -math.inf
ONE, OTHER, LATE = (UUID(int=number) for number in (1, 2, 3))


class Told(Telling):
    """What was published on which link, as a test says."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, UUID | None], float] = {}
        self.news: set[UUID] = set()

    def told(self, link: str, struck_off: UUID | None = None) -> float | None:
        """Return what the test said."""
        return self.times.get((link, struck_off))

    def also_tell(self, struck_off: Iterable[UUID]) -> None:
        """Note who is to be told."""
        self.news.update(struck_off)


class Case:
    """A watch over a register that the test writes, begun when its clock shows 100 s."""

    def __init__(self, *, linked: bool = True) -> None:
        self.clock = ManualClock()
        self.clock.advance(100)
        self.told = Told()
        self.watch = Watch(CHANGE, self.told if linked else None, self.clock, LEASE, UNFED)

    def look(
        self,
        *rows: tuple[Any, ...],
        heard: Collection[UUID] = (),
        after: float = 0,
        head: int = CHANGE,
    ) -> float:
        """Look *after* seconds at the register with those rows; return the end of trust, from 100.

        A row is a process, what it has seen, and its link.
        """
        self.clock.advance(after)
        register = {worker: Member(seen, link) for worker, seen, link in rows}
        return self.watch.look(Register(head, register), heard) - 100


@pytest.fixture
def case() -> Case:
    """Begin a watch by a process that has a link."""
    return Case()


def test_who_acknowledged_or_has_seen_the_change_is_not_waited_for(case: Case) -> None:
    """Rules (a) and (b): each by itself will do, for everybody or for each of them."""
    assert case.look() == NOBODY_LEFT
    assert case.look((ONE, CHANGE, "x")) == NOBODY_LEFT
    assert case.look((ONE, CHANGE + 1, None)) == NOBODY_LEFT
    case = Case()
    assert case.look((ONE, 0, "x"), (OTHER, CHANGE, None), heard={ONE}) == NOBODY_LEFT
    case = Case()
    assert case.look((ONE, CHANGE - 1, "x"), (OTHER, CHANGE, None), heard={OTHER}) == LONGEST


def test_without_a_link_a_process_is_waited_for_a_lease_and_a_half(case: Case) -> None:
    """Rule (c): it trusts nothing longer than a lease after it had no link."""
    for _ in range(4):
        assert case.look((ONE, 6, None), after=0.75) == 0.75 + WAIT


def test_with_a_link_the_wait_is_counted_from_publishing(case: Case) -> None:
    """Rule (c): from when the change went out on that very link; rule (d) until it has."""
    row = (ONE, 6, "x")
    assert case.look(row) == LONGEST
    case.told.times["y", None] = 101
    assert case.look(row, after=1) == LONGEST
    case.told.times["x", None] = 102
    assert case.look(row, after=1) == 2 + WAIT
    case.told.times["x", None] = 159.5
    assert case.look(row, after=50) == LONGEST


def test_the_last_process_decides(case: Case) -> None:
    """Everybody is waited for, and so whoever takes longest."""
    case.told.times["x", None] = 101
    rows = [(ONE, 6, "x"), (OTHER, 6, "y"), (UUID(int=9), 6, None)]
    assert case.look(*rows) == LONGEST
    assert case.look(*rows, heard={OTHER}) == 1 + WAIT
    assert case.look(*rows, heard={OTHER, ONE}) == WAIT


def test_without_a_link_of_ones_own_nobody_can_be_told() -> None:
    """Who has no Redis, but finds processes that do, waits until not even a link is trusted."""
    case = Case(linked=False)
    rows = [(ONE, 6, "x"), (OTHER, 6, None)]
    assert case.look(*rows) == LONGEST
    assert case.look(*rows, heard={ONE}) == WAIT


def test_a_register_that_cannot_be_read_is_no_register(case: Case) -> None:
    """Rule (d), whatever was heard; what was found before stands when it can be read again."""
    assert case.watch.look(None, {ONE}) == 100 + LONGEST
    assert case.look((ONE, 6, None), after=40) == 40 + WAIT
    assert case.watch.look(None, {ONE}) == 100 + LONGEST
    assert case.look((ONE, 6, None), after=1) == 40 + WAIT
    assert case.watch.silent == {ONE}


def test_a_link_that_goes_while_revoking_waits_begins_the_wait_anew(case: Case) -> None:
    """Its last proof may have come just before the register said so, however late that is."""
    assert case.look((ONE, 6, "x")) == LONGEST
    assert case.look((ONE, 6, "x"), after=30) == LONGEST
    assert case.look((ONE, 6, None), after=1) == 31 + WAIT
    assert case.look((ONE, 6, None), after=WAIT) == 31 + WAIT


def test_a_link_that_changes_while_revoking_waits_begins_the_wait_anew(case: Case) -> None:
    """The change went out on the new link long ago, but it was the old one that was trusted."""
    case.told.times["y", None] = 100
    assert case.look((ONE, 6, "x")) == LONGEST
    assert case.look((ONE, 6, "y"), after=30) == 30 + WAIT
    assert case.look((ONE, 6, "y"), after=1) == 30 + WAIT
    assert case.look((ONE, 6, "x"), after=1) == LONGEST
    assert case.look((ONE, 6, "y"), after=1) == 33 + WAIT


def test_no_wait_is_longer_than_unfed(case: Case) -> None:
    """Rule (d): a link that goes at the last moment prolongs nothing."""
    assert case.look((ONE, 6, "x")) == LONGEST
    assert case.look((ONE, 6, None), after=60) == LONGEST


def test_who_comes_later_is_not_waited_for(case: Case) -> None:
    """It was not in the register when that was first read, so it will read the feed first."""
    assert case.look((ONE, 6, None)) == WAIT
    assert case.look((ONE, CHANGE, None), (LATE, 0, "x"), after=1) == NOBODY_LEFT
    assert case.watch.silent == set()


def test_who_goes_is_not_waited_for(case: Case) -> None:
    """A process leaves the register only when it trusts nothing any more."""
    assert case.look((ONE, 6, "x"), (OTHER, 6, None)) == LONGEST
    assert case.look((OTHER, 6, None), after=1) == WAIT
    assert case.look(after=1) == NOBODY_LEFT


def test_silent_is_who_never_said_anything(case: Case) -> None:
    """Who was there from the first and neither acknowledged nor saw; once heard is heard."""
    third = UUID(int=9)
    case.look((ONE, 6, None), (OTHER, 6, None), (third, CHANGE, None))
    assert case.watch.silent == {ONE, OTHER}
    case.look((ONE, 6, None), (OTHER, 6, None), (LATE, 6, None), heard={ONE})
    assert case.watch.silent == {OTHER}
    case.look((ONE, 6, None), (OTHER, 6, None), (third, 0, None))
    assert case.watch.silent == {OTHER}


def test_a_marked_process_is_told_so_and_waited_for(case: Case) -> None:
    """Marked with a link, it may live: the wait counts from when the news of the mark went out."""
    row = (ONE, MARKED, "x")
    case.told.times["x", None] = 100
    assert case.look(row) == LONGEST
    assert case.told.news == {ONE}
    case.told.times["x", ONE] = 101
    assert case.look(row, after=1) == 1 + WAIT
    assert case.watch.marked == case.watch.silent == {ONE}
    assert case.look(row, heard={ONE}) == NOBODY_LEFT
    assert case.watch.silent == set()


def test_a_marked_process_without_a_link_is_waited_for(case: Case) -> None:
    """It may have read the feed just before it was marked."""
    assert case.look((ONE, MARKED, None)) == WAIT
    assert case.watch.marked == {ONE}


def test_a_mark_made_while_revoking_waits_is_another_revokers(case: Case) -> None:
    """Such a process may have read the feed a moment before, so this wait does not remove it."""
    case.told.times["x", None] = 100
    assert case.look((ONE, 6, "x"), (OTHER, 6, None)) == WAIT
    assert case.look((ONE, MARKED, "x"), (OTHER, MARKED, None), after=2) == WAIT
    assert case.told.news == set()
    assert case.watch.silent == {ONE, OTHER}
    assert case.watch.marked == set()


def test_register_of_a_server_that_lacks_the_change_tells_nothing(case: Case) -> None:
    """Who is in the register of a former primary says nothing of who has registered since."""
    assert case.look(head=CHANGE - 1) == LONGEST
    assert case.look((ONE, CHANGE - 1, None), after=1) == 1 + WAIT
