"""All faults that are tried."""

from tests.faults import rows_database, rows_link, rows_process, rows_redis, rows_usage

# By shape, so that a deployment serves many of them.
ROWS = sorted(
    [
        *rows_redis.ROWS,
        *rows_link.ROWS,
        *rows_database.ROWS,
        *rows_process.ROWS,
        *rows_usage.ROWS,
    ],
    key=lambda row: (str(row.shape), row.number),
)
