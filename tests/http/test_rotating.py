"""Rotating keys over HTTP, what clients are told meanwhile, and keys that revoke themselves."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.http.guarded_app import Observed, make_app
from tests.http.managing import KEYS, Api
from tests.http.support import Answer, bearer, call, http_scope, make_guard
from tests.support.sql import execute
from tfm_guard import APIKeyMiddleware
from tfm_guard.store import schema

DAY: Final = 86_400
MOMENT: Final = r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z"'
ID: Final = r'"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"'


async def rotate(api: Api, name: str = "sender", body: object = b"", **options: Any) -> Answer:
    """Rotate the key of that name."""
    return await api.call("POST", api.path(name, "/rotate"), body, **options)


def dates(api: Api, name: str) -> tuple[datetime, datetime]:
    """Return when the key was replaced, and when it ends, as the database has it."""
    keys = schema.keys.c
    statement = select(keys.replaced_at, keys.expires_at).where(keys.id == api.keys[name].id)
    ((replaced_at, expires_at),) = execute(api.url, statement)
    return replaced_at, expires_at


async def protected(api: Api, token: str, path: str = "/x") -> Answer:
    """Call an app behind the middleware, of which `/scoped` is for keys that may send."""
    observed = Observed()
    try:
        return await call(
            make_app(api.guard, observed), http_scope(path=path, headers=bearer(token))
        )
    finally:
        observed.stop()


async def test_rotating_answers_as_documented(api: Api) -> None:
    """The successor is answered like a new key, with what it replaces; both work for a day."""
    answer = await rotate(api)
    assert answer.status == 201
    assert answer.header("content-type") == "application/json"
    assert re.fullmatch(
        rf'{{"id":{ID},"name":"sender","key":"tfm_k_[0-9a-f]{{48}}","key_prefix":"[0-9a-f]{{8}}",'
        rf'"permissions":\["send"\],"created_at":{MOMENT},'
        rf'"replaces":"{api.keys["sender"].id}","confirmed":true}}',
        answer.body.decode(),
    )
    new = await api.guard.verify(answer.json["key"])
    old = await api.guard.verify(api.tokens["sender"])
    assert str(new.key_id) == answer.json["id"]
    assert (new.name, new.scopes, new.account_id) == (old.name, old.scopes, old.account_id)
    row = await api.row(old.key_id)
    replaced_at, expires_at = dates(api, "sender")
    assert (row["replaced_by"], row["status"]) == (answer.json["id"], "replaced")
    assert datetime.fromisoformat(row["expires_at"]) == expires_at
    assert expires_at - replaced_at == timedelta(days=1)


@pytest.mark.parametrize("seconds", [1, 604_800])
async def test_the_grace_is_as_long_as_asked(api: Api, seconds: int) -> None:
    """grace_seconds says for how long the old key works on: up to seven days."""
    assert (await rotate(api, body={"grace_seconds": seconds})).status == 201
    replaced_at, expires_at = dates(api, "sender")
    assert expires_at - replaced_at == timedelta(seconds=seconds)


async def test_without_grace_the_old_key_ends_at_once(api: Api) -> None:
    """With a grace of 0 the old key is refused when the answer has come, and listed no more."""
    await protected(api, api.tokens["sender"])  # so that memory knows it
    answer = await rotate(api, body={"grace_seconds": 0})
    assert (answer.status, answer.json["confirmed"]) == (201, True)
    assert (await protected(api, api.tokens["sender"])).code == "invalid_token"
    assert (await protected(api, answer.json["key"])).status == 200
    assert await api.row(api.keys["sender"].id) is None


# A body, where in it the fault is, and what is wrong.
FAULTY: Final[list[tuple[object, list[str], str]]] = [
    ({"grace_seconds": -1}, ["grace_seconds"], "invalid"),
    ({"grace_seconds": 604_801}, ["grace_seconds"], "invalid"),
    (b'{"grace_seconds":' + b"9" * 400 + b"}", ["grace_seconds"], "invalid"),
    ({"grace_seconds": 1.5}, ["grace_seconds"], "invalid"),
    ({"grace_seconds": "60"}, ["grace_seconds"], "invalid"),
    ({"grace_seconds": None}, ["grace_seconds"], "invalid"),
    ({"grace_seconds": True}, ["grace_seconds"], "invalid"),
    ({"name": "x"}, ["name"], "extra_forbidden"),
    ({"permissions": ["send"]}, ["permissions"], "extra_forbidden"),
    (b"60", [], "invalid"),
    (b" ", [], "json_invalid"),
    (b"{", [], "json_invalid"),
]


async def test_a_body_that_will_not_do(api: Api) -> None:
    """What is wrong is answered in the list form, and the key is not rotated."""
    for body, location, kind in FAULTY:
        answer = await rotate(api, body=body)
        assert answer.status == 422, body
        (fault,) = answer.json["detail"]
        assert (fault["loc"], fault["type"]) == (["body", *location], kind), body
    assert (await api.row(api.keys["sender"].id))["replaced_by"] is None


async def test_one_predecessor_at_a_time(api: Api) -> None:
    """Neither a key in its grace nor its successor can be rotated: 409, until the old one ended."""
    successor = (await rotate(api)).json["id"]
    for key_id in (api.keys["sender"].id, successor):
        answer = await api.call("POST", f"{KEYS}{key_id}/rotate")
        assert (answer.status, answer.code) == (409, "already_replaced")
    assert len((await api.call("GET")).json) == 5
    assert (await api.call("DELETE", api.path("sender"))).status == 204
    assert (await api.call("POST", f"{KEYS}{successor}/rotate")).status == 201


async def test_deleting_cuts_the_grace_short(api: Api) -> None:
    """A deleted key is refused at once, in its grace as ever, and its successor is not."""
    token = (await rotate(api)).json["key"]
    assert (await protected(api, api.tokens["sender"])).status == 200
    assert (await api.call("DELETE", api.path("sender"))).status == 204
    assert (await protected(api, api.tokens["sender"])).code == "invalid_token"
    assert (await protected(api, token)).status == 200


async def test_every_other_id_is_answered_alike(api: Api) -> None:
    """A revoked key, another account's and one that never was: one 404; what is no UUID: 422."""
    await api.call("DELETE", api.path("sender"))
    gone, foreign = api.keys["sender"].id, api.keys["other"].id
    answers = [await api.call("POST", f"{KEYS}{each}/rotate") for each in (gone, foreign, uuid4())]
    assert len(set(answers)) == 1
    assert (answers[0].status, answers[0].code) == (404, "not_found")
    answer = await api.call("POST", f"{KEYS}no-uuid/rotate")
    assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["path", "key_id"])


