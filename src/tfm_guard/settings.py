"""Settings: from keyword arguments, else from TFM_GUARD_* variables, else the defaults."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Final, Self, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tfm_guard.errors import ConfigurationError
from tfm_guard.scopes import ScopeRegistry

DEFAULT_REALM: Final = "api"
DEFAULT_PLANS: Final = {"free": 2, "starter": 5, "pro": 15, "business": 50}
# The most that argon2 is given for one hash, memory times passes: `Hashing` verifies none that
# asks for more.
MAXIMUM_WORK_KIB: Final = 524_288

_PREFIX: Final = "TFM_GUARD_"
_TESTS_PREFIX: Final = "TFM_GUARD_TEST_"  # read by this project's tests, not by the library
_MINIMUM_SECRET_CHARACTERS: Final = 32
_MOST_SHOWN: Final = 40  # characters of a value that is quoted in a message

# What the mappings look like in a variable.
_EXAMPLES: Final = {
    "plans": 'a JSON object of plan and limit, like {"free": 2, "pro": 15}',
    "scopes": 'a JSON object of scope and description, like {"invoices:read": "Read invoices"}',
}

_LARGEST_PORT: Final = 65_535
# One host or several, each a name or an address.
_HOST: Final = re.compile(r"[A-Za-z0-9._,-]*|[0-9A-Fa-f:.]+")
_URL_FORMS: Final = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
_ESCAPES: Final = "write @ / : # ? in a user name or password as %40 %2F %3A %23 %3F"


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that can be set. Made by `load`, which reports every fault at once."""

    # sqlite:///FILE or postgresql://…
    database_url: str
    # Connections for verifying, and as many again for changes (SQLite: one for changes).
    database_pool_size: Annotated[int, Meta(ge=1, le=200)] = 10
    # redis://… or rediss://…; none: this process's memory and the database do without.
    redis_url: str | None = None
    # Connections for reading from Redis and writing to it, beside two for changes.
    redis_pool_size: Annotated[int, Meta(ge=1, le=200)] = 16
    # Keys that one process remembers, at up to 300 bytes each, and as many refused tokens.
    local_cache_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 100_000
    # Seconds between two writings of what was counted: what is lost with a process that is killed.
    usage_flush_seconds: Annotated[int, Meta(ge=1, le=60)] = 5
    # The protection space named in challenges (RFC 9110 section 11.5).
    realm: str = DEFAULT_REALM
    # Root secrets, newest first; empty: the one that was made with the database's tables.
    secrets: tuple[str, ...] = ()
    # Scopes that the host application adds: scope to description.
    scopes: dict[str, str] = {}
    # How many active keys an account may hold on each plan. "free" must be among them.
    plans: dict[str, Annotated[int, Meta(ge=0)]] = msgspec.field(
        default_factory=lambda: dict(DEFAULT_PLANS)
    )
    # Whether to look up tokens of the older forms, which have no tag and so cost a query each.
    accept_untagged_tokens: bool = False
    # argon2id; the defaults are OWASP's (Password Storage Cheat Sheet).
    argon2_time_cost: Annotated[int, Meta(ge=1, le=10)] = 2
    argon2_memory_kib: Annotated[int, Meta(ge=8, le=262_144)] = 19_456
    argon2_parallelism: Annotated[int, Meta(ge=1, le=16)] = 1

    @classmethod
    def load(cls, environ: Mapping[str, str], **arguments: Any) -> Self:
        """Return the settings that *arguments*, then *environ*, then the defaults give.

        Raises `ConfigurationError` with every fault, each naming its variable.
        """
        values: dict[str, Any] = {}
        known = {field.name: field for field in msgspec.structs.fields(cls)}
        faults = [
            f"{name!r} is no setting; there are: {', '.join(known)}"
            for name in arguments
            if name not in known
        ]
        variables = {_PREFIX + name.upper() for name in known}
        faults += [
            f"{name}: there is no such setting; there are: {', '.join(sorted(variables))}"
            for name in sorted(environ.keys() - variables)
            if name.startswith(_PREFIX) and not name.startswith(_TESTS_PREFIX)
        ]
        for name, field in known.items():
            variable = _PREFIX + name.upper()
            given: Any = arguments.get(name)
            try:
                if name in arguments:
                    values[name] = msgspec.convert(given, field.type)
                elif variable in environ:
                    given = environ[variable]
                    values[name] = _from_text(given, field.type)
                elif field.required:
                    faults.append(f"{variable} is not set")
            except (msgspec.ValidationError, msgspec.DecodeError):
                faults.append(f"{variable}: {_in_words(name, field.type, given)}")
        if values.get("secrets") == () and "secrets" not in arguments:
            faults.append(
                "TFM_GUARD_SECRETS: it is set, and empty; name at least one secret, or unset it"
            )
        faults.extend(_inconsistencies(values))
        if faults:
            raise ConfigurationError(*faults)
        return cls(**values)

    def __repr__(self) -> str:
        # The URL may hold a password; the secrets are secrets.
        kind, is_url, _ = self.database_url.partition("://")
        return f"Settings(database={kind if is_url else '?'}, realm={self.realm!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("realm", self.realm)]


