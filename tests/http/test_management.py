"""The management API, as programs see it."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, Final
from uuid import UUID, uuid4

import httpx2
import pytest
from sqlalchemy import insert, select
from starlette.types import Message

from tests.http.managing import KEYS, Api
from tests.http.support import Answer, bearer, call, database_gone, http_scope, make_guard
from tests.support.guards import new_guard, prepare
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxy
from tests.support.sql import execute
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.errors import InsufficientScope, InvalidToken
from tfm_guard.http.messages import CreatedKeyResponse
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

MOMENT = r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z"'
ID = r'"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"'


async def test_creating_answers_as_documented(api: Api) -> None:
    """A new key is answered with 201 and these fields in this order, the token among them."""
    answer = await api.create(name="CI", permissions=["send"])
    assert answer.status == 201
    assert answer.header("content-type") == "application/json"
    assert re.fullmatch(
        rf'{{"id":{ID},"name":"CI","key":"tfm_k_[0-9a-f]{{48}}","key_prefix":"[0-9a-f]{{8}}",'
        rf'"permissions":\["send"\],"created_at":{MOMENT}}}',
        answer.body.decode(),
    )
    created = answer.json
    assert created["key"].startswith(f"tfm_k_{created['key_prefix']}")
    key = await api.guard.verify(created["key"])
    assert (str(key.key_id), key.account_id, key.name) == (created["id"], "acme", "CI")


async def test_a_key_may_send_unless_said_otherwise(api: Api) -> None:
    """Without permissions in the body the new key has the one that is documented."""
    answer = await api.create(name="CI")
    assert answer.json["permissions"] == ["send"]
    assert (await api.guard.verify(answer.json["key"])).scopes == {"send"}


async def test_listing_answers_as_documented(api: Api) -> None:
    """The list is a bare array, newest first, with the documented fields and then our own."""
    await api.create(name="CI")
    answer = await api.call("GET")
    assert answer.status == 200
    assert answer.header("content-type") == "application/json"
    row = (
        rf'{{"id":{ID},"name":"\w+","key_prefix":"[0-9a-f]{{8}}","permissions":\[[^]]*\],'
        rf'"is_active":true,"last_used_at":null,"created_at":{MOMENT},"expires_at":null,'
        rf'"replaced_by":null,"status":"never_used"}}'
    )
    assert re.fullmatch(rf"\[{row}(,{row}){{4}}\]", answer.body.decode())
    assert [row["name"] for row in answer.json] == ["CI", "sender", "writer", "reader", "manager"]
    assert answer.json[-1]["permissions"] == [
        "api-keys:read", "api-keys:write", "domains:read", "send",
    ]  # fmt: skip


async def test_the_list_shows_active_keys_alone(api: Api) -> None:
    """Revoked keys are not listed, nor are those of other accounts; the last use is."""
    used, revoked = api.keys["sender"], api.keys["reader"]
    await api.guard.keys.revoke("acme", revoked.id)
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)
    execute(api.url, insert(schema.key_usage).values(key_id=used.id, last_used_at=moment))
    rows = {row["name"]: row for row in (await api.call("GET")).json}
    assert rows.keys() == {"manager", "writer", "sender"}
    assert rows["sender"]["last_used_at"] == "2026-01-02T03:04:05.678900Z"
    assert rows["writer"]["last_used_at"] is None


async def test_deleting_answers_as_documented(api: Api) -> None:
    """Deleting answers 204 with nothing in it, and from then on the key is refused."""
    answer = await api.call("DELETE", f"{KEYS}{api.keys['sender'].id}")
    assert (answer.status, answer.body) == (204, b"")
    assert answer.header("content-type") is None
    refused = await api.call("GET", caller="sender")
    assert (refused.status, refused.code) == (401, "invalid_token")


async def test_deleting_is_not_confirmed_before_it_holds_everywhere(database_url: str) -> None:
    """While a process may still accept the key: 503 and a pause; later 204, and 404 after that."""
    clock = ManualClock()
    guard = new_guard(database_url, clock=clock)
    async with guard:
        manager = await guard.keys.create(account_id="acme", name="m", scopes=["api-keys:write"])
        doomed = await guard.keys.create(account_id="acme", name="d")
        # A process that says nothing, on a link that nobody here can publish on.
        row = {"id": uuid4(), "name": "cut off", "link": "x/y", "seen": 0, "turn": 1}
        execute(database_url, insert(schema.workers).values(**row, registered_at=clock.now()))

        async def delete() -> Answer:
            scope = http_scope("DELETE", f"{KEYS}{doomed.key.id}", bearer(manager.token))
            return await call(guard.management_app(), scope)

        async def delete_when(*pauses: float) -> Answer:
            deleting = asyncio.create_task(delete())
            # Who sleeps: the caller, who watches the register for it, who reads the feed, who
            # writes usage, and who looks for signs of trouble.
            await clock.wait_for_sleepers(5)
            for pause in pauses:
                await clock.pass_time(pause)
            return await deleting

        answer = await delete_when(CONFIRM_SECONDS)
        assert (answer.status, answer.code) == (503, "unconfirmed")
        assert int(answer.header("retry-after") or 0) in range(1, 4)
        with pytest.raises(InvalidToken):
            await guard.verify(doomed.token)
        # Longer than any process trusts its link alone.
        await clock.pass_time(61 - CONFIRM_SECONDS - 1)
        answer = await delete_when(1.1)
        assert (answer.status, answer.body) == (204, b"")
        answer = await delete()
        assert (answer.status, answer.code) == (404, "not_found")


async def test_a_key_may_delete_itself(api: Api) -> None:
    """The key that calls is one of the account's keys like the others."""
    path = f"{KEYS}{api.keys['manager'].id}"
    assert (await api.call("DELETE", path)).status == 204
    assert (await api.call("DELETE", path)).status == 401


