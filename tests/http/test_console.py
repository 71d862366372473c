"""Settings → API Keys without a browser: what it answers, to whom, and what it never says."""

import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from http.cookies import SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import uuid4

import jwt
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from tests.http.support import Answer, call, http_scope, make_guard
from tests.support.guards import begin_waiting, create, new_guard, store_of
from tests.support.sql import execute
from tfm_guard import Guard, Person
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.errors import ConfigurationError, GuardError, InvalidToken
from tfm_guard.http.console import texts
from tfm_guard.http.console.charts import draw, gather
from tfm_guard.http.identities import jwt_identity, session_identity
from tfm_guard.http.persons import Identify
from tfm_guard.http.sign_in import LINK_SECONDS, SESSION_SECONDS, SignInLinks
from tfm_guard.records import Tally, UsageBucket
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

OWNER = Person(account_id="acme", id="ana", may_manage=True)
MEMBER = Person(account_id="acme", id="ben", may_manage=False)
STRANGER = Person(account_id="other", id="cleo", may_manage=True)
FORM = (b"content-type", b"application/x-www-form-urlencoded")
SAME = (b"sec-fetch-site", b"same-origin")
TOKEN = re.compile(r"tfm_k_[0-9a-f]{48}")
SECRET = "s" * 32


class Console(NamedTuple):
    """The page, and the guard behind it."""

    guard: Guard

    async def get(self, path: str, person: Person | None = OWNER, **scope: Any) -> Answer:
        """Open an address, which may have a query."""
        path, _, query = path.partition("?")
        more = {"query_string": query.encode(), **scope}
        return await call(self.app(person), http_scope(path=path, **more))

    async def post(
        self,
        path: str,
        *fields: tuple[str, str],
        person: Person | None = OWNER,
        headers: Sequence[tuple[bytes, bytes]] = (FORM, SAME),
        body: bytes | None = None,
    ) -> Answer:
        """Send a form as a browser does."""
        content = urlencode(fields).encode() if body is None else body
        return await call(self.app(person), http_scope("POST", path, headers), content)

    async def submit(
        self, path: str, *fields: tuple[str, str], person: Person = OWNER, request_id: bytes = b""
    ) -> Answer:
        """Open the form at an address, fill it in, and send it with what it carries."""
        page = (await self.get(path, person)).body.decode()
        hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page)
        headers = (FORM, SAME, (b"x-request-id", request_id))
        return await self.post(path, *hidden, *fields, person=person, headers=headers)

    async def token(self, person: Person = OWNER) -> tuple[str, str]:
        """Return the field that shows that a form is ours."""
        page = (await self.get("/new", person)).body.decode()
        (token,) = re.findall(r'name="token" value="([^"]+)"', page)
        return "token", token

    def app(self, person: Person | None, **options: Any) -> ASGIApp:
        """Return the page for who is signed in."""
        return self.guard.console(identify=known(person), **options)

    async def how_many(self) -> int:
        """Return how many keys the account has."""
        return len(await self.guard.keys.list("acme"))


def known(person: Person | None) -> Identify:
    """Return an `identify` that always gives the same answer."""

    async def identify(_: HTTPConnection) -> Person | None:
        return person

    return identify


@pytest.fixture
async def console(guard: Guard) -> Console:
    """Serve the page of an account without keys."""
    return Console(guard)


@pytest.fixture
async def clock(sqlite_url: str) -> AsyncIterator[tuple[Console, ManualClock]]:
    """Serve the page at a time that the test moves."""
    time = ManualClock(datetime(2030, 1, 1, tzinfo=UTC))
    async with new_guard(sqlite_url, clock=time) as guard:
        yield Console(guard), time


async def test_every_answer_forbids_what_it_does_not_need(console: Console) -> None:
    """Pages, refusals and redirects are not stored, not framed, and run nothing that is inline."""
    answers = [
        await console.get("/"),
        await console.get("/", None),
        await console.get("/nothing"),
        await console.get("/new/"),
        await console.post("/new", headers=[FORM]),
        await console.submit("/new", ("name", "CI"), ("scope", "send"), ("expires", "never")),
    ]
    assert [answer.status for answer in answers] == [200, 401, 404, 308, 403, 201]
    for answer in answers:
        assert answer.header("cache-control") == "no-store"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("referrer-policy") == "same-origin"
        policy = str(answer.header("content-security-policy")).split("; ")
        assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= {*policy}
        assert "form-action 'self'" in policy
        assert "unsafe" not in " ".join(policy)
        page = answer.body.decode()
        assert not re.search(r"<script(?! src=)|<style| style=| on\w+=|=.(https?:)?//", page)


