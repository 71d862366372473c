"""The store: keys and all that is kept about them, in SQLite or PostgreSQL."""

from tfm_guard.store.feed import MARKED, FeedState, Member, Place, Register
from tfm_guard.store.inspection import Look
from tfm_guard.store.measuring import Room, Sample
from tfm_guard.store.schema import HEAD
from tfm_guard.store.signs import HourOfUse, Said, Turn, hour_of, start_of
from tfm_guard.store.store import Installation, Store
from tfm_guard.store.times import Times
from tfm_guard.store.transaction import (
    ERASED_ACCOUNT,
    Holding,
    LockedAccount,
    LockedKey,
    NewKey,
    PrefixTaken,
    Transaction,
)
from tfm_guard.store.usage import UsageHour

__all__ = [
    "ERASED_ACCOUNT",
    "HEAD",
    "MARKED",
    "FeedState",
    "Holding",
    "HourOfUse",
    "Installation",
    "LockedAccount",
    "LockedKey",
    "Look",
    "Member",
    "NewKey",
    "Place",
    "PrefixTaken",
    "Register",
    "Room",
    "Said",
    "Sample",
    "Store",
    "Times",
    "Transaction",
    "Turn",
    "UsageHour",
    "hour_of",
    "start_of",
]