async def test_nobody_rotates_more_than_they_hold(api: Api) -> None:
    """Without api-keys:write, or a scope of the rotated key, the answer names what is missing."""
    refused = [
        (await rotate(api, "manager", caller="reader"), "api-keys:write"),
        (await rotate(api, "sender", caller="sender"), "api-keys:write"),
        (await rotate(api, "manager", caller="writer"), "api-keys:read domains:read send"),
    ]
    for answer, missing in refused:
        assert (answer.status, answer.code) == (403, "insufficient_scope")
        assert answer.header("www-authenticate") == (
            f'Bearer realm="api", error="insufficient_scope", scope="{missing}"'
        )
    assert (await rotate(api, "writer", caller="writer")).status == 201


async def test_rotating_needs_no_room_in_the_plan(api: Api) -> None:
    """At the plan's limit a key is rotated all the same, and of the pair one is counted."""
    async with make_guard(api.url, plans={"free": 4}) as guard:
        limited = api._replace(guard=guard)
        full = await limited.create(name="fifth")
        assert (full.status, full.code) == (403, "plan_limit_reached")
        assert (await rotate(limited)).status == 201
        assert (await limited.create(name="fifth")).json["detail"]["current"] == 4
        await limited.call("DELETE", limited.path("reader"))
        assert (await limited.create(name="fifth")).status == 201


async def test_a_successor_lives_as_long(api: Api) -> None:
    """A key with an end gets a successor with as long a life, and its own end comes no later."""
    ends = datetime.now(UTC) + timedelta(hours=1)
    await api.add("short", "send", expires_at=ends)
    answer = await rotate(api, "short")
    created_at = datetime.fromisoformat(answer.json["created_at"])
    lifetime = ends - api.keys["short"].created_at
    assert datetime.fromisoformat(answer.json["expires_at"]) == created_at + lifetime
    assert dates(api, "short")[1] == ends


async def test_the_audit_log_names_who_rotated(api: Api) -> None:
    """Rotating leaves a row for each of the two keys, with the caller."""
    before = len(api.audited("id"))
    new = (await rotate(api, body={"grace_seconds": 60})).json["id"]
    who, old = f"api_key:{api.keys['manager'].id}", str(api.keys["sender"].id)
    assert api.audited("actor", "action", "target_id")[before:] == [
        (who, "api_key.created", new),
        (who, "api_key.rotated", old),
    ]


async def test_answers_to_the_old_key_announce_its_end(api: Api) -> None:
    """They say since when it is replaced and when it ends, also those that come from memory."""
    await rotate(api)
    replaced_at, expires_at = dates(api, "sender")
    cold = await protected(api, api.tokens["sender"])
    warm = [await protected(api, api.tokens["sender"]) for _ in range(2)]
    assert api.guard.recall(bearer(api.tokens["sender"])) is not None
    for answer in (cold, *warm):
        assert answer.status == 200
        assert answer.header("deprecation") == f"@{int(replaced_at.timestamp())}"
        sunset = answer.header("sunset") or ""
        assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", sunset)
        assert parsedate_to_datetime(sunset) == expires_at.replace(microsecond=0)


