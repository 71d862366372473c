"""Reading usage, status and the audit log over HTTP."""

from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import uuid4

import pytest
from sqlalchemy import insert

from tests.http.managing import AUDIT, KEYS, Api
from tests.support.guards import wrong_secret
from tests.support.sql import execute
from tfm_guard.errors import InvalidToken
from tfm_guard.store import schema


async def test_usage_is_answered_by_hour_or_day(api: Api) -> None:
    """Each range has all its hours or days, the oldest first, and the sums of what was counted."""
    token = api.tokens["sender"]
    for _ in range(3):
        await api.guard.verify(token)
    with pytest.raises(InvalidToken):
        await api.guard.verify(wrong_secret(api.guard, token[6:14]))
    await api.guard.close()
    async with api.guard:
        for query, unit, count in (
            ("", "hour", 24),
            ("range=24h", "hour", 24),
            ("range=7d", "hour", 168),
            ("range=30d", "day", 30),
            ("range=90d", "day", 90),
        ):
            answer = await api.call(
                "GET", api.path("sender", "/usage"), query=query, caller="reader"
            )
            assert answer.status == 200
            usage = answer.json
            assert list(usage) == ["range", "unit", "accepted", "refused", "buckets"]
            assert (usage["range"], usage["unit"]) == (query.partition("=")[2] or "24h", unit)
            assert (usage["accepted"], usage["refused"]) == (3, 1)
            buckets = usage["buckets"]
            assert len(buckets) == count
            assert [list(each) for each in buckets] == [["start", "accepted", "refused"]] * count
            assert [each["start"] for each in buckets] == sorted(each["start"] for each in buckets)
            assert sum(each["accepted"] for each in buckets) == 3
            assert sum(each["refused"] for each in buckets) == 1


async def test_usage_of_a_key_that_ended_can_be_read(api: Api) -> None:
    """A revoked key's usage is there; another account's, and of a key that never was, is 404."""
    await api.call("DELETE", api.path("sender"))
    assert (await api.call("GET", api.path("sender", "/usage"))).status == 200
    answers = {
        await api.call("GET", f"{KEYS}{each}/usage") for each in (api.keys["other"].id, uuid4())
    }
    (answer,) = answers
    assert (answer.status, answer.code) == (404, "not_found")
    answer = await api.call("GET", f"{KEYS}no-uuid/usage")
    assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["path", "key_id"])


# A path, a query, where in it the fault is, and what is wrong.
FAULTY: Final = [
    ("usage", "range=1d", "range", "invalid"),
    ("usage", "range=", "range", "invalid"),
    ("usage", "range=7d&range=7d", "range", "repeated"),
    ("usage", "limit=1", "limit", "extra_forbidden"),
    ("audit", "range=1d", "range", "invalid"),
    ("audit", "range=x+-+at+`$.limit", "range", "invalid"),
    ("audit", "limit=0", "limit", "invalid"),
    ("audit", "limit=501", "limit", "invalid"),
    ("audit", "limit=-1", "limit", "invalid"),
    ("audit", "limit=x", "limit", "invalid"),
    ("audit", "limit=", "limit", "invalid"),
    ("audit", "limit=1.5", "limit", "invalid"),
    ("audit", "limit=" + "9" * 5000, "limit", "invalid"),
    ("audit", "actor=a%00", "actor", "invalid"),
    ("audit", "target_id=" + "a" * 301, "target_id", "invalid"),
    ("audit", "actions=api_key.created", "actions", "extra_forbidden"),
    ("audit", "account_id=other", "account_id", "extra_forbidden"),
    ("audit", "actor=a&actor=b", "actor", "repeated"),
]


@pytest.mark.parametrize(("what", "query", "field", "kind"), FAULTY)
async def test_a_query_that_will_not_do(
    api: Api, what: str, query: str, field: str, kind: str
) -> None:
    """What is wrong, misspelt, or there twice is answered in the list form."""
    await api.add("auditor", "audit:read", "api-keys:read")
    path = AUDIT if what == "audit" else api.path("sender", "/usage")
    answer = await api.call("GET", path, query=query, caller="auditor")
    assert answer.status == 422
    (fault,) = answer.json["detail"]
    assert list(fault) == ["loc", "msg", "type"]
    assert (fault["loc"], fault["type"]) == (["query", field], kind)