async def test_every_other_id_is_answered_alike(api: Api) -> None:
    """Deleting twice, another account's key, or one that never was: the same 404, to the byte."""
    gone, foreign = api.keys["sender"].id, api.keys["other"].id
    assert (await api.call("DELETE", f"{KEYS}{gone}")).status == 204
    answers = {await api.call("DELETE", f"{KEYS}{key_id}") for key_id in (gone, foreign, uuid4())}
    (answer,) = answers
    assert answer.status == 404
    assert answer.body == b'{"detail":{"code":"not_found","message":"There is no such API key."}}'
    assert (await api.guard.verify(api.tokens["other"])).key_id == foreign


async def test_expiry_comes_back_in_utc(api: Api) -> None:
    """An expiry given in another zone is stored, answered and listed as the same moment in UTC."""
    answer = await api.create(name="CI", expires_at="2099-01-01T02:00:00+02:00")
    assert answer.status == 201
    assert list(answer.json)[-1] == "expires_at"
    assert answer.json["expires_at"] == "2099-01-01T00:00:00Z"
    newest, *others = (await api.call("GET")).json
    assert newest["expires_at"] == "2099-01-01T00:00:00Z"
    assert {row["expires_at"] for row in others} == {None}


LACKING: Final = [
    ("GET", KEYS, "writer", "api-keys:read"),
    ("GET", KEYS, "sender", "api-keys:read"),
    ("POST", KEYS, "reader", "api-keys:write"),
    ("POST", KEYS, "sender", "api-keys:write"),
    ("DELETE", f"{KEYS}{uuid4()}", "reader", "api-keys:write"),
    ("DELETE", f"{KEYS}no-uuid", "reader", "api-keys:write"),
]


async def test_managing_needs_its_scopes(api: Api) -> None:
    """A key without the scope is refused with its name, before anything in the request is read."""
    for method, path, caller, missing in LACKING:
        answer = await api.call(method, path, b"no JSON", caller=caller)
        assert (answer.status, answer.code) == (403, "insufficient_scope"), (method, caller)
        assert answer.header("www-authenticate") == (
            f'Bearer realm="api", error="insufficient_scope", scope="{missing}"'
        )


