"""`requires`: an endpoint for keys with certain scopes."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from tfm_guard.errors import ConfigurationError, InsufficientScope, MissingCredentials, Refusal
from tfm_guard.http.refusals import RefusalResponse, send_refusal
from tfm_guard.records import KeyCredentials, VerifiedKey
from tfm_guard.settings import DEFAULT_REALM

Endpoint = Callable[..., Any]

_CONNECTIONS: Final = ("request", "websocket")


def requires(scopes: str | Sequence[str]) -> Callable[[Endpoint], Endpoint]:
    """Let an endpoint be called only with a key that has all of *scopes*.

    The endpoint, sync or async, takes a Starlette `request` or `websocket` under that name. Other
    callers get the refusal and challenge of RFC 6750 section 3.1; where no key was verified at
    all, because the app is not behind `APIKeyMiddleware`, everyone does.
    """
    needed = frozenset([scopes] if isinstance(scopes, str) else scopes)

    def decorate(endpoint: Endpoint) -> Endpoint:
        names = list(inspect.signature(endpoint).parameters)
        name = next((name for name in names if name in _CONNECTIONS), None)
        if name is None:
            raise ConfigurationError(
                f"requires: {endpoint!r} must take a parameter named 'request' or 'websocket'"
            )
        position = names.index(name)

        def refuse(args: Sequence[Any], kwargs: dict[str, Any]) -> RefusalResponse | None:
            connection = kwargs[name] if name in kwargs else args[position]
            refusal = _refusal(connection, needed)
            return None if refusal is None else RefusalResponse(refusal, _realm(connection))

        if not inspect.iscoroutinefunction(endpoint):

            @functools.wraps(endpoint)
            def call(*args: Any, **kwargs: Any) -> Any:
                return refuse(args, kwargs) or endpoint(*args, **kwargs)

            return call

        @functools.wraps(endpoint)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            response = refuse(args, kwargs)
            if response is None:
                return await endpoint(*args, **kwargs)
            if name == "websocket":
                websocket: WebSocket = kwargs[name] if name in kwargs else args[position]
                await send_refusal(websocket.scope, websocket.receive, websocket.send, response)
            return response

        return call_async

    return decorate


def _refusal(connection: HTTPConnection, needed: frozenset[str]) -> Refusal | None:
    key = connection.scope.get("user")
    if not isinstance(key, VerifiedKey):
        return MissingCredentials()
    missing = needed - key.scopes
    return InsufficientScope(missing) if missing else None


def _realm(connection: HTTPConnection) -> str:
    credentials = connection.scope.get("auth")
    return credentials.realm if isinstance(credentials, KeyCredentials) else DEFAULT_REALM