async def test_reading_needs_its_scope(api: Api) -> None:
    """Usage needs api-keys:read, the audit log audit:read, and the query is not read before."""
    for path, missing in ((api.path("sender", "/usage"), "api-keys:read"), (AUDIT, "audit:read")):
        answer = await api.call("GET", path, caller="sender", query="range=x")
        assert (answer.status, answer.code) == (403, "insufficient_scope")
        assert f'scope="{missing}"' in (answer.header("www-authenticate") or "")


async def test_the_audit_log_is_answered_as_documented(api: Api) -> None:
    """It has these fields, the newest row first, of the caller's account alone."""
    await api.add("auditor", "audit:read")
    created = (await api.create(name="CI")).json
    answer = await api.call("GET", AUDIT, caller="auditor")
    assert answer.status == 200
    assert list(answer.json) == ["items", "range", "total"]
    assert (answer.json["range"], answer.json["total"]) == ("30d", 6)
    newest, *others = answer.json["items"]
    assert [row["target_name"] for row in others] == [
        "auditor", "sender", "writer", "reader", "manager",
    ]  # fmt: skip
    moment = datetime.fromisoformat(newest.pop("created_at"))
    assert abs(moment - datetime.now(UTC)) < timedelta(minutes=5)
    assert isinstance(newest.pop("id"), int)
    assert newest == {
        "actor": f"api_key:{api.keys['manager'].id}",
        "action": "api_key.created",
        "target_type": "API key",
        "target_name": "CI",
        "target_id": created["id"],
        "category": "Security",
        "meta": {"key_prefix": created["key_prefix"], "permissions": ["send"]},
        "request_id": None,
    }


async def test_the_audit_log_can_be_filtered(api: Api) -> None:
    """Each filter leaves the rows that have exactly its value; the limit leaves the total."""
    await api.add("auditor", "audit:read")
    await api.call("DELETE", api.path("sender"), caller="writer")
    sender, writer = api.keys["sender"].id, api.keys["writer"].id
    for query, total, shown in (
        ("category=Security", 6, 6),
        ("category=security", 0, 0),
        ("category=null", 0, 0),
        ("action=api_key.revoked", 1, 1),
        (f"actor=api_key:{writer}", 1, 1),
        (f"target_id={sender}", 2, 2),
        (f"target_id={sender}&action=api_key.created", 1, 1),
        (f"target_id={api.keys['other'].id}", 0, 0),
        ("limit=2", 6, 2),
        ("limit=500&range=90d", 6, 6),
    ):
        answer = await api.call("GET", AUDIT, query=query, caller="auditor")
        assert answer.status == 200, query
        assert (answer.json["total"], len(answer.json["items"])) == (total, shown), query


async def test_the_audit_log_reaches_as_far_back_as_asked(api: Api) -> None:
    """A row is shown in the ranges that reach it, and in no other."""
    await api.add("auditor", "audit:read")
    row = {
        "account_id": "acme",
        "actor": "application",
        "action": "api_key.created",
        "target_type": "API key",
        "target_name": "old",
        "target_id": str(uuid4()),
        "category": "Security",
        "meta": "{}",
        "created_at": datetime.now(UTC) - timedelta(days=10),
    }
    execute(api.url, insert(schema.audit).values(**row))
    for query, total in (("range=24h", 5), ("range=7d", 5), ("range=30d", 6), ("", 6)):
        answer = await api.call("GET", AUDIT, query=query, caller="auditor")
        assert answer.json["total"] == total, query


async def test_rows_say_what_there_is_to_say(api: Api) -> None:
    """The status tells of keys that were replaced, end soon, lie idle, or were never used."""
    now = datetime.now(UTC)
    await api.add("soon", "send", expires_at=now + timedelta(days=13))
    await api.add("later", "send", expires_at=now + timedelta(days=15))
    await api.call("POST", api.path("sender", "/rotate"))
    uses = {"reader": now, "writer": now - timedelta(days=91)}
    created = {schema.keys.c.created_at: now - timedelta(days=100)}
    execute(api.url, schema.keys.update().where(schema.keys.c.name == "writer").values(created))
    for name, moment in uses.items():
        values = {"key_id": api.keys[name].id, "last_used_at": moment}
        execute(api.url, insert(schema.key_usage).values(**values))
    rows = (await api.call("GET")).json
    found = {row["name"]: row["status"] for row in rows if row["replaced_by"] is None}
    assert found == {
        "soon": "expiring",
        "later": "never_used",
        "reader": "ok",
        "writer": "idle",
        "sender": "never_used",
        "manager": "never_used",
    }
    assert [row["status"] for row in rows if row["replaced_by"]] == ["replaced"]
