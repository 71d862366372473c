"""How often the rule for a sudden change in use is wrong, and how often it is right.

Makes keys with hourly counts of several shapes for twelve weeks, and judges each complete hour of
the last eight as a guard does, with a day of silence after each finding. Then, for each shape, it
makes the same keys again with something that begins at a random hour: ten times the use, refusals,
or silence, and asks whether that was found within 24 hours.

    python benchmarks/unusual_use.py [--keys 200] [--seed 1] [--json]
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tfm_guard.unusual import HISTORY, REACH, WEEK, Unusual, is_unusual, suspicions

WEEKS = 12
HOURS = WEEKS * WEEK
NORMAL = 30  # a mean from which on a Poisson distribution looks like a normal one
LATE = 0.2  # how often a weekly job is an hour late
OPEN = range(8, 18)  # hours of the day
QUIET = 24  # hours after a finding
WITHIN = 24  # hours in which something is to be found

Counts = dict[int, int]


class Use(NamedTuple):
    """The counts of one key's hours."""

    accepted: Counts
    refused: Counts


def some(dice: random.Random, mean: float) -> int:
    """Return a count with that *mean*, spread wider than chance alone would."""
    mean *= dice.lognormvariate(-0.045, 0.3)  # on average 1
    if mean > NORMAL:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), dice.random(), 0
    while product > limit:
        product *= dice.random()
        count += 1
    return count


def steady(_dice: random.Random, level: float) -> Iterator[float]:
    """Use a key all the time."""
    for _ in range(HOURS):
        yield level


def day_and_night(_dice: random.Random, level: float) -> Iterator[float]:
    """Use it thirty times more in the afternoon than before dawn."""
    for hour in range(HOURS):
        yield level * math.exp(1.7 * math.sin((hour - 9) * math.pi / 12))


def office_hours(_dice: random.Random, level: float) -> Iterator[float]:
    """Use it from 8 to 18, Monday to Friday, and hardly ever else."""
    for hour in range(HOURS):
        working = hour % 24 in OPEN and hour % WEEK < 5 * 24
        yield level * 3 if working else level / 50


def bursts(dice: random.Random, level: float) -> Iterator[float]:
    """Send a campaign, at any time, about three times a week."""
    for _ in range(HOURS):
        yield level * (dice.uniform(20, 60) if dice.random() < 3 / WEEK else 1)


def weekly_job(dice: random.Random, level: float) -> Iterator[float]:
    """Do nothing but one big job a week, which now and then is an hour late."""
    late = 0
    for hour in range(HOURS):
        if hour % WEEK == 0:
            late = dice.random() < LATE
        yield level * 100 if hour % WEEK == 33 + late else 0.0


def growth(_dice: random.Random, level: float) -> Iterator[float]:
    """Use it day and night, a quarter more each week."""
    for hour, mean in enumerate(day_and_night(_dice, level)):
        yield mean * 1.25 ** (hour / WEEK - 6)


SHAPES: dict[str, Callable[[random.Random, float], Iterator[float]]] = {
    "steady": steady,
    "day and night": day_and_night,
    "office hours": office_hours,
    "bursts": bursts,
    "weekly job": weekly_job,
    "growth": growth,
}
TROUBLES = ("ten times the use", "refusals", "silence")


def use_of(dice: random.Random, shape: str) -> Use:
    """Return twelve weeks of a key of that *shape*, of 3 to 3,000 requests an hour or so."""
    level = 10 ** dice.uniform(0.5, 3.5)
    accepted = {hour: some(dice, mean) for hour, mean in enumerate(SHAPES[shape](dice, level))}
    # One request in a hundred lacks a scope.
    refused = {hour: some(dice, count / 100) for hour, count in accepted.items()}
    return Use(accepted, refused)


def disturbed(dice: random.Random, use: Use, trouble: str, since: int) -> Use:
    """Return *use* with a *trouble* that begins at the hour *since* and lasts a day."""
    accepted, refused = dict(use.accepted), dict(use.refused)
    for hour in range(since, min(since + WITHIN, HOURS)):
        if trouble == "ten times the use":
            accepted[hour] *= 10
        elif trouble == "silence":
            accepted[hour] = 0
        else:
            refused[hour] += some(dice, 200)
    return Use(accepted, refused)


def judge(use: Use, hours: range) -> list[tuple[int, Unusual]]:
    """Return what is said of the key in those *hours*."""
    found: list[tuple[int, Unusual]] = []
    for hour in hours:
        if found and hour < found[-1][0] + QUIET:
            continue
        for suspicion in suspicions(hour, use.accepted, use.refused):
            counts = use.refused if suspicion.kind == "more_refused" else use.accepted
            if is_unusual(suspicion, hour, counts, first=0):
                found.append((hour, suspicion))
                break
    return found


def measure(keys: int, seed: int) -> dict[str, dict[str, float]]:
    """Return false alarms for each key and year, and for each trouble the share that was found."""
    results: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        dice = random.Random(f"{seed} {shape}")  # noqa: S311  # it protects nothing
        alarms, found = 0, dict.fromkeys(TROUBLES, 0)
        for _ in range(keys):
            use = use_of(dice, shape)
            alarms += len(judge(use, range(HISTORY, HOURS)))
            for trouble in TROUBLES:
                since = dice.randrange(REACH, HOURS - WITHIN)
                hours = range(since, since + WITHIN)
                found[trouble] += bool(judge(disturbed(dice, use, trouble, since), hours))
        years = keys * (HOURS - HISTORY) / (24 * 365)
        shares = {trouble: count / keys for trouble, count in found.items()}
        results[shape] = {"false alarms": alarms / years, **shares}
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How good the rule for unusual use is.")
    parser.add_argument("--keys", type=int, default=200, help="of each shape (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results: dict[str, Any] = measure(options.keys, options.seed)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'':15}{'false alarms':>16}{'':3}{'found within 24 hours':^48}")
    print(f"{'':15}{'a key and year':>16}{'':3}" + "".join(f"{each:>18}" for each in TROUBLES))
    for shape, row in results.items():
        shares = "".join(f"{row[each]:>18.0%}" for each in TROUBLES)
        print(f"{shape:15}{row['false alarms']:>16.2f}{'':3}{shares}")


if __name__ == "__main__":
    main()
