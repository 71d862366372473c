"""Try every fault and print what came of it: python -m tests.faults [NUMBER...]."""

import sys
import time

from tests.faults.deployment import Servers
from tests.faults.rows import ROWS
from tests.faults.trial import Theatre
from tests.support.background import Background

HEADINGS = (
    "fault",
    "time to return",
    "how",
    "accepted after return",
    "wrong answers to valid keys",
    "defence off: accepted",
    "verdict",
)


def main(numbers: list[str]) -> int:
    """Try the rows with these *numbers*, or all; return the exit status."""
    chosen = [row for row in ROWS if not numbers or str(row.number) in numbers]
    _print(" | ".join(HEADINGS))
    failed = 0
    with Background() as background:
        servers = Servers(background)
        theatre = Theatre(servers, full=True)
        try:
            for row in chosen:
                began = time.monotonic()
                result = theatre.try_row(row)
                failed += bool(result.faults)
                seconds = time.monotonic() - began
                _print(f"{' | '.join(result.cells())} ({seconds:.0f} s)")
        finally:
            theatre.close()
            servers.close()
    for complaint in theatre.complaints:
        _print(complaint)
    _print(f"{len(chosen) - failed} of {len(chosen)} hold")
    return 1 if failed or theatre.complaints else 0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
