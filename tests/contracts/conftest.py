"""A store on each kind of database."""

from collections.abc import AsyncIterator

import pytest

from tfm_guard.clock import SystemClock
from tfm_guard.store import Store


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """Open a store on an empty database."""
    store = Store(database_url, pool_size=10, clock=SystemClock())
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def postgres_store(postgres_url: str) -> AsyncIterator[Store]:
    """Open a store on an empty PostgreSQL database."""
    store = Store(postgres_url, pool_size=10, clock=SystemClock())
    await store.open()
    yield store
    await store.close()