def read_database_url(url: str) -> URL:
    """Return *url* in its parts, if it can name a database that works here.

    Raises `ConfigurationError`, whose message never quotes the URL: it may hold a password.
    """
    scheme, is_url, rest = url.partition("://")
    fault = _scheme_fault(scheme) if is_url else f"it is no URL; expected {_URL_FORMS}"
    if fault is None and scheme == "sqlite" and not rest.startswith("/"):
        fault = (
            "three slashes stand before the name of a file: sqlite:///FILE, "
            "and a fourth if the name begins with /"
        )
    if fault is None and scheme == "postgresql" and rest.count("@") > 1:
        fault = f"more than one @ stands in it; {_ESCAPES}"
    if fault is None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # the latter for a port that is no number
            fault = f"it cannot be read; expected {_URL_FORMS}; {_ESCAPES}"
        else:
            fault = (_sqlite_fault if scheme == "sqlite" else _postgresql_fault)(parsed)
            if fault is None:
                return parsed
    raise ConfigurationError(f"TFM_GUARD_DATABASE_URL: {fault}")


def _scheme_fault(scheme: str) -> str | None:
    if scheme in ("sqlite", "postgresql"):
        return None
    kind = scheme.partition("+")[0]
    if kind == "postgres":
        return "write postgresql:// in place of postgres://"
    if kind in ("sqlite", "postgresql"):
        return f"write {kind}:// without a driver's name; the driver is chosen here"
    return f"expected {_URL_FORMS}, and no other kind of database"


def _sqlite_fault(url: URL) -> str | None:
    if url.database in (None, "", ":memory:"):
        return (
            "a database in memory is not shared between connections; "
            "name a file: sqlite:///tfm_guard.db"
        )
    if url.query:
        return "SQLite takes no options after ?; a ? in the name of the file is written %3F"
    return None


def _postgresql_fault(url: URL) -> str | None:
    # What was meant for the password may have been read as any part after it.
    if not _HOST.fullmatch(url.host or "") or "@" in (url.database or ""):
        return f"its host cannot be one; {_ESCAPES}"
    if url.port is not None and not 1 <= url.port <= _LARGEST_PORT:
        return f"the port is a number from 1 to {_LARGEST_PORT}; {_ESCAPES}"
    if find_spec("psycopg") is None:
        return "PostgreSQL needs its driver: pip install 'tfm-guard[postgres]'"
    return None


def _redis_fault(url: str) -> str | None:
    scheme, is_url, rest = url.partition("://")
    if not is_url or scheme not in ("redis", "rediss"):
        return "expected redis://HOST:PORT/0 or rediss://HOST:PORT/0"
    try:
        _ = urlsplit(url).port
    except ValueError:
        return f"it cannot be read; expected redis://HOST:PORT/0; {_ESCAPES}"
    if rest.partition("?")[0].count("@") > 1:
        return f"its host cannot be one; {_ESCAPES}"
    return None


