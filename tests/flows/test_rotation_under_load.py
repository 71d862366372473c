"""Rotating a key that is in use, with real workers: who switches in time loses nothing."""

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.faults.load import REVOKED, Load
from tests.support.api import Answer, call, first_token
from tests.support.background import Background
from tests.support.redis import RedisServer
from tests.support.servers import wait_until
from tests.support.uvicorn_process import UvicornProcess

APP = "tests.support.whoami_api:app"
GRACE = 2  # seconds


class Api:
    """A server with two workers, and who manages its keys."""

    def __init__(self, server: UvicornProcess, admin: str) -> None:
        self.ports = [server.port]
        self._url = server.url
        self._admin = admin

    def manage(self, method: str, path: str, body: object = None) -> Answer:
        """Ask for something about keys."""
        return call(self._url, method, f"/v1/api-keys/{path}", token=self._admin, body=body)

    def new_key(self) -> tuple[str, str]:
        """Create a key; return its id and token."""
        answer = self.manage("POST", "", {"name": "in use"})
        assert answer.status == 201
        return answer.json["id"], answer.json["key"]


@pytest.fixture
def api(database_url: str, redis_server: RedisServer) -> Iterator[Api]:
    """Serve with Redis on PostgreSQL, and without on SQLite."""
    env = {"TFM_GUARD_DATABASE_URL": database_url}
    if database_url.startswith("postgresql"):
        env["TFM_GUARD_REDIS_URL"] = redis_server.url
    admin = first_token(database_url, "send", "api-keys:read", "api-keys:write")
    with UvicornProcess(APP, env=env, workers=2) as server:
        yield Api(server, admin)


def watch(load: Load, *, until: float = 0.0) -> None:
    """Return when 200 requests have been sent, all of them after *until*, monotonic."""
    since = max(time.monotonic(), until)
    wait_until(
        lambda: time.monotonic() > since and load.started_since(since, 0, REVOKED) >= 200,
        what="requests",
    )


def end_of(api: Api, key_id: str) -> float:
    """Return when a key in its grace ends, monotonic."""
    listed = {key["id"]: key for key in api.manage("GET", "").json}
    end = datetime.fromisoformat(listed[key_id]["expires_at"]).timestamp()
    return end + (time.monotonic() - time.time())


def rotate_under_load(api: Api, *, grace: int, delete: bool) -> None:
    """Rotate a key while it is used, and then the new one too; delete the old one, or let it end.

    The old key is good until then, and never after; the new one is good from the first on.
    """
    key_id, old = api.new_key()
    with Background() as background:
        load = Load(background, api.ports, revoked=old, valid=(old, old))
        watch(load)
        rotated = api.manage("POST", f"{key_id}/rotate", {"grace_seconds": grace})
        assert rotated.status == 201
        # From here on a client may switch, at any moment.
        new = rotated.json["key"]
        switched = Load(background, api.ports, revoked=new, valid=(new, new))
        watch(switched)
        begins = ends = end_of(api, key_id)
        if delete:
            begins = time.monotonic()
            assert api.manage("DELETE", key_id).status == 204
            ends = time.monotonic()
        watch(load, until=ends)
        for each in (load, switched):
            each.stop()
    before = [answer.status for answer in load.answers if answer.ended < begins]
    after = [answer.status for answer in load.answers if answer.started > ends]
    assert len(before) > 400
    assert set(before) == {200}
    assert len(after) >= 200
    assert set(after) == {401}
    assert {answer.status for answer in switched.answers} == {200}


def test_a_key_is_rotated_under_load(api: Api) -> None:
    """Nobody who switches is refused; when its grace is over, or it is deleted, the old key is."""
    rotate_under_load(api, grace=GRACE, delete=False)
    rotate_under_load(api, grace=3600, delete=True)
