"""API keys for any ASGI application."""

from tfm_guard.guard import Guard
from tfm_guard.http.middleware import APIKeyMiddleware
from tfm_guard.http.requires import requires
from tfm_guard.records import VerifiedKey

__all__ = ["APIKeyMiddleware", "Guard", "VerifiedKey", "requires"]
__version__ = "0.1.0"
