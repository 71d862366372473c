"""No keys at all."""

from contextlib import AsyncExitStack

from benchmarks.contenders.contender import Contender
from benchmarks.measuring import app


async def make() -> Contender:
    """Return the bare app."""
    return Contender(app, app, b"Bearer none", AsyncExitStack())
