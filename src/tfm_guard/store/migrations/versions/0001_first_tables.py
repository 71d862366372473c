"""The first tables, and what every installation gets once: its feed, its secrets, its name."""

import os
import uuid
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from tfm_guard.store.schema import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "tfm_accounts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("suspended_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_accounts")),
    )
    op.create_table(
        "tfm_audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target_type", sa.Text(), nullable=False),
        sa.Column("target_name", sa.Text(), nullable=False),
        sa.Column("target_id", sa.Text(), nullable=False),
        sa.Column("category", sa.Text(), nullable=False),
        sa.Column("meta", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_audit")),
    )
    op.create_index(
        op.f("ix_tfm_audit_account_id_created_at"),
        "tfm_audit",
        ["account_id", "created_at"],
        unique=False,
    )
    op.create_index(
        op.f("ix_tfm_audit_account_id_id"), "tfm_audit", ["account_id", "id"], unique=False
    )
    op.create_table(
        "tfm_changes",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(length=8), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_changes")),
    )
    op.create_index(op.f("ix_tfm_changes_created_at"), "tfm_changes", ["created_at"], unique=False)
    op.create_table(
        "tfm_feed",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("head", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_feed")),
    )
    op.create_table(
        "tfm_flushes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_flushes")),
    )
    op.create_index(op.f("ix_tfm_flushes_created_at"), "tfm_flushes", ["created_at"], unique=False)
    op.create_table(
        "tfm_key_usage",
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("last_used_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_tfm_key_usage")),
    )
    op.create_table(
        "tfm_secrets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tfm_secrets")),
    )
    op.create_table(
        "tfm_settings",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tfm_settings")),
    )
    op.create_table(
        "tfm_signs",
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("sign", sa.Text(), nullable=False),
        sa.Column("occasion", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "sign", name=op.f("pk_tfm_signs")),
    )
    op.create_table(
        "tfm_usage_hours",
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("accepted", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "hour", name=op.f("pk_tfm_usage_hours")),
    )
    op.create_index(op.f("ix_tfm_usage_hours_hour"), "tfm_usage_hours", ["hour"], unique=False)
    op.create_table(
        "tfm_workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("link", sa.Text(), nullable=True),
        sa.Column("seen", sa.BigInteger(), nullable=False),
        sa.Column("turn", sa.BigInteger(), nullable=False),
        sa.Column("registered_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_workers")),
    )
    op.create_table(
        "tfm_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(length=8), nullable=False),
        sa.Column("secret_hash", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=True),
        sa.Column("digest_key_id", sa.String(length=16), nullable=True),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("replaced_by", sa.Uuid(), nullable=True),
        sa.Column("replaced_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.Column("confirmed_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["account_id"], ["tfm_accounts.id"], name=op.f("fk_tfm_keys_account_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tfm_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_tfm_keys_prefix")),
    )
    op.create_index(op.f("ix_tfm_keys_account_id"), "tfm_keys", ["account_id"], unique=False)
    now = datetime.now(UTC)
    op.bulk_insert(sa.table("tfm_feed", sa.column("id"), sa.column("head")), [{"id": 1, "head": 0}])
    op.bulk_insert(
        sa.table(
            "tfm_secrets",
            sa.column("name"),
            sa.column("value"),
            sa.column("created_at", UtcDateTime()),
        ),
        [{"name": name, "value": os.urandom(32), "created_at": now} for name in ("root", "tag")],
    )
    op.bulk_insert(
        sa.table("tfm_settings", sa.column("name"), sa.column("value")),
        [
            {"name": "installation_id", "value": uuid.uuid4().hex},
            {"name": "lease_seconds", "value": "2"},
            {"name": "unfed_seconds", "value": "60"},
            {"name": "poll_seconds", "value": "0.25"},
            {"name": "linked_poll_seconds", "value": "1"},
            {"name": "signs_hour", "value": ""},
        ],
    )
