"""Links that sign somebody in once: for a demo, where nobody has a password."""

import secrets
from collections.abc import MutableMapping
from typing import Final, NamedTuple

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from tfm_guard.clock import Clock, SystemClock
from tfm_guard.records import Person

LINK_SECONDS: Final = 600.0
SESSION_SECONDS: Final = 8 * 3600.0
_BYTES: Final = 32
_COOKIE: Final = "tfm_demo_session"


class _Entry(NamedTuple):
    person: Person
    until: float  # monotonic seconds


class SignInLinks:
    """An ASGI app for `Mount("/sign-in", links)`, and an `identify` for whom it signed in.

    Links and sessions are in the memory of one process: they end with it, and others do not know
    them. The browser is sent on to *to*, seen from the address of the link.
    """

    def __init__(self, *, to: str, clock: Clock | None = None) -> None:
        self._to = to
        self._clock = clock or SystemClock()
        self._links: dict[str, _Entry] = {}
        self._sessions: dict[str, _Entry] = {}

    def __repr__(self) -> str:
        return f"SignInLinks({len(self._links)} links, {len(self._sessions)} sessions)"

    def new(self, person: Person) -> str:
        """Return the last part of a link that signs *person* in: once, within 10 minutes."""
        return self._add(self._links, person, LINK_SECONDS)

    async def identify(self, connection: HTTPConnection) -> Person | None:
        """Return who was signed in by a link, up to 8 hours ago."""
        entry = self._sessions.get(connection.cookies.get(_COOKIE, ""))
        return entry.person if entry is not None and self._holds(entry) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"a sign-in link is no {scope['type']}")
        await self._answer(Request(scope))(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        headers = {"cache-control": "no-store", "referrer-policy": "no-referrer"}
        if request.method != "GET":
            return PlainTextResponse("Open the link.\n", 405, {**headers, "allow": "GET"})
        entry = self._links.pop(request.url.path.rpartition("/")[2], None)
        if entry is None or not self._holds(entry):
            session = self._sessions.get(request.cookies.get(_COOKIE, ""))
            if session is not None and self._holds(session):
                return RedirectResponse(self._to, 303, headers)
            text = "This link was used before, or is too old. Start the demo again for another.\n"
            return PlainTextResponse(text, 410, headers)
        response = RedirectResponse(self._to, 303, headers)
        response.set_cookie(
            _COOKIE,
            self._add(self._sessions, entry.person, SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    def _add(self, entries: MutableMapping[str, _Entry], person: Person, seconds: float) -> str:
        for name in [name for name, entry in entries.items() if not self._holds(entry)]:
            del entries[name]
        name = secrets.token_urlsafe(_BYTES)
        entries[name] = _Entry(person, self._clock.monotonic() + seconds)
        return name

    def _holds(self, entry: _Entry) -> bool:
        return self._clock.monotonic() < entry.until
