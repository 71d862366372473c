"""The mail service's official Python client, unmodified, against the example."""

import pytest
from axene_mailer import Axene, AxeneError  # type: ignore[import-untyped]  # it has no types

from tests.support.api import call, first_token
from tests.support.uvicorn_process import UvicornProcess

MESSAGE = {
    "from": {"email": "shop@example.com", "name": "Shop"},
    "to": "customer@example.com",
    "subject": "Your receipt",
    "html": "<p>Thank you.</p>",
}


def test_the_official_client_sends_until_its_key_is_deleted(database_url: str) -> None:
    """It sends with a key made by the API; after the key's deletion it gets its typed error."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": database_url}) as server:
        managing = first_token(database_url, "api-keys:write", "send", "emails:read")
        wanted = {"name": "Shop", "permissions": ["send", "emails:read"]}
        created = call(server.url, "POST", "/v1/api-keys/", token=managing, body=wanted)
        assert created.status == 201
        axene = Axene(api_key=created.json["key"], base_url=server.url, max_retries=1)

        accepted = axene.emails.send(MESSAGE)
        (listed,) = axene.emails.list()
        path = f"/v1/api-keys/{created.json['id']}"
        deleted = call(server.url, "DELETE", path, token=managing)
        with pytest.raises(AxeneError) as refused:
            axene.emails.send(MESSAGE)

    assert accepted["status"] == "queued"
    assert (listed["id"], listed["subject"]) == (accepted["id"], "Your receipt")
    assert (deleted.status, deleted.body) == (204, b"")
    assert (refused.value.status, refused.value.code) == (401, "invalid_token")
    assert str(refused.value) == "The API key is not valid."


def test_the_official_client_is_told_which_scope_is_missing(sqlite_url: str) -> None:
    """A key that may only send gets 403 and the scope's name when it asks for the list."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": sqlite_url}) as server:
        axene = Axene(api_key=first_token(sqlite_url, "send"), base_url=server.url, max_retries=1)
        with pytest.raises(AxeneError, match="lacks the scope: emails:read") as refused:
            axene.emails.list()
    assert (refused.value.status, refused.value.code) == (403, "insufficient_scope")


def test_accounts_see_their_own_emails_only(sqlite_url: str) -> None:
    """What one account has sent is not in the list of another."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": sqlite_url}) as server:
        acme, zenith = (
            Axene(
                api_key=first_token(sqlite_url, "send", "emails:read", account=account),
                base_url=server.url,
                max_retries=1,
            )
            for account in ("acme", "zenith")
        )
        accepted = acme.emails.send(MESSAGE)
        assert [email["id"] for email in acme.emails.list()] == [accepted["id"]]
        assert zenith.emails.list() == []


def test_a_message_that_is_none_is_refused(sqlite_url: str) -> None:
    """The example answers 422 with the list form of errors to a body without a sender."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": sqlite_url}) as server:
        token = first_token(sqlite_url)
        answer = call(server.url, "POST", "/v1/emails/", token=token, body={"subject": "Hello"})
    assert answer.status == 422
    assert [set(fault) for fault in answer.json["detail"]] == [{"loc", "msg", "type"}]
