"""Facts about argon2id off the event loop."""

import asyncio
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.servers import wait_until
from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.hashing import PERMITS, QUEUE, Hashing, HashingProfile

CHEAP = HashingProfile(time_cost=1, memory_kib=8, parallelism=1)
TOKEN = b"tfm_k_00112233445566778899aabbccddeeff0011223344556677"
# Of no token, and about half a second to find that out.
SLOW = "$argon2id$v=19$m=65536,t=8,p=1$c2FsdHNhbHRzYWx0$MDEyMzQ1Njc4OWFiY2RlZg"


def computing_threads() -> int:
    """Return how many threads of the pool there are."""
    return sum(thread.name.startswith("tfm-guard-argon2") for thread in threading.enumerate())


async def test_a_hash_proves_its_token_alone() -> None:
    """A hash is an argon2id string of the profile's cost, and only of the token it was made of."""
    counters = Counters()
    hashing = Hashing(HashingProfile(time_cost=2, memory_kib=16, parallelism=2), counters)
    made = await hashing.hash(TOKEN)
    assert made.startswith("$argon2id$v=19$m=16,t=2,p=2$")
    assert TOKEN.decode() not in made
    assert await hashing.hash(TOKEN) != made
    assert await hashing.verify(made, TOKEN)
    assert not await hashing.verify(made, TOKEN[:-1] + b"8")
    assert counters.hashes == 4
    hashing.close()


async def test_an_imported_hash_has_its_own_cost() -> None:
    """A hash made with another profile, or another kind of argon2, is verified as it says."""
    hashing = Hashing(CHEAP, Counters())
    others = [
        "$argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHRzYWx0$/kAKieIf5ulzaiyc7la7AA",
        "$argon2id$v=19$m=64,t=3,p=4$c2FsdHNhbHRzYWx0$C1Uh7jCfkPkrm4fQ31WL+g",
    ]
    assert [await hashing.verify(other, b"token") for other in others] == [True, True]
    assert [await hashing.verify(other, b"tokem") for other in others] == [False, False]
    hashing.close()


@pytest.mark.parametrize(
    "asked",
    [
        "m=1048576,t=10,p=1",
        "m=262145,t=1,p=1",
        "m=262144,t=3,p=1",
        "m=8,t=65537,p=1",
        "m=256,t=1,p=17",
    ],
)
async def test_a_hash_that_asks_for_too_much_is_not_computed(asked: str) -> None:
    """1 GiB ten times, 768 MiB over all passes, 17 lanes: of no token, without trying."""
    counters = Counters()
    hashing = Hashing(CHEAP, counters)
    assert not await hashing.verify(f"$argon2id$v=19${asked}$c2FsdHNhbHQ$aGFzaGhhc2g", TOKEN)
    assert counters.hashes == 0
    hashing.close()


pieces = st.sampled_from(
    ["$", "argon2id", "argon2i", "v=19", "m=8", ",t=1", ",p=1", "c2FsdHNhbHQ", "m=-1", "é", "\0"]
)


@example("")
@example("$argon2id$v=19$m=8,t=1,p=1$\u00e9$\u00e9")
@example("$argon2id$v=19$m=\uff18,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g")
@example("$argon2id$v=19$m=4194304,t=1,p=1,m=8$c2FsdHNhbHQ$aGFzaGhhc2g")
@given(st.text() | st.lists(pieces, max_size=12).map("".join))
async def test_garbage_is_the_hash_of_no_token(garbage: str) -> None:
    """Whatever stands in a row instead of a hash is a no, never an error."""
    hashing = Hashing(CHEAP, Counters())
    assert not await hashing.verify(garbage, TOKEN)
    hashing.close()


async def test_permits_belong_to_what_is_computed() -> None:
    """Requests that go away free the queue, but not the threads that still compute for them."""
    counters = Counters()
    hashing = Hashing(CHEAP, counters)
    cheap = await hashing.hash(TOKEN)
    first = [asyncio.create_task(hashing.verify(SLOW, TOKEN)) for _ in range(PERMITS + QUEUE)]
    await asyncio.to_thread(
        wait_until, lambda: counters.hashes == 1 + PERMITS, what="both threads compute"
    )
    with pytest.raises(Unavailable) as caught:
        await hashing.verify(cheap, TOKEN)
    assert caught.value.reason == "the argon2 queue is full"
    for request in first:
        request.cancel()
    await asyncio.wait(first)
    assert all(request.cancelled() for request in first)

    second = [asyncio.create_task(hashing.verify(cheap, TOKEN)) for _ in range(QUEUE + 1)]
    refused, _ = await asyncio.wait(second, return_when=asyncio.FIRST_COMPLETED)
    # Nothing ran meanwhile: both threads are busy with what nobody waits for any more.
    assert counters.hashes == 1 + PERMITS
    assert [type(request.exception()) for request in refused] == [Unavailable]
    assert computing_threads() <= PERMITS
    answers = await asyncio.gather(*second, return_exceptions=True)
    assert answers.count(True) == QUEUE
    # Of the cancelled requests, those that waited were never computed.
    assert counters.hashes == 1 + PERMITS + QUEUE
    hashing.close()


async def test_the_event_loop_goes_on() -> None:
    """While one hash is computed, the loop runs, and even answers another request."""
    hashing = Hashing(CHEAP, Counters())
    slow = asyncio.create_task(hashing.verify(SLOW, TOKEN))
    assert await hashing.verify(await hashing.hash(TOKEN), TOKEN)
    assert not slow.done()
    assert not await slow
    hashing.close()


async def test_closing_ends_what_was_begun() -> None:
    """What was asked for before closing is answered, what is asked later is refused."""
    counters = Counters()
    hashing = Hashing(CHEAP, counters)
    made = await hashing.hash(TOKEN)
    begun = [asyncio.create_task(hashing.verify(made, TOKEN)) for _ in range(QUEUE)]
    await asyncio.wait(begun, timeout=0)
    hashing.close()
    assert await asyncio.gather(*begun) == [True] * QUEUE
    for _ in range(PERMITS + QUEUE + 1):
        with pytest.raises(Unavailable) as caught:
            await hashing.hash(TOKEN)
        assert caught.value.reason == "closed"
    assert counters.hashes == 1 + QUEUE