async def test_nobody_grants_more_than_they_hold(api: Api) -> None:
    """Creating a key with scopes that the caller lacks is refused, and names exactly those."""
    answer = await api.create(name="CI", permissions=["webhooks:write", "send", "audit:read"])
    assert (answer.status, answer.code) == (403, "insufficient_scope")
    assert answer.header("www-authenticate") == (
        'Bearer realm="api", error="insufficient_scope", scope="audit:read webhooks:write"'
    )
    assert answer.json["detail"]["message"] == (
        "This key lacks the scope: audit:read webhooks:write"
    )
    default = await api.call("POST", body={"name": "CI"}, caller="writer")
    assert (default.status, default.code) == (403, "insufficient_scope")
    assert len((await api.call("GET")).json) == 4


async def test_a_key_may_be_granted_nothing(api: Api) -> None:
    """An empty list makes a key that is good for nothing."""
    answer = await api.call("POST", body={"name": "CI", "permissions": []}, caller="writer")
    assert (answer.status, answer.json["permissions"]) == (201, [])


async def test_the_same_scope_twice_is_one(api: Api) -> None:
    """Permissions are a set: what is named twice is granted once, in a fixed order."""
    answer = await api.create(name="CI", permissions=["send", "domains:read", "send"])
    assert (answer.status, answer.json["permissions"]) == (201, ["domains:read", "send"])


async def test_names_are_shown_as_they_are(api: Api) -> None:
    """A name is text: markup in it is no fault, and blanks around it go."""
    answer = await api.create(name="  <script>alert('Zoë')</script> ")
    assert (answer.status, answer.json["name"]) == (201, "<script>alert('Zoë')</script>")
    longest = await api.create(name="é" * 100)
    assert (longest.status, longest.json["name"]) == (201, "é" * 100)


YESTERDAY: Final = (datetime.now(UTC) - timedelta(days=1)).isoformat()
# Moments that no calendar has in UTC.
EARLIEST: Final = "0001-01-01T00:00:00+01:00"
LATEST: Final = "9999-12-31T23:59:59-01:00"


# A body, where in it the fault is, and what is wrong.
FAULTY_BODIES: Final[list[tuple[object, list[str | int], str]]] = [
    (b"{}", ["name"], "missing"),
    ({"permissions": ["send"]}, ["name"], "missing"),
    ({"name": 1}, ["name"], "invalid"),
    ({"name": None}, ["name"], "invalid"),
    ({"name": ""}, ["name"], "string_too_short"),
    ({"name": " \t\n"}, ["name"], "string_too_short"),
    ({"name": "a" * 101}, ["name"], "string_too_long"),
    ({"name": "a\0b"}, ["name"], "string_control"),
    ({"name": f"a tfm_k_{'0' * 48}"}, ["name"], "string_token"),
    ({"name": "a\u202eb"}, ["name"], "string_control"),
    ({"name": "a\u2066b"}, ["name"], "string_control"),
    (b'{"name": "a\\udc80"}', [], "json_invalid"),
    (b'{"name": "a\xff"}', [], "json_invalid"),
    (b'{"name": "a\xed\xa0\x80"}', [], "json_invalid"),
    ({"name": "CI", "permissions": "send"}, ["permissions"], "invalid"),
    ({"name": "CI", "permissions": None}, ["permissions"], "invalid"),
    ({"name": "CI", "permissions": ["send", 1]}, ["permissions", 1], "invalid"),
    ({"name": "CI", "permissions": ["send", "all"]}, ["permissions", 1], "unknown_scope"),
    ({"name": "CI", "permissions": [""]}, ["permissions", 0], "unknown_scope"),
    ({"name": "CI", "permissions": ["*"]}, ["permissions", 0], "unknown_scope"),
    ({"name": "CI", "user_id": "other"}, ["user_id"], "extra_forbidden"),
    ({"name": "CI", "account_id": "other"}, ["account_id"], "extra_forbidden"),
    ({"name": "CI", "plan": "business"}, ["plan"], "extra_forbidden"),
    ({"name": "CI", "id": str(uuid4())}, ["id"], "extra_forbidden"),
    ({"name": "CI", "revoked_at": None}, ["revoked_at"], "extra_forbidden"),
    ({"name": "CI", "a - at `$.²": 1}, ["a - at `$.²"], "extra_forbidden"),
    ({"name": "CI", "expires_at": "soon"}, ["expires_at"], "invalid"),
    ({"name": "CI", "expires_at": 4e9}, ["expires_at"], "invalid"),
    ({"name": "CI", "expires_at": "2099-01-01T00:00:00"}, ["expires_at"], "timezone_aware"),
    ({"name": "CI", "expires_at": YESTERDAY}, ["expires_at"], "datetime_future"),
    ({"name": "CI", "expires_at": LATEST}, ["expires_at"], "datetime_range"),
    ({"name": "CI", "expires_at": EARLIEST}, ["expires_at"], "datetime_range"),
    (b"", [], "json_invalid"),
    (b"name=CI", [], "json_invalid"),
    (b'{"name": "CI"} {}', [], "json_invalid"),
    (b"[]", [], "invalid"),
    (b"null", [], "invalid"),
    (b"[" * 60_000, [], "invalid"),
    (b'{"name":' + b"[" * 60_000, ["name"], "invalid"),
]  # fmt: skip


