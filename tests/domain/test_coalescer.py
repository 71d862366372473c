"""Facts about look-ups that travel together."""

import asyncio
from collections.abc import Mapping

import pytest

from tfm_guard.coalescer import LIMIT, Coalescer


class Source:
    """Answers with what each key holds when it is read, once it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.values: dict[str, str] = {}
        self.error: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()

    async def load(self, keys: list[str]) -> Mapping[str, str]:
        """Read first, answer later."""
        self.calls.append(keys)
        found = {key: self.values[key] for key in keys if key in self.values}
        self.asked.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return found


@pytest.fixture
def source() -> Source:
    """Return a source that answers at once."""
    return Source()


@pytest.fixture
def coalescer(source: Source) -> Coalescer[str]:
    """Return a coalescer over the source."""
    return Coalescer(source.load)


async def test_one_turn_is_one_call(source: Source, coalescer: Coalescer[str]) -> None:
    """Look-ups begun together are one call, with each key once; each gets its own answer."""
    source.values = {"a": "A", "b": "B"}
    keys = ["a", "b", "a", "missing", "b"]
    found = await asyncio.gather(*(coalescer.get(key) for key in keys))
    assert found == ["A", "B", "A", None, "B"]
    assert source.calls == [["a", "b", "missing"]]


@pytest.mark.parametrize(
    ("count", "sizes"), [(256, [256]), (257, [256, 1]), (1000, [256, 256, 256, 232])]
)
async def test_a_call_has_at_most_256_keys(
    source: Source, coalescer: Coalescer[str], count: int, sizes: list[int]
) -> None:
    """More than 256 keys are several calls, which together ask for each key once."""
    assert LIMIT == 256
    source.values = {str(number): f"value {number}" for number in range(count)}
    found = await asyncio.gather(*(coalescer.get(str(number)) for number in range(count)))
    assert found == [f"value {number}" for number in range(count)]
    assert [len(call) for call in source.calls] == sizes
    assert len({key for call in source.calls for key in call}) == count


async def test_an_error_reaches_all_who_asked(source: Source, coalescer: Coalescer[str]) -> None:
    """Everyone in a failed call gets its error, and the next call is not affected."""
    source.error = OSError("gone")
    found = await asyncio.gather(
        *(coalescer.get(key) for key in ("a", "b", "a")), return_exceptions=True
    )
    assert found == [source.error] * 3
    source.error = None
    source.values = {"a": "A"}
    assert await coalescer.get("a") == "A"


@pytest.mark.parametrize("first", [True, False])
async def test_a_cancelled_waiter_goes_alone(
    source: Source, coalescer: Coalescer[str], *, first: bool
) -> None:
    """Whichever of several waiters is cancelled, the others get their answers, of one call."""
    source.go.clear()
    source.values = {"a": "A", "b": "B"}
    waiters = [asyncio.create_task(coalescer.get(key)) for key in ("a", "a", "b")]
    await source.asked.wait()
    gone = waiters.pop(0 if first else 1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    source.go.set()
    assert await asyncio.gather(*waiters) == ["A", "B"]
    assert len(source.calls) == 1


async def test_nobody_left_to_hear_of_an_error(source: Source, coalescer: Coalescer[str]) -> None:
    """When all waiters have gone, an error that comes afterwards troubles nobody."""
    source.go.clear()
    source.error = OSError("gone")
    waiter = asyncio.create_task(coalescer.get("a"))
    await source.asked.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    source.go.set()
    source.error = None
    assert await coalescer.get("a") is None


async def test_a_look_up_is_read_after_it_was_asked_for(
    source: Source, coalescer: Coalescer[str]
) -> None:
    """A look-up that begins while another is under way is not answered by that one."""
    source.go.clear()
    source.values = {"a": "old"}
    earlier = asyncio.create_task(coalescer.get("a"))
    await source.asked.wait()
    source.values = {"a": "new"}
    later = asyncio.create_task(coalescer.get("a"))
    source.go.set()
    assert (await earlier, await later) == ("old", "new")
    assert source.calls == [["a"], ["a"]]
