"""People who are signed in to the host application and manage keys over HTTP."""

from typing import Final

import pytest
from starlette.requests import HTTPConnection

from tests.http.managing import AUDIT, KEYS, Api
from tests.http.support import Headers, bearer, call, http_scope
from tfm_guard import Person
from tfm_guard.errors import NotAllowed
from tfm_guard.http.persons import Identify

ADMIN: Final = Person(account_id="acme", id="7", may_manage=True)
MEMBER: Final = Person(account_id="acme", id="8", may_manage=False)
HOST: Final = (b"host", b"app.example")


def signed_in(person: Person | None) -> Identify:
    """Return what says that this is who is signed in, whatever comes."""

    async def identify(_connection: HTTPConnection) -> Person | None:
        return person

    return identify


def origin(value: bytes) -> Headers:
    """Return the headers of a browser's request from a page of that origin."""
    return ((b"origin", value), HOST)


async def test_who_may_manage_does_all_that_a_key_does(api: Api) -> None:
    """Such a person creates, lists, changes, rotates and deletes keys, with any scope there is."""
    admin = signed_in(ADMIN)
    body = {"name": "Mine", "permissions": ["send", "webhooks:write"]}
    created = await api.call_as(admin, "POST", body=body)
    assert created.status == 201
    path = f"{KEYS}{created.json['id']}"
    listed = await api.call_as(admin, "GET")
    assert (listed.status, listed.json[0]["name"]) == (200, "Mine")
    assert (await api.call_as(admin, "PATCH", path, {"name": "Ours"})).json["name"] == "Ours"
    assert (await api.call_as(admin, "POST", f"{path}/rotate")).status == 201
    assert (await api.call_as(admin, "GET", f"{path}/usage")).status == 200
    assert (await api.call_as(admin, "DELETE", path)).status == 204
    assert (await api.call_as(admin, "GET", AUDIT)).json["items"][0]["actor"] == "person:7"


async def test_a_member_sees_and_changes_nothing(api: Api) -> None:
    """Who may not manage sees keys, usage and log; each change is refused with 403 not_allowed."""
    member, path = signed_in(MEMBER), api.path("sender")
    for seen in (KEYS, f"{path}/usage", AUDIT):
        assert (await api.call_as(member, "GET", seen)).status == 200
    for method, refused in (
        ("POST", KEYS),
        ("PATCH", path),
        ("DELETE", path),
        ("POST", f"{path}/rotate"),
        ("POST", f"{KEYS}self/revoke"),
    ):
        answer = await api.call_as(member, method, refused, {"name": "x"})
        assert (answer.status, answer.code) == (403, "not_allowed"), refused
        assert answer.header("www-authenticate") is None
    assert (await api.guard.verify(api.tokens["sender"])).name == "sender"


async def test_a_person_is_of_one_account(api: Api) -> None:
    """Keys of another account are neither listed nor found."""
    admin = signed_in(ADMIN)
    assert "other" not in {row["name"] for row in (await api.call_as(admin, "GET")).json}
    answer = await api.call_as(admin, "DELETE", api.path("other"))
    assert (answer.status, answer.code) == (404, "not_found")


async def test_nobody_gets_nowhere(api: Api) -> None:
    """Who is not signed in, and has no key, is answered 401 with the challenge; so is a HEAD."""
    for method, path in (
        ("GET", KEYS),
        ("DELETE", api.path("sender")),
        ("GET", "/"),
        ("HEAD", KEYS),
    ):
        answer = await api.call_as(signed_in(None), method, path)
        assert answer.status == 401
        assert answer.header("www-authenticate") == 'Bearer realm="api"'
        assert answer.header("cache-control") == "no-store"
        assert answer.code == (None if method == "HEAD" else "missing_credentials")


async def test_the_host_may_refuse_by_itself(api: Api) -> None:
    """What `identify` raises of the refusals is the answer."""

    async def identify(_connection: HTTPConnection) -> Person | None:
        raise NotAllowed

    answer = await api.call_as(identify, "GET")
    assert (answer.status, answer.code) == (403, "not_allowed")


async def test_the_host_sees_the_request(api: Api) -> None:
    """`identify` is given the headers, cookies among them, and the path."""
    seen = []

    async def identify(connection: HTTPConnection) -> Person | None:
        seen.append((connection.cookies["session"], connection.url.path))
        return ADMIN

    headers = ((b"cookie", b"session=s1"),)
    assert (await api.call_as(identify, "GET", headers=headers)).status == 200
    assert seen == [("s1", KEYS)]


