"""All faults that are tried."""

from tests.faults import rows_redis

ROWS = sorted([*rows_redis.ROWS], key=lambda row: (row.shape, row.number))
