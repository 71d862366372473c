"""Deliberate breaks: each takes one rule out of the code of this process, and can put it back.

A test of a rule proves something only if it fails without the rule. These are for such tests:
``BREAKS[name]()`` applies a break and returns what undoes it.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable
from hmac import compare_digest
from typing import Any, Final

import msgspec
import sqlalchemy
from sqlalchemy import insert, update

from tfm_guard import (
    confirmation,
    deadlines,
    freshness,
    keys,
    link,
    reader,
    records,
    redis_access,
    shared_cache,
    usage,
    verifier,
)
from tfm_guard.errors import InvalidToken, Unavailable
from tfm_guard.local_cache import LocalCache
from tfm_guard.store import database, revoking, schema, store, transaction, upgrade

Undo = Callable[[], None]
_NOTHING: Final = object()


def put(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute of a class or a module; return what sets it back."""
    former = vars(owner).get(name, _NOTHING)
    setattr(owner, name, value)

    def undo() -> None:
        if former is _NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, former)

    return undo


def both(*undos: Undo) -> Undo:
    """Return what undoes several things."""

    def undo() -> None:
        for each in reversed(undos):
            each()

    return undo


def no_wait() -> Undo:
    """Revoking tells the others, and returns without having heard of them."""
    former = confirmation.Confirmation.wait
    telling = set()

    async def wait(self: Any, *args: Any, **options: Any) -> records.Revocation:
        task = asyncio.ensure_future(former(self, *args, **options))
        telling.add(task)
        task.add_done_callback(telling.discard)
        await asyncio.sleep(0)
        return records.Revocation(how="acknowledged", workers=0, seconds=0.0)

    return put(confirmation.Confirmation, "wait", wait)


def no_lease() -> Undo:
    """Memory counts for ever, whatever has been heard."""

    def set_value(self: Any, value: float) -> None:
        if value < math.inf:  # else it would outlast the break
            self.__dict__["fresh_until"] = value

    forever = property(lambda _self: math.inf, set_value)
    return put(freshness.Freshness, "fresh_until", forever)


def no_floors() -> Undo:
    """What is older than a known change is believed."""
    return put(freshness.Freshness, "floor", lambda _self, _prefix: 0)


def no_feed() -> Undo:
    """The feed is read, and its changes are not applied."""

    async def new_changes(_self: Any, _state: Any) -> list[Any]:
        return []

    return put(freshness.Freshness, "_new_changes", new_changes)


def no_seal() -> Undo:
    """What stands in Redis is believed whoever wrote it."""
    return put(shared_cache, "compare_digest", lambda _one, _other: True)


def no_breaker() -> Undo:
    """A Redis that does not answer is asked again by every request."""
    return put(shared_cache.Breaker, "failed", lambda _self, _error: None)


def no_fallback() -> Undo:
    """A read of Redis that fails, fails the request."""
    former = shared_cache.SharedCache.find

    async def find(self: Any, prefixes: list[str], *, counts: Any) -> Any:
        before = self._counters.shared_failures
        entries = await former(self, prefixes, counts=counts)
        if self._counters.shared_failures > before:
            raise Unavailable("Redis did not answer")
        return entries

    return put(shared_cache.SharedCache, "find", find)


def no_flights() -> Undo:
    """Every request reads for itself."""

    async def find(self: Any, prefix: str, **_: Any) -> Any:
        flight = reader.Flight(prefix)
        landing = flight.wait()
        await self._fly([flight])
        return await landing

    return put(reader.KeyReader, "find", find)


def no_detaching() -> Undo:
    """A read under way is joined, and what it brings back is kept, though a change came since."""
    return both(
        put(reader.KeyReader, "_still_stands", lambda *_: True),
        put(reader.KeyReader, "detach", lambda *_: None),
        no_floors(),
    )


def no_local() -> Undo:
    """Memory keeps nothing."""
    return put(LocalCache, "put", lambda *_, **__: None)


def no_fill() -> Undo:
    """Redis is read, and never written."""
    return put(shared_cache.SharedCache, "put", lambda *_: None)


def own_time() -> Undo:
    """A process takes its own wall time for the database's, and entries of any age count."""
    return both(
        put(freshness.Freshness, "database_time", lambda self: self._clock.now().timestamp()),
        put(reader.KeyReader, "_counts", lambda *_: True),
    )


