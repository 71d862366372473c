"""The application of one process under test, which can be told to misbehave; see `_control`."""

import asyncio
import json
import logging
import os
import resource
import time
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
_revocations: list[Revocation] = []
_revoke = KeyManager.revoke


async def _noted_revoke(*args: Any, **options: Any) -> Revocation:
    """Revoke as usual, and note how it was confirmed, which the management API does not tell."""
    revocation = await _revoke(*args, **options)
    _revocations.append(revocation)
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
        content = json.dumps(await _control(path.removeprefix("/control/"), options))
        await _send(send, 200, content.encode())
    else:
        await _protected(scope, receive, send)


async def _control(action: str, options: dict[str, str]) -> Any:
    match action:
        case "break":
            _undos.append(BREAKS[options["name"]]())
        case "mend":
            while _undos:
                _undos.pop()()
            while _failpoints:
                _failpoints.pop().remove()
            _clock.shift = 0.0
        case "failpoint":
            _failpoints.append(Failpoint(options["point"], dies=options["does"] == "die"))
        case "release":
            for failpoint in _failpoints:
                failpoint.release()
        case "stall":
            asyncio.get_running_loop().call_soon(time.sleep, float(options["seconds"]))
        case "clock":
            _clock.shift = float(options["shift"])
        case "state":
            return _state()
    return None


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
        ),
        "how": _revocations[-1].how if _revocations else "",
        "repr": repr(freshness),
    }
