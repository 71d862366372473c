"""Facts about reading Authorization, and about the challenge."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tfm_guard.bearer import MAX_HEADER_BYTES, Unreadable, challenge, read_token

KEY = b"tfm_k_00112233445566778899aabbccddeeff0011223344556677"

names = st.sampled_from([b"authorization", b"Authorization", b"cookie", b""]) | st.binary()
values = st.binary() | st.tuples(
    st.sampled_from([b"", b" ", b"\t"]),
    st.sampled_from([b"Bearer", b"bearer", b"BEARER", b"Basic", b"Bearerx"]),
    st.sampled_from([b"", b" ", b"  ", b"\t", b"\xa0"]),
    st.binary(max_size=8) | st.just(KEY),
).map(b"".join)
headers = st.lists(st.tuples(names, values))


def read(value: bytes) -> bytes | Unreadable:
    """Return what one Authorization line says."""
    return read_token([(b"host", b"x"), (b"authorization", value), (b"accept", b"*/*")])


@given(headers)
def test_any_headers_have_one_reading(pairs: list[tuple[bytes, bytes]]) -> None:
    """Any header bytes give a token that was in them, or one reason why there is none."""
    lines = [value for name, value in pairs if name == b"authorization"]
    result = read_token(pairs)
    if isinstance(result, bytes):
        assert result
        assert lines[0].rstrip(b" \t").endswith(result)
        assert lines[0].lstrip(b" \t")[:6].lower() == b"bearer"
    elif result is Unreadable.MISSING:
        assert not b"".join(lines).strip(b" \t")
    elif result is Unreadable.UNSUPPORTED:
        assert len(lines) == 1
    else:
        assert len(lines) > 1 or lines[0].strip(b" \t")[:6].lower() == b"bearer"


@given(st.from_regex(rb"[A-Za-z0-9\-._~+/]+=*", fullmatch=True))
def test_every_rfc_token_is_read(token: bytes) -> None:
    """Any b64token of RFC 6750 section 2.1 is returned as it was sent."""
    assert read(b"Bearer " + token) == token


@example(b"\xa0")
@example(b"\x85")
@example(b"\x1c")
@given(st.binary(min_size=1, max_size=3).filter(lambda tail: not set(tail) & set(b" \t,")))
def test_nothing_but_blanks_is_trimmed(tail: bytes) -> None:
    """Only space and tab are blanks: whatever else follows a key is part of the token."""
    assert read(b"Bearer " + KEY + tail) == KEY + tail


@pytest.mark.parametrize(
    "value",
    [
        b"bearer " + KEY,
        b"BEARER " + KEY,
        b"bEaReR " + KEY,
        b"Bearer  " + KEY,
        b"Bearer      " + KEY,
        b" \t Bearer " + KEY,
        b"Bearer " + KEY + b" \t",
    ],
)
def test_what_is_read_as_the_key(value: bytes) -> None:
    """The scheme may be in any case, with several spaces after it and blanks around the value."""
    assert read(value) == KEY


@pytest.mark.parametrize("value", [b"", b" ", b"\t  "])
def test_what_is_missing(value: bytes) -> None:
    """An empty or blank field is no credentials, like none at all."""
    assert read(value) is Unreadable.MISSING
    assert read_token([]) is Unreadable.MISSING


@pytest.mark.parametrize(
    "value",
    [
        b"Basic dXNlcjpw",
        b"Digest username=x",
        b"Token x",
        KEY,
        b"Bearer\xa0" + KEY,
        b"Bearer\x00" + KEY,
        b"Bearerx " + KEY,
        b"Bearer, " + KEY,
        b"Bear",
    ],
)
def test_what_is_another_scheme(value: bytes) -> None:
    """A scheme is compared whole: a prefix of Bearer, or more than it, is another one."""
    assert read(value) is Unreadable.UNSUPPORTED


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer",
        b"Bearer   ",
        b"Bearer\t" + KEY,
        b"Bearer " + KEY + b" " + KEY,
        b"Bearer " + KEY + b", Bearer " + KEY,
        b"Bearer " + KEY + b",x=y",
        b"Bearer " + KEY + b"\t" + KEY,
        b"Bearer " + b"x" * MAX_HEADER_BYTES,
    ],
)
def test_what_is_malformed(value: bytes) -> None:
    """No token, a tab after the scheme, several tokens, or too many bytes: not one Bearer token."""
    assert read(value) is Unreadable.MALFORMED


@pytest.mark.parametrize("second", [b"Bearer " + KEY, b"Basic x", b""])
def test_two_lines_are_malformed(second: bytes) -> None:
    """Two Authorization lines are refused whatever they say, in either order."""
    one, other = (b"authorization", b"Bearer " + KEY), (b"authorization", second)
    assert read_token([one, other]) is Unreadable.MALFORMED
    assert read_token([other, one]) is Unreadable.MALFORMED


@pytest.mark.parametrize("token", [b'"' + KEY + b'"', b"\xff\xfe \xe9", b"' OR '1'='1", b"{a b}"])
def test_foreign_characters_make_one_token(token: bytes) -> None:
    """What holds characters that no token has is one token that no key equals."""
    assert read(b"Bearer " + token) == token


def test_header_names_are_compared_as_asgi_sends_them() -> None:
    """An ASGI server sends lower-case names; another spelling is another header."""
    assert read_token([(b"Authorization", b"Bearer " + KEY)]) is Unreadable.MISSING
    assert read_token([(b"proxy-authorization", b"Bearer " + KEY)]) is Unreadable.MISSING


PARAMETER = re.compile(r'(realm|error|scope)="([\x20-\x21\x23-\x5b\x5d-\x7e]*)"')
printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters='"\\'))


@given(printable, st.none() | printable, st.none() | printable)
def test_a_challenge_reads_back(realm: str, error: str | None, scope: str | None) -> None:
    """Every parameter is one quoted string, and an absent one is left out."""
    scheme, _, parameters = challenge(realm, error, scope).decode("ascii").partition(" ")
    expected = {"realm": realm, "error": error, "scope": scope}
    found = PARAMETER.findall(parameters)
    assert scheme == "Bearer"
    assert found == [(name, value) for name, value in expected.items() if value is not None]
    assert ", ".join(f'{name}="{value}"' for name, value in found) == parameters


def test_the_challenge_without_credentials() -> None:
    """Where no credentials came, no error is named (RFC 6750 section 3)."""
    assert challenge("api") == b'Bearer realm="api"'
    assert challenge("api", "insufficient_scope", "domains:write send") == (
        b'Bearer realm="api", error="insufficient_scope", scope="domains:write send"'
    )
