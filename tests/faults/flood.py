"""Publish something over and over: python -m tests.faults.flood URL CHANNEL PER_SECOND HEX."""

import sys
import time

from redis import Redis

_BATCHES_PER_SECOND = 100


def main(url: str, channel: str, per_second: int, payload: bytes) -> None:
    """Publish *payload* so many times a second, evenly, until killed."""
    batch = per_second // _BATCHES_PER_SECOND
    due = time.monotonic()
    with Redis.from_url(url) as client:
        while True:
            pipeline = client.pipeline(transaction=False)
            for _ in range(batch):
                pipeline.publish(channel, payload)
            pipeline.execute()
            due = max(due + 1 / _BATCHES_PER_SECOND, time.monotonic() - 0.1)
            time.sleep(max(due - time.monotonic(), 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4]))
