"""Settings: from keyword arguments, else from TFM_GUARD_* variables, else the defaults."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

import msgspec
from msgspec import Meta, Struct

from tfm_guard.errors import ConfigurationError

DEFAULT_REALM: Final = "api"
DEFAULT_PLANS: Final = {"free": 2, "starter": 5, "pro": 15, "business": 50}

_PREFIX: Final = "TFM_GUARD_"
_MINIMUM_SECRET_CHARACTERS: Final = 32


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that can be set. `load` checks all of it and reports every fault at once."""

    # sqlite:///FILE or postgresql://…
    database_url: str
    # Connections for verifying, and as many again for changes (SQLite: one for changes).
    database_pool_size: Annotated[int, Meta(ge=1, le=200)] = 10
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
    argon2_memory_kib: Annotated[int, Meta(ge=8, le=1_048_576)] = 19_456
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
        for name, field in known.items():
            variable = _PREFIX + name.upper()
            try:
                if name in arguments:
                    values[name] = msgspec.convert(arguments[name], field.type)
                elif variable in environ:
                    values[name] = _from_text(environ[variable], field.type)
                elif field.required:
                    faults.append(f"{variable} is not set")
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                faults.append(f"{variable}: {error}")
        faults.extend(_inconsistencies(values))
        if faults:
            raise ConfigurationError(*faults)
        return cls(**values)

    def __repr__(self) -> str:
        # The URL may hold a password; the secrets are secrets.
        kind, is_url, _ = self.database_url.partition("://")
        return f"Settings(database={kind if is_url else '?'}, realm={self.realm!r})"


def _from_text(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind == tuple[str, ...]:
        return tuple(text.replace(",", " ").split())
    if isinstance(getattr(kind, "__origin__", None), type):
        return msgspec.json.decode(text, type=kind)
    return msgspec.convert(text, kind, strict=False)


def _inconsistencies(values: Mapping[str, Any]) -> list[str]:
    faults = []
    if "free" not in values.get("plans", DEFAULT_PLANS):
        faults.append("TFM_GUARD_PLANS: the plan 'free' is missing; unknown accounts are on it")
    if any(len(secret) < _MINIMUM_SECRET_CHARACTERS for secret in values.get("secrets", ())):
        faults.append(
            f"TFM_GUARD_SECRETS: each secret needs at least {_MINIMUM_SECRET_CHARACTERS} "
            "characters; make one with: openssl rand -hex 32"
        )
    realm = values.get("realm", DEFAULT_REALM)
    if not (realm.isascii() and realm.isprintable()) or set(realm) & {'"', "\\"} or not realm:
        faults.append("TFM_GUARD_REALM: expected printable ASCII without quotes or backslashes")
    memory, lanes = values.get("argon2_memory_kib", 19_456), values.get("argon2_parallelism", 1)
    if memory < 8 * lanes:
        faults.append(f"TFM_GUARD_ARGON2_MEMORY_KIB: {lanes} lanes need at least {8 * lanes} KiB")
    return faults
