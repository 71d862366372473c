"""What each contender is made of. Standard library only, as each has an environment of its own."""

from contextlib import AsyncExitStack
from typing import NamedTuple

from benchmarks.measuring import ASGIApp


class Contender(NamedTuple):
    """An app behind keys, the same app without them, and a header that is let through.

    What it has opened is closed with *ending*.
    """

    bare: ASGIApp
    guarded: ASGIApp
    authorization: bytes
    ending: AsyncExitStack