async def test_a_body_that_will_not_do(api: Api) -> None:
    """What is wrong with a body is answered in FastAPI's form: one fault, where it is and what."""
    for body, location, kind in FAULTY_BODIES:
        answer = await api.call("POST", body=body)
        assert answer.status == 422, body
        assert answer.header("content-type") == "application/json"
        assert answer.json.keys() == {"detail"}
        (fault,) = answer.json["detail"]
        assert list(fault) == ["loc", "msg", "type"]
        assert (fault["loc"], fault["type"]) == (["body", *location], kind)
        assert isinstance(fault["msg"], str)
        assert fault["msg"]
    assert len((await api.call("GET")).json) == 4


async def test_an_id_that_is_no_uuid(api: Api) -> None:
    """It is a fault in the path, and told as such."""
    for key_id in ("no-uuid", "1", "self", "00000000-0000-0000-0000-00000000000g"):
        answer = await api.call("DELETE", f"{KEYS}{key_id}")
        assert answer.status == 422, key_id
        (fault,) = answer.json["detail"]
        assert (fault["loc"], fault["type"]) == (["path", "key_id"], "uuid_parsing")


async def test_a_body_too_large(api: Api) -> None:
    """A body beyond 64 KiB is answered with 413, and one below is read."""
    start, end = b'{"name": "CI"', b"}"
    fitting = start + b" " * (65_536 - len(start + end)) + end
    assert (await api.call("POST", body=fitting)).status == 201
    answer = await api.call("POST", body=start + b" " + fitting[len(start) :])
    assert (answer.status, answer.code) == (413, "body_too_large")


async def test_the_plan_limits_how_many(api: Api) -> None:
    """At the limit creating answers 403 with the numbers, and deleting makes room at once."""
    async with make_guard(api.url, plans={"free": 2, "starter": 5}) as guard:
        await guard.accounts.set_plan("acme", "starter")
        limited = api._replace(guard=guard)
        assert (await limited.create(name="fifth")).status == 201
        answer = await limited.create(name="sixth")
        assert (answer.status, answer.code) == (403, "plan_limit_reached")
        assert answer.header("www-authenticate") is None
        detail = answer.json["detail"]
        assert list(detail) == ["code", "message", "limit", "current", "plan"]
        assert (detail["limit"], detail["current"], detail["plan"]) == (5, 5, "starter")
        await limited.call("DELETE", f"{KEYS}{api.keys['sender'].id}")
        assert (await limited.create(name="sixth")).status == 201