async def test_its_files_are_kept_by_their_version(console: Console) -> None:
    """Style and script are served to anybody, under addresses that change with them."""
    page = (await console.get("/")).body.decode()
    addresses = re.findall(r'(?:href|src)="\./(console\.\w+\?v=\w+)"', page)
    assert len(addresses) == 3
    for address in addresses:
        answer = await console.get(f"/{address}", None)
        assert answer.status == 200
        assert "immutable" in str(answer.header("cache-control"))


async def test_nobody_who_is_not_signed_in_sees_anything(console: Console) -> None:
    """Without a person every address answers 401 with the way to sign in, whatever there is."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    app = console.app(None, sign_in_url="/login")
    for path in ("/", "/new", f"/{created.key.id}", f"/{created.key.id}/delete"):
        answer = await call(app, http_scope(path=path))
        assert answer.status == 401
        assert b'href="/login"' in answer.body
        assert b"CI" not in answer.body


async def test_a_way_to_tell_who_is_signed_in_is_needed(guard: Guard) -> None:
    """There is no page without `identify`, and nothing stands in for it."""
    with pytest.raises(TypeError, match="identify"):
        guard.console()  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="identify"):
        guard.console(identify=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"sec-fetch-site", b"cross-site")],
        [(b"sec-fetch-site", b"same-site")],
        [(b"origin", b"https://evil.example"), (b"host", b"here")],
        [(b"origin", b"null"), (b"host", b"here")],
    ],
    ids=["cross-site", "same-site", "foreign origin", "null origin"],
)
async def test_forms_of_other_sites_change_nothing(
    console: Console, headers: list[tuple[bytes, bytes]]
) -> None:
    """What a browser sends for another site is answered 403, even with a good token."""
    fields = [await console.token(), ("name", "CI"), ("scope", "send")]
    answer = await console.post("/new", *fields, headers=[FORM, *headers])
    assert answer.status == 403
    assert b"another site" in answer.body
    assert await console.how_many() == 0


async def test_a_form_needs_the_token_of_its_person(
    clock: tuple[Console, ManualClock],
) -> None:
    """No token, a changed one, another person's or one of two days ago: 403, and no key."""
    console, time = clock
    _, token = await console.token()
    other = Person(account_id="acme", id="dan", may_manage=True)
    _, others = await console.token(other)
    _, strangers = await console.token(STRANGER)
    for wrong in ("", "x", f"{token[:-1]}x", others, strangers, token.partition(".")[0]):
        answer = await console.post("/new", ("token", wrong), ("name", "CI"))
        assert answer.status == 403
        assert b"Nothing was changed" in answer.body
    time.advance(2 * 86_400)
    assert (await console.post("/new", ("token", token), ("name", "CI"))).status == 403
    assert await console.how_many() == 0


async def test_a_token_outlives_a_new_secret(sqlite_url: str) -> None:
    """Forms that were open when the installation got a new secret can still be sent."""
    async with make_guard(sqlite_url) as guard:
        token = await Console(guard).token()
    async with make_guard(sqlite_url, secrets=["n" * 32]) as guard:
        answer = await Console(guard).post("/new", token, ("name", "CI"), ("scope", "send"))
        assert answer.status == 201


