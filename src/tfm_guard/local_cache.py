"""The local cache: what this process remembers of keys. Bounded, and invisible to the collector.

A million remembered keys must cost neither a pause nor 300 bytes each. Hence an entry is a struct
that the garbage collector does not track, holding bytes and references to shared objects; a dict
of such entries is not tracked either; and the order of eviction is kept in a bytearray.
"""

from collections import deque
from typing import Final

from msgspec import Struct

from tfm_guard.records import VerifiedKey
from tfm_guard.token import PREFIX_LENGTH

# How many used entries an insertion passes over before it evicts one all the same.
_MAXIMUM_STEPS: Final = 32
# In place of when an entry was last used.
_NEVER: Final = -2.0
_COUNTED: Final = -1.0
# A slot of the ring: a prefix, and the entry's hits (the last 8 bits) when the hand last passed.
_SLOT: Final = PREFIX_LENGTH + 1


class LocalEntry(Struct, gc=False):
    """A key that was active when it was read."""

    key: VerifiedKey
    deadline: float  # monotonic seconds; not to be believed from then on
    hits: int = 0  # not yet counted
    used_at: float = _NEVER  # monotonic seconds of the last hit, while it has hits

    @property
    def key_id(self) -> bytes:
        return self.key.record[16:32]

    def count(self) -> int:
        """Return its hits, which are counted with that, and begin anew."""
        hits, self.hits = self.hits, 0
        # One object for all that were counted; the hand of the clock sees that it was used.
        self.used_at = _COUNTED
        return hits


class LocalCache:
    """At most *capacity* entries by prefix, evicted by the CLOCK algorithm (second chance)."""

    def __init__(self, capacity: int) -> None:
        self.entries: dict[bytes, LocalEntry] = {}
        # Those with hits that are not yet counted, the longest first. One that has left the cache
        # since stays here until it is counted.
        self.used: deque[LocalEntry] = deque()
        self.capacity = capacity
        # The prefix in each slot. A slot whose prefix has been dropped is taken by the next
        # insertion that comes past; a prefix may thus stand in two slots, which costs nothing but
        # an earlier second look.
        self._ring = bytearray()
        self._hand = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"LocalCache({len(self)} of {self.capacity})"

    def put(self, prefix: bytes, key: VerifiedKey, deadline: float) -> None:
        """Remember *key* until *deadline*, monotonic seconds."""
        if prefix not in self.entries:
            self._take_slot(prefix)
        self.entries[prefix] = LocalEntry(key, deadline)

    def drop(self, prefix: bytes) -> None:
        """Forget one key."""
        self.entries.pop(prefix, None)

    def clear(self) -> None:
        """Forget all keys."""
        self.entries.clear()
        self._ring.clear()
        self._hand = 0

    def _take_slot(self, prefix: bytes) -> None:
        if len(self._ring) < self.capacity * _SLOT:
            self._ring += prefix + b"\0"
            return
        slot = slice(0)
        for _ in range(_MAXIMUM_STEPS):
            slot, passed = slice(self._hand, self._hand + PREFIX_LENGTH), self._hand + PREFIX_LENGTH
            self._hand = (self._hand + _SLOT) % len(self._ring)
            entry = self.entries.get(bytes(self._ring[slot]))
            if entry is None or not _was_used(entry, self._ring[passed]):
                break
            self._ring[passed] = entry.hits & 0xFF
            if not entry.hits:
                entry.used_at = _NEVER
        self.entries.pop(bytes(self._ring[slot]), None)
        self._ring[slot.start : slot.start + _SLOT] = prefix + b"\0"


def _was_used(entry: LocalEntry, passed: int) -> bool:
    """Tell whether an entry was used since the hand came by, or since the last count before."""
    return entry.hits & 0xFF != passed if entry.hits else entry.used_at != _NEVER


class Denial(Struct, frozen=True, gc=False):
    """Why a token is refused, and the id of the key with its prefix, if there is one."""

    reason: str
    key_id: bytes | None


class NegativeCache:
    """Tokens known to prove no key, by digest, with the denial. At most *capacity*.

    Two generations: when the younger is half of all, the older is dropped. `epoch` moves whenever
    everything is forgotten, so that a look-up begun before can tell that it comes too late.
    """

    def __init__(self, capacity: int) -> None:
        self.epoch = 0
        self._half = capacity // 2
        self._young: dict[bytes, Denial] = {}
        self._old: dict[bytes, Denial] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, digest: bytes) -> Denial | None:
        """Return why the token with *digest* is refused, if that is known."""
        return self._young.get(digest) or self._old.get(digest)

    def put(self, digest: bytes, denial: Denial) -> None:
        """Remember that the token with *digest* is refused."""
        if len(self._young) >= self._half:
            # A capacity of one has no halves: the younger generation is all there is.
            self._old = self._young if self._half else {}
            self._young = {}
        self._young[digest] = denial

    def clear(self) -> None:
        """Forget everything."""
        self.epoch += 1
        self._young = {}
        self._old = {}
