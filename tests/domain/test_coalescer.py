"""Facts about look-ups that travel together."""

import asyncio

import pytest

from tfm_guard.coalescer import LIMIT, Coalescer, Shared


class Bus:
    """Carries what it gets once it is let go, unless it breaks down."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failed: list[tuple[list[str], BaseException]] = []
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.arrived = asyncio.Event()
        self.coalescer = Coalescer(self.carry, self.fail)

    async def carry(self, batch: list[str]) -> None:
        """Note *batch*, and arrive later."""
        self.calls.append(batch)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.arrived.set()

    def fail(self, batch: list[str], error: BaseException) -> None:
        """Note what did not arrive."""
        self.failed.append((batch, error))
        self.arrived.set()

    async def all_arrived(self) -> None:
        """Return once something arrived, or did not."""
        await self.arrived.wait()
        self.arrived.clear()


@pytest.fixture
async def bus() -> Bus:
    """Return a bus that goes at once."""
    return Bus()


async def test_one_turn_is_one_call(bus: Bus) -> None:
    """What is put in one turn is carried together, in its order."""
    for one in ("a", "b", "a"):
        bus.coalescer.put(one)
    await bus.all_arrived()
    assert bus.calls == [["a", "b", "a"]]


@pytest.mark.parametrize(
    ("count", "sizes"), [(256, [256]), (257, [256, 1]), (1000, [256, 256, 256, 232])]
)
async def test_at_most_256_are_carried_together(bus: Bus, count: int, sizes: list[int]) -> None:
    """More than 256 are several calls, which together carry each once."""
    assert LIMIT == 256
    for number in range(count):
        bus.coalescer.put(str(number))
    await bus.all_arrived()
    assert [len(call) for call in bus.calls] == sizes
    assert [one for call in bus.calls for one in call] == [str(number) for number in range(count)]


async def test_what_comes_later_is_carried_by_a_later_call(bus: Bus) -> None:
    """What is put while a call is under way does not become part of it, nor wait for it."""
    bus.go.clear()
    bus.coalescer.put("early")
    await asyncio.sleep(0)
    assert bus.calls == [["early"]]
    bus.coalescer.put("late")
    await asyncio.sleep(0)
    assert bus.calls == [["early"], ["late"]]
    bus.go.set()
    await bus.all_arrived()


async def test_an_error_is_told_with_what_it_hit(bus: Bus) -> None:
    """What a failed call carried is told with the error, and the next call is not affected."""
    bus.error = OSError("gone")
    bus.coalescer.put("a")
    bus.coalescer.put("b")
    await bus.all_arrived()
    assert bus.failed == [(["a", "b"], bus.error)]
    bus.error = None
    bus.coalescer.put("c")
    await bus.all_arrived()
    assert bus.calls == [["a", "b"], ["c"]]
    assert len(bus.failed) == 1


@pytest.mark.parametrize("left", [True, False])
async def test_who_cancels_all_tasks_leaves_nothing_behind(bus: Bus, *, left: bool) -> None:
    """What is cancelled, before it left or later, is told; what comes afterwards is carried."""
    bus.go.clear()
    bus.coalescer.put("a")
    if left:
        await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await bus.all_arrived()
    ((batch, error),) = bus.failed
    assert batch == ["a"]
    assert isinstance(error, asyncio.CancelledError)
    bus.go.set()
    bus.coalescer.put("b")
    await bus.all_arrived()
    assert bus.calls == [*([["a"]] if left else []), ["b"]]


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_cancelled_waiter_goes_alone(gone: int) -> None:
    """Whichever of several waiters is cancelled, the others get the answer."""
    shared: Shared[str] = Shared()
    waits = [shared.wait() for _ in range(3)]
    waits.pop(gone).cancel()
    shared.answer("A")
    assert await asyncio.gather(*waits) == ["A", "A"]


async def test_an_error_reaches_all_who_wait() -> None:
    """Everyone who waits gets the error, and nobody complains of one that nobody waits for."""
    shared: Shared[str] = Shared()
    waits = [shared.wait() for _ in range(3)]
    waits[0].cancel()
    error = OSError("gone")
    shared.fail(error)
    assert await asyncio.gather(*waits[1:], return_exceptions=True) == [error, error]
    shared.wait()
    shared.fail(error)


async def test_the_first_answer_stands() -> None:
    """An error that comes after the answer changes nothing for who has it."""
    shared: Shared[str] = Shared()
    wait = shared.wait()
    shared.answer("A")
    shared.fail(OSError("gone"))
    assert await wait == "A"
