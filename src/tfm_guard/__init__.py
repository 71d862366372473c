"""API keys for any ASGI application."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.http.middleware import APIKeyMiddleware
    from tfm_guard.http.requires import requires
    from tfm_guard.records import Person, VerifiedKey

__all__ = ["APIKeyMiddleware", "Guard", "Person", "VerifiedKey", "requires"]
__version__ = "0.1.0"

# Where each public name lives. It is imported when it is first asked for, so that what needs
# only a light part of the package, like `tfm-guard --help`, does not wait for SQLAlchemy.
_HOMES: Final = {
    "APIKeyMiddleware": "tfm_guard.http.middleware",
    "Guard": "tfm_guard.guard",
    "Person": "tfm_guard.records",
    "VerifiedKey": "tfm_guard.records",
    "requires": "tfm_guard.http.requires",
}

if not TYPE_CHECKING:  # or a type checker would take every name for an existing one

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
