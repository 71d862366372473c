"""keyshield: its cached service and its dependency for FastAPI, its repository in memory.

In memory, so that the last use, which it saves with every request, costs no database.
"""

from contextlib import AsyncExitStack
from typing import Any

from fastapi import Depends, FastAPI, Response
from keyshield.api import create_depends_api_key
from keyshield.hasher.argon2 import Argon2ApiKeyHasher
from keyshield.repositories.in_memory import InMemoryApiKeyRepository
from keyshield.services.cached import CachedApiKeyService

from benchmarks.contenders.contender import Contender


def _app(*dependencies: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/emails/", dependencies=list(dependencies))
    async def emails() -> Response:
        return Response(status_code=204)

    return app


async def make(**delay: float) -> Contender:
    """Return a FastAPI app of one route behind its dependency; *delay* is for the service."""
    service = CachedApiKeyService(
        repo=InMemoryApiKeyRepository(),
        hasher=Argon2ApiKeyHasher(pepper="a pepper for a benchmark"),
        **delay,
    )
    _, token = await service.create(name="bench")

    async def services() -> CachedApiKeyService:
        return service

    guarded = _app(Depends(create_depends_api_key(services)))
    return Contender(_app(), guarded, f"Bearer {token}".encode(), AsyncExitStack())
