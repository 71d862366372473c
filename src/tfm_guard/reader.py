"""Reading keys that memory does not know: from the shared cache, else from the store.

However many ask for a prefix at the same time, one read is made for all: a flight.
"""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

from tfm_guard.clock import Clock
from tfm_guard.coalescer import Coalescer, Shared
from tfm_guard.counters import Counters
from tfm_guard.deadlines import Deadlines
from tfm_guard.errors import Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.local_cache import LocalCache
from tfm_guard.records import (
    CacheEntry,
    Change,
    ChangeKind,
    KeyCredentials,
    StoredKey,
    VerifiedKey,
)
from tfm_guard.shared_cache import MAX_AGE_SECONDS, SKEW_SECONDS, SharedCache
from tfm_guard.store import Store

T = TypeVar("T")

# A change that was not read from the feed.
_UNNUMBERED: Final = 0
# The version that a key is created as.
_FIRST: Final = 1


class Known(NamedTuple):
    """A key that was found, ready to be compared with a token."""

    entry: CacheEntry
    key: VerifiedKey
    suspended: bool
    read_at: float  # the database's time, seconds since 1970

    @property
    def expired(self) -> bool:
        """Whether the key had come to its end when it was read."""
        end = self.entry.expires_at
        return end is not None and end.timestamp() <= self.read_at


class Unproven(NamedTuple):
    """A row with no digest under the current key: its token must prove itself in a slower way."""

    row: StoredKey
    beginning: "Beginning"

    @property
    def suspended(self) -> bool:
        """Whether the key's account is."""
        return self.row.suspended_at is not None


class Beginning(NamedTuple):
    """What was known just before a read was sent: what comes of it is kept only if that stands."""

    epoch: int
    floor: int
    sealed_at: float  # the database's time or a little earlier, seconds since 1970
    monotonic: float  # seconds


class Flight(Shared[Known | Unproven | None]):
    """A read of one key, under way or about to be. *sent* from before its first question leaves."""

    __slots__ = ("beginning", "follower", "prefix", "sent")

    beginning: Beginning  # once it is sent

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.sent = False
        self.follower: Flight | None = None  # for the same prefix, to be sent when this has landed