OTHER_PATHS: Final = [
    "/v1/api-keys",
    "/v1/api-keys//",
    f"{KEYS}{uuid4()}/",
    "/v1/api-key/",
    "/",
    "",
    "//v1/api-keys/",
]


async def test_no_other_path_is_there(api: Api) -> None:
    """Without its trailing slash, or with one too many, a path is not redirected but not there."""
    for method, path in product(("GET", "POST", "DELETE"), OTHER_PATHS):
        answer = await api.call(method, path, {"name": "CI"})
        assert (answer.status, answer.code) == (404, "not_found"), path
        assert answer.header("location") is None


OTHER_METHODS: Final = [
    ("PUT", KEYS, {"GET", "HEAD", "POST"}),
    ("DELETE", KEYS, {"GET", "HEAD", "POST"}),
    ("OPTIONS", KEYS, {"GET", "HEAD", "POST"}),
    ("GET", f"{KEYS}{uuid4()}", {"DELETE", "PATCH"}),
    ("POST", f"{KEYS}{uuid4()}", {"DELETE", "PATCH"}),
    ("GET", f"{KEYS}{uuid4()}/rotate", {"POST"}),
    ("GET", f"{KEYS}self/revoke", {"POST"}),
]


async def test_no_other_method_is_there(api: Api) -> None:
    """A method that a path does not answer to gets 405 with all that it does answer to."""
    for method, path, allowed in OTHER_METHODS:
        answer = await api.call(method, path, {"name": "CI"})
        assert (answer.status, answer.code) == (405, "method_not_allowed"), (method, path)
        assert set((answer.header("allow") or "").split(", ")) == allowed


async def test_a_revoked_key_stays_revoked(api: Api) -> None:
    """No call brings a revoked key back."""
    key = api.keys["sender"]
    path = f"{KEYS}{key.id}"
    await api.call("DELETE", path)
    for method in ("PATCH", "PUT", "POST", "DELETE"):
        answer = await api.call(method, path, {"is_active": True, "revoked_at": None})
        assert answer.status in (404, 405, 422)
    assert (await api.call("GET", caller="sender")).code == "invalid_token"


async def test_nobody_without_a_key_gets_anywhere(api: Api) -> None:
    """Without a key every call, also to what is not there, is answered 401 with its challenge."""
    for method, path in (("GET", KEYS), ("POST", KEYS), ("DELETE", f"{KEYS}1"), ("GET", "/")):
        answer = await call(api.guard.management_app(), http_scope(method, path))
        assert (answer.status, answer.code) == (401, "missing_credentials")
        assert answer.header("www-authenticate") == 'Bearer realm="api"'
        assert answer.header("cache-control") == "no-store"


async def test_lists_hold_no_secret(api: Api) -> None:
    """Neither a token's secret nor its hash, digest or the digest's key can be read anywhere."""
    created = await api.create(name="CI")
    tokens = [*api.tokens.values(), created.json["key"]]
    stored = execute(api.url, "SELECT secret_hash, digest, digest_key_id FROM tfm_keys")
    answers = [
        await api.call("GET"),
        await api.call("DELETE", f"{KEYS}{created.json['id']}"),
        await api.call("DELETE", f"{KEYS}{created.json['id']}"),
    ]
    shown = b"".join(answer.body for answer in answers).decode()
    assert all(token[14:] not in shown for token in tokens)
    assert api.keys["manager"].key_prefix in shown
    assert len(stored) == 6
    for secret_hash, digest, digest_key_id in stored:
        assert secret_hash not in shown
        assert bytes(digest).hex() not in shown
        assert digest_key_id not in shown


