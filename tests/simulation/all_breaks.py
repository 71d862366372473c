"""Break each rule in turn; something must fail: `python -m tests.simulation.all_breaks`."""

import sys
import time

from tests.simulation.breaks import BREAKS, DIRECTED, FOCUS
from tests.simulation.campaign import Campaign

# Several times what is needed on average, so that no change of the code turns the luck.
STEPS = 4_000_000


def fault_of(name: str, *, steps: int) -> str:
    """Return what is wrong with the rule called *name*, if anything is, in so many *steps*."""
    if name in DIRECTED:
        return DIRECTED[name].fault(name)
    campaign = Campaign(first_seed=1, focus=FOCUS.get(name, ()))
    undo = BREAKS[name]()
    try:
        campaign.run(steps=steps)
    finally:
        undo()
    return "" if campaign.failures else f"not noticed in {campaign.steps} steps"


def main() -> int:
    """Break all of them, print what came of it, and return the exit status."""
    failed = 0
    for name in (*BREAKS, *DIRECTED):
        began = time.monotonic()
        fault = fault_of(name, steps=STEPS)
        failed += bool(fault)
        sys.stdout.write(f"{name}: {fault or 'noticed'} ({time.monotonic() - began:.1f} s)\n")
        sys.stdout.flush()
    sys.stdout.write(f"{failed} of {len(BREAKS) + len(DIRECTED)} rules are missed by nobody\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
