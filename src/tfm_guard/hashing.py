"""What is stored of a token besides its digest: argon2id, or what came with an imported key.

argon2 is computed off the event loop, in a pool that cannot be flooded.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hmac import compare_digest
from typing import Final, NamedTuple, TypeVar

from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.settings import MAXIMUM_WORK_KIB

T = TypeVar("T")

# How many hashes are computed at once, and how many more may wait, in one process.
PERMITS: Final = 2
QUEUE: Final = 16

# A row may have been written by anyone with access to the database: what it asks for is not
# allowed to take the machine down. RFC 9106's second choice, and argon2-cffi's default, is 64 MiB
# and three passes; this admits two and a half times that work.
_MAXIMUM_MEMORY_KIB: Final = 262_144
_MAXIMUM_LANES: Final = 16

# A fast hash is stored as its name, this mark, and its hexadecimal digits.
_TAG: Final = "$"
_FAST_HASHES: Final = {"sha256": hashlib.sha256, "sha512": hashlib.sha512}
_FAST_HASH_BY_DIGITS: Final = {
    hash_().digest_size * 2: name for name, hash_ in _FAST_HASHES.items()
}
_LOWERCASE_HEX: Final = re.compile(r"[0-9a-f]+")
_PHC: Final = re.compile(
    r"\$argon2(?:id|i|d)\$v=(?:16|19)\$m=[1-9][0-9]{0,9},t=[1-9][0-9]{0,9},p=[1-9][0-9]{0,9}"
    r"\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)"
)
# RFC 9106 section 3.1 asks for 8 bytes of salt, and has hashes from 4 bytes on: of so short a one,
# many tokens would pass for the right one.
_SALT_BYTES: Final = range(8, 65)
_HASH_BYTES: Final = range(16, 65)
_LEAST_MEMORY_KIB_PER_LANE: Final = 8


class HashingProfile(NamedTuple):
    """The cost of an argon2id hash."""

    time_cost: int
    memory_kib: int
    parallelism: int


class Hashing:
    """Computes and verifies argon2id hashes of tokens on `PERMITS` threads of its own.

    A permit belongs to the thread that computes, not to the request that asked: a request that is
    cancelled frees nothing that is still being computed. Beyond `QUEUE` waiting, `Unavailable`.
    """

    def __init__(self, profile: HashingProfile, counters: Counters) -> None:
        self._hasher = PasswordHasher(
            time_cost=profile.time_cost,
            memory_cost=profile.memory_kib,
            parallelism=profile.parallelism,
            type=Type.ID,
        )
        self._threads = ThreadPoolExecutor(PERMITS, thread_name_prefix="tfm-guard-argon2")
        self._room = threading.BoundedSemaphore(PERMITS + QUEUE)
        self._counters = counters
        self._counting = threading.Lock()  # to add one is several steps, on several threads

    async def hash(self, token: bytes) -> str:
        """Return the argon2id hash of *token* in PHC form. Raises `Unavailable`."""
        return await self._run(lambda: self._hasher.hash(token))

    async def verify(self, secret_hash: str, token: bytes) -> bool:
        """Tell whether *secret_hash*, an argon2 PHC string or a tagged fast hash, is of *token*.

        One that is unreadable or asks for more than this machine should give is of no token.
        Raises `Unavailable`.
        """
        name, _, digits = secret_hash.partition(_TAG)
        if name in _FAST_HASHES:  # the work of microseconds, and so done here
            return compare_digest(_FAST_HASHES[name](token).hexdigest().encode(), digits.encode())
        if not _is_affordable(secret_hash):
            return False

        def compute() -> bool:
            with contextlib.suppress(VerificationError, InvalidHashError):
                return self._hasher.verify(secret_hash, token)
            return False

        return await self._run(compute)

    def close(self) -> None:
        """End the threads once all that was asked for is computed; refuse what comes later."""
        # To cancel what waits would look, to those who wait for it, like their own cancellation.
        self._threads.shutdown(wait=False)

    async def _run(self, compute: Callable[[], T]) -> T:
        if not self._room.acquire(blocking=False):
            raise Unavailable("the argon2 queue is full")

        def in_thread() -> T:
            with self._counting:
                self._counters.hashes += 1
            return compute()

        try:
            future = self._threads.submit(in_thread)
        except RuntimeError:
            self._room.release()
            raise Unavailable("closed") from None
        # Called once for every end: computed, failed, or cancelled before a thread took it up.
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)


def _is_affordable(secret_hash: str) -> bool:
    if not secret_hash.isascii():
        return False  # argon2-cffi would raise UnicodeEncodeError
    try:
        asked = extract_parameters(secret_hash)
    except InvalidHashError:
        return False
    return (
        asked.memory_cost <= _MAXIMUM_MEMORY_KIB
        and asked.memory_cost * asked.time_cost <= MAXIMUM_WORK_KIB
        and asked.parallelism <= _MAXIMUM_LANES
    )


def read_hash(text: str) -> str:
    """Return the hash that *text* gives of a whole token, as it is stored and verified.

    It is an argon2 PHC string, or the hexadecimal digits of a SHA-256 or SHA-512. Raises
    `ValueError` with what is wrong with it; the message never quotes it.
    """
    if text.startswith("$"):
        return _checked_phc(text)
    digits = text.lower()
    name = _FAST_HASH_BY_DIGITS.get(len(digits))
    if name is None or not _LOWERCASE_HEX.fullmatch(digits):
        raise ValueError(
            "Expected an argon2 PHC string ($argon2id$v=19$…), 64 hexadecimal digits of SHA-256, "
            "or 128 of SHA-512"
        )
    return f"{name}{_TAG}{digits}"


def _checked_phc(text: str) -> str:
    match = _PHC.fullmatch(text)
    if match is None:
        raise ValueError("This is no argon2 PHC string, like $argon2id$v=19$m=19456,t=2,p=1$…$…")
    salt, hash_ = map(_decoded_length, match.groups())
    if salt not in _SALT_BYTES or hash_ not in _HASH_BYTES:
        raise ValueError(
            f"argon2 with {salt} bytes of salt and {hash_} of hash: expected "
            f"{_SALT_BYTES[0]} to {_SALT_BYTES[-1]}, and {_HASH_BYTES[0]} to {_HASH_BYTES[-1]}"
        )
    asked = extract_parameters(text)
    if asked.memory_cost < _LEAST_MEMORY_KIB_PER_LANE * asked.parallelism:
        raise ValueError(f"argon2 needs at least {_LEAST_MEMORY_KIB_PER_LANE} KiB for each lane")
    if not _is_affordable(text):
        raise ValueError(
            f"argon2 with m={asked.memory_cost},t={asked.time_cost},p={asked.parallelism} asks for "
            f"too much: m at most {_MAXIMUM_MEMORY_KIB}, m times t at most {MAXIMUM_WORK_KIB}, "
            f"p at most {_MAXIMUM_LANES}"
        )
    return text


def _decoded_length(text: str) -> int:
    """Return how many bytes *text* stands for in base64 without padding; 0 if it is none."""
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return 0
    # Of the bits left over in the last letter argon2 demands that they are zero.
    return len(decoded) if base64.b64encode(decoded).decode().rstrip("=") == text else 0