async def test_only_who_may_manage_changes_anything(console: Console) -> None:
    """A member sees the list and a key; forms and what they do are 403."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    path = f"/{created.key.id}"
    seen = [await console.get(each, MEMBER) for each in ("/", path)]
    assert [answer.status for answer in seen] == [200, 200]
    assert all(b"<form" not in answer.body for answer in seen)
    for each in ("/new", f"{path}/rotate", f"{path}/delete"):
        assert (await console.get(each, MEMBER)).status == 403
        assert (await console.post(each, person=MEMBER)).status == 403
    assert await console.how_many() == 1


async def test_what_is_anothers_looks_like_what_never_was(console: Console) -> None:
    """Another account's key, an id never issued and no id at all: one and the same 404."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    token = await console.token(STRANGER)
    answers = []
    for key_id in (created.key.id, uuid4(), "nothing"):
        path, grace = f"/{key_id}", ("grace", "0")
        answers += [
            *[await console.get(f"{path}{way}", STRANGER) for way in ("", "/rotate", "/delete")],
            await console.post(f"{path}/delete", token, person=STRANGER),
            await console.post(f"{path}/delete", token, ("again", "yes"), person=STRANGER),
            await console.post(f"{path}/rotate", token, grace, person=STRANGER),
        ]
    bodies = {re.sub(rb'(?<=")(\.\./|\./)', b"", answer.body) for answer in answers}
    assert {answer.status for answer in answers} == {404}
    assert len(bodies) == 1
    assert await console.how_many() == 1