def _from_text(text: str, kind: Any) -> Any:
    if kind is str or kind == str | None:
        return text
    if kind == tuple[str, ...]:
        return tuple(text.replace(",", " ").split())
    if isinstance(getattr(kind, "__origin__", None), type):
        return msgspec.json.decode(text, type=kind)
    return msgspec.convert(text, kind, strict=False)


def _in_words(name: str, kind: Any, given: Any) -> str:
    """Return what was expected of a setting, and what came unless it could be secret."""
    if name in _EXAMPLES:
        return _mapping_in_words(name, given)
    if kind is bool:
        return f"expected true or false, got {_shown(given)}"
    if kind is int or get_args(kind)[:1] == (int,):
        return f"expected {_range(kind)}, got {_shown(given)}"
    expected = "a list of texts" if name == "secrets" else "text"
    return f"expected {expected}, got a value of type {type(given).__name__}"


def _mapping_in_words(name: str, given: Any) -> str:
    try:
        found = msgspec.json.decode(given) if isinstance(given, str) else given
    except msgspec.DecodeError:
        found = None
    if not isinstance(found, dict):
        return f"expected {_EXAMPLES[name]}"
    for entry, value in found.items():
        if name == "plans" and (not isinstance(value, int) or value is True or value < 0):
            return f"the plan {entry!r}: expected a whole number from 0, got {_shown(value)}"
        if name == "scopes" and not isinstance(value, str):
            return f"the scope {entry!r}: expected its description, got {_shown(value)}"
    return f"expected {_EXAMPLES[name]}"


def _range(kind: Any) -> str:
    meta = get_args(kind)[1]
    return f"a whole number from {meta.ge} to {meta.le}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MOST_SHOWN else shown[:_MOST_SHOWN] + "…"


def _inconsistencies(values: Mapping[str, Any]) -> Iterator[str]:
    if "database_url" in values:
        try:
            read_database_url(values["database_url"])
        except ConfigurationError as error:
            yield from error.faults
    redis = values.get("redis_url")
    if redis is not None and (fault := _redis_fault(redis)):
        yield f"TFM_GUARD_REDIS_URL: {fault}"
    try:
        ScopeRegistry(values.get("scopes"))
    except ConfigurationError as error:
        yield from error.faults
    if "free" not in values.get("plans", DEFAULT_PLANS):
        yield "TFM_GUARD_PLANS: the plan 'free' is missing; unknown accounts are on it"
    if any(len(secret) < _MINIMUM_SECRET_CHARACTERS for secret in values.get("secrets", ())):
        yield (
            f"TFM_GUARD_SECRETS: each secret needs at least {_MINIMUM_SECRET_CHARACTERS} "
            "characters; make one with: openssl rand -hex 32"
        )
    realm = values.get("realm", DEFAULT_REALM)
    if not realm:
        yield "TFM_GUARD_REALM: it is empty; give it a name, or unset it"
    elif not (realm.isascii() and realm.isprintable()) or set(realm) & {'"', "\\"}:
        yield "TFM_GUARD_REALM: expected printable ASCII without quotes or backslashes"
    yield from _argon2_inconsistencies(
        values.get("argon2_memory_kib", 19_456),
        values.get("argon2_time_cost", 2),
        values.get("argon2_parallelism", 1),
    )


def _argon2_inconsistencies(memory: int, passes: int, lanes: int) -> Iterator[str]:
    if memory < 8 * lanes:
        yield f"TFM_GUARD_ARGON2_MEMORY_KIB: {lanes} lanes need at least {8 * lanes} KiB"
    if memory * passes > MAXIMUM_WORK_KIB:
        yield (
            f"TFM_GUARD_ARGON2_TIME_COST: {passes} passes over {memory} KiB are more work than is "
            f"done for one hash; the product is at most {MAXIMUM_WORK_KIB}"
        )
