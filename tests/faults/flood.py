"""Publish something over and over: python -m tests.faults.flood PORT CHANNEL PER_SECOND HEX.

It packs what it sends once, so that the flood is a burden to those who get it, and hardly to the
machine that they share with whoever sends it.
"""

import socket
import sys
import time
from typing import Any

import hiredis

_BATCHES_PER_SECOND = 500


def main(port: int, channel: str, per_second: int, payload: bytes) -> None:
    """Publish *payload* so many times a second, evenly, until killed."""
    batch = per_second // _BATCHES_PER_SECOND
    pack: Any = hiredis.pack_command  # annotated for a single word
    packed = pack(("PUBLISH", channel, payload)) * batch
    due = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while True:
            connection.sendall(packed)
            answered = 0
            while answered < batch:
                answered += connection.recv(65536).count(b"\r\n")
            due = max(due + 1 / _BATCHES_PER_SECOND, time.monotonic() - 0.1)
            time.sleep(max(due - time.monotonic(), 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4]))
