"""People who are signed in to the host application, as it says who they are."""

from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from tfm_guard.errors import GuardError, InvalidInput, Refusal
from tfm_guard.records import Person
from tfm_guard.text import check_id

# Returns who sent a request, none if nobody is signed in. It sees all of it but the body.
Identify = Callable[[HTTPConnection], Awaitable[Person | None]]

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class CrossOrigin(Refusal):
    """A page of another origin had a browser send this, with the cookies of who is signed in."""

    code = "cross_origin"
    status = 403

    def __init__(self) -> None:
        super().__init__("This request came from another site.")


async def identified(identify: Identify, connection: HTTPConnection) -> Person | None:
    """Return who *identify* says sent a request.

    Raises `GuardError` if that is no `Person`, or one whose ids cannot be written down.
    """
    person = await identify(connection)
    if person is not None and not isinstance(person, Person):
        raise GuardError(
            f"identify returned a {type(person).__name__}, no tfm_guard.Person or None"
        )
    if person is not None:
        _check_ids(person)
    return person


def _check_ids(person: Person) -> None:
    for field, value in (("account_id", person.account_id), ("id", person.id)):
        if not isinstance(value, str):
            raise GuardError(f"identify returned a Person whose {field} is no str")
        try:
            check_id(value, field=field)
        except InvalidInput as error:
            raise GuardError(
                f"identify returned a Person with a bad {field}: {error.message}"
            ) from None


def check_origin(connection: HTTPConnection) -> None:
    """Raise `CrossOrigin` if a page of another origin had a browser send this to change something.

    Browsers say so in Sec-Fetch-Site (Fetch Metadata, section 2.4), which no page can forge; old
    ones only in Origin (Fetch, section 3.1). What sends neither is no browser, and carries no
    cookies that it was not given for this.
    """
    if connection.scope["method"] in _SAFE_METHODS:
        return
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        if site not in {"same-origin", "none"}:
            raise CrossOrigin
        return
    origin = connection.headers.get("origin")
    if origin is not None and _host(origin) != connection.headers.get("host", ""):
        raise CrossOrigin


def _host(origin: str) -> str | None:
    """Return the host and port of *origin*; none for "null", which pages of no origin send.

    Not its scheme: behind a proxy that ends TLS, this side does not know its own.
    """
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
