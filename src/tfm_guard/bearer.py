"""The Authorization header: bytes in, a token or a refusal out; and the challenge that answers.

Bytes only: after a latin-1 decode `str.strip` and `str.split` would take 0x85, 0xa0 and 0x1c for
blanks. Grammar: RFC 6750 section 2.1 and RFC 9110 section 11.4, with the scheme in any case, one
or more spaces after it, and optional blanks around the value.
"""

import string
from collections.abc import Iterable
from enum import Enum
from typing import Final

# The longest real credentials (Kerberos tickets) stay below this; nothing longer is looked at.
MAX_HEADER_BYTES: Final = 65_536

_B64TOKEN: Final = (string.ascii_letters + string.digits + "-._~+/=").encode()
_SEPARATORS: Final = b" \t,"


class Unreadable(Enum):
    """Why a request's headers hold no Bearer token."""

    MISSING = "missing"  # no Authorization, or an empty one
    UNSUPPORTED = "unsupported"  # another scheme
    MALFORMED = "malformed"  # more than one header or token, or none after the scheme


def read_token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | Unreadable:
    """Return the token that *headers* carry, or why there is none. Never raises."""
    value = b""
    found = 0
    for name, content in headers:
        if name == b"authorization":
            value = content
            found += 1
    if found > 1 or len(value) > MAX_HEADER_BYTES:
        return Unreadable.MALFORMED
    value = value.strip(b" \t")
    if not value:
        return Unreadable.MISSING
    if value[:6].lower() != b"bearer" or value[6:7] not in b" \t":
        return Unreadable.UNSUPPORTED
    # A tab after the scheme is left standing by this lstrip and so falls to the check below.
    token = value[6:].lstrip(b" ")
    if not token or _is_several_tokens(token):
        return Unreadable.MALFORMED
    return token


def _is_several_tokens(token: bytes) -> bool:
    # Only what is made of token characters can be two tokens. With any other character in it the
    # whole is one token that no key can equal, and is refused as such.
    return any(blank in token for blank in _SEPARATORS) and not token.translate(
        None, _B64TOKEN + _SEPARATORS
    )


def challenge(realm: str, error: str | None = None, scope: str | None = None) -> bytes:
    """Return a WWW-Authenticate value (RFC 6750 section 3) for *realm*, a quotable ASCII text."""
    parts = [f'realm="{realm}"']
    if error is not None:
        parts.append(f'error="{error}"')
    if scope is not None:
        parts.append(f'scope="{scope}"')
    return f"Bearer {', '.join(parts)}".encode("ascii")