async def test_no_get_changes_anything(console: Console) -> None:
    """Addresses answer to GET without a change, and to no other method than their own."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    path = f"/{created.key.id}"
    query = urlencode([await console.token(), ("name", "x"), ("grace", "0")])
    before = execute(console.guard.settings.database_url, "SELECT count(*) FROM tfm_audit")
    for each in ("/", "/new", path, f"{path}/rotate", f"{path}/delete"):
        assert (await console.get(f"{each}?{query}")).status == 200
    for method, each in [("POST", "/"), ("POST", path), ("DELETE", path), ("PUT", "/new")]:
        answer = await call(console.app(OWNER), http_scope(method, each, [SAME]))
        assert answer.status == 405
        assert "GET" in str(answer.header("allow"))
    assert execute(console.guard.settings.database_url, "SELECT count(*) FROM tfm_audit") == before


async def test_a_key_is_created_and_shown_in_that_answer_alone(console: Console) -> None:
    """The token is in the answer to the form and in no other, nor in any header."""
    answer = await console.submit(
        "/new", ("name", " Shop "), ("scope", "send"), ("scope", "send"), ("scope", "emails:read")
    )
    assert answer.status == 201
    (token,) = TOKEN.findall(answer.body.decode())
    assert token not in str(answer.headers)
    key = await console.guard.verify(token)
    assert (key.account_id, key.name, key.scopes) == (
        "acme",
        "Shop",
        frozenset({"send", "emails:read"}),
    )
    for path in ("/", f"/{key.key_id}", f"/{key.key_id}/rotate", f"/{key.key_id}/delete", "/new"):
        seen = await console.get(path)
        assert seen.status == 200
        assert token[14:] not in seen.body.decode()
    page = (await console.get(f"/{key.key_id}")).body.decode()
    assert re.search(r"Created</bdi></td>\s*<td><bdi>ana</bdi>", page)


async def test_the_audit_log_names_the_person_and_the_request(console: Console) -> None:
    """What is done on the page is logged with who did it and the X-Request-ID, if that is good."""
    await console.submit("/new", ("name", "CI"), request_id=b"r-1")
    (key,) = await console.guard.keys.list("acme")
    await console.submit(f"/{key.id}/rotate", ("grace", "0"), request_id=b"r-2")
    (new,) = await console.guard.keys.list("acme")
    await console.submit(f"/{new.id}/delete", request_id=b"\xff")
    page = await console.guard.audit.list("acme")
    assert [(row.actor, row.action, row.request_id) for row in reversed(page.items)] == [
        ("person:ana", "api_key.created", "r-1"),
        ("person:ana", "api_key.created", "r-2"),
        ("person:ana", "api_key.rotated", "r-2"),
        ("person:ana", "api_key.revoked", None),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "At least 1 character"),
        ("x" * 101, "At most 100 characters"),
        ("a\x00b", "Control and directional"),
        ("a\u202eb", "Control and directional"),
    ],
    ids=["empty", "long", "control", "directional"],
)
async def test_a_name_that_is_none_is_told_beside_its_field(
    console: Console, name: str, message: str
) -> None:
    """The answer is 422, the field has the focus, names its error, and keeps what was typed."""
    answer = await console.submit("/new", ("name", name), ("scope", "domains:read"))
    page = answer.body.decode()
    assert answer.status == 422
    assert re.search(rf'role="alert" id="name-error">{message}', page)
    assert re.search(r'id="name" [^>]*aria-invalid="true" [^>]*name-error[^>]* autofocus', page)
    assert re.search(r'value="domains:read" checked', page)
    assert await console.how_many() == 0


async def test_a_name_is_only_ever_text(console: Console) -> None:
    """Markup in a name arrives as text, everywhere that it is shown."""
    name = '"><script>alert(1)</script>'
    answer = await console.submit("/new", ("name", name))
    assert answer.status == 201
    (key,) = await console.guard.keys.list("acme")
    assert key.name == name
    for path in ("/", f"/{key.id}", f"/{key.id}/rotate", f"/{key.id}/delete", "/?q=<script>"):
        page = (await console.get(path)).body
        assert b"<script>" not in page
    assert b"<script>" not in answer.body


@pytest.mark.parametrize(
    "field",
    [
        ("scope", "send everything"),
        ("user_id", "1"),
        ("plan", "pro"),
        ("id", str(uuid4())),
        ("revoked_at", "2030-01-01"),
        ("expires", "3650"),
        ("expires", "date"),
        ("expires_on", "2001-01-01"),
        ("expires_on", "tomorrow"),
        ("expires_on", "9999-12-31"),
    ],
)
async def test_what_the_form_does_not_have_is_refused(
    console: Console, field: tuple[str, str]
) -> None:
    """Unknown scopes, fields and choices, and days that have passed: 422, and no key."""
    answer = await console.submit("/new", ("name", "CI"), field)
    assert answer.status == 422
    assert b'role="alert"' in answer.body
    assert await console.how_many() == 0


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ([(b"content-type", b"application/json")], b'{"name": "CI"}', 422),
        ([FORM], b"name", 422),
        ([FORM], b"name=%ff", 422),
        ([FORM], b"name=\xff", 422),
        ([FORM], b"&".join([b"scope=send"] * 300), 422),
        ([FORM], b"name=" + b"x" * 70_000, 413),
    ],
    ids=["json", "no pair", "no UTF-8", "no ASCII", "too many", "too long"],
)
async def test_what_is_no_form_is_refused(
    console: Console, headers: list[tuple[bytes, bytes]], body: bytes, status: int
) -> None:
    """What cannot be read as a form is refused, and changes nothing."""
    assert (await console.post("/new", headers=[*headers, SAME], body=body)).status == status
    assert await console.how_many() == 0


async def test_a_form_sent_twice_creates_one_key(console: Console) -> None:
    """Sent again, as by a reload, a form answers 409, names its key, and creates nothing."""
    page = (await console.get("/new")).body.decode()
    hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page)
    first = await console.post("/new", *hidden, ("name", "CI"))
    again = await console.post("/new", *hidden, ("name", "CI"))
    assert (first.status, again.status) == (201, 409)
    assert not TOKEN.search(again.body.decode())
    assert "the key “CI” was created" in again.body.decode()
    assert await console.how_many() == 1


async def test_an_expiry_is_what_was_chosen(clock: tuple[Console, ManualClock]) -> None:
    """In days from now, or at the end of a day, UTC, also where the choice was left as it was."""
    console, time = clock
    for fields, expected in [
        ([("expires", "never")], None),
        ([("expires", "30")], time.now() + timedelta(days=30)),
        ([("expires", "never"), ("expires_on", "2031-05-06")], datetime(2031, 5, 7, tzinfo=UTC)),
    ]:
        assert (await console.submit("/new", ("name", "CI"), *fields)).status == 201
        time.advance(1)
        assert (await console.guard.keys.list("acme"))[0].expires_at == (
            expected and (expected + timedelta(seconds=1) if "30" in str(fields) else expected)
        )


async def test_at_the_limit_nothing_is_created(sqlite_url: str) -> None:
    """At the plan's limit the form is 403 and says so, also where it was opened before."""
    async with make_guard(sqlite_url, plans={"free": 1}) as guard:
        console = Console(guard)
        token = await console.token()
        created = await guard.keys.create(account_id="acme", name="CI")
        newest = created.key.created_at.isoformat(timespec="microseconds")
        answer = await console.post("/new", token, ("after", newest), ("name", "x"))
        assert answer.status == 403
        assert "1 of 1 key of the plan “free” used" in answer.body.decode()
        assert b"Your plan has no room" in (await console.get("/")).body
        assert b'href="./new"' not in (await console.get("/")).body


