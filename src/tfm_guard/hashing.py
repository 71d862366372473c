"""argon2id, off the event loop, in a pool that cannot be flooded."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable

T = TypeVar("T")

# How many hashes are computed at once, and how many more may wait, in one process.
PERMITS: Final = 2
QUEUE: Final = 16

# A row may have been written by anyone with access to the database: what it asks for is not
# allowed to take the machine down. RFC 9106's second choice, and argon2-cffi's default, is 64 MiB
# and three passes; this admits two and a half times that work.
_MAXIMUM_MEMORY_KIB: Final = 262_144
_MAXIMUM_WORK_KIB: Final = 524_288  # memory times passes
_MAXIMUM_LANES: Final = 16


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
        """Tell whether *secret_hash*, an argon2 PHC string, is of *token*.

        One that is unreadable or asks for more than this machine should give is of no token.
        Raises `Unavailable`.
        """
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
        and asked.memory_cost * asked.time_cost <= _MAXIMUM_WORK_KIB
        and asked.parallelism <= _MAXIMUM_LANES
    )
