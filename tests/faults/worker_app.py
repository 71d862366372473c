"""The application of one process under test, which can be told to misbehave; see `_control`."""

import asyncio
import json
import logging
import os
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from tests.support.breaks import BREAKS, Undo, put
from tests.support.failpoints import Failpoint
from tests.support.guards import freshness_of, store_of, verifier_of
from tfm_guard import APIKeyMiddleware, Guard
from tfm_guard.clock import SystemClock
from tfm_guard.keys import KeyManager
from tfm_guard.records import Revocation
from tfm_guard.settings import Settings
from tfm_guard.testing import CHEAP_HASHING


class ShiftedClock(SystemClock):
    """The machine's clocks, but for a wall clock that is wrong by *shift* seconds."""

    shift = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.shift)


async def _answer(scope: Scope, _receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise ValueError(scope["type"])
    await _send(send, 200, b"{}")


async def _send(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


logging.getLogger("tfm_guard").addHandler(logging.StreamHandler())
_clock = ShiftedClock()
_guard = Guard(
    Settings.load(os.environ, **CHEAP_HASHING, plans={"free": 100_000, "few": 5}), clock=_clock
)
_protected = APIKeyMiddleware(_answer, guard=_guard)
_management = _guard.management_app()
_undos: list[Undo] = []
_failpoints: list[Failpoint] = []
_PAGE_BYTES: Final = resource.getpagesize()
_revocations: list[tuple[Revocation, float]] = []
_revoke = KeyManager.revoke


async def _noted_revoke(*args: Any, **options: Any) -> Revocation:
    """Revoke as usual, and note how and how fast, which the management API does not tell."""
    began = time.monotonic()
    revocation = await _revoke(*args, **options)
    _revocations.append((revocation, time.monotonic() - began))
    return revocation


put(KeyManager, "revoke", _noted_revoke)
_undos.extend(
    BREAKS[name]() for name in os.environ.get("TFM_GUARD_TEST_BREAKS", "").split(",") if name
)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve the protected app, the management API, and what the tests control it by."""
    path = scope.get("path", "")
    if path.startswith("/v1/"):
        await _management(scope, receive, send)
    elif path.startswith("/control/"):
        options = dict(parse_qsl(scope["query_string"].decode()))
        content = json.dumps(_control(path.removeprefix("/control/"), options))
        await _send(send, 200, content.encode())
    else:
        await _protected(scope, receive, send)


def _control(action: str, options: dict[str, str]) -> Any:
    """Do what *action* says, and tell what it asks for."""
    if action == "state":
        return _state()
    return _ACTIONS[action](**options)


def _break(name: str) -> None:
    _undos.append(BREAKS[name]())


def _mend() -> None:
    while _undos:
        _undos.pop()()
    while _failpoints:
        _failpoints.pop().remove()
    _clock.shift = 0.0


def _fail_at(point: str, does: str, about: str = "") -> None:
    _failpoints.append(Failpoint(point, dies=does == "die", about=about))


def _release() -> None:
    for failpoint in _failpoints:
        failpoint.release()


def _stall(seconds: str) -> None:
    asyncio.get_running_loop().call_soon(time.sleep, float(seconds))


def _set_clock(shift: str) -> None:
    _clock.shift = float(shift)


_ACTIONS: Final[dict[str, Callable[..., None]]] = {
    "break": _break,
    "mend": _mend,
    "failpoint": _fail_at,
    "release": _release,
    "stall": _stall,
    "clock": _set_clock,
}


def _state() -> dict[str, Any]:
    freshness = freshness_of(_guard)
    shared = verifier_of(_guard)._reader._shared  # noqa: SLF001  # nothing else leads inside
    database: Any = store_of(_guard)._database  # noqa: SLF001
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        resident = int(statm.read().split()[1]) * _PAGE_BYTES
    return {
        **{name: getattr(_guard.counters, name) for name in _guard.counters.__struct_fields__},
        "fresh": freshness.is_fresh(),
        "redis_in_use": shared is not None and shared._breaker.closed,  # noqa: SLF001
        "linked": freshness._link_counts,  # noqa: SLF001
        "reached": any(failpoint.reached for failpoint in _failpoints),
        "resident": resident,
        "connections": sum(
            pool.pool.checkedout()
            for pool in (database._reader, database._writer, database._feed_reader)  # noqa: SLF001
        )
        + getattr(database._changing, "in_use", 0),  # noqa: SLF001  # none on SQLite
        "how": _revocations[-1][0].how if _revocations else "",
        "revoking": _revocations[-1][1] if _revocations else 0.0,
        "repr": repr(freshness),
    }