async def test_a_key_is_rotated_and_the_old_one_stays_for_its_grace(console: Console) -> None:
    """The answer has the new token, and says when the old one ends; a second time is 409."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    path = f"/{created.key.id}/rotate"
    assert (await console.submit(path, ("grace", "99"))).status == 422
    answer = await console.submit(path, ("grace", "3600"))
    assert answer.status == 201
    (token,) = TOKEN.findall(answer.body.decode())
    assert (await console.guard.verify(token)).name == "CI"
    assert (await console.guard.verify(created.token)).name == "CI"
    assert f"tfm_k_{created.key.key_prefix}…" in answer.body.decode()
    again = await console.submit(path, ("grace", "3600"))
    assert again.status == 409
    assert b"rotated already" in again.body
    page = (await console.get("/")).body.decode()
    assert page.count("/rotate") == 0  # neither of the two can be, while both work
    (successor,) = (key for key in await console.guard.keys.list("acme") if not key.replaced_by)
    page = (await console.get(f"/{successor.id}")).body.decode()
    assert f'<a href="./{created.key.id}">a key in its grace</a>' in page
    assert "/rotate" not in page
    await console.guard.keys.revoke("acme", created.key.id)
    assert (await console.get("/")).body.decode().count("/rotate") == 1


async def test_a_form_is_good_when_the_newest_key_went(console: Console) -> None:
    """No key is called new because the one that was newest when the form was opened is gone."""
    await console.guard.keys.create(account_id="acme", name="Old")
    newest = await console.guard.keys.create(account_id="acme", name="Newest")
    page = (await console.get("/new")).body.decode()
    hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page)
    await console.guard.keys.revoke("acme", newest.key.id)
    fields = (*hidden, ("name", "CI"), ("scope", "send"))
    assert (await console.post("/new", *fields)).status == 201
    assert (await console.post("/new", *fields)).status == 409


async def test_a_rotated_key_is_shown_whatever_fails_then(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is committed the new key's token is shown, without any question to the database."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    rotate = console.guard.keys.rotate

    async def rotated_last(*args: Any, **options: Any) -> Any:
        rotated = await rotate(*args, **options)
        monkeypatch.setattr("tfm_guard.store.database.READ_SECONDS", 0.0)
        return rotated

    monkeypatch.setattr(console.guard.keys, "rotate", rotated_last)
    answer = await console.submit(f"/{created.key.id}/rotate", ("grace", "3600"))
    assert (await console.get("/")).status == 503
    assert answer.status == 201
    assert len(TOKEN.findall(answer.body.decode())) == 1


async def test_what_is_no_person_is_nobody_known(console: Console) -> None:
    """An `identify` of the host that answers with something else is told so."""
    nobody: Any = {"account_id": "acme", "id": "ana", "may_manage": True}
    with pytest.raises(GuardError, match="identify returned a dict"):
        await call(console.app(nobody), http_scope(path="/"))


@pytest.mark.parametrize(
    ("account_id", "person_id", "said"),
    [
        (7, "ana", "whose account_id is no str"),
        ("acme", uuid4(), "whose id is no str"),
        ("acme", "ana\x00", "with a bad id: Control and directional characters"),
        ("", "ana", "with a bad account_id: At least 1 character"),
        (" acme", "ana", "with a bad account_id: Blanks around it"),
    ],
)
async def test_a_person_whose_ids_cannot_be_written_down_is_nobody(
    console: Console, account_id: Any, person_id: Any, said: str
) -> None:
    """An `identify` of the host that names somebody by what is no plain text is told so."""
    person = Person(account_id=account_id, id=person_id, may_manage=True)
    with pytest.raises(GuardError, match=said):
        await call(console.app(person), http_scope(path="/"))


async def test_without_grace_the_old_key_is_said_to_have_ended(console: Console) -> None:
    """Rotated with no grace, the old key is refused, and the page names it."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    answer = await console.submit(f"/{created.key.id}/rotate", ("grace", "0"))
    assert answer.status == 201
    prefix = f'<code class="prefix">tfm_k_{created.key.key_prefix}…</code>'
    assert f"The old key {prefix} works no more." in answer.body.decode()
    with pytest.raises(InvalidToken):
        await console.guard.verify(created.token)


