"""The store: keys and all that is kept about them, in SQLite or PostgreSQL."""

from tfm_guard.store.store import Store
from tfm_guard.store.transaction import Account, PrefixTaken, Transaction

__all__ = ["Account", "PrefixTaken", "Store", "Transaction"]
