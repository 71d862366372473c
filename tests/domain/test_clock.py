"""Facts about the machine's clock."""

import asyncio

import pytest

from tfm_guard.clock import SystemClock


@pytest.mark.parametrize("turns", range(5))
async def test_a_sleep_that_is_woken_and_cancelled_is_cancelled(turns: int) -> None:
    """A cancellation is not lost on a sleep that has been woken, and has not ended yet."""
    event = asyncio.Event()
    sleep = asyncio.ensure_future(SystemClock().sleep(60, unless=event))
    for _ in range(3):
        await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    was_asleep = sleep.cancel()
    await asyncio.wait({sleep})
    assert sleep.cancelled() == was_asleep
