"""Stores on each kind of database, which are closed however the test ends."""

from collections.abc import AsyncIterator
from typing import Protocol

import pytest

from tfm_guard.clock import SystemClock
from tfm_guard.store import Store


class NewStore(Protocol):
    """Makes stores that are not open yet."""

    def __call__(self, url: str, *, pool_size: int = 10) -> Store: ...


@pytest.fixture
async def new_store() -> AsyncIterator[NewStore]:
    """Make stores, and close them all in the end."""
    made: list[Store] = []

    def make(url: str, *, pool_size: int = 10) -> Store:
        made.append(Store(url, pool_size=pool_size, clock=SystemClock()))
        return made[-1]

    yield make
    for store in made:
        await store.close()


@pytest.fixture
async def store(database_url: str, new_store: NewStore) -> Store:
    """Open a store on an empty database."""
    store = new_store(database_url)
    await store.open()
    return store


@pytest.fixture
async def postgres_store(postgres_url: str, new_store: NewStore) -> Store:
    """Open a store on an empty PostgreSQL database."""
    store = new_store(postgres_url)
    await store.open()
    return store