async def test_the_audit_log_names_who_did_it(api: Api) -> None:
    """Creating and deleting leave one row each that names the calling key; refusals leave none."""
    before = len(execute(api.url, select(schema.audit)))
    created = (await api.create(name="CI", permissions=["send"])).json
    await api.call("DELETE", f"{KEYS}{created['id']}", caller="writer")
    await api.call("DELETE", f"{KEYS}{created['id']}", caller="writer")
    await api.create(name="CI", permissions=["audit:read"])
    audit = schema.audit.c
    rows = execute(
        api.url,
        select(
            *(audit.account_id, audit.actor, audit.action, audit.target_type, audit.target_name),
            *(audit.target_id, audit.category, audit.meta),
        )
        .order_by(audit.id)
        .offset(before),
    )
    what = ("API key", "CI", created["id"], "Security")
    prefix = f'"key_prefix":"{created["key_prefix"]}"'
    manager, writer = (f"api_key:{api.keys[name].id}" for name in ("manager", "writer"))
    assert [tuple(row) for row in rows] == [
        ("acme", manager, "api_key.created", *what, f'{{{prefix},"permissions":["send"]}}'),
        ("acme", writer, "api_key.revoked", *what, f"{{{prefix}}}"),
    ]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([], None),
        ([b"f0-9_/ {}~"], "f0-9_/ {}~"),
        ([b"x" * 128], "x" * 128),
        ([b"x" * 129], None),
        ([b""], None),
        ([b"a\tb"], None),
        ([b"caf\xc3\xa9"], None),
        ([b"a\x7f"], None),
        ([b"one", b"two"], None),
    ],
)
async def test_the_audit_log_keeps_the_id_of_the_request(
    api: Api, sent: list[bytes], kept: str | None
) -> None:
    """One X-Request-ID of 1 to 128 printable ASCII characters is logged, anything else ignored."""
    headers = [(b"x-request-id", each) for each in sent]
    scope = http_scope("POST", KEYS, [*bearer(api.tokens["manager"]), *headers])
    created = (await call(api.guard.management_app(), scope, b'{"name":"CI"}')).json
    scope = http_scope(
        "DELETE", f"{KEYS}{created['id']}", [*bearer(api.tokens["writer"]), *headers]
    )
    assert (await call(api.guard.management_app(), scope, b"")).status == 204
    audit = schema.audit.c
    rows = execute(
        api.url, select(audit.request_id).where(audit.target_id == created["id"]).order_by(audit.id)
    )
    assert [row.request_id for row in rows] == [kept, kept]


async def test_a_client_over_http(api: Api) -> None:
    """An ordinary client creates, lists and deletes a key, wherever the API is mounted."""
    transport = httpx2.ASGITransport(api.guard.management_app())
    headers = {"authorization": f"Bearer {api.tokens['manager']}"}
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://api", headers=headers
    ) as client:
        created = await client.post(KEYS, json={"name": "CI"})
        assert created.status_code == 201
        listed = await client.get(KEYS)
        assert UUID(listed.json()[0]["id"]) == UUID(created.json()["id"])
        deleted = await client.delete(f"{KEYS}{created.json()['id']}")
        assert (deleted.status_code, deleted.content) == (204, b"")


async def test_without_its_database(api: Api, postgres_server: PostgresServer) -> None:
    """While the database is gone all calls are answered 503 without a challenge, then as before."""
    calls = [("GET", KEYS), ("POST", KEYS), ("DELETE", f"{KEYS}{api.keys['sender'].id}")]
    async with database_gone(api.url, postgres_server):
        for method, path in calls:
            answer = await api.call(method, path, {"name": "CI"})
            assert (answer.status, answer.code) == (503, "unavailable")
            assert answer.header("www-authenticate") is None
            assert re.fullmatch("[1-9][0-9]*", answer.header("retry-after") or "")
    assert [(await api.call(*each, {"name": "CI"})).status for each in calls] == [200, 201, 204]