def unavailable_is_no() -> Undo:
    """A key that cannot be checked is refused as if it were wrong."""
    former = verifier.Verifier.look_up

    async def look_up(self: Any, token: bytes) -> Any:
        try:
            return await former(self, token)
        except Unavailable as error:
            raise InvalidToken(error.reason) from None

    return put(verifier.Verifier, "look_up", look_up)


def no_deadline() -> Undo:
    """A request waits for the database for as long as it takes."""
    return both(put(database, "READ_SECONDS", 3600.0), put(deadlines, "DEADLINE_SECONDS", 3600.0))


def no_retry() -> Undo:
    """A transaction that another one was in the way of fails at once."""
    return put(database, "_ATTEMPTS", 1)


def no_account_lock() -> Undo:
    """Two changes of one account's keys may run at the same time."""

    async def lock_account(self: Any, account_id: str) -> Any:
        return transaction.LockedAccount(account_id, "free", None)

    return put(transaction.Transaction, "lock_account", lock_account)


def no_schema_lock() -> Undo:
    """Each process makes the tables without asking whether another one is at it."""
    return put(upgrade, "_LOCK", os.getpid())


def no_busy_wait() -> Undo:
    """A transaction on SQLite fails at once while another one writes."""
    former = sqlalchemy.Connection.exec_driver_sql

    def execute(self: Any, statement: str, *args: Any, **options: Any) -> Any:
        if statement == "BEGIN IMMEDIATE":
            former(self, "PRAGMA busy_timeout = 0")
        return former(self, statement, *args, **options)

    return put(sqlalchemy.Connection, "exec_driver_sql", execute)


def no_joining() -> Undo:
    """Revoking a key again says that there is none, confirmed or not."""
    former = revoking.revoke_at_once

    async def revoke(*args: Any) -> Any:
        change, new = await former(*args)
        return change if new else None, new

    return put(revoking, "revoke_at_once", revoke)


def no_role_check() -> Undo:
    """Any Redis will do, a replica too."""

    async def run_id(connection: Any) -> str:
        command = connection.pack_commands([("INFO", "server")])
        await connection.send_packed_command(command, check_health=False)
        info = await connection.read_response(disable_decoding=True, timeout=math.inf)
        return redis_access._field(info, b"run_id")  # noqa: SLF001  # what it replaces uses it

    return put(redis_access, "_checked_run_id", run_id)


def any_format() -> Undo:
    """What is sealed is taken to be of this release's form."""

    def unseal(self: Any, prefix: str, value: bytes) -> Any:
        body, seal = value[:-16], value[-16:]
        if not compare_digest(seal, self._mac(prefix, body)):
            return None
        return msgspec.msgpack.decode(body[17:], type=records.CacheEntry)

    return put(shared_cache.SharedCache, "_unseal", unseal)


def other_format() -> Undo:
    """Entries are written as another release might write them."""

    def seal(self: Any, prefix: str, entry: records.CacheEntry) -> bytes:
        value = b"2" + b"%016x" % entry.version + msgspec.msgpack.encode({"another": "form"})
        mac: bytes = self._mac(prefix, value)
        return value + mac

    return put(shared_cache.SharedCache, "_seal", seal)


def commits_early() -> Undo:
    """A revocation is committed before its row in the feed is written."""

    async def change_key(self: Any, kind: str, key: Any, **values: Any) -> None:
        await self._connection.execute(
            update(schema.keys)
            .where(schema.keys.c.id == key.id)
            .values(version=key.version + 1, **values)
        )
        await self._connection.exec_driver_sql("COMMIT")  # PostgreSQL's driver then begins anew
        self._pending.append((kind, key.prefix, key.version + 1))

    return both(put(transaction.Transaction, "change_key", change_key), in_steps())


def in_steps() -> Undo:
    """Revoking is several statements on PostgreSQL, too: where the next break takes one apart."""

    async def revoke_key(self: Any, account_id: str, key_id: Any, actor: Any) -> Any:
        who = records.Actor.of(actor)
        earlier, changes = await self.transact(
            lambda transaction: revoking.revoke(transaction, account_id, key_id, who)
        )
        return earlier or next(iter(changes), None)

    return put(store.Store, "revoke_key", revoke_key)


def numbers_early() -> Undo:
    """A change gets its number in a transaction of its own."""

    async def append_changes(self: Any) -> None:
        feed, changes = schema.feed, schema.changes
        await self._write()
        for kind, prefix, version in self._pending:
            async with self._connection.engine.begin() as own:
                statement = update(feed).values(head=feed.c.head + 1).returning(feed.c.head)
                head = (await own.execute(statement)).scalar_one()
            await self._connection.execute(
                insert(changes).values(
                    id=head, kind=kind, prefix=prefix, version=version, created_at=self.now
                )
            )
            self.changes.append(records.Change(head, kind, prefix, version))

    return put(transaction.Transaction, "append_changes", append_changes)