class KeyReader:
    """Finds keys by prefix, and has *local* remember them while nothing has changed."""

    def __init__(
        self,
        *,
        store: Store,
        shared: SharedCache | None,
        local: LocalCache,
        freshness: Freshness,
        digest_key_id: str,
        realm: str,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._store = store
        self._shared = shared
        self._local = local
        self._freshness = freshness
        self._digest_key_id = digest_key_id
        self._realm = realm
        self._clock = clock
        self._counters = counters
        self._departures = Coalescer(self._fly, self._fail)
        self._flights: dict[str, Flight] = {}
        self._deadlines = Deadlines()

    async def find(self, prefix: str, *, since: float) -> Known | Unproven | None:
        """Return the key with *prefix*, read no earlier than any change made before this call.

        Raises `Unavailable`, at the latest `DEADLINE_SECONDS` from *since*, in the loop's time.
        """
        # A read that has been sent may have missed a change made before this call. While fresh,
        # that change would have detached the flight; otherwise nobody can tell.
        flight, joined = self._board(prefix, sent_ones_too=self._freshness.is_fresh())
        found = await self._landing(flight, since)
        if joined and self._may_differ_now(found):
            flight, _ = self._board(prefix, sent_ones_too=False)
            found = await self._landing(flight, since)
        return found

    def _may_differ_now(self, found: Known | Unproven | None) -> bool:
        """Tell whether time alone, or what nobody waits for, may have changed what was found."""
        if found is None:
            return True  # nobody waits until all know of a new key: it may have been made since
        if found.suspended:
            return True  # nor until all know that its account was resumed
        expires_at = (found.row if isinstance(found, Unproven) else found.entry).expires_at
        if expires_at is None:
            return False
        return expires_at.timestamp() - self._freshness.database_time() < SKEW_SECONDS

    def _board(self, prefix: str, *, sent_ones_too: bool) -> tuple[Flight, bool]:
        """Return a flight to wait for, and whether it had been sent before."""
        flight = self._flights.get(prefix)
        if flight is not None and (sent_ones_too or not flight.sent):
            return flight, flight.sent
        next_one = self._flights[prefix] = Flight(prefix)
        if flight is None:
            self._departures.put(next_one)
        else:
            # One read at a time for a prefix, however many ask while nothing is fresh.
            flight.follower = next_one
        return next_one, False

    def _landing(self, flight: Flight, since: float) -> "asyncio.Future[Known | Unproven | None]":
        landing = flight.wait()
        self._deadlines.limit(landing, since)
        return landing

    def detach(self, prefix: str) -> None:
        """Let nobody join the flight for *prefix* any more: its key has changed."""
        self._flights.pop(prefix, None)

    def detach_all(self) -> None:
        """Let nobody join any of the present flights any more."""
        self._flights.clear()

    def proven(self, unproven: Unproven, digest: bytes) -> Known:
        """Return the key whose row has been proven to belong to a token with *digest*.

        Raises `Unavailable` where the key has changed since: proving may take long.
        """
        if unproven.row.version < self._freshness.floor(unproven.row.prefix):
            raise Unavailable("the key changed while a token for it was proven")
        return self._know_row(unproven.row, digest, unproven.beginning)

    async def _fly(self, flights: list[Flight]) -> None:
        """Land *flights*: those whose keys the shared cache knows before it asks for the others."""
        self._begin(flights)
        left = await self._ask_shared(flights)
        if left:
            left = await self._ask_store(left)
        if left:
            # A change has overtaken the read; one that begins now finds it.
            left = await self._ask_store(left)
        if left:
            raise Unavailable("the database is older than what is known already")

    def _begin(self, flights: list[Flight]) -> None:
        epoch = self._freshness.epoch
        # What is known of the database's time may be ahead of it by as long as reading it took.
        sealed_at = self._freshness.database_time() - SKEW_SECONDS
        now = self._clock.monotonic()
        for flight in flights:
            floor = self._freshness.floor(flight.prefix)
            flight.beginning = Beginning(epoch, floor, sealed_at, now)
            flight.sent = True

    async def _ask_shared(self, flights: list[Flight]) -> list[Flight]:
        """Land the flights whose keys the shared cache knows, and return the others."""
        if self._shared is None or not self._freshness.is_fresh():
            return flights
        prefixes = [flight.prefix for flight in flights]
        entries = await self._shared.find(prefixes, counts=self._counts)
        if not self._freshness.is_fresh():
            return flights
        left = []
        for flight in flights:
            entry = entries.get(flight.prefix)
            if entry is None:
                left.append(flight)
            else:
                self._land(flight, self._know_entry, entry)
        return left

    async def _ask_store(self, flights: list[Flight]) -> list[Flight]:
        """Land the flights by the store's rows, and return those whose rows are too old."""
        self._counters.store_reads += 1
        rows = await self._store.find_keys([flight.prefix for flight in flights])
        left = []
        for flight in flights:
            row = rows.get(flight.prefix)
            if row is None:
                self._end(flight)
                flight.answer(None)
            elif row.version < self._freshness.floor(flight.prefix):
                left.append(flight)
            else:
                self._land(flight, self._read_row, row)
        return left

    def _land(
        self,
        flight: Flight,
        know: Callable[[str, T, Beginning], Known | Unproven],
        found: T,
    ) -> None:
        """Have all who are aboard get what there is to *know* of what was *found*."""
        self._end(flight)
        try:
            known = know(flight.prefix, found, flight.beginning)
        except Exception as error:  # noqa: BLE001  # of this key alone
            flight.fail(error)
        else:
            flight.answer(known)

    def _fail(self, flights: list[Flight], error: BaseException) -> None:
        for flight in flights:  # those that have landed notice nothing of it
            self._end(flight)
            flight.fail(error)

    def _end(self, flight: Flight) -> None:
        """Have nobody join *flight* any more, and the next one leave."""
        if self._flights.get(flight.prefix) is flight:
            del self._flights[flight.prefix]
        if flight.follower is not None:
            self._departures.put(flight.follower)
            flight.follower = None

    def _counts(self, prefix: str, entry: CacheEntry) -> bool:
        """Tell whether an entry may be believed now, after the wait for it."""
        now = self._freshness.database_time()
        age = now - entry.sealed_at
        return (
            -SKEW_SECONDS <= age < MAX_AGE_SECONDS
            and entry.sealed_at >= self._freshness.sealed_after
            and entry.version >= self._freshness.floor(prefix)
            # Close to the end of a key only the database, whose clock decides, can tell.
            and (entry.expires_at is None or entry.expires_at.timestamp() - now > SKEW_SECONDS)
        )

    def _know_entry(self, prefix: str, entry: CacheEntry, beginning: Beginning) -> Known:
        now = self._freshness.database_time()
        known = Known(entry, self._key_of(prefix, entry), suspended=False, read_at=now)
        if self._still_stands(prefix, beginning):
            age = now - entry.sealed_at
            self._remember(prefix, known, self._clock.monotonic(), MAX_AGE_SECONDS - age)
        self._learn(prefix, known)
        return known

    def _read_row(self, _prefix: str, row: StoredKey, beginning: Beginning) -> Known | Unproven:
        if row.digest is None or row.digest_key_id != self._digest_key_id:
            return Unproven(row, beginning)
        return self._know_row(row, row.digest, beginning)

    def _know_row(self, row: StoredKey, digest: bytes, beginning: Beginning) -> Known:
        entry = CacheEntry(
            sealed_at=beginning.sealed_at,
            version=row.version,
            revoked=row.revoked_at is not None,
            digest=digest,
            key_id=row.id,
            account_id=row.account_id,
            name=row.name,
            scopes=tuple(sorted(row.scopes)),
            expires_at=row.expires_at,
            replaced_at=row.replaced_at,
        )
        known = Known(
            entry,
            self._key_of(row.prefix, entry),
            suspended=row.suspended_at is not None,
            read_at=row.read_at.timestamp(),
        )
        if not known.suspended and self._still_stands(row.prefix, beginning):
            self._remember(row.prefix, known, beginning.monotonic, MAX_AGE_SECONDS)
            if self._shared is not None:
                self._shared.put(row.prefix, entry)
        self._learn(row.prefix, known)
        return known

    def _learn(self, prefix: str, known: Known) -> None:
        """Take what was read for known: who has refused a key does not accept it afterwards.

        Memory may hold it as it was before, and a poll begun before it changed may make memory
        count again.
        """
        entry, remembered = known.entry, self._local.entries.get(prefix.encode())
        changed = remembered is not None and remembered.key != known.key
        ended = entry.revoked or known.suspended or known.expired
        # What a key was made with, nobody has ever known otherwise.
        if (ended or changed) and entry.version > max(self._freshness.floor(prefix), _FIRST):
            kind: ChangeKind = "suspended" if known.suspended else "narrowed"
            kind = "revoked" if entry.revoked else kind
            self._freshness.apply(Change(_UNNUMBERED, kind, prefix, entry.version))

    def _still_stands(self, prefix: str, beginning: Beginning) -> bool:
        return (
            self._freshness.is_fresh()
            and self._freshness.epoch == beginning.epoch
            and self._freshness.floor(prefix) == beginning.floor
        )

    def _remember(self, prefix: str, known: Known, since: float, seconds: float) -> None:
        """Have memory keep an active key for *seconds* from *since*, monotonic, or its expiry."""
        entry = known.entry
        if entry.revoked:
            return
        if entry.expires_at is not None:
            seconds = min(seconds, entry.expires_at.timestamp() - known.read_at)
        self._local.put(prefix.encode(), known.key, _whole_second(int(since + seconds)))

    def _key_of(self, prefix: str, entry: CacheEntry) -> VerifiedKey:
        return VerifiedKey.pack(
            digest=entry.digest,
            key_id=entry.key_id,
            key_prefix=prefix,
            account_id=entry.account_id,
            name=entry.name,
            expires_at=entry.expires_at,
            replaced_at=entry.replaced_at,
            credentials=_credentials(entry.scopes, self._realm, entry.replaced_at is not None),
        )


_SHARED_OBJECTS: Final = 4096


@lru_cache(_SHARED_OBJECTS)
def _credentials(scopes: tuple[str, ...], realm: str, replaced: bool) -> KeyCredentials:  # noqa: FBT001  # by position, for the cache
    return KeyCredentials(frozenset(scopes), realm, replaced=replaced)


@lru_cache(_SHARED_OBJECTS)
def _whole_second(second: int) -> float:
    # One object for all entries that end in the same second, up to a second early.
    return float(second)
