"""Ready-made `identify` functions: who is signed in, told from a session or from a JWT cookie."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, Final

from starlette.requests import HTTPConnection

from tfm_guard.errors import ConfigurationError
from tfm_guard.http.persons import Identify
from tfm_guard.records import Person

# Who manages the keys of an account; members see them.
MANAGERS: Final = frozenset({"owner", "admin"})
_MINIMUM_SECRET_BYTES: Final = 32  # RFC 7518, section 3.2: as long as what HS256 makes
_ALGORITHM: Final = "HS256"


def session_identity(
    *,
    account: str = "account_id",
    person: str = "user_id",
    role: str = "role",
    managers: Collection[str] = MANAGERS,
) -> Identify:
    """Return an `identify` that reads the session of Starlette's SessionMiddleware.

    *account*, *person* and *role* are where in it these stand. Whose role is one of *managers* may
    manage keys. The middleware goes in front of the page.
    """
    _require_roles(managers)

    async def identify(connection: HTTPConnection) -> Person | None:
        if "session" not in connection.scope:
            raise ConfigurationError(
                "session_identity needs SessionMiddleware in front of the page: "
                "Middleware(SessionMiddleware, secret_key=…)"
            )
        return _person(connection.session, account, person, role, managers)

    return identify


def jwt_identity(
    *,
    secret: str | bytes,
    cookie: str = "tfm_access_token",
    account: str = "account_id",
    person: str = "sub",
    role: str = "role",
    managers: Collection[str] = MANAGERS,
    audience: str | None = None,
    issuer: str | None = None,
) -> Identify:
    """Return an `identify` that believes a JWT in *cookie*, signed with HS256 and *secret*.

    *account*, *person* and *role* are its claims; whose role is one of *managers* may manage keys.
    A token must expire, and be for *audience* and by *issuer* where they are given; one that is for
    an audience is not believed without. A token that is not good means that nobody is signed in.
    Needs PyJWT, the extra `jwt`. Raises `ConfigurationError` for a secret of less than 32 bytes.
    """
    _require_roles(managers)
    try:
        import jwt  # noqa: PLC0415  # only who uses this has it
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "jwt_identity needs PyJWT: pip install 'tfm-guard[jwt]'"
        ) from error
    if len(secret.encode() if isinstance(secret, str) else secret) < _MINIMUM_SECRET_BYTES:
        raise ConfigurationError(
            f"jwt_identity: the secret needs at least {_MINIMUM_SECRET_BYTES} bytes"
        )
    decode = functools.partial(
        jwt.decode,
        key=secret,
        algorithms=[_ALGORITHM],  # never the one that the token names
        audience=audience,
        issuer=issuer,
        options={"require": ["exp", person, account]},
    )

    async def identify(connection: HTTPConnection) -> Person | None:
        token = connection.cookies.get(cookie)
        if token is None:
            return None
        try:
            claims: Mapping[str, Any] = decode(token)
        except jwt.InvalidTokenError:
            return None
        return _person(claims, account, person, role, managers)

    return identify


def _require_roles(managers: Collection[str]) -> None:
    if isinstance(managers, str):  # whose letters would each be a role, and every part of it
        raise ConfigurationError(f"managers: expected several roles, like {{{managers!r}}}")


def _person(
    values: Mapping[str, Any], account: str, person: str, role: str, managers: Collection[str]
) -> Person | None:
    """Return the person that *values* describe; none if they do not name both."""
    account_id, person_id = (_text(values.get(name)) for name in (account, person))
    if not account_id or not person_id:
        return None
    given = values.get(role)
    may_manage = isinstance(given, str) and given in managers
    return Person(account_id=account_id, id=person_id, may_manage=may_manage)


def _text(value: Any) -> str:
    """Return an id as text: hosts have numbers and UUIDs, too."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
