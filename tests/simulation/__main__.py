"""Search one world after another: `python -m tests.simulation --seed N --steps N`."""

import argparse
import gc
import logging
import sys
import time
from collections import Counter

from tests.simulation.breaks import BREAKS
from tests.simulation.invariants import Violation
from tests.simulation.world import World

WORLD_STEPS = 4000


def explore(seed: int, *, verbose: bool = False) -> World:
    """Return the world made from *seed*, at its end or at its violation."""
    world = World(seed, verbose=verbose)
    try:
        world.run(WORLD_STEPS)
    except Violation:
        pass
    return world


def search_breaks(which: str, first: int, limit: int) -> int:
    for number, (name, apply) in enumerate(BREAKS.items()):
        if which in ("0", "1"):
            if number % 2 != int(which):
                continue
        elif which not in name:
            continue
        undo = apply()
        steps, seed = 0, first
        try:
            while steps < limit:
                world = explore(seed)
                steps += world.steps
                seed += 1
                if world.violation is not None:
                    print(f"{steps:8} seed {seed - 1:4} {name}: {str(world.violation)[:110]}", flush=True)
                    break
            else:
                print(f"   -     {name}: NOT CAUGHT", flush=True)
        finally:
            undo()
        gc.collect()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--breaks")
    options = parser.parse_args()
    if options.breaks is not None:
        logging.disable()
        gc.disable()
        return search_breaks(options.breaks, options.seed, options.steps)
    logging.disable()
    gc.disable()
    seed, steps, counts = options.seed, 0, Counter()
    failed = []
    began = time.perf_counter()
    while steps < options.steps:
        world = explore(seed)
        steps += world.steps
        counts += world.counts
        if world.violation is not None:
            failed.append((seed, world.steps, world.violation))
            print(seed, world.steps, world.violation)
            if not options.keep_going:
                print("\n".join(explore(seed, verbose=True).trace))
                break
        seed += 1
        if seed % 10 == 0:
            gc.collect()
    seconds = time.perf_counter() - began
    print(f"{steps} steps in {seconds:.1f} s, {steps / seconds:.0f}/s; seeds {options.seed}..{seed}")
    print(counts)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
