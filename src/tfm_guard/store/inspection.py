"""Looking at a database as it is, without making or mending anything; and tidying it up."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Select, delete, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tfm_guard.store import schema
from tfm_guard.store.schema import HEAD
from tfm_guard.store.transaction import ERASED_ACCOUNT, is_active
from tfm_guard.store.upgrade import read_revision

_EXAMPLES: Final = 5  # of what is wrong, told by their prefixes
_SETTINGS: Final = frozenset(
    {"installation_id", "lease_seconds", "unfed_seconds", "poll_seconds", "linked_poll_seconds"}
)
_SECRETS: Final = frozenset({"root", "tag"})
_DIGEST_BYTES: Final = 16


class Look(NamedTuple):
    """A database at one moment. *revision* is none where there are no tables, as then is the rest.

    *settings* are those that all processes share.
    """

    now: datetime  # the database's time
    revision: str | None
    settings: dict[str, str]
    processes: int


async def look(connection: AsyncConnection, now: ColumnElement[datetime]) -> Look:
    """Return what there is to see at first sight."""
    moment: datetime = (await connection.execute(select(now))).scalar_one()
    revision = await read_revision(connection)
    if revision is None:
        return Look(moment, None, {}, 0)
    rows = await connection.execute(select(schema.settings))
    settings = {row.name: row.value for row in rows}
    processes = await connection.execute(select(func.count()).select_from(schema.workers))
    return Look(moment, revision, settings, processes.scalar_one())


async def find_faults(connection: AsyncConnection, now: ColumnElement[datetime]) -> list[str]:
    """Return, in words, everything that cannot be so if nobody changed the tables by hand."""
    revision = await read_revision(connection)
    if revision != HEAD:
        return [f"the tables are at revision {revision}, this release needs {HEAD}"]
    faults = [*await _feed_faults(connection), *await _missing_values(connection)]
    for words, prefixes in _key_checks(now):
        found = [row[0] for row in await connection.execute(prefixes.limit(_EXAMPLES + 1))]
        if found:
            more = ", …" if len(found) > _EXAMPLES else ""
            faults.append(f"{words}: {', '.join(found[:_EXAMPLES])}{more}")
    return faults


async def prune_changes(connection: AsyncConnection, before: datetime, most: int) -> int:
    """Remove up to *most* changes from before that moment, the oldest; return how many.

    No gap arises, also where a change was committed later than one with a higher time. The latest
    change stays: it shows that the head of the feed is right.
    """
    changes = schema.changes.c
    kept = select(func.min(changes.id)).where(changes.created_at >= before).scalar_subquery()
    latest = select(func.max(changes.id)).scalar_subquery()
    oldest = select(func.min(changes.id)).scalar_subquery()
    removed = await connection.execute(
        delete(schema.changes).where(
            changes.id < func.coalesce(kept, latest), changes.id < oldest + most
        )
    )
    return removed.rowcount


async def prune_audit(connection: AsyncConnection, before: datetime, most: int) -> int:
    """Remove up to *most* rows of the audit log from before that moment; return how many."""
    audit = schema.audit.c
    old = select(audit.id).where(audit.created_at < before).order_by(audit.id).limit(most)
    removed = await connection.execute(delete(schema.audit).where(audit.id.in_(old)))
    return removed.rowcount


async def _feed_faults(connection: AsyncConnection) -> list[str]:
    # In one statement, or a change made in between would look like a fault.
    changes = schema.changes.c
    row = (
        await connection.execute(
            select(
                select(func.count()).select_from(schema.feed).scalar_subquery().label("feeds"),
                select(func.max(schema.feed.c.head)).scalar_subquery().label("head"),
                func.count(changes.id).label("number"),
                func.min(changes.id).label("first"),
                func.max(changes.id).label("last"),
            )
        )
    ).one()
    faults = []
    if row.feeds != 1:
        faults.append(f"the feed has {row.feeds} heads instead of one")
    elif row.head != (row.last or 0):
        faults.append(f"the head of the feed is {row.head}, its latest change {row.last or 0}")
    if row.number and (missing := row.last - row.first + 1 - row.number):
        faults.append(f"the feed has gaps: {missing} changes from {row.first} on are missing")
    return faults


async def _missing_values(connection: AsyncConnection) -> list[str]:
    faults = []
    for table, expected in ((schema.settings, _SETTINGS), (schema.secrets, _SECRETS)):
        names = set((await connection.execute(select(table.c.name))).scalars())
        if missing := expected - names:
            faults.append(f"{table.name} lacks: {', '.join(sorted(missing))}")
    return faults


def _key_checks(now: ColumnElement[datetime]) -> Iterator[tuple[str, Select[Any]]]:
    """Yield what may not be, and the query for the prefixes of which it is so."""
    keys = schema.keys
    key, other = keys.c, keys.alias("other")
    prefixes = select(key.prefix).order_by(key.prefix)
    yield (
        "keys whose successor is missing or of another account",
        prefixes.where(
            key.replaced_by.is_not(None),
            key.account_id != ERASED_ACCOUNT,
            ~exists().where(other.c.id == key.replaced_by, other.c.account_id == key.account_id),
        ),
    )
    yield (
        "keys with a successor that is another key's, too",
        prefixes.where(
            exists().where(other.c.replaced_by == key.replaced_by, other.c.id != key.id)
        ),
    )
    yield (
        "replaced keys whose successor was replaced before their grace ended",
        prefixes.where(
            *is_active(now),
            exists().where(other.c.id == key.replaced_by, other.c.replaced_by.is_not(None)),
        ),
    )
    yield (
        "replaced keys without an end",
        prefixes.where(
            key.replaced_by.is_not(None), key.expires_at.is_(None), key.revoked_at.is_(None)
        ),
    )
    yield (
        "active keys of an account that was erased",
        prefixes.where(key.account_id == ERASED_ACCOUNT, key.revoked_at.is_(None)),
    )
    yield (
        "keys whose revocation is confirmed, and that are not revoked",
        prefixes.where(key.confirmed_at.is_not(None), key.revoked_at.is_(None)),
    )
    yield (
        "keys with half a digest",
        prefixes.where(
            or_(
                key.digest.is_(None) != key.digest_key_id.is_(None),
                func.length(key.digest) != _DIGEST_BYTES,
            )
        ),
    )
    change = schema.changes.c
    newest = (
        select(change.prefix, func.max(change.version).label("version"))
        .group_by(change.prefix)
        .subquery()
    )
    yield (
        "keys with another version than the latest change in the feed",
        prefixes.join(newest, newest.c.prefix == key.prefix).where(newest.c.version != key.version),
    )
    yield (
        "changes of keys that do not exist",
        select(change.prefix)
        .distinct()
        .order_by(change.prefix)
        .where(~exists().where(key.prefix == change.prefix)),
    )
