"""Runs the migrations on the connection, and in the transaction, that was handed over."""

from alembic import context

from tfm_guard.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,  # true of SQLite too, where a transaction has been begun by hand
)
context.run_migrations()