def no_publishing() -> Undo:
    """Nobody is told of a change but through the feed."""

    async def tell(_self: Any, *_: Any, **__: Any) -> str:
        raise ConnectionError("this process publishes nothing")

    return put(link.Link, "tell", tell)


def no_link_seal() -> Undo:
    """What is published is believed whoever did it."""
    return put(link, "compare_digest", lambda _one, _other: True)


def no_unfed() -> Undo:
    """The link counts for ever after the feed was last read."""

    def get(self: Any) -> Any:
        return self.__dict__["_installation"]._replace(unfed=math.inf)

    def set_value(self: Any, value: Any) -> None:
        self.__dict__["_installation"] = value

    return put(freshness.Freshness, "_installation", property(get, set_value))


def lease_is_enough() -> Undo:
    """Whoever revokes a key takes a lease for long enough, whatever the others hear of."""

    def end_of_trust(self: Any, _worker: Any) -> float:
        end: float = self.started + self._wait
        return end

    return put(confirmation.Watch, "_end_of_trust", end_of_trust)


def any_link() -> Undo:
    """What was published on one server counts as told on every other."""

    def told(self: Any, _link: str, _struck_off: Any = None) -> float | None:
        return min(self._told.values(), default=None)

    return put(confirmation.Telling, "told", told)


def handler_raises() -> Undo:
    """Handling a message fails: no rule taken out, but a fault that the rules are for."""

    def handle(_self: Any, _payload: bytes) -> None:
        raise RuntimeError("a fault that the tests made")

    return put(link.Link, "_handle_message", handle)


def dies_silently() -> Undo:
    """A message that cannot be handled is passed over."""
    former = link.Link._handle  # noqa: SLF001  # what it replaces

    def handle(self: Any, frame: Any) -> None:
        with contextlib.suppress(RuntimeError):
            former(self, frame)

    return put(link.Link, "_handle", handle)


def joins_blindly() -> Undo:
    """A process that registers neither asks what was before, nor learns it from what it reads.

    Each of the two is enough, under requests for the key.
    """

    async def recent_changes(_self: Any, *_: Any) -> list[Any]:
        return []

    return both(
        put(store.Store, "recent_changes", recent_changes),
        put(reader.KeyReader, "_learn", lambda *_: None),
        put(
            freshness.Freshness,
            "sealed_after",
            property(lambda _self: -math.inf, lambda _self, _value: None),
        ),
    )


def ack_regardless() -> Undo:
    """Revoking returns normally when the database refuses it."""
    former = keys.KeyManager.revoke

    async def revoke(self: Any, *args: Any, **options: Any) -> records.Revocation:
        try:
            return await former(self, *args, **options)
        except Unavailable:
            return records.Revocation(how="acknowledged", workers=0, seconds=0.0)

    return put(keys.KeyManager, "revoke", revoke)


def no_flushes() -> Undo:
    """Usage is counted, and never written."""

    async def try_to_flush(_self: Any) -> None:
        pass

    return put(usage.Usage, "_try_to_flush", try_to_flush)


def no_last_flush() -> Undo:
    """A process that is told to end leaves what it has not written yet."""
    former = usage.Usage._try_to_flush  # noqa: SLF001  # what it replaces

    async def try_to_flush(self: Any) -> None:
        if not self._stopping.is_set():
            await former(self)

    return put(usage.Usage, "_try_to_flush", try_to_flush)


BREAKS: Final[dict[str, Callable[[], Undo]]] = {
    each.__name__: each
    for each in (
        no_wait,
        no_lease,
        no_floors,
        no_feed,
        no_seal,
        no_breaker,
        no_fallback,
        no_flights,
        no_detaching,
        no_local,
        no_fill,
        own_time,
        unavailable_is_no,
        no_deadline,
        no_retry,
        no_account_lock,
        no_schema_lock,
        no_busy_wait,
        no_joining,
        no_role_check,
        any_format,
        other_format,
        commits_early,
        numbers_early,
        no_publishing,
        no_link_seal,
        no_unfed,
        lease_is_enough,
        any_link,
        handler_raises,
        dies_silently,
        joins_blindly,
        ack_regardless,
        no_flushes,
        no_last_flush,
    )
}
