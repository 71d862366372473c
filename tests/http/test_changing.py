"""Renaming and narrowing keys over HTTP."""

from typing import Any, Final
from uuid import uuid4

import pytest

from tests.http.managing import KEYS, Api


async def test_a_key_is_renamed(api: Api) -> None:
    """PATCH with a name answers the row with the new name, trimmed; the key may do what it did."""
    answer = await api.call("PATCH", api.path("sender"), {"name": "  Web site "})
    assert answer.status == 200
    assert answer.header("content-type") == "application/json"
    assert answer.json == await api.row(api.keys["sender"].id)
    assert (answer.json["name"], answer.json["permissions"]) == ("Web site", ["send"])
    key = await api.guard.verify(api.tokens["sender"])
    assert (key.name, *key.scopes) == ("Web site", "send")


async def test_a_key_is_narrowed(api: Api) -> None:
    """PATCH with some of its scopes leaves the key these, at once, and its name."""
    assert (await api.call("GET")).status == 200  # so that memory knows what it may do
    answer = await api.call("PATCH", api.path("manager"), {"permissions": ["api-keys:write"]})
    assert answer.status == 200
    assert (answer.json["name"], answer.json["permissions"]) == ("manager", ["api-keys:write"])
    refused = await api.call("GET")
    assert (refused.status, refused.code) == (403, "insufficient_scope")


async def test_a_key_is_renamed_and_narrowed_at_once(api: Api) -> None:
    """PATCH with both does both, and leaves one row in the audit log for each."""
    before = len(api.audited("id"))
    answer = await api.call("PATCH", api.path("sender"), {"name": "Idle", "permissions": []})
    assert (answer.status, answer.json["name"], answer.json["permissions"]) == (200, "Idle", [])
    key, who = str(api.keys["sender"].id), f"api_key:{api.keys['manager'].id}"
    assert sorted(api.audited("action", "actor", "target_id")[before:]) == [
        ("api_key.narrowed", who, key),
        ("api_key.renamed", who, key),
    ]


async def test_the_same_again_changes_nothing(api: Api) -> None:
    """PATCH with what the key is already answers 200, and leaves no row in the audit log."""
    before = api.audited("id")
    answer = await api.call(
        "PATCH", api.path("sender"), {"name": "sender", "permissions": ["send"]}
    )
    assert answer.status == 200
    assert answer.json == await api.row(api.keys["sender"].id)
    assert api.audited("id") == before


# A body, where in it the fault is, and what is wrong.
FAULTY: Final[list[tuple[object, list[str | int], str]]] = [
    (b"", [], "json_invalid"),
    (b"{", [], "json_invalid"),
    (b"[]", [], "invalid"),
    ({}, [], "missing"),
    ({"name": None}, ["name"], "invalid"),
    ({"permissions": None}, ["permissions"], "invalid"),
    ({"name": ""}, ["name"], "string_too_short"),
    ({"name": "a" * 101}, ["name"], "string_too_long"),
    ({"name": "a\0"}, ["name"], "string_control"),
    ({"name": "x", "permissions": ["send", "emails:read"]}, ["permissions", 1], "scope_added"),
    ({"permissions": ["no-such-scope"]}, ["permissions", 0], "scope_added"),
    ({"permissions": "send"}, ["permissions"], "invalid"),
    ({"permissions": [1]}, ["permissions", 0], "invalid"),
    ({"name": "x", "expires_at": "2099-01-01T00:00:00Z"}, ["expires_at"], "extra_forbidden"),
    ({"name": "x", "is_active": True}, ["is_active"], "extra_forbidden"),
    ({"name": "x", "account_id": "other"}, ["account_id"], "extra_forbidden"),
]


async def test_a_body_that_will_not_do(api: Api) -> None:
    """What is wrong is answered in the list form, and of a body with a fault nothing is done."""
    for body, location, kind in FAULTY:
        answer = await api.call("PATCH", api.path("sender"), body)
        assert answer.status == 422, body
        (fault,) = answer.json["detail"]
        assert (fault["loc"], fault["type"]) == (["body", *location], kind), body
    row = await api.row(api.keys["sender"].id)
    assert (row["name"], row["permissions"]) == ("sender", ["send"])


async def test_a_scope_that_is_added_is_answered_with_those_there_are(api: Api) -> None:
    """Who asks for more is told what the key has, and what to do."""
    answer = await api.call("PATCH", api.path("sender"), {"permissions": ["emails:read"]})
    assert answer.json["detail"][0]["msg"] == (
        "A key can lose scopes, not get more. It has: send. Create another key instead"
    )


async def test_every_other_id_is_answered_alike(api: Api) -> None:
    """A revoked key, another account's and one that never was: one 404; what is no UUID: 422."""
    await api.call("DELETE", api.path("sender"))
    gone, foreign = api.keys["sender"].id, api.keys["other"].id
    answers = [
        await api.call("PATCH", f"{KEYS}{each}", {"name": "x"}) for each in (gone, foreign, uuid4())
    ]
    assert len(set(answers)) == 1
    assert (answers[0].status, answers[0].code) == (404, "not_found")
    answer = await api.call("PATCH", f"{KEYS}no-uuid", {"name": "x"})
    assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["path", "key_id"])
    assert (await api.guard.verify(api.tokens["other"])).name == "other"


@pytest.mark.parametrize("body", [{"name": "x"}, {"permissions": []}, b"no JSON"])
async def test_changing_needs_its_scope(api: Api, body: Any) -> None:
    """A key without api-keys:write changes nothing, not even itself."""
    for caller in ("reader", "sender"):
        answer = await api.call("PATCH", api.path(caller), body, caller=caller)
        assert (answer.status, answer.code) == (403, "insufficient_scope")
