"""What a guard has done since it was opened, as numbers."""

from msgspec import Struct


class Counters(Struct, kw_only=True):
    """Counts of one process. Only ever rise."""

    negative_hits: int = 0  # refused from memory: known to prove no key
    shared_reads: int = 0  # commands sent to Redis to read entries
    shared_hits: int = 0
    shared_misses: int = 0
    shared_rejected: int = 0  # entries that were garbage, forged, too old, or below the floor
    shared_failures: int = 0  # commands that failed or took too long
    shared_fills_dropped: int = 0  # because too many were waiting
    store_reads: int = 0  # queries sent to the database to verify
    hashes: int = 0  # argon2 computations, for creating and for verifying
    link_rejected: int = 0  # messages on the link that were not sealed by one of us
    flushes: int = 0  # times that everything remembered was forgotten
    usage_flushes: int = 0  # batches of last uses and counts that were written
    usage_failures: int = 0  # times that one could not be written, and was kept
    usage_dropped: int = 0  # requests that were not counted, because too much was kept
