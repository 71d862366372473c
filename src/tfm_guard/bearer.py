"""The Authorization header: bytes in, a token or a refusal out; and the challenge that answers.

Bytes only: after a latin-1 decode `str.strip` and `str.split` would take 0x85, 0xa0 and 0x1c for
blanks. Grammar: RFC 6750 section 2.1 and RFC 9110 section 11.4, with the scheme in any case, one
or more spaces after it, and optional blanks around the value.
"""

import string
from collections.abc import Iterable
from enum import Enum
from typing import Final

# As a server puts them into an ASGI scope: names in lower case.
Headers = Iterable[tuple[bytes, bytes]]

# The longest real credentials (Kerberos tickets) stay below this; nothing longer is looked at.
MAX_HEADER_BYTES: Final = 65_536

_SCHEME: Final = b"bearer"
_B64TOKEN: Final = (string.ascii_letters + string.digits + "-._~+/=").encode()
_SEPARATORS: Final = b" \t,"


class Unreadable(Enum):
    """Why a request's headers hold no Bearer token."""

    MISSING = "missing"  # no Authorization, or an empty one
    UNSUPPORTED = "unsupported"  # another scheme
    MALFORMED = "malformed"  # more than one header or token, or none after the scheme


def read_token(headers: Headers) -> bytes | Unreadable:
    """Return the token that *headers* carry, or why there is none. Never raises."""
    value = None
    for name, content in headers:
        if name == b"authorization":
            if value is not None:
                return Unreadable.MALFORMED
            value = content
    if value is None:
        return Unreadable.MISSING
    if len(value) > MAX_HEADER_BYTES:
        return Unreadable.MALFORMED
    return _read_value(value.strip(b" \t"))


def _read_value(value: bytes) -> bytes | Unreadable:
    if not value:
        return Unreadable.MISSING
    scheme, after = value[: len(_SCHEME)], value[len(_SCHEME) :]
    if scheme.lower() != _SCHEME or after[:1] not in b" \t":
        return Unreadable.UNSUPPORTED
    # A tab after the scheme is left standing by this lstrip and so falls to the check below.
    token = after.lstrip(b" ")
    if not token or _is_several_tokens(token):
        return Unreadable.MALFORMED
    return token


def _is_several_tokens(token: bytes) -> bool:
    # Only what is made of token characters can be two tokens. With any other character in it the
    # whole is one token that no key can equal, and is refused as such.
    return any(blank in token for blank in _SEPARATORS) and not token.translate(
        None, _B64TOKEN + _SEPARATORS
    )


def as_headers(token: bytes) -> Headers:
    """Return the headers of a request that carries *token*."""
    return ((b"authorization", b"Bearer " + token),)


def challenge(realm: str, error: str | None = None, scope: str | None = None) -> bytes:
    """Return a WWW-Authenticate value (RFC 6750 section 3) for *realm*, a quotable ASCII text."""
    parts = [f'realm="{realm}"']
    if error is not None:
        parts.append(f'error="{error}"')
    if scope is not None:
        parts.append(f'scope="{scope}"')
    return f"Bearer {', '.join(parts)}".encode("ascii")
