"""Keys written through the store alone."""

from datetime import datetime
from uuid import uuid4

from tfm_guard.records import ApiKey, Change
from tfm_guard.store import Store, Transaction


async def insert_key(
    transaction: Transaction,
    prefix: str,
    *,
    account_id: str = "acme",
    expires_at: datetime | None = None,
) -> ApiKey:
    """Insert a key whose token nobody knows, with its account and its audit row."""
    await transaction.lock_account(account_id)
    key = ApiKey(
        id=uuid4(),
        key_prefix=prefix,
        account_id=account_id,
        name=f"key {prefix}",
        scopes=frozenset({"send", "domains:write"}),
        created_at=transaction.now,
        last_used_at=None,
        expires_at=expires_at,
        replaced_by=None,
    )
    await transaction.insert_key(
        key,
        secret_hash="$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA",
        digest=b"sixteen bytes...",
        digest_key_id="0011223344556677",
        created_by="a test",
    )
    await transaction.audit(
        account_id=account_id,
        actor="a test",
        action="api_key.created",
        target_id=key.id,
        target_name=key.name,
        meta={"key_prefix": prefix},
    )
    return key


async def create_key(
    store: Store, prefix: str, *, account_id: str = "acme", expires_at: datetime | None = None
) -> ApiKey:
    """Insert such a key in a transaction of its own."""

    async def work(transaction: Transaction) -> ApiKey:
        return await insert_key(transaction, prefix, account_id=account_id, expires_at=expires_at)

    key, _ = await store.transact(work)
    return key


async def revoke_key(store: Store, key: ApiKey) -> list[Change]:
    """Revoke such a key and return the changes that this made."""
    change = await store.revoke_key(key.account_id, key.id, "a test")
    assert change is not None
    return [change]