def test_no_answer_shows_its_token_to_a_log() -> None:
    """Neither the repr of the answer with a token, nor what the library rich prints, has it."""
    answer = CreatedKeyResponse(
        id=uuid4(),
        name="CI",
        key="tfm_k_00112233" + "a" * 40,
        key_prefix="00112233",
        permissions=["send"],
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    for shown in (repr(answer), repr(list(answer.__rich_repr__()))):
        assert "00112233" in shown
        assert "aaaa" not in shown


SUCCESSOR = b'{"name":"CI","permissions":["api-keys:write"]}'


async def test_a_caller_revoked_meanwhile_makes_no_key(api: Api) -> None:
    """Who sends a body slowly and is revoked before its end gets 401, and leaves no successor."""
    halfway, revoked = asyncio.Event(), asyncio.Event()
    parts = [SUCCESSOR[:10], SUCCESSOR[10:]]
    sent: list[Message] = []

    async def receive() -> Message:
        if len(parts) == 1:
            halfway.set()
            await revoked.wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    def made() -> set[UUID]:
        return {row.id for row in execute(api.url, select(schema.keys.c.id))}

    assert made() == {key.id for key in api.keys.values()}
    scope = http_scope("POST", KEYS, bearer(api.tokens["manager"]))
    answering = asyncio.ensure_future(api.guard.management_app()(scope, receive, send))
    await halfway.wait()
    execute(
        api.url,
        schema.keys.update()
        .where(schema.keys.c.id == api.keys["manager"].id)
        .values(revoked_at=datetime.now(UTC)),
    )
    revoked.set()
    await answering
    assert sent[0]["status"] == 401
    assert b"invalid_token" in sent[1]["body"]
    assert made() == {key.id for key in api.keys.values()}


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, 401),
        ({"scopes": "api-keys:write"}, 403),
        ({"account_id": "other"}, 401),
    ],
    ids=["expired", "narrowed", "of another account"],
)
async def test_a_caller_is_judged_when_the_key_is_made(
    api: Api, values: dict[str, Any], status: int
) -> None:
    """What memory says of the caller does not count: the key is made by what the database says."""
    assert (await api.call("GET")).status == 200  # so that it is remembered
    row = schema.keys.update().where(schema.keys.c.id == api.keys["manager"].id)
    execute(api.url, row.values(**values))
    before = len(execute(api.url, select(schema.keys.c.id)))
    assert (await api.create(name="CI", permissions=["send"])).status == status
    assert len(execute(api.url, select(schema.keys.c.id))) == before


async def test_a_caller_makes_keys_of_its_account_alone(api: Api) -> None:
    """Nor does the application make a key for a caller that is of another account."""
    caller = await api.guard.verify(api.tokens["other"])
    with pytest.raises(InvalidToken):
        await api.guard.keys.create(account_id="acme", name="CI", scopes=["send"], caller=caller)
    with pytest.raises(InsufficientScope):
        await api.guard.keys.create(
            account_id="other", name="CI", scopes=["domains:read"], caller=caller
        )
    assert [key.name for key in await api.guard.keys.list("other")] == ["other"]


async def test_a_deletion_whose_answer_was_lost_ends_well(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """With the connection reset right after COMMIT it is asked again, unseen: 204, and then 404."""
    await prepare(postgres_url)
    async with Proxy(postgres_server.port) as proxy:
        url = postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")
        async with make_guard(url) as guard:
            manager = await guard.keys.create(
                account_id="acme", name="manager", scopes=["api-keys:write"]
            )
            doomed = await guard.keys.create(account_id="acme", name="CI")
            await guard.verify(doomed.token)
            proxy.lose_answer(b"COMMIT", after=b"EXECUTE tfm_revoke")
            connections = proxy.connections
            scope = http_scope("DELETE", f"{KEYS}{doomed.key.id}", bearer(manager.token))
            answers = [await call(guard.management_app(), scope) for _ in range(2)]
            assert [answer.status for answer in answers] == [204, 404]
            assert proxy.connections > connections + 2  # two to revoke, and one to ask
            with pytest.raises(InvalidToken):
                await guard.verify(doomed.token)
    actions = execute(postgres_url, select(schema.audit.c.action).order_by(schema.audit.c.id))
    assert [row.action for row in actions].count("api_key.revoked") == 1
