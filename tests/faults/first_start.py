"""Eight processes open a guard on an empty database at the same moment, on one after the other.

``python -m tests.faults.first_start BREAK URL...``, where *BREAK* may be empty.
"""

import asyncio
import multiprocessing
import sys
from multiprocessing.synchronize import Barrier

from tests.support.breaks import BREAKS
from tests.support.guards import new_guard
from tfm_guard.errors import GuardError

_PROCESSES = 8


def main(name: str, urls: list[str]) -> int:
    """Return 0 if all processes could open all guards."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(_PROCESSES)
    processes = [
        context.Process(target=_open_all, args=(name, urls, barrier)) for _ in range(_PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return int(any(process.exitcode for process in processes))


def _open_all(name: str, urls: list[str], barrier: Barrier) -> None:
    if name:
        BREAKS[name]()
    try:
        for url in urls:
            asyncio.run(_open(url, barrier))
    except GuardError as error:
        barrier.abort()  # the others must not wait for this one
        sys.exit(f"Error: {getattr(error, 'reason', error)}")


async def _open(url: str, barrier: Barrier) -> None:
    guard = new_guard(url)
    barrier.wait()
    async with guard:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
