"""What people may call things."""

import re
import unicodedata
from typing import Final

from tfm_guard.errors import InvalidInput

_MAXIMUM_ID_LENGTH: Final = 255
# Control characters, and the directional formatting characters (among `Cf`) with which a text can
# be made to read as another one (UAX #9 section 2), and the byte order mark, which nobody types.
_DIRECTIONAL: Final = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
)
# Blank, though Unicode counts them among letters and symbols: Hangul fillers, the Braille blank.
_BLANK: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800")
# More of a key than the part that is shown.
_TOKEN: Final = re.compile("tfm_k_[0-9a-f]{9}")


def plain_text(text: str, *, field: str, most: int) -> str:
    """Return *text* trimmed, if 1 to *most* characters, one of them visible, are left.

    Controls are refused, and keys, which people paste into any field. Raises `InvalidInput` naming
    *field*.
    """
    text = text.strip()
    if not text:
        raise InvalidInput((field,), "string_too_short", "At least 1 character is needed")
    if len(text) > most:
        raise InvalidInput(
            (field,),
            "string_too_long",
            f"At most {most} characters are allowed, and {len(text)} came",
        )
    if any(
        character in _DIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        for character in text
    ):
        raise InvalidInput(
            (field,), "string_control", "Control and directional characters are not allowed"
        )
    if _TOKEN.search(text):
        raise InvalidInput(
            (field,), "string_token", "This holds a key, which nobody would keep secret here"
        )
    if not any(map(_is_visible, text)):
        raise InvalidInput((field,), "string_too_short", "At least 1 visible character is needed")
    return text


def check_id(text: str, *, field: str) -> None:
    """Raise `InvalidInput` unless *text* is 1 to 255 plain characters, without blanks around.

    It is the host application's own name for an account or a person, so it is taken as it is or
    not at all.
    """
    if plain_text(text, field=field, most=_MAXIMUM_ID_LENGTH) != text:
        raise InvalidInput((field,), "string_blank", "Blanks around it are not allowed")


def _is_visible(character: str) -> bool:
    """Tell whether something is seen where *character* stands alone: no format, mark or blank."""
    return character not in _BLANK and unicodedata.category(character)[0] not in "CMZ"
