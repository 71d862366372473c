"""`requires`: an endpoint for keys with certain scopes."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket, WebSocketState

from tfm_guard.errors import ConfigurationError, InsufficientScope, MissingCredentials, Refusal
from tfm_guard.http.refusals import POLICY_VIOLATION, RefusalResponse, send_refusal
from tfm_guard.records import KeyCredentials, VerifiedKey
from tfm_guard.scopes import NO_SCOPE, is_scope
from tfm_guard.settings import DEFAULT_REALM

Endpoint = Callable[..., Any]

_CONNECTIONS: Final = ("request", "websocket")
# Methods of Starlette's WebSocketEndpoint that come after the answer to the handshake.
_TOO_LATE: Final = ("on_receive", "on_disconnect")


def requires(scopes: str | Sequence[str]) -> Callable[[Endpoint], Endpoint]:
    """Let an endpoint be called only with a key that has all of *scopes*.

    The endpoint, sync or async, takes a Starlette `request` or `websocket` under that name. Other
    callers get the refusal and challenge of RFC 6750 section 3.1; where no key was verified at
    all, because the app is not behind `APIKeyMiddleware`, everyone does. A WebSocket is refused
    before it is accepted, else closed with 1008.

    Raises `ConfigurationError` for what is no scope, and for an endpoint it cannot stand before.
    """
    needed = frozenset([scopes] if isinstance(scopes, str) else scopes)
    faults = [f"requires: {scope!r} {NO_SCOPE}" for scope in needed if not is_scope(scope)]
    if faults:
        raise ConfigurationError(*faults)

    def decorate(endpoint: Endpoint) -> Endpoint:
        name, position = _connection_of(endpoint)

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
                await _refuse_websocket(websocket, response)
            return response

        return call_async

    return decorate


def _connection_of(endpoint: Endpoint) -> tuple[str, int]:
    """Return which parameter of *endpoint* is its connection, and its position."""
    if not (inspect.isroutine(endpoint) or isinstance(endpoint, functools.partial)):
        raise ConfigurationError(
            f"requires: {endpoint!r} is no function; decorate a function or a method"
        )
    names = list(inspect.signature(endpoint).parameters)
    name = next((name for name in names if name in _CONNECTIONS), None)
    if name is None:
        raise ConfigurationError(
            f"requires: {endpoint!r} must take a parameter named 'request' or 'websocket'"
        )
    if name == "websocket" and not inspect.iscoroutinefunction(endpoint):
        raise ConfigurationError(f"requires: {endpoint!r} takes a WebSocket and must be async")
    if getattr(endpoint, "__name__", "") in _TOO_LATE:
        raise ConfigurationError(
            f"requires: {endpoint!r} is called when the WebSocket was accepted; decorate on_connect"
        )
    return name, names.index(name)


async def _refuse_websocket(websocket: WebSocket, response: RefusalResponse) -> None:
    if websocket.application_state is WebSocketState.CONNECTED:
        await websocket.close(POLICY_VIOLATION)
    else:
        await send_refusal(websocket.scope, websocket.receive, websocket.send, response)


def _refusal(connection: HTTPConnection, needed: frozenset[str]) -> Refusal | None:
    key = connection.scope.get("user")
    if not isinstance(key, VerifiedKey):
        return MissingCredentials()
    missing = needed - key.scopes
    return InsufficientScope(missing) if missing else None


def _realm(connection: HTTPConnection) -> str:
    credentials = connection.scope.get("auth")
    return credentials.realm if isinstance(credentials, KeyCredentials) else DEFAULT_REALM
