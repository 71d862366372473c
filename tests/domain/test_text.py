"""Facts about what people may call things."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.errors import InvalidInput
from tfm_guard.text import plain_text

# All characters that Unicode has for direction (UAX #9 section 2), by their bidirectional class.
BIDI_CLASSES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = "\u061c\u200e\u200f\ufeff"
CONTROLS = "".join(
    character
    for character in map(chr, range(0x110000))
    if unicodedata.category(character) in ("Cc", "Zl", "Zp")
    or unicodedata.bidirectional(character) in BIDI_CLASSES
)


def kind_of_refusal(text: str) -> str:
    """Return why *text* is refused as a name of at most 10 characters."""
    with pytest.raises(InvalidInput) as caught:
        plain_text(text, field="name", most=10)
    assert caught.value.field == ("name",)
    return caught.value.kind


@given(st.text() | st.text(st.sampled_from(CONTROLS + MARKS + "ab\u00a0")))
def test_no_control_or_direction_comes_through(text: str) -> None:
    """What is returned is the trimmed text, encodable, without controls or direction."""
    try:
        returned = plain_text(text, field="name", most=100)
    except InvalidInput:
        return
    assert returned == text.strip() != ""
    assert len(returned) <= 100
    assert not set(returned) & set(CONTROLS + MARKS)
    returned.encode()


@pytest.mark.parametrize(
    "text",
    [
        "CI",
        " CI\n",
        "x" * 10,
        "<script>",
        "Ω é 名 🔑",
        "עברית",
        "\u0645\u06cc\u200c\u062e",
        "👩\u200d🔧",
    ],
)
def test_ordinary_names_are_taken(text: str) -> None:
    """Letters of any script, signs and markup are text like any other, trimmed."""
    assert plain_text(text, field="name", most=10) == text.strip()


def test_every_control_and_directional_character_is_refused() -> None:
    """None of the characters that hide or turn a text is allowed within a name."""
    for character in CONTROLS + MARKS:
        assert kind_of_refusal(f"a{character}b") == "string_control"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "string_too_short"),
        (" \t\n", "string_too_short"),
        ("\u200b\u200d\u2060", "string_too_short"),
        ("\u3164", "string_too_short"),
        ("\u2800\u00ad", "string_too_short"),
        ("\u0301\ufe0f", "string_too_short"),
        ("x" * 11, "string_too_long"),
        ("a\ud800b", "string_control"),
    ],
)
def test_what_else_is_refused(text: str, kind: str) -> None:
    """Nothing, too much, and half a character are refused, each by its name."""
    assert kind_of_refusal(text) == kind


def test_a_text_that_is_too_long_is_told_its_length() -> None:
    """Who gave too much learns how much it was."""
    with pytest.raises(InvalidInput, match="At most 10 characters are allowed, and 11 came"):
        plain_text("x" * 11, field="name", most=10)
