"""Lifespan: opens the guard with the server, also around apps that do not speak the protocol."""

import logging
from contextlib import AsyncExitStack
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard.errors import GuardError
from tfm_guard.guard import Guard

_log: Final = logging.getLogger(__name__)

# After one of these a server may end its event loop, and whatever still runs in it.
_LAST: Final = frozenset(
    {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}
)


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
    async with AsyncExitStack() as undo:
        undo.push_async_callback(guard.close)

        async def close_and_send(message: Message) -> None:
            if message["type"] in _LAST:
                await undo.aclose()
            await send(message)

        await _run_inner(app, scope, startup, receive, close_and_send)


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
        level = logging.DEBUG if unread else logging.WARNING
        _log.log(level, "the app's lifespan ended with an error, and was left out", exc_info=True)
    if not spoke:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
