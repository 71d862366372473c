"""fastapi-keygate: its dependency on an SQLite file, no limits, and usage written in batches."""

import tempfile
from contextlib import AsyncExitStack

from fastapi import Depends, FastAPI, Response
from keygate import KeyGate

from benchmarks.contenders.contender import Contender


async def make() -> Contender:
    """Return a FastAPI app of one route behind its dependency."""
    ending = AsyncExitStack()
    folder = ending.enter_context(tempfile.TemporaryDirectory())
    guarded, bare = FastAPI(), FastAPI()
    gate = KeyGate(
        guarded,
        db_url=f"sqlite:///{folder}/keygate.db",
        default_per_minute=None,
        usage_batch_size=100,
    )
    ending.callback(gate.flush_usage)

    @guarded.get("/v1/emails/", dependencies=[Depends(gate.require)])
    @bare.get("/v1/emails/")
    async def emails() -> Response:
        return Response(status_code=204)

    return Contender(bare, guarded, f"Bearer {gate.create_key('bench').key}".encode(), ending)