@pytest.mark.parametrize("grace", ["0", "3600"])
async def test_a_rotation_that_is_not_confirmed_says_so(
    clock: tuple[Console, ManualClock], grace: str
) -> None:
    """Where a process may not know when the old key ends, the new one is shown all the same."""
    console, time = clock
    created = await create(console.guard)
    row = {"id": uuid4(), "name": "cut off", "link": "x/y", "seen": 0, "turn": 1}
    url = console.guard.settings.database_url
    execute(url, schema.workers.insert().values(**row, registered_at=time.now()))
    rotating = await begin_waiting(
        time, console.submit(f"/{created.key.id}/rotate", ("grace", grace))
    )
    await time.pass_time(CONFIRM_SECONDS)
    page = (await rotating).body.decode()
    assert TOKEN.search(page)
    prefix = f'<code class="prefix">tfm_k_{created.key.key_prefix}…</code>'
    assert f"knows when the old key {prefix} ends" in page
    assert "works no more" not in page


async def test_no_page_shows_a_brace_that_nothing_was_put_into(console: Console) -> None:
    """Whatever is shown of a key, each place in the texts got its value."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    path = f"/{created.key.id}"
    answers = [await console.get(each) for each in ("/", "/new", path, "/?q=x")]
    answers += [await console.get(f"{path}{way}") for way in ("/rotate", "/delete")]
    answers.append(await console.submit(f"{path}/rotate", ("grace", "3600")))
    answers.append(await console.submit("/new", ("name", "CI")))
    for answer in answers:
        shown = re.sub(r"(?s)<pre.*?</pre>", "", answer.body.decode())
        assert not re.search(r"\{\w*\}", shown)


async def test_a_key_is_deleted_and_the_list_says_so_once(console: Console) -> None:
    """The form leads to the list (303), which names the key; again, the key is not there: 404."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    path = f"/{created.key.id}/delete"
    token = await console.token()
    answer = await console.submit(path)
    assert answer.status == 303
    where = str(answer.header("location"))
    assert where.startswith("../?note=")
    page = (await console.get(where[2:])).body.decode()
    assert f"tfm_k_{created.key.key_prefix}…</code> is deleted" in page
    assert "is deleted" not in (await console.get(where[2:], STRANGER)).body.decode()
    assert "is deleted" not in (await console.get("/?note=deleted-abcdef12.00")).body.decode()
    assert (await console.post(path, token)).status == 404
    # Who asks whether it is refused everywhere gets an answer, though.
    assert (await console.post(path, token, ("again", "yes"))).status == 303


