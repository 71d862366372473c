"""The store: keys and all that is kept about them, in SQLite or PostgreSQL."""

from tfm_guard.store.feed import MARKED, FeedState, Member, Place, Register
from tfm_guard.store.signs import HourOfUse, Said, Turn, hour_of, start_of
from tfm_guard.store.store import Installation, Store
from tfm_guard.store.transaction import Account, PrefixTaken, Transaction

__all__ = [
    "MARKED",
    "Account",
    "FeedState",
    "HourOfUse",
    "Installation",
    "Member",
    "Place",
    "PrefixTaken",
    "Register",
    "Said",
    "Store",
    "Transaction",
    "Turn",
    "hour_of",
    "start_of",
]
