"""The shared cache: keys in Redis or Valkey, sealed, because anyone may write there.

Nothing that is read here is believed for being here. An entry counts if its seal holds for the
name it was found under and it is young enough; whether it has been overtaken by a change, the
caller decides. All else is a miss, and every failure is one too.
"""

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from hmac import compare_digest
from types import NoneType
from typing import Any, Final

import msgspec

from tfm_guard.clock import Clock
from tfm_guard.coalescer import LIMIT
from tfm_guard.counters import Counters
from tfm_guard.errors import ConfigurationError
from tfm_guard.records import CacheEntry
from tfm_guard.redis_access import TIMEOUT_SECONDS, RedisAccess, describe

_log: Final = logging.getLogger(__name__)

# An entry says nothing any more this long after its database read began.
MAX_AGE_SECONDS: Final = 600.0
# How far two processes' ideas of the database's time may be apart.
SKEW_SECONDS: Final = 1.0
_WAITING_FILLS: Final = 4 * LIMIT

_FORMAT: Final = b"1"
_SEAL_BYTES: Final = 16
_VERSION_END: Final = len(_FORMAT) + 16  # hexadecimal, so that the script can compare texts

# Writes each entry over nothing, over a lower version, or over the very garbage that was read
# (named by its SHA-1); never over another entry of the same or a later version.
_FILL: Final = """
for i, name in ipairs(KEYS) do
  local new, garbage = ARGV[2 * i], ARGV[2 * i + 1]
  local old = redis.pcall('GET', name)
  local write = not old or type(old) == 'table' or redis.sha1hex(old) == garbage
  if not write and string.sub(old, 1, 1) == '1' and string.sub(old, 2, 17) < string.sub(new, 2, 17)
  then write = true end
  if write then redis.call('SET', name, new, 'PX', ARGV[1]) end
end
"""


