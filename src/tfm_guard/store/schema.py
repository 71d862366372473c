"""The tables. Migrations create them; queries are built from them; a test holds both together."""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

# The newest migration. Their ids sort in the order in which they apply.
HEAD: Final = "0001"
VERSION_TABLE: Final = "tfm_schema_version"


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with its zone, to the microsecond: `timestamptz`, or sortable text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(
            String(27) if dialect.name == "sqlite" else DateTime(timezone=True)
        )

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return moment.astimezone(UTC)


# SQLite makes only INTEGER PRIMARY KEY columns number themselves.
_Counter = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

accounts = Table(
    "tfm_accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("plan", Text, nullable=False),
    Column("suspended_at", UtcDateTime),
)

keys = Table(
    "tfm_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("account_id", Text, ForeignKey(accounts.c.id), nullable=False, index=True),
    Column("name", Text, nullable=False),
    # Unique over all keys there ever were, so that a prefix means one key for good.
    Column("prefix", String(8), nullable=False, unique=True),
    Column("secret_hash", Text, nullable=False),
    Column("digest", LargeBinary),
    Column("digest_key_id", String(16)),
    Column("scopes", Text, nullable=False),  # sorted, with a space between two
    Column("version", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("replaced_by", Uuid),
    Column("replaced_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("confirmed_at", UtcDateTime),
)

# Apart from the keys, so that writing usage behind never locks or rewrites a key's row.
key_usage = Table(
    "tfm_key_usage",
    metadata,
    Column("key_id", Uuid, primary_key=True),
    Column("last_used_at", UtcDateTime, nullable=False),
)

usage_hours = Table(
    "tfm_usage_hours",
    metadata,
    Column("key_id", Uuid, primary_key=True),
    Column("hour", UtcDateTime, primary_key=True, index=True),
    Column("accepted", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
)

# The feed: every change of a key's state, numbered in the order of the commits, without gaps.
changes = Table(
    "tfm_changes",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("prefix", String(8), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)

feed = Table(
    "tfm_feed",
    metadata,
    Column("id", Integer, primary_key=True),  # one row, 1
    Column("head", BigInteger, nullable=False),
)

# One row for each process that caches.
workers = Table(
    "tfm_workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),  # host and process id, for people
    # What a revoker must publish on for the process to hear of it, and to know that it does.
    Column("link", Text),
    Column("seen", BigInteger, nullable=False),  # it has applied the feed up to this change
    Column("turn", BigInteger, nullable=False),  # which of its writes this row is
    Column("registered_at", UtcDateTime, nullable=False),
)

audit = Table(
    "tfm_audit",
    metadata,
    Column("id", _Counter, primary_key=True),
    Column("account_id", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target_type", Text, nullable=False),
    Column("target_name", Text, nullable=False),
    Column("target_id", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("meta", Text, nullable=False),  # a JSON object
    Column("request_id", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "account_id", "created_at"),
    Index(None, "account_id", "id"),
)

# What was last said about a key in the audit log: which sign of trouble, and upon what.
signs = Table(
    "tfm_signs",
    metadata,
    Column("key_id", Uuid, primary_key=True),
    Column("sign", Text, primary_key=True),
    Column("occasion", UtcDateTime, nullable=False),
)

secrets = Table(
    "tfm_secrets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# What all processes must agree on, and so is no setting of any one of them.
settings = Table(
    "tfm_settings",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

flushes = Table(
    "tfm_flushes",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)