async def test_a_key_has_a_page_with_its_use(console: Console) -> None:
    """For each range there is a drawing with a text for it, and a table of the same numbers."""
    created = await console.guard.keys.create(account_id="acme", name="CI")
    tally = Tally(created.key.id.bytes, int(datetime.now(UTC).timestamp()) // 3600, 1234, 5)
    await store_of(console.guard).add_usage(uuid4(), [tally])
    for range_, words in [("24h", "24 hours"), ("7d", "7 days"), ("30d", "30 days")]:
        page = (await console.get(f"/{created.key.id}?range={range_}")).body.decode()
        assert f'role="img" aria-label="1,234 accepted, 5 refused in {words}"' in page
        assert "<td>1,234</td><td>5</td>" in page
        assert len(re.findall(r'<rect class="accepted" x=', page)) == 1
        assert f'?range={range_}#usage" aria-current="true"' in page
    assert "in 24 hours" in (await console.get(f"/{created.key.id}?range=1y")).body.decode()


@pytest.mark.parametrize("root", ["", "/settings/api-keys", "/a/b%20c"])
async def test_it_works_wherever_it_is_mounted(console: Console, root: str) -> None:
    """Addresses are relative to that of the page, and a slash too many or too few leads on."""
    created = await console.guard.keys.create(account_id="acme", name="CI")

    async def get(path: str) -> Answer:
        return await console.get(f"{root}{path}", root_path=root)

    for path, base in [("/", "./"), ("/new", "./"), (f"/{created.key.id}/delete", "../")]:
        answer = await get(path)
        assert answer.status == 200
        assert f'<a href="{base}">API Keys</a>' in answer.body.decode()
    for path, where in [("/new/?q=1", "./../new?q=1"), ("//new//", "./../../new")]:
        answer = await get(path)
        assert (answer.status, answer.header("location")) == (308, where)
    if root:
        answer = await get("")
        assert answer.header("location") == f"./{root.rpartition('/')[2].replace('%', '%25')}/"


async def test_the_guard_is_opened_by_the_first_visit(sqlite_url: str) -> None:
    """Mounted where no lifespan reaches it, the page opens the guard; closed again, it is 503."""
    guard = make_guard(sqlite_url)
    console = Console(guard)
    assert (await console.get("/")).status == 200
    await guard.close()
    answer = await console.get("/")
    assert answer.status == 503
    assert answer.header("retry-after")


async def test_an_account_without_keys_is_shown_programs_that_fit(console: Console) -> None:
    """The first steps name the address of the API: the page's own, or the one that was given."""
    page = await console.get("/", headers=[(b"host", b"mail.example")])
    assert b"curl http://mail.example/v1/emails/" in page.body
    app = console.app(OWNER, api_url="https://api.example/", first_steps={"Go": "get {api_url}/x"})
    page = await call(app, http_scope(path="/"))
    assert b"get https://api.example/x" in page.body
    assert b"curl" not in page.body


async def test_the_words_can_be_others(console: Console) -> None:
    """A translation is a subclass of the texts."""

    class German(texts.Texts):
        language = "de"
        create = "Schlüssel erstellen"

    page = (await call(console.app(OWNER, texts=German()), http_scope(path="/"))).body.decode()
    assert '<html lang="de"' in page
    assert "Schlüssel erstellen" in page


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "just now"),
        (61, "1 minute ago"),
        (7200, "2 hours ago"),
        (90_000, "1 day ago"),
        (40 * 86_400, "1 month ago"),
        (800 * 86_400, "2 years ago"),
        (-30, "in a moment"),
        (-3700, "in 1 hour"),
    ],
)
def test_times_are_told_from_now(seconds: int, words: str) -> None:
    """A moment is so and so long ago, in the largest unit that fits."""
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert texts.Texts().ago(now - timedelta(seconds=seconds), now) == words


def test_a_chart_shows_every_count_and_none_where_there_is_none() -> None:
    """The most reaches the top, one request is seen beside a million, and groups add up."""
    start = datetime(2030, 1, 1, tzinfo=UTC)
    counts = [(0, 0), (1_000_000, 0), (1, 1), (500_000, 0)]
    buckets = [UsageBucket(start=start, accepted=yes, refused=no) for yes, no in counts]
    chart = draw(buckets, width=100, height=55, numbered=False)
    assert [bar.accepted for bar in chart.bars] == [0, 50, 1.5, 25]
    assert [bar.refused for bar in chart.bars] == [0, 0, 1.5, 0]
    assert chart.axis == 50
    assert draw(buckets[2:3], width=1, height=1, numbered=True).most == 1
    assert [bucket.accepted for bucket in gather(buckets, 3)] == [1_000_001, 500_000]


async def whoami(request: Request) -> JSONResponse:
    """Answer whom `identify` of the app finds."""
    person = await request.app.state.identify(request)
    return JSONResponse(person and [person.account_id, person.id, person.may_manage])


async def person_of(identify: Identify, cookie: str, **options: Any) -> Any:
    """Return whom *identify* finds in a request with that cookie."""
    app = Starlette(routes=[Route("/", whoami)], **options)
    app.state.identify = identify
    return (await call(app, http_scope(path="/", headers=[(b"cookie", cookie.encode())]))).json


