"""What people may call things."""

import unicodedata
from typing import Final

from tfm_guard.errors import InvalidInput

# Control characters, and the directional formatting characters (among `Cf`) with which a text can
# be made to read as another one: UAX #9 section 2.
_DIRECTIONAL: Final = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


def plain_text(text: str, *, field: str, most: int) -> str:
    """Return *text* trimmed, if 1 to *most* characters without controls are left.

    Raises `InvalidInput` naming *field*.
    """
    text = text.strip()
    if not text:
        raise InvalidInput((field,), "string_too_short", "At least 1 character is needed")
    if len(text) > most:
        raise InvalidInput((field,), "string_too_long", f"At most {most} characters are allowed")
    if any(
        character in _DIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        for character in text
    ):
        raise InvalidInput(
            (field,), "string_control", "Control and directional characters are not allowed"
        )
    return text
