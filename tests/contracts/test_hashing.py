"""Facts about argon2id off the event loop."""

import asyncio
import base64
import hashlib
import threading
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.servers import wait_until
from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.hashing import PERMITS, QUEUE, Hashing, HashingProfile, read_hash

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


@pytest.mark.parametrize("name", ["sha256", "sha512"])
async def test_a_fast_hash_proves_its_token_alone(name: str) -> None:
    """A tagged SHA-256 or SHA-512 is of its token and of no other, and costs no argon2."""
    counters = Counters()
    hashing = Hashing(CHEAP, counters)
    stored = read_hash(hashlib.new(name, TOKEN).hexdigest())
    assert stored.startswith(f"{name}$")
    assert await hashing.verify(stored, TOKEN)
    assert not await hashing.verify(stored, TOKEN[:-1] + b"8")
    assert not await hashing.verify(stored[:-1], TOKEN)
    assert not await hashing.verify(stored + "0", TOKEN)
    assert counters.hashes == 0
    hashing.close()


@given(st.binary(max_size=80), st.binary(max_size=80), st.sampled_from(["sha256", "sha512"]))
async def test_whatever_is_hashed_is_told_apart(token: bytes, other: bytes, name: str) -> None:
    """For any two tokens, the hash of one is of the other only if both are the same."""
    hashing = Hashing(CHEAP, Counters())
    stored = read_hash(hashlib.new(name, token).hexdigest().upper())
    assert await hashing.verify(stored, token)
    assert await hashing.verify(stored, other) == (token == other)
    hashing.close()


@example(f"sha256${'0' * 64}")
@example("$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHRzYWx0$")
@given(st.text() | st.lists(pieces, max_size=12).map("".join))
async def test_garbage_is_no_hash(garbage: str) -> None:
    """What is no hash is refused with a `ValueError`, whatever it is."""
    with pytest.raises(ValueError, match="argon2"):
        read_hash(garbage)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"salt": b"salt"}, "4 bytes of salt"),
        ({"salt": b"salt" * 17}, "68 bytes of salt"),
        ({"hash_len": 15}, "15 of hash"),
        ({"hash_len": 65}, "65 of hash"),
        ({"memory": 262_145}, "asks for too much"),
        ({"memory": 262_144, "time": 3}, "asks for too much"),
        ({"lanes": 17, "memory": 256}, "asks for too much"),
        ({"lanes": 2, "memory": 15}, "at least 8 KiB for each lane"),
        ({"lanes": 0}, "no argon2 PHC string"),
        ({"kind": "argon2x"}, "no argon2 PHC string"),
        ({"version": 18}, "no argon2 PHC string"),
    ],
)
def test_an_argon2_hash_out_of_bounds_is_refused(changes: dict[str, Any], expected: str) -> None:
    """What could not be verified, or proves too little or costs too much, is not taken over."""
    assert read_hash(phc()) == phc()
    with pytest.raises(ValueError, match=expected):
        read_hash(phc(**changes))


def phc(
    *,
    kind: str = "argon2id",
    version: int = 19,
    memory: int = 8,
    time: int = 1,
    lanes: int = 1,
    salt: bytes = b"saltsalt",
    hash_len: int = 16,
) -> str:
    """Return an argon2 hash with these parameters; of no token, very likely."""
    encoded = [base64.b64encode(part).decode().rstrip("=") for part in (salt, b"h" * hash_len)]
    return f"${kind}$v={version}$m={memory},t={time},p={lanes}${encoded[0]}${encoded[1]}"


def test_base64_that_argon2_cannot_read_is_refused() -> None:
    """Bits left over that are not zero, which argon2 never verifies, are noticed at once."""
    good = phc(salt=b"saltsaltsa")
    assert read_hash(good) == good
    salt = good.split("$")[-2]
    with pytest.raises(ValueError, match="0 bytes of salt"):
        read_hash(good.replace(salt, salt[:-1] + chr(ord(salt[-1]) + 1)))
