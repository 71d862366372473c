"""Lifespan: opens the guard with the server, also around apps that do not speak the protocol."""

import logging
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard.errors import GuardError
from tfm_guard.guard import Guard

_log: Final = logging.getLogger(__name__)


async def run_lifespan(
    app: ASGIApp, guard: Guard, scope: Scope, receive: Receive, send: Send
) -> None:
    """Open *guard*, run *app*'s own lifespan if it has one, and close *guard* at the end.

    A guard that cannot be opened fails the start-up, with what to do in the server's log.
    """
    startup = await receive()
    try:
        await guard.open()
    except GuardError as error:
        message = getattr(error, "reason", str(error))
        _log.critical("the guard cannot be opened: %s", message)
        await send({"type": "lifespan.startup.failed", "message": message})
        return
    try:
        await _run_inner(app, scope, startup, receive, send)
    finally:
        await guard.close()


async def _run_inner(
    app: ASGIApp, scope: Scope, startup: Message, receive: Receive, send: Send
) -> None:
    unread: list[Message] = [startup]
    spoke = False

    async def receive_startup_again() -> Message:
        return unread.pop() if unread else await receive()

    async def note_and_send(message: Message) -> None:
        nonlocal spoke
        spoke = True
        await send(message)

    try:
        await app(scope, receive_startup_again, note_and_send)
    except Exception:
        if spoke:
            raise
        # An app without lifespan support raises (the ASGI specification says so). It is answered
        # for here: the server must learn that start-up is complete.
        _log.debug("the app does not take part in the lifespan protocol")
    if not spoke:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
