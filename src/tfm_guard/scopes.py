"""Scopes: what they may be called, which exist, and whether a key's scopes are enough."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from tfm_guard.errors import ConfigurationError, InvalidInput

# RFC 6749 section 3.3, less what would need quoting in a log line or a query string.
_SCOPE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,30}(:[a-z0-9][a-z0-9._-]{0,30})?")

_MOST_SHOWN: Final = 64  # characters of what came in place of a scope

NO_SCOPE: Final = (
    "is no scope: use lowercase letters, digits and . _ - with at most one colon, "
    "like 'invoices:read'"
)

DEFAULT_SCOPES: Final = ("send",)
# Without it, a key creates, changes and revokes no other.
MANAGING_SCOPE: Final = "api-keys:write"

BUILT_IN_SCOPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "send": "Send transactional and batch emails",
        "emails:read": "Read sent emails and their events",
        "domains:read": "List sending domains and their status",
        "domains:write": "Create, delete and transfer sending domains",
        "webhooks:read": "List webhooks and their deliveries",
        "webhooks:write": "Create, change, delete and test webhooks",
        "api-keys:read": "List API keys and their usage",
        "api-keys:write": "Create, rotate and delete API keys",
        "audit:read": "Read the audit log",
    }
)


def is_scope(text: str) -> bool:
    """Tell whether *text* has the form of a scope, be it registered or not."""
    return _SCOPE.fullmatch(text) is not None


class ScopeRegistry:
    """The scopes that keys may carry: the built-in ones and *extra* (scope to description)."""

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        faults = [
            f"TFM_GUARD_SCOPES: {scope!r} {NO_SCOPE}"
            for scope in extra or ()
            if not is_scope(scope)
        ]
        if faults:
            raise ConfigurationError(*faults)
        self.descriptions: Mapping[str, str] = MappingProxyType(
            {**BUILT_IN_SCOPES, **(extra or {})}
        )

    def __repr__(self) -> str:
        return f"ScopeRegistry({', '.join(self.descriptions)})"

    def grant(self, requested: Iterable[str]) -> frozenset[str]:
        """Return *requested* as a set, without duplicates.

        Raises `InvalidInput` for a scope that is not registered, naming its position.
        """
        if isinstance(requested, str):
            raise InvalidInput(("scopes",), "list_type", "Scopes are a list of strings.")
        granted = []
        for position, scope in enumerate(requested):
            if scope not in self.descriptions:
                known = ", ".join(self.descriptions)
                raise InvalidInput(
                    ("scopes", position),
                    "unknown_scope",
                    f"Unknown scope {_shown(scope)}. Known: {known}",
                )
            granted.append(scope)
        return frozenset(granted)


def _shown(scope: str) -> str:
    return repr(scope if len(scope) <= _MOST_SHOWN else scope[:_MOST_SHOWN] + "…")
