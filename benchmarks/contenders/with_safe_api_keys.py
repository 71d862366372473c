"""safe-api-keys: its own ASGI middleware, its store in memory, and its cache."""

from contextlib import AsyncExitStack

from safe_api_keys import AsyncKeyManager
from safe_api_keys.cache import VerifyCache
from safe_api_keys.contrib.starlette import APIKeyMiddleware
from safe_api_keys.stores.memory import AsyncMemoryStore

from benchmarks.contenders.contender import Contender
from benchmarks.measuring import app


async def make() -> Contender:
    """Return the bare app behind its middleware."""
    manager = AsyncKeyManager(
        AsyncMemoryStore(),
        "sk_live",
        pepper=b"thirty-two bytes for a benchmark",
        cache=VerifyCache(),
    )
    issued = await manager.issue("bench", scopes=["send"])
    guarded = APIKeyMiddleware(app, km=manager, protect=("/v1/",), exempt=())
    return Contender(app, guarded, f"Bearer {issued.raw_key}".encode(), AsyncExitStack())
