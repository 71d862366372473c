"""Confirming a change that takes something away: returning only once nobody acts on the old state.

The change is in the feed. A process that has applied it records so in the register. One that has
not cannot answer from memory for longer than the lease after its last read of the feed, and any
read begun after the commit finds the change. So once a lease has passed since the commit, each
process has either applied the change or asks the database, which knows.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Collection
from typing import Final
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.errors import Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.records import Change, Revocation
from tfm_guard.store import MARKED, Store

_log: Final = logging.getLogger(__name__)

# Room for clocks that run at different rates; no real ones differ by half.
_MARGIN: Final = 1.5
# Less than this is left over from rounding, and no clock sleeps for so short.
_RESOLUTION_SECONDS: Final = 1e-6
_FIRST_PAUSE_SECONDS: Final = 0.005
_LONGEST_PAUSE_SECONDS: Final = 0.05


class Confirmation:
    """Waits for the other processes in the register of *store*."""

    def __init__(self, *, store: Store, freshness: Freshness, clock: Clock, lease: float) -> None:
        self._store = store
        self._freshness = freshness
        self._clock = clock
        self._wait = _MARGIN * lease
        self._next_reading: asyncio.Task[dict[UUID, float]] | None = None
        self._reading: asyncio.Task[dict[UUID, float]] | None = None

    async def wait(self, change: Change) -> Revocation:
        """Return when no process acts on anything older than *change*, which is committed.

        This takes at most 1.5 times the lease.
        """
        # It may have been committed by another process, or have been cancelled just then.
        self._freshness.apply(change)
        started = self._clock.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        register = first = await self._read_register()
        silent = set(register)
        while True:
            seconds = self._clock.monotonic() - started
            behind = {worker for worker, seen in register.items() if seen < change.id}
            if register and not behind:
                return Revocation(how="acknowledged", workers=len(register), seconds=seconds)
            silent &= behind
            left = self._wait - seconds
            if left < _RESOLUTION_SECONDS:
                marked = {worker for worker in silent if first[worker] == MARKED}
                await self._strike_off(silent - marked, change.id, marked)
                return Revocation(how="lease", workers=len(register), seconds=seconds)
            await self._clock.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            register = await self._read_register()

    async def _read_register(self) -> dict[UUID, float]:
        """Return what each process has seen; nothing where the register cannot be read.

        All who wait share one reading at a time, each one that begins after it was asked for.
        """
        if self._next_reading is None:
            self._next_reading = asyncio.get_running_loop().create_task(
                self._read_after(self._reading)
            )
        return await asyncio.shield(self._next_reading)

    async def _read_after(
        self, previous: "asyncio.Task[dict[UUID, float]] | None"
    ) -> dict[UUID, float]:
        if previous is not None:
            await asyncio.wait({previous})
        self._reading, self._next_reading = self._next_reading, None
        try:
            register = await self._store.read_register()
        except Unavailable:
            return {}
        # This process has applied the change, whatever it has read of the feed since.
        return register | {self._freshness.worker_id: math.inf}

    async def _strike_off(
        self, silent: Collection[UUID], change_id: int, marked: Collection[UUID]
    ) -> None:
        """Strike off processes that were silent all along, so that nobody waits for them for ever.

        They are dead, as a rule. One that is not finds its mark, forgets everything and registers
        anew; until then it counts as one that has seen nothing. Only who found it marked, and has
        then waited as long as it can have trusted its memory, removes it.
        """
        if not silent and not marked:
            return
        _log.warning(
            "not every process confirmed a change, which took %.1f s to be safe for that: %s",
            self._wait,
            ", ".join(map(str, [*silent, *marked])),
        )
        with contextlib.suppress(Unavailable):
            await self._store.strike_off(silent, change_id, marked=marked)
