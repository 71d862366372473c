"""What `tfm-guard prove` makes of the answers that it got."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Final, NamedTuple

from tfm_guard.cli.connection import Answer

# Of the new key on each connection: so many acceptances before DELETE is sent, refusals after.
ACCEPTANCES: Final = 5
REFUSALS: Final = 10


class Outcome(Enum):
    """What an answer says about the key that was sent."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNCLEAR = "unclear"


class Sample(NamedTuple):
    """One request: *managing* tells by which of the two keys, *words* what was answered."""

    started: float
    ended: float
    managing: bool
    outcome: Outcome
    words: str


class Deletion(NamedTuple):
    """When DELETE was first sent, what was answered each time, and when it had confirmed."""

    sent: float
    answers: tuple[str, ...]
    returned: float | None


class Verdict(Enum):
    """Whether the guarantee held."""

    HELD = "held"
    BROKEN = "broken"
    NOT_SHOWN = "not_shown"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was seen at one address. Before and after are those of DELETE's return.

    Of the new key, unless a name says `managing`. Seconds count from the sending of DELETE.
    `fewest_refused_after` is that of the connection that refused the fewest.
    """

    address: str
    connections: int
    accepted_before: int
    refused_too_early: int
    first_refused_seconds: float | None
    last_accepted_seconds: float | None
    accepted_after: int
    refused_after: int
    fewest_refused_after: int
    unclear_before: dict[str, int]
    unclear_after: dict[str, int]
    managing_accepted: int
    managing_refused: int
    managing_unclear: dict[str, int]


def outcome_of(answer: Answer) -> Outcome:
    """Tell whether *answer* accepted the key: it did unless something says otherwise.

    A 403 or a 404 comes from behind the check of the key, so it counts as accepted. Overload, an
    error of the server or a 401 for another cause than the key tell nothing.
    """
    if answer.status == HTTPStatus.UNAUTHORIZED:
        return Outcome.REFUSED if answer.code == "invalid_token" else Outcome.UNCLEAR
    return Outcome.UNCLEAR if answer.passing else Outcome.ACCEPTED


def find(
    address: str,
    connections: int,
    by_connection: Sequence[Sequence[Sample]],
    deletion: Deletion,
) -> Findings:
    """Count what the samples of one address' connections show."""
    returned = float("inf") if deletion.returned is None else deletion.returned
    mine = [[one for one in samples if not one.managing] for samples in by_connection]
    managing = [one for samples in by_connection for one in samples if one.managing]
    before = [one for samples in mine for one in samples if one.started <= returned]
    after = [[one for one in samples if one.started > returned] for samples in mine]
    flat = [one for samples in after for one in samples]
    accepted = [one.started for one in before + flat if one.outcome is Outcome.ACCEPTED]
    refused = [one.ended for one in before + flat if one.outcome is Outcome.REFUSED]
    too_early = [moment for moment in refused if moment < deletion.sent]
    in_time = [moment - deletion.sent for moment in refused if moment >= deletion.sent]
    return Findings(
        address=address,
        connections=connections,
        accepted_before=_count(before, Outcome.ACCEPTED),
        refused_too_early=len(too_early),
        first_refused_seconds=min(in_time, default=None),
        last_accepted_seconds=max(accepted) - deletion.sent if accepted else None,
        accepted_after=_count(flat, Outcome.ACCEPTED),
        refused_after=_count(flat, Outcome.REFUSED),
        fewest_refused_after=min(_count(samples, Outcome.REFUSED) for samples in after),
        unclear_before=_unclear(before),
        unclear_after=_unclear(flat),
        managing_accepted=_count(managing, Outcome.ACCEPTED),
        managing_refused=_count(managing, Outcome.REFUSED),
        managing_unclear=_unclear(managing),
    )


def judge(found: Sequence[Findings], deletion: Deletion) -> tuple[Verdict, list[str]]:
    """Return the verdict and, unless it is that the guarantee held, each reason for it."""
    if broken := [reason for one in found for reason in _broken(one)]:
        return Verdict.BROKEN, broken
    if deletion.returned is None:
        tries = f"{len(deletion.answers)} times" if len(deletion.answers) > 1 else "once"
        return Verdict.NOT_SHOWN, [
            f"DELETE was sent {tries} and never confirmed; answered: {', '.join(deletion.answers)}"
        ]
    if lacking := [reason for one in found for reason in _lacking(one)]:
        return Verdict.NOT_SHOWN, lacking
    return Verdict.HELD, []


def _broken(one: Findings) -> Iterable[str]:
    if one.accepted_after:
        yield (
            f"{one.address}: {one.accepted_after} requests that began after DELETE had returned "
            "were accepted"
        )
    for name, count in (
        ("the new key, not yet deleted,", one.refused_too_early),
        ("the managing key", one.managing_refused),
    ):
        if count:
            yield f"{one.address}: {name} is valid and was refused with 401 in {count} requests"


def _lacking(one: Findings) -> Iterable[str]:
    if one.unclear_after:
        yield f"{one.address}: neither accepted nor refused: {in_words(one.unclear_after)}"
    if one.fewest_refused_after < REFUSALS:
        yield (
            f"{one.address}: a connection refused the key only {one.fewest_refused_after} times "
            f"after DELETE had returned, and {REFUSALS} are asked for"
        )


def in_words(unclear: dict[str, int]) -> str:
    """Return what was answered and how often."""
    return ", ".join(f"{words} ({count} times)" for words, count in unclear.items())


def _count(samples: Iterable[Sample], outcome: Outcome) -> int:
    return sum(one.outcome is outcome for one in samples)


def _unclear(samples: Iterable[Sample]) -> dict[str, int]:
    return dict(Counter(one.words for one in samples if one.outcome is Outcome.UNCLEAR))