@pytest.mark.parametrize(
    ("credentials", "status"),
    [
        (b"Bearer tfm_k_nothing", 401),
        (b"Basic YTpi", 401),
        (b"", 401),
        (b"Bearer", 400),
    ],
)
async def test_an_authorization_header_is_judged_alone(
    api: Api, credentials: bytes, status: int
) -> None:
    """With the header, whatever is in it, nobody is asked who is signed in."""

    async def identify(_connection: HTTPConnection) -> Person | None:
        raise AssertionError

    headers = ((b"authorization", credentials),)
    assert (await api.call_as(identify, "GET", headers=headers)).status == status
    by_key = tuple(bearer(api.tokens["reader"]))
    assert (await api.call_as(identify, "GET", headers=by_key)).status == 200
    answer = await api.call_as(identify, "POST", headers=by_key, body={"name": "x"})
    assert (answer.status, answer.code) == (403, "insufficient_scope")


async def test_a_person_is_no_key_that_revokes_itself(api: Api) -> None:
    """Who is signed in has no key in the request to revoke: 401."""
    answer = await api.call_as(signed_in(ADMIN), "POST", f"{KEYS}self/revoke")
    assert (answer.status, answer.code) == (401, "missing_credentials")


REFUSED: Final[list[Headers]] = [
    ((b"sec-fetch-site", b"cross-site"),),
    ((b"sec-fetch-site", b"same-site"),),
    ((b"sec-fetch-site", b""),),
    ((b"sec-fetch-site", b"cross-site"), *origin(b"https://app.example")),
    origin(b"https://evil.example"),
    origin(b"https://app.example.evil.example"),
    origin(b"https://app.example:8443"),
    origin(b"https://sub.app.example"),
    origin(b"https://app.example@evil.example"),
    origin(b"null"),
    origin(b""),
    origin(b"http://["),
    ((b"origin", b"null"),),
    ((b"origin", b"null"), (b"host", b"")),
    ((b"origin", b"https://app.example"), (b"host", b"app.example:8443")),
]


@pytest.mark.parametrize("headers", REFUSED, ids=str)
async def test_a_page_of_another_site_changes_nothing(api: Api, headers: Headers) -> None:
    """What a browser sends for a page of another origin is refused with 403 cross_origin."""
    for method, path in (
        ("POST", KEYS),
        ("PATCH", api.path("sender")),
        ("DELETE", api.path("sender")),
        ("POST", api.path("sender", "/rotate")),
    ):
        answer = await api.call_as(signed_in(ADMIN), method, path, {"name": "x"}, headers)
        assert (answer.status, answer.code) == (403, "cross_origin"), method
    assert (await api.guard.verify(api.tokens["sender"])).name == "sender"
    # A page may look wherever it likes: it is not shown the answer.
    assert (await api.call_as(signed_in(ADMIN), "GET", headers=headers)).status == 200


TAKEN: Final[list[Headers]] = [
    (),
    ((b"sec-fetch-site", b"same-origin"),),
    ((b"sec-fetch-site", b"none"),),
    ((b"sec-fetch-site", b"same-origin"), *origin(b"https://evil.example")),
    origin(b"https://app.example"),
    origin(b"http://app.example"),  # behind a proxy, the scheme is not known here
    ((b"origin", b"http://app.example:8080"), (b"host", b"app.example:8080")),
]


@pytest.mark.parametrize("headers", TAKEN, ids=str)
async def test_a_page_of_the_same_site_may(api: Api, headers: Headers) -> None:
    """The host's own pages, and what is no browser, change keys."""
    answer = await api.call_as(signed_in(ADMIN), "POST", KEYS, {"name": "x"}, headers)
    assert answer.status == 201


async def test_a_key_is_sent_by_no_browser_unasked(api: Api) -> None:
    """Requests with a key are not asked where they come from: CORS is the host's matter."""
    headers = (*bearer(api.tokens["manager"]), (b"sec-fetch-site", b"cross-site"))
    answer = await api.call_as(signed_in(ADMIN), "POST", KEYS, {"name": "x"}, headers)
    assert answer.status == 201


async def test_the_audit_log_names_the_person(api: Api) -> None:
    """A person's changes are logged under the id that the host gave, with that of the request."""
    before = len(api.audited("id"))
    headers = ((b"x-request-id", b"r-1"),)
    path = api.path("sender")
    await api.call_as(signed_in(ADMIN), "PATCH", path, {"name": "x"}, headers)
    await api.call_as(signed_in(ADMIN), "DELETE", path)
    assert api.audited("actor", "action", "request_id")[before:] == [
        ("person:7", "api_key.renamed", "r-1"),
        ("person:7", "api_key.revoked", None),
    ]


async def test_without_identify_nobody_is_signed_in(api: Api) -> None:
    """Where the host says nothing about people, a cookie opens nothing."""
    scope = http_scope("GET", KEYS, ((b"cookie", b"session=s1"),))
    answer = await call(api.guard.management_app(), scope)
    assert (answer.status, answer.code) == (401, "missing_credentials")
