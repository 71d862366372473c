"""The app of the page: its addresses, and what each of them does."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final, NamedTuple, get_args
from urllib.parse import quote, urlencode
from uuid import UUID

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tfm_guard.clock import Clock
from tfm_guard.errors import (
    AccountNotFound,
    AlreadyReplaced,
    ConfigurationError,
    GuardError,
    InvalidInput,
    KeyNotFound,
    NotAllowed,
    NotConfirmed,
    PlanLimitReached,
    Refusal,
    Unavailable,
)
from tfm_guard.guard import Guard
from tfm_guard.http.actors import actor_in
from tfm_guard.http.console.charts import Chart, draw, gather
from tfm_guard.http.console.forms import Form, FormExpired, Seals, read_form
from tfm_guard.http.console.texts import Texts
from tfm_guard.http.lifespan import run_lifespan
from tfm_guard.http.middleware import route_path
from tfm_guard.http.persons import Identify, check_origin, identified
from tfm_guard.keys import DEFAULT_GRACE
from tfm_guard.records import Account, Actor, ApiKey, CreatedKey, KeyUsage, Person, UsageRange
from tfm_guard.scopes import DEFAULT_SCOPES
from tfm_guard.signs import status_of
from tfm_guard.token import PREFIX_LENGTH

try:
    from tfm_guard.http.console.pages import SECURITY_HEADERS, Pages
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"the page needs {error.name}: pip install 'tfm-guard[console]'"
    ) from error

# With so few keys nobody has to search.
MANY: Final = 8
PAGE: Final = 50
_WEEK_IN_BARS: Final = 6  # hours to a bar of the small charts
_HISTORY: Final = 100
_VISIT: Final = "tfm_guard.visit"
_SORTS: Final[Mapping[str, Callable[[ApiKey], Any]]] = {
    "created": lambda key: -key.created_at.timestamp(),
    "name": lambda key: key.name.casefold(),
    "used": lambda key: -key.last_used_at.timestamp() if key.last_used_at else 0.0,
}
# Of the fields that InvalidInput names, where they stand in the form.
_PLACES: Final = {"name": "name", "scopes": "scopes", "expires_at": "expires"}


class NoSuchPage(Refusal):
    """Nothing is at this address."""

    code = "no_such_page"
    status = 404


class WrongMethod(Refusal):
    """The address exists, for other methods."""

    code = "method_not_allowed"
    status = 405


class Links(NamedTuple):
    """Where else people go from the page."""

    sign_in: str | None
    plans: str | None
    api: str | None


class Visit(NamedTuple):
    """A request of a person who is signed in; *base* leads to the list."""

    request: Request
    person: Person
    seals: Seals
    base: str
    now: datetime

    @property
    def account_id(self) -> str:
        return self.person.account_id

    @property
    def actor(self) -> Actor:
        return actor_in(self.request, self.person)

    def key_id(self) -> UUID:
        try:
            return UUID(self.request.path_params["key_id"])
        except ValueError:
            raise KeyNotFound from None

    def to(self, **query: str) -> Response:
        """Send the browser to the list (RFC 9110, section 15.4.4: with GET)."""
        return RedirectResponse(self.base + (f"?{urlencode(query)}" if query else ""), 303)


class Row(NamedTuple):
    """A key as the list shows it."""

    key: ApiKey
    status: str
    usage: KeyUsage
    chart: Chart
    rotatable: bool  # neither in its grace nor the successor of a key that is


Endpoint = Callable[[Visit], Awaitable[Response]]


class ConsoleApp:
    """The ASGI app of Settings → API Keys, for whom *identify* knows."""

    def __init__(
        self,
        guard: Guard,
        *,
        identify: Identify,
        form_keys: Callable[[], Awaitable[Sequence[bytes]]],
        links: Links,
        first_steps: Mapping[str, str] | None,
        texts: Texts | None,
        clock: Clock,
        random: Callable[[int], bytes],
    ) -> None:
        if not callable(identify):
            raise ConfigurationError(
                "identify must be an async function that returns who sent a request, or none"
            )
        self._guard = guard
        self._identify = identify
        self._form_keys = form_keys
        self._links = links
        self._texts = texts or Texts()
        self._first_steps = self._texts.first_steps if first_steps is None else first_steps
        self._pages = Pages(self._texts)
        self._clock = clock
        self._random = random
        self._app = Starlette(
            routes=[
                _route("/", GET=self._list),
                _route("/new", GET=self._ask_new, POST=self._create),
                _route("/{key_id}", GET=self._show),
                _route("/{key_id}/rotate", GET=self._ask_rotate, POST=self._rotate),
                _route("/{key_id}/delete", GET=self._ask_delete, POST=self._delete),
            ],
            exception_handlers={Refusal: self._refuse, HTTPException: self._refuse_route},
        )
        self._app.router.redirect_slashes = False  # it would need to know our own address

    def __repr__(self) -> str:
        return f"ConsoleApp({self._guard!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await run_lifespan(self._app, self._guard, scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # which turns it down
            return
        path = route_path(scope)
        send = _with_security_headers(send)
        response = (
            self._pages.file(path.removeprefix("/"))
            or _to_right_slashes(path, scope)
            or await self._enter(scope, receive, path)
        )
        if response is not None:
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, path: str) -> Response | None:
        """Note in *scope* who visits; return what turns them away, if something does."""
        base = "../" * (path.count("/") - 1) or "./"
        try:
            person = await identified(self._identify, HTTPConnection(scope))
            if person is None:
                return self._turn_away(base)
            check_origin(HTTPConnection(scope))
            seals = Seals(await self._keys(), person, self._clock, self._random)
        except Refusal as refusal:
            return self._pages.refuse(refusal, base=base)
        scope[_VISIT] = Visit(Request(scope, receive), person, seals, base, self._clock.now())
        return None

    async def _keys(self) -> Sequence[bytes]:
        try:
            return await self._form_keys()
        except Refusal:
            raise
        except GuardError as error:
            raise Unavailable(f"the guard cannot be opened: {error}") from error

    def _turn_away(self, base: str) -> Response:
        return self._pages.render(
            "signed_out.html", base=base, status=401, sign_in_url=self._links.sign_in
        )

    def _page(self, visit: Visit, template: str, status: int = 200, **values: Any) -> Response:
        return self._pages.render(
            template,
            base=visit.base,
            status=status,
            person=visit.person,
            token=visit.seals.token(),
            now=visit.now,
            **values,
        )

    # The list

    async def _list(self, visit: Visit) -> Response:
        query = visit.request.query_params
        keys = await self._guard.keys.list(visit.account_id)
        wanted = query.get("q", "").strip()
        sort = query.get("sort", "")
        sort = sort if sort in _SORTS else "created"
        found = sorted((key for key in keys if _matches(key, wanted)), key=_SORTS[sort])
        pages = max((len(found) + PAGE - 1) // PAGE, 1)
        number = min(_positive(query.get("page", "")), pages)
        first = (number - 1) * PAGE
        revoking = await self._guard.keys.unconfirmed(visit.account_id)
        notice = self._notice(visit, query.get("note", ""))
        return self._page(
            visit,
            "list.html",
            rows=await self._rows(visit, found[first : first + PAGE], _predecessors(keys)),
            revoking=revoking,
            many=len(keys) > MANY,
            total=len(keys),
            found=len(found),
            wanted=wanted,
            sort=sort,
            number=number,
            pages=pages,
            first=first + 1,
            notice=notice,
            first_steps=self._steps(visit) if not keys else None,
            **await self._plan(visit),
        )

    async def _rows(
        self, visit: Visit, keys: Sequence[ApiKey], predecessors: Mapping[UUID, ApiKey]
    ) -> list[Row]:
        usage = await self._guard.keys.usage_of(keys, range="7d")
        rows = []
        for key in keys:
            buckets = gather(usage[key.id].buckets, _WEEK_IN_BARS)
            status = status_of(key, visit.now)
            chart = draw(buckets, width=112, height=32, numbered=False)
            rotatable = key.replaced_by is None and key.id not in predecessors
            rows.append(Row(key, status, usage[key.id], chart, rotatable))
        return rows

    async def _plan(self, visit: Visit) -> dict[str, Any]:
        plans = self._guard.settings.plans
        try:
            account = await self._guard.accounts.get(visit.account_id)
        except AccountNotFound:  # nobody has mentioned it yet
            account = Account(id=visit.account_id, plan="free", suspended_at=None, active_keys=0)
        limit = plans.get(account.plan, plans["free"])
        return {
            "account": account,
            "limit": limit,
            "full": account.active_keys >= limit,
            "plans_url": self._links.plans,
        }

    def _notice(self, visit: Visit, sealed: str) -> tuple[str, str] | None:
        """Return a text about a key and its prefix, if *sealed* is one that we sent."""
        kind, _, prefix = (visit.seals.read_note(sealed) or "").partition("-")
        match kind:
            case "deleted":
                return self._texts.deleted, prefix
            case "unconfirmed":
                return self._texts.unconfirmed, prefix
        return None

    def _steps(self, visit: Visit) -> Mapping[str, str]:
        url = visit.request.url
        api_url = (self._links.api or f"{url.scheme}://{url.netloc}").rstrip("/")
        return {
            title: program.replace("{api_url}", api_url)
            for title, program in self._first_steps.items()
        }

    # Create

    async def _ask_new(self, visit: Visit) -> Response:
        _check_manages(visit)
        values = {"name": "", "scopes": DEFAULT_SCOPES, "expires": "never", "expires_on": ""}
        return await self._new_page(visit, 200, values)

    async def _new_page(
        self,
        visit: Visit,
        status: int,
        values: Mapping[str, Any],
        errors: Mapping[str, str] | None = None,
    ) -> Response:
        keys = await self._guard.keys.list(visit.account_id)
        return self._page(
            visit,
            "new.html",
            status,
            values=values,
            errors=errors or {},
            scopes=self._guard.scopes.descriptions,
            newest=_newest(keys),
            tomorrow=(visit.now + timedelta(days=1)).date(),
            **await self._plan(visit),
        )

    async def _create(self, visit: Visit) -> Response:
        fields = ("after", "name", "scope", "expires", "expires_on")
        form = await self._form(visit, *fields)
        values: dict[str, Any] = {
            "name": form.one("name"),
            "scopes": form.all("scope"),
            "expires": form.one("expires"),
            "expires_on": form.one("expires_on"),
        }
        # Sent again, by reloading, it must not create another key: whoever cannot see the key any
        # more would not know that there is one.
        keys = await self._guard.keys.list(visit.account_id)
        if _newest(keys) > form.one("after"):
            problem = self._texts.created_meanwhile.format(name=keys[0].name)
            return await self._new_page(visit, 409, values, {"form": problem})
        try:
            created = await self._guard.keys.create(
                account_id=visit.account_id,
                name=values["name"],
                scopes=values["scopes"],
                expires_at=self._expiry(form, visit.now),
                actor=visit.actor,
            )
        except InvalidInput as error:
            place = _PLACES.get(str(error.field[0]), "form")
            fault = {place: self._texts.fault(error)}
            return await self._new_page(visit, error.status, values, fault)
        except PlanLimitReached as error:
            return await self._new_page(visit, error.status, values)
        return self._show_once(visit, created)

    def _expiry(self, form: Form, now: datetime) -> datetime | None:
        """Return when a new key ends. A day that was typed counts, also without the script."""
        choice, day = form.one("expires"), form.one("expires_on").strip()
        if day:
            try:
                last = datetime.combine(date.fromisoformat(day), time(), UTC)
                return last + timedelta(days=1)
            except (ValueError, OverflowError):
                fault = self._texts.bad_date
        elif choice == "date":
            fault = self._texts.choose_date
        elif choice in ("", "never"):
            return None
        elif choice in self._texts.expiry_choices:
            return now + timedelta(days=int(choice))
        else:
            fault = self._texts.bad_choice
        raise InvalidInput(("expires_at",), "expiry", fault)

    def _show_once(self, visit: Visit, created: CreatedKey, **values: Any) -> Response:
        return self._page(
            visit,
            "created.html",
            201,
            secret=created.token,
            key=created.key,
            first_steps=self._steps(visit),
            **values,
        )

    # One key

    async def _show(self, visit: Visit) -> Response:
        key = await self._guard.keys.get(visit.account_id, visit.key_id())
        keys = await self._guard.keys.list(visit.account_id)
        range_ = _range(visit.request.query_params.get("range", ""))
        usage = await self._guard.keys.usage(visit.account_id, key.id, range=range_)
        history = await self._guard.audit.list(
            visit.account_id, range="90d", target_id=str(key.id), limit=_HISTORY
        )
        return self._page(
            visit,
            "key.html",
            key=key,
            predecessor=_predecessors(keys).get(key.id),
            key_status=status_of(key, visit.now),
            usage=usage,
            chart=draw(usage.buckets, width=720, height=180, numbered=True),
            history=history,
            descriptions=self._guard.scopes.descriptions,
        )

    async def _ask_rotate(self, visit: Visit) -> Response:
        _check_manages(visit)
        return await self._rotate_page(visit, 200)

    async def _rotate_page(
        self, visit: Visit, status: int, errors: Mapping[str, str] | None = None
    ) -> Response:
        key = await self._guard.keys.get(visit.account_id, visit.key_id())
        default = str(int(DEFAULT_GRACE.total_seconds()))
        return self._page(
            visit, "rotate.html", status, key=key, errors=errors or {}, default=default
        )

    async def _rotate(self, visit: Visit) -> Response:
        form = await self._form(visit, "grace")
        if form.one("grace") not in self._texts.grace_choices:
            return await self._rotate_page(visit, 422, {"grace": self._texts.bad_choice})
        old = await self._guard.keys.get(visit.account_id, visit.key_id())
        try:
            rotated = await self._guard.keys.rotate(
                visit.account_id,
                old.id,
                grace=timedelta(seconds=int(form.one("grace"))),
                actor=visit.actor,
            )
        except AlreadyReplaced as error:
            return await self._rotate_page(
                visit, error.status, {"form": self._texts.refusal(error)}
            )
        # Without asking the database for anything more: what it has just given would be lost.
        ends = rotated.grace_ends_at if int(form.one("grace")) else None
        return self._show_once(
            visit, rotated, old=old, ends=ends, unconfirmed=rotated.confirmed is None
        )

    async def _ask_delete(self, visit: Visit) -> Response:
        _check_manages(visit)
        key = await self._guard.keys.get(visit.account_id, visit.key_id())
        return self._page(visit, "delete.html", key=key)

    async def _delete(self, visit: Visit) -> Response:
        form = await self._form(visit, "again")
        key_id = visit.key_id()
        prefix = await self._prefix(visit, key_id, deleted=bool(form.one("again")))
        outcome = "deleted"
        try:
            await self._guard.keys.revoke(visit.account_id, key_id, actor=visit.actor)
        except NotConfirmed:
            outcome = "unconfirmed"
        except KeyNotFound:
            if not form.one("again"):
                raise
        return visit.to(note=visit.seals.note(f"{outcome}-{prefix}"))

    async def _prefix(self, visit: Visit, key_id: UUID, *, deleted: bool) -> str:
        """Return the prefix of one of the account's keys; also of one that was *deleted*.

        For who asks again: it may have been confirmed in the meantime.
        """
        keys = self._guard.keys
        there = [*await keys.list(visit.account_id), *await keys.unconfirmed(visit.account_id)]
        for key in there:
            if key.id == key_id:
                return key.key_prefix
        if deleted:
            rows = await self._guard.audit.list(
                visit.account_id, action="api_key.revoked", target_id=str(key_id), limit=1
            )
            for row in rows.items:
                return str(row.meta["key_prefix"])
        raise KeyNotFound

    async def _form(self, visit: Visit, *known: str) -> Form:
        """Return the form that came, if the person may change keys and it was given to them."""
        _check_manages(visit)
        form = await read_form(
            visit.request, known={"token", *known}, unreadable=self._texts.bad_form
        )
        if not visit.seals.is_token(form.one("token")):
            raise FormExpired(self._texts.form_expired)
        return form

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)  # noqa: S101  # this handler is registered for nothing else
        return self._pages.refuse(error, base=request.scope[_VISIT].base)

    async def _refuse_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # as above
        refusal: Refusal = NoSuchPage("There is nothing at this address.")
        if error.status_code == WrongMethod.status:
            refusal = WrongMethod("This address does not answer to this method.")
        response = self._pages.refuse(refusal, base=request.scope[_VISIT].base)
        response.headers.update(error.headers or {})
        return response


def _route(path: str, **endpoints: Endpoint) -> Route:
    """Return one route for all methods of a path, so that a 405 names all of them in Allow."""

    async def dispatch(request: Request) -> Response:
        # Starlette adds HEAD to GET.
        method = "GET" if request.method == "HEAD" else request.method
        return await endpoints[method](request.scope[_VISIT]._replace(request=request))

    return Route(path, dispatch, methods=[*endpoints])


def _with_security_headers(send: Send) -> Send:
    async def add_and_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return add_and_send


def _to_right_slashes(path: str, scope: Scope) -> Response | None:
    """Send the browser on from an address with a slash too many at its end, or one too few.

    With an address relative to its own, which is right wherever the app is mounted.
    """
    if path == "":
        where = f"{quote(scope.get('root_path', '').rpartition('/')[2])}/"
    elif path.endswith("/") and path.strip("/"):
        last = path.rstrip("/").rpartition("/")[2]
        where = "../" * (len(path) - len(path.rstrip("/"))) + quote(last)
    else:
        return None
    query = scope.get("query_string", b"").decode("latin-1")
    return RedirectResponse(f"./{where}" + (f"?{query}" if query else ""), 308)


def _check_manages(visit: Visit) -> None:
    if not visit.person.may_manage:
        raise NotAllowed


def _predecessors(keys: Iterable[ApiKey]) -> dict[UUID, ApiKey]:
    """Return the keys in their grace by the ids of those that take their places."""
    return {key.replaced_by: key for key in keys if key.replaced_by is not None}


def _matches(key: ApiKey, wanted: str) -> bool:
    prefix = wanted.removeprefix("tfm_k_")
    if prefix != wanted:
        prefix = prefix[:PREFIX_LENGTH]  # who pasted a whole key means that one
    return wanted.casefold() in key.name.casefold() or key.key_prefix.startswith(prefix.lower())


def _newest(keys: Sequence[ApiKey]) -> str:
    """Return when the newest of *keys* was created, as a text that sorts as that does."""
    return keys[0].created_at.isoformat(timespec="microseconds") if keys else ""


def _positive(text: str) -> int:
    return max(int(text), 1) if text.isascii() and text.isdigit() and len(text) < 6 else 1  # noqa: PLR2004


def _range(text: str) -> UsageRange:
    return next((range_ for range_ in get_args(UsageRange) if range_ == text), "24h")
