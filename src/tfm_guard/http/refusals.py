"""Refusals on the wire: a status, headers and a JSON body, for HTTP and for WebSocket."""

import random
from typing import Final

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tfm_guard.bearer import challenge
from tfm_guard.errors import InsufficientScope, InvalidInput, PlanLimitReached, Refusal

# Spread over a few seconds, so that clients turned away together do not come back together.
_RETRY_AFTER_SECONDS: Final = (1, 3)
# RFC 6455 section 7.4.1: the endpoint ends the connection because its policy was violated.
POLICY_VIOLATION: Final = 1008


class Detail(Struct):
    """What a program, and what a person, may know about a refusal."""

    code: str
    message: str


class RefusalBody(Struct):
    """The body of every refusal but of an unacceptable value."""

    detail: Detail


class PlanLimitDetail(Detail):
    """A refusal, with the numbers that it is about."""

    limit: int
    current: int
    plan: str


class PlanLimitBody(Struct):
    """The body of a refusal to exceed what the plan allows."""

    detail: PlanLimitDetail


class Fault(Struct):
    """What is wrong with a value: where it is, outermost first, and what is expected."""

    loc: tuple[str | int, ...]
    msg: str
    type: str


class FaultsBody(Struct):
    """The body of a refusal of unacceptable values."""

    detail: list[Fault]


class RefusalResponse(Response):
    """The answer to a client that *refusal* describes; challenges name *realm*."""

    media_type = "application/json"

    def __init__(self, refusal: Refusal, realm: str) -> None:
        super().__init__(
            msgspec.json.encode(body_of(refusal)), refusal.status, headers_of(refusal, realm)
        )


async def send_refusal(
    scope: Scope, receive: Receive, send: Send, response: RefusalResponse
) -> None:
    """Answer an HTTP request, or turn down a WebSocket before it is accepted."""
    if scope["type"] == "http":
        if scope["method"] == "HEAD":
            response.body = b""  # RFC 9110 section 9.3.2: the headers of GET, and no content
        await response(scope, receive, send)
        return
    if (await receive())["type"] == "websocket.connect":  # else the client has gone
        await deny(scope, receive, send, response)


async def deny(scope: Scope, receive: Receive, send: Send, response: RefusalResponse) -> None:
    """Turn down a WebSocket that wants to be accepted."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        # Before acceptance, servers turn this into HTTP 403.
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})


def headers_of(refusal: Refusal, realm: str) -> dict[str, str]:
    """Return the headers of the answer, with names in lower case."""
    headers = {"cache-control": "no-store"}
    if refusal.challenged:
        scope = (
            " ".join(sorted(refusal.missing)) if isinstance(refusal, InsufficientScope) else None
        )
        headers["www-authenticate"] = challenge(realm, refusal.bearer_error, scope).decode("ascii")
    if refusal.retryable:
        # Whole seconds: the service's clients ignore a date or a fraction.
        headers["retry-after"] = str(random.randint(*_RETRY_AFTER_SECONDS))  # noqa: S311  # no secret
    return headers


def body_of(refusal: Refusal) -> Struct:
    """Return what is sent to the client."""
    if isinstance(refusal, InvalidInput):
        return FaultsBody([Fault(refusal.field, refusal.message, refusal.kind)])
    if isinstance(refusal, PlanLimitReached):
        numbers = refusal.limit, refusal.current, refusal.plan
        return PlanLimitBody(PlanLimitDetail(refusal.code, refusal.message, *numbers))
    return RefusalBody(Detail(refusal.code, refusal.message))