def token_of(key: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a cookie with a JWT that is good but for what is given."""
    good = {"sub": "ana", "account_id": "acme", "role": "admin", "exp": 4_000_000_000}
    content = {name: value for name, value in (good | claims).items() if value is not None}
    return f"tfm_access_token={jwt.encode(content, key, algorithm)}"


async def test_a_jwt_cookie_tells_who_is_signed_in() -> None:
    """Owners and admins manage, others see; ids may be numbers; other names can be chosen."""
    identify = jwt_identity(secret=SECRET)
    assert await person_of(identify, token_of()) == ["acme", "ana", True]
    assert await person_of(identify, token_of(role="owner")) == ["acme", "ana", True]
    assert await person_of(identify, token_of(role="member")) == ["acme", "ana", False]
    assert await person_of(identify, token_of(role=None)) == ["acme", "ana", False]
    assert await person_of(identify, token_of(role=["admin"])) == ["acme", "ana", False]
    assert await person_of(identify, token_of(account_id=7)) == ["7", "ana", True]
    named = jwt_identity(secret=SECRET, account="org", audience="me", issuer="us")
    assert await person_of(named, token_of(org="b", aud="me", iss="us")) == ["b", "ana", True]
    assert await person_of(named, token_of(org="b", aud="me", iss="they")) is None


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "tfm_access_token=",
        "tfm_access_token=a.b.c",
        token_of(exp=1),
        token_of(exp=None),
        token_of(sub=None),
        token_of(account_id=None),
        token_of(account_id=True),
        token_of(account_id=["acme"]),
        token_of(aud="others"),
        token_of("x" * 32),
        token_of("x" * 64, "HS512"),
        token_of(SECRET * 2, "HS512"),
        token_of("", "none"),
    ],
)
async def test_a_bad_jwt_means_nobody(cookie: str) -> None:
    """Expired, unsigned, of another key or algorithm, or without a claim: nobody is signed in."""
    assert await person_of(jwt_identity(secret=SECRET), cookie) is None


def test_a_short_jwt_secret_is_refused() -> None:
    """A secret that could be guessed is a fault of configuration, told at the start."""
    with pytest.raises(ConfigurationError, match="32 bytes"):
        jwt_identity(secret="short")


def test_one_role_is_no_list_of_roles() -> None:
    """A text in place of the roles is refused: parts of it, or none, would pass for a role."""
    with pytest.raises(ConfigurationError, match="expected several roles"):
        session_identity(managers="admin")


async def test_a_session_tells_who_is_signed_in() -> None:
    """What the host wrote into Starlette's session is who is there; without one, it says so."""

    async def sign_in(request: Request) -> JSONResponse:
        request.session.update({"account_id": "acme", "user_id": 5, "role": "owner"})
        return JSONResponse(None)

    session = [Middleware(SessionMiddleware, secret_key=SECRET)]
    app = Starlette(routes=[Route("/", sign_in)], middleware=session)
    header = str((await call(app, http_scope(path="/"))).header("set-cookie"))
    ((name, cookie),) = SimpleCookie(header).items()
    found = await person_of(session_identity(), f"{name}={cookie.value}", middleware=session)
    assert found == ["acme", "5", True]
    assert await person_of(session_identity(), "", middleware=session) is None
    with pytest.raises(ConfigurationError, match="SessionMiddleware"):
        await session_identity()(HTTPConnection(http_scope()))


async def test_a_whole_key_finds_its_key(console: Console) -> None:
    """Who searches for a token finds the key, though the page asks for its prefix alone."""
    created = [
        await console.guard.keys.create(account_id="acme", name=str(number)) for number in range(9)
    ]
    page = (await console.get(f"/?q={created[4].token}")).body.decode()
    assert page.count('class="prefix"') == 1
    assert f"tfm_k_{created[4].key.key_prefix}…" in page


async def test_a_link_signs_in_once() -> None:
    """It works once, within its time, for a session that ends; only GET opens it."""
    clock = ManualClock()
    links = SignInLinks(to="../", clock=clock)
    app = Starlette(routes=[Mount("/sign-in", links), Route("/", whoami)])
    app.state.identify = links.identify
    path = f"/sign-in/{links.new(OWNER)}"
    assert (await call(app, http_scope("HEAD", path))).status == 405
    answer = await call(app, http_scope(path=path))
    assert (answer.status, answer.header("location")) == (303, "../")
    header = str(answer.header("set-cookie"))
    assert "HttpOnly" in header
    assert "SameSite=strict" in header
    cookie = [(b"cookie", header.partition(";")[0].encode())]
    assert (await call(app, http_scope(path="/", headers=cookie))).json == ["acme", "ana", True]
    assert (await call(app, http_scope(path=path))).status == 410
    assert (await call(app, http_scope(path=path, headers=cookie))).status == 303
    assert (await call(app, http_scope(path="/sign-in/x"))).status == 410
    late = f"/sign-in/{links.new(OWNER)}"
    clock.advance(LINK_SECONDS)
    assert (await call(app, http_scope(path=late))).status == 410
    clock.advance(SESSION_SECONDS)
    assert (await call(app, http_scope(path="/", headers=cookie))).json is None