class SharedCache:
    """Entries in *redis* whose names begin with *names*, sealed with *seal_key* (32 bytes)."""

    def __init__(
        self,
        redis: RedisAccess,
        *,
        names: str,
        seal_key: bytes,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._redis = redis
        self._names = names
        # The beginning of every seal, which so is computed once.
        self._seals = blake2b(
            names.encode(), key=seal_key, digest_size=_SEAL_BYTES, person=b"tfm-guard entry"
        )
        self._counters = counters
        self._breaker = Breaker(self._probe, clock=clock)
        self._fill = redis.client.register_script(_FILL)
        self._fills: dict[str, tuple[CacheEntry, bytes]] = {}
        self._filling: asyncio.Task[None] | None = None
        # What was read and did not count, for the next fill to overwrite: prefix to SHA-1.
        self._garbage: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"SharedCache({self._breaker!r})"

    async def open(self) -> None:
        """Connect, if Redis is there; go on trying if not. Raises `ConfigurationError`."""
        await self._breaker.start()

    async def close(self) -> None:
        """End what is under way; what was still to be filled is left out."""
        await self._breaker.stop()
        if self._filling is not None:
            self._filling.cancel()

    async def find(
        self, prefixes: list[str], *, counts: Callable[[str, CacheEntry], bool]
    ) -> dict[str, CacheEntry]:
        """Return the entries for *prefixes* whose seals hold, and which *count*; never raises.

        One that does not is overwritten by the next `put`.
        """
        if not self._breaker.closed:
            return {}
        try:
            values = await self._read(prefixes)
        except Exception:  # noqa: BLE001  # counted where it was raised; to the caller all are misses
            return {}
        found = {}
        for prefix, value in zip(prefixes, values, strict=True):
            if value is None:
                self._counters.shared_misses += 1
                continue
            entry = self._unseal(prefix, value)
            if entry is None or not counts(prefix, entry):
                self._reject(prefix, value)
            else:
                found[prefix] = entry
        self._counters.shared_hits += len(found)
        return found

    def put(self, prefix: str, entry: CacheEntry) -> None:
        """Write *entry* soon, unless Redis has the same or a later version by then."""
        if not self._breaker.closed:
            return
        if len(self._fills) >= _WAITING_FILLS:
            self._counters.shared_fills_dropped += 1
            return
        self._fills[prefix] = entry, self._garbage.pop(prefix, b"")
        if self._filling is None:
            self._filling = asyncio.get_running_loop().create_task(self._write_fills())

    def _reject(self, prefix: str, value: bytes) -> None:
        self._counters.shared_rejected += 1
        if len(self._garbage) >= _WAITING_FILLS:
            # Most was found under names of no key, for which no fill will ever come.
            self._garbage.clear()
        self._garbage[prefix] = hashlib.sha1(value, usedforsecurity=False).hexdigest().encode()

    async def _read(self, prefixes: list[str]) -> list[bytes | None]:
        self._counters.shared_reads += 1
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                names = [self._names + prefix for prefix in prefixes]
                values: Any = await self._redis.client.mget(names)
            found = _checked(values, len(names))
        except Exception as error:
            self._counters.shared_failures += 1
            self._breaker.failed(error)
            raise
        self._breaker.succeeded()
        return found

    async def _write_fills(self) -> None:
        try:
            while self._fills:
                batch = [self._fills.popitem() for _ in range(min(LIMIT, len(self._fills)))]
                arguments: list[Any] = [int(MAX_AGE_SECONDS * 1000)]
                for prefix, (entry, garbage) in batch:
                    arguments += [self._seal(prefix, entry), garbage]
                names = [self._names + prefix for prefix, _ in batch]
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    await self._fill(keys=names, args=arguments)
        except Exception as error:  # noqa: BLE001  # whatever is there that calls itself Redis
            # Nothing is lost but speed, and reads go on: only they open the breaker.
            self._counters.shared_failures += 1
            self._fills.clear()
            _log.debug("entries were not written to Redis: %s", type(error).__name__)
        finally:
            self._filling = None

    async def _probe(self) -> None:
        """Raise unless a master that is of no cluster can be reached."""
        wire = await self._redis.connect()
        await wire.close()

    def _seal(self, prefix: str, entry: CacheEntry) -> bytes:
        value = _FORMAT + b"%016x" % entry.version + msgspec.msgpack.encode(entry)
        return value + self._mac(prefix, value)

    def _unseal(self, prefix: str, value: bytes) -> CacheEntry | None:
        body, seal = value[:-_SEAL_BYTES], value[-_SEAL_BYTES:]
        if not body.startswith(_FORMAT) or not compare_digest(seal, self._mac(prefix, body)):
            return None
        try:
            return _decoder.decode(body[_VERSION_END:])
        except msgspec.MsgspecError:
            return None  # sealed by a release with other fields

    def _mac(self, prefix: str, body: bytes) -> bytes:
        # With the name in it, an entry copied under another name is a forgery.
        mac = self._seals.copy()
        mac.update(prefix.encode())
        mac.update(body)
        return mac.digest()


_decoder: Final = msgspec.msgpack.Decoder(CacheEntry)


def _checked(values: Any, count: int) -> list[bytes | None]:
    """Return what MGET was answered with; raise if Redis does not answer so."""
    if (
        isinstance(values, list)
        and len(values) == count
        and {bytes, NoneType}.issuperset(map(type, values))
    ):
        return values
    raise ConnectionError("the answer is not one that Redis gives")


class Breaker:
    """Keeps requests from waiting for a Redis that does not answer.

    It opens after `FAILURES` failures in a row. While it is open, *probe* is tried about once a
    second, in the background, so that no request pays for finding out; its success closes it.
    """

    FAILURES: Final = 3
    _PAUSE_SECONDS: Final = (0.5, 1.0)

    def __init__(self, probe: Callable[[], Awaitable[None]], *, clock: Clock) -> None:
        self.closed = False
        self._probe = probe
        self._clock = clock
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Breaker({'closed' if self.closed else 'open'})"

    async def start(self) -> None:
        """Probe once, and go on in the background if that fails. Raises `ConfigurationError`."""
        error = await self._try()
        if isinstance(error, ConfigurationError):
            raise error
        if error is not None:
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_closed())

    async def stop(self) -> None:
        """End the probing."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})

    def succeeded(self) -> None:
        """Note that a command was answered."""
        self._failures = 0

    def failed(self, error: BaseException) -> None:
        """Note that a command was not."""
        self._failures += 1
        if self.closed and self._failures >= self.FAILURES:
            self.closed = False
            _log.error("Redis is left aside for now: %s", describe(error))
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_closed())

    async def _probe_until_closed(self) -> None:
        while True:
            # Jittered, so that processes that lost Redis together do not return together.
            await self._clock.sleep(random.uniform(*self._PAUSE_SECONDS))  # noqa: S311
            if await self._try() is None:
                return

    async def _try(self) -> Exception | None:
        try:
            await self._probe()
        except Exception as error:  # noqa: BLE001  # whatever it is, probing must go on
            if not self._failures:
                _log.error("Redis cannot be used now: %s", describe(error))
            self._failures += 1
            return error
        self._failures = 0
        self.closed = True
        _log.info("Redis is in use")
        return None