async def test_refusals_of_the_app_announce_it_too(api: Api) -> None:
    """A 403 or 404 for a key in its grace has the same two headers, here as in any app."""
    await api.add("unscoped")
    await rotate(api, "unscoped")
    for answer in (
        await protected(api, api.tokens["unscoped"], "/scoped"),
        await api.call("GET", caller="unscoped"),
        await api.call("GET", "/v1/nothing", caller="unscoped"),
    ):
        assert answer.status in (403, 404)
        assert (answer.header("deprecation") or "").startswith("@")
        assert answer.header("sunset") is not None


async def test_no_other_answer_announces_anything(api: Api) -> None:
    """The successor, other keys, and who is refused get neither of the headers."""
    successor = (await rotate(api)).json["key"]
    ends = datetime.now(UTC) + timedelta(hours=1)
    await api.add("ending", "send", expires_at=ends)
    await api.add("deleted", "send")
    await rotate(api, "deleted")
    await api.call("DELETE", api.path("deleted"))
    others = {
        successor: 200,
        api.tokens["ending"]: 200,
        api.tokens["reader"]: 200,
        api.tokens["deleted"]: 401,
        "tfm_k_nothing": 401,
    }
    for token, status in others.items():
        answer = await protected(api, token)
        assert answer.status == status
        assert (answer.header("deprecation"), answer.header("sunset")) == (None, None)


async def test_what_the_app_says_of_itself_stands(api: Api) -> None:
    """An app's own Deprecation or Sunset is neither repeated nor replaced."""
    await rotate(api)
    said = {"Deprecation": "@1", "Sunset": "Wed, 01 Jan 2031 00:00:00 GMT"}

    async def old(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("old", headers=said)(scope, receive, send)

    app = APIKeyMiddleware(old, guard=api.guard)
    answer = await call(app, http_scope(headers=bearer(api.tokens["sender"])))
    assert answer.header("deprecation") == said["Deprecation"]
    assert answer.header("sunset") == said["Sunset"]


async def test_a_request_is_verified_once_behind_the_middleware(api: Api) -> None:
    """Mounted in an app that is protected already, the API counts and announces once."""
    await rotate(api, "reader")
    app = APIKeyMiddleware(api.guard.management_app(), guard=api.guard)
    used = api.keys["reader"].id
    before = (await api.guard.keys.usage("acme", used)).accepted
    for _ in range(3):
        answer = await call(app, http_scope(path=KEYS, headers=bearer(api.tokens["reader"])))
        assert answer.status == 200
        assert answer.header("deprecation") is not None  # and but one
    await api.guard.close()
    async with api.guard:
        assert (await api.guard.keys.usage("acme", used)).accepted == before + 3


async def test_a_key_of_another_guard_opens_nothing(api: Api, tmp_path: Any) -> None:
    """The API trusts the middleware around it for its own keys alone: another guard's get 401."""
    async with make_guard(f"sqlite:///{tmp_path}/elsewhere.db") as elsewhere:
        stranger = await elsewhere.keys.create(
            account_id="acme", name="stranger", scopes=["api-keys:read"]
        )
        app = APIKeyMiddleware(api.guard.management_app(), guard=elsewhere)
        answer = await call(app, http_scope(path=KEYS, headers=bearer(stranger.token)))
        assert (answer.status, answer.code) == (401, "invalid_token")


async def test_a_key_revokes_itself(api: Api) -> None:
    """Any key may, without a scope: 204 with nothing in it, then it is refused everywhere."""
    await api.add("unscoped")
    for caller in ("unscoped", "sender", "manager"):
        answer = await api.call("POST", f"{KEYS}self/revoke", caller=caller)
        assert (answer.status, answer.body) == (204, b"")
        again = await api.call("POST", f"{KEYS}self/revoke", caller=caller)
        assert (again.status, again.code) == (401, "invalid_token")
        who = UUID(str(api.keys[caller].id))
        assert api.audited("actor", "action", "target_id")[-1] == (
            f"api_key:{who}",
            "api_key.revoked",
            str(who),
        )
    names = {key.name for key in await api.guard.keys.list("acme")}
    assert names == {"reader", "writer"}


async def test_a_key_in_its_grace_revokes_itself(api: Api) -> None:
    """The old key of a pair ends its own grace; its successor works on."""
    token = (await rotate(api)).json["key"]
    assert (await api.call("POST", f"{KEYS}self/revoke", caller="sender")).status == 204
    assert (await protected(api, api.tokens["sender"])).status == 401
    assert (await protected(api, token)).status == 200


async def test_nobody_revokes_without_a_key(api: Api) -> None:
    """Without a key there is nothing to revoke: 401 with its challenge."""
    answer = await call(api.guard.management_app(), http_scope("POST", f"{KEYS}self/revoke"))
    assert (answer.status, answer.code) == (401, "missing_credentials")
    assert answer.header("www-authenticate") == 'Bearer realm="api"'
