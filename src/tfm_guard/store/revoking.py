"""What revoking a key asks of the database.

On PostgreSQL each step is one statement, since revoking is to take milliseconds; SQLite, which has
no statement that does so much, and no way to it that takes long, has a transaction.
"""

from typing import Final
from uuid import UUID

from tfm_guard.records import SECURITY, Actor, Change
from tfm_guard.store.database import READ_SECONDS, Database
from tfm_guard.store.feed import Register, register_of
from tfm_guard.store.statements import Statement
from tfm_guard.store.transaction import Transaction


async def revoke(
    transaction: Transaction, account_id: str, key_id: UUID, actor: Actor
) -> Change | None:
    """Revoke the account's key; return the latest change if it was revoked before, else none.

    None too, and nothing is changed, if there is no such key or its revocation was confirmed.
    """
    row = await transaction.lock_key(account_id, key_id)
    if row is None or row.confirmed_at is not None:
        return None
    if row.revoked_at is not None:
        return _again(await transaction.head(), row.prefix, row.version)
    await transaction.change_key("revoked", row, revoked_at=transaction.now)
    await transaction.audit(
        account_id=account_id,
        actor=actor,
        action=_ACTION,
        target_id=key_id,
        target_name=row.name,
        meta={"key_prefix": row.prefix},
    )
    return None


async def revoke_at_once(
    database: Database, account_id: str, key_id: UUID, actor: Actor
) -> tuple[Change | None, bool]:
    """Do the same on PostgreSQL, but return the change in any case, and whether it is new."""
    values = {
        "account_id": account_id,
        "key_id": key_id,
        "actor": actor.name,
        "action": _ACTION,
        "category": SECURITY,
        "request_id": actor.request_id,
    }
    found = await database.change_at_once(_REVOKE, values)
    if not found:
        return None, False
    ((number, prefix, version),) = found
    if number is not None:
        return Change(number, "revoked", prefix, version), True
    # Read anew: the statement saw the head as it was before it waited for the key.
    ((head,),) = await database.ask_at_once(_HEAD, {})
    return _again(head, prefix, version), False


async def read_register_at_once(database: Database) -> Register:
    """Return from PostgreSQL who caches, and the head of the feed in the same moment."""
    return register_of(await database.ask_at_once(_REGISTER, {}, seconds=READ_SECONDS))


async def confirm_at_once(database: Database, key_id: UUID) -> None:
    """Record on PostgreSQL that a revocation has been shown to hold everywhere."""
    await database.change_at_once(_CONFIRM, {"key_id": key_id})


def _again(head: int, prefix: str, version: int) -> Change:
    # Revoked earlier, here or elsewhere: whoever has seen the feed up to its head has seen that.
    return Change(head, "revoked", prefix, version)


_ACTION: Final = "api_key.revoked"

# The order matters. First the account and the key are locked, as in every other change; who waits
# for that finds what they have become. Then the key is changed, if it is not revoked. The feed's
# head comes last, so that it is locked for as short as can be, and its numbers are in the order of
# the commits; a row of the audit log gets its id behind that, for the same reason.
_REVOKE: Final = Statement(
    "tfm_revoke",
    """
WITH found AS MATERIALIZED (
    SELECT tfm_keys.id, tfm_keys.prefix, tfm_keys.version, tfm_keys.revoked_at,
        tfm_keys.confirmed_at
    FROM tfm_accounts JOIN tfm_keys ON tfm_keys.account_id = tfm_accounts.id
    WHERE tfm_keys.id = %(key_id)s::uuid AND tfm_accounts.id = %(account_id)s::text
    FOR UPDATE
), revoked AS (
    UPDATE tfm_keys
    SET version = found.version + 1, revoked_at = clock_timestamp()
    FROM found
    WHERE tfm_keys.id = found.id AND found.revoked_at IS NULL
    RETURNING tfm_keys.id, tfm_keys.account_id, tfm_keys.prefix, tfm_keys.name, tfm_keys.version,
        tfm_keys.revoked_at
), numbered AS (
    UPDATE tfm_feed SET head = head + 1 FROM revoked
    RETURNING tfm_feed.head, revoked.*
), appended AS (
    INSERT INTO tfm_changes (id, kind, prefix, version, created_at)
    SELECT head, 'revoked', prefix, version, revoked_at FROM numbered
), audited AS (
    INSERT INTO tfm_audit (account_id, actor, action, target_type, target_name, target_id,
        category, meta, request_id, created_at)
    SELECT account_id, %(actor)s::text, %(action)s::text, 'API key', name, id::text,
        %(category)s::text, '{"key_prefix":' || to_json(prefix)::text || '}',
        %(request_id)s::text, revoked_at
    FROM numbered
)
SELECT numbered.head, found.prefix, coalesce(numbered.version, found.version)
FROM found LEFT JOIN numbered ON true
WHERE found.confirmed_at IS NULL
""",
    parameters=("key_id", "account_id", "actor", "action", "category", "request_id"),
    script="""
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL lock_timeout = '1500ms';
{};
COMMIT
""",
)
_HEAD: Final = Statement("tfm_head", "SELECT head FROM tfm_feed")
_REGISTER: Final = Statement(
    "tfm_register",
    "SELECT tfm_feed.head, tfm_workers.id, tfm_workers.seen, tfm_workers.link "
    "FROM tfm_feed LEFT JOIN tfm_workers ON true",
)
# Without waiting for a disk or a standby: if PostgreSQL loses it, asking again confirms it again.
_CONFIRM: Final = Statement(
    "tfm_confirm",
    "UPDATE tfm_keys SET confirmed_at = clock_timestamp() "
    "WHERE id = %(key_id)s::uuid AND set_config('synchronous_commit', 'off', true) = 'off'",
    parameters=("key_id",),
)
