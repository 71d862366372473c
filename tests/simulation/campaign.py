"""Searching one world after another."""

import argparse
import contextlib
import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.simulation.faults import FAULTS, Fault
from tests.simulation.invariants import Violation
from tests.simulation.world import World

_WORLD_STEPS = 4000
_WORLDS_BETWEEN_COLLECTIONS = 10


class Failure(NamedTuple):
    """A world in which an invariant does not hold."""

    seed: int
    steps: int
    violation: Violation

    @property
    def invariant(self) -> int:
        """The number of the invariant."""
        return self.violation.invariant


def explore(seed: int, *, focus: Sequence[Fault] = (), verbose: bool = False) -> World:
    """Return the world made from *seed*, at its end or at its violation."""
    world = World(seed, focus=focus, verbose=verbose)
    with _undisturbed(), contextlib.suppress(Violation):
        world.run(_WORLD_STEPS)
    return world


class Campaign:
    """A search through the worlds from *first_seed* on, in which the faults of *focus* happen."""

    def __init__(self, *, first_seed: int, focus: Sequence[Fault] = ()) -> None:
        self.steps = 0
        self.counts: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._focus = focus
        self._first_seed = self._next_seed = first_seed
        self._seconds = 0.0

    def run(self, *, steps: int) -> None:
        """Search until so many *steps* have been taken, or an invariant fails."""
        began = time.perf_counter()
        while self.steps < steps and not self.failures:
            world = explore(self._next_seed, focus=self._focus)
            self.steps += world.steps
            self.counts += world.counts
            if world.violation is not None:
                self.failures.append(Failure(self._next_seed, world.steps, world.violation))
            self._next_seed += 1
            if self._next_seed % _WORLDS_BETWEEN_COLLECTIONS == 0:
                gc.collect()
        self._seconds += time.perf_counter() - began

    def faults_left_out(self) -> list[str]:
        """Return the names of the faults that did not happen."""
        return [fault.__name__ for fault in FAULTS if not self.counts[fault.__name__]]

    def report(self) -> str:
        """Return what was searched, how fast, what happened, and what led to a failure."""
        seeds = f"seeds {self._first_seed} to {self._next_seed - 1}"
        speed = self.steps / max(self._seconds, 1e-9)
        lines = [
            f"{self.steps} steps in {self._seconds:.1f} s ({speed:.0f}/s), {seeds}",
            ", ".join(f"{what}: {count}" for what, count in sorted(self.counts.items())),
        ]
        for failure in self.failures:
            lines += explore(failure.seed, focus=self._focus, verbose=True).trace
            lines += [
                str(failure.violation),
                f'Once more: make simulate ARGS="--seed {failure.seed} --steps 1"',
            ]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description="Search simulated worlds for a violation."
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first world")
    parser.add_argument("--steps", type=int, default=10_000_000, help="how many to take in all")
    options = parser.parse_args(arguments)
    campaign = Campaign(first_seed=options.seed)
    campaign.run(steps=options.steps)
    print(campaign.report())  # noqa: T201  # what was asked for
    return int(bool(campaign.failures))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave out the log, which takes longer than the rest, and collections at odd moments."""
    disabled = logging.root.manager.disable
    collecting = gc.isenabled()
    logging.disable()
    gc.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        if collecting:
            gc.enable()
