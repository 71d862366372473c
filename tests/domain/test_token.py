"""Facts about tokens, tags and digests."""

from collections.abc import Callable
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.token import (
    MARK,
    RANDOM_BYTES,
    TOKEN_LENGTH,
    DigestKey,
    DigestKeys,
    Tagger,
    derive,
    is_tagged,
    is_untagged,
    prefix_of,
)

KEY = b"an installation's tag key, 32 b."
HEX = "0123456789abcdef"
randoms = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)
secrets = st.binary(min_size=1, max_size=80)


def minted(random: bytes) -> bytes:
    """Return the token that the installation of these tests makes of *random*."""
    return Tagger(KEY).mint(random)


@given(randoms)
def test_a_minted_token_reads_back(random: bytes) -> None:
    """A token is 54 ASCII characters: the mark, the random bytes in hex, a tag that holds."""
    token = minted(random)
    assert len(token) == TOKEN_LENGTH == 54
    assert token.startswith(b"tfm_k_" + random.hex().encode())
    assert set(token[len(MARK) :].decode("ascii")) <= set(HEX)
    assert is_tagged(token)
    assert not is_untagged(token)
    assert Tagger(KEY).holds(token)
    assert prefix_of(token) == random[:4].hex()


def test_the_tag_is_a_keyed_blake2b_of_the_rest() -> None:
    """A tag can be recomputed from its definition: four bytes of BLAKE2b, keyed and personal."""
    token = minted(bytes(RANDOM_BYTES))
    mac = blake2b(token[:46], key=KEY, digest_size=4, person=b"tfm-guard tag")
    assert token[46:] == mac.hexdigest().encode()


@given(randoms, st.integers(0, TOKEN_LENGTH - 1), st.data())
def test_one_wrong_character_fails(random: bytes, position: int, data: st.DataObject) -> None:
    """Another hex digit anywhere after the mark breaks the tag; anywhere in it, the form."""
    token = minted(random)
    others = st.sampled_from(HEX).map(str.encode).filter(lambda c: c != token[position:][:1])
    wrong = token[:position] + data.draw(others) + token[position + 1 :]
    assert is_tagged(wrong) == (position >= len(MARK))
    assert not Tagger(KEY).holds(wrong)


@given(randoms, st.integers(0, TOKEN_LENGTH - 1), st.integers(0, 255))
def test_one_wrong_byte_never_passes(random: bytes, position: int, byte: int) -> None:
    """Any byte in place of a token's own either fails the form or fails the tag."""
    token = minted(random)
    wrong = token[:position] + bytes([byte]) + token[position + 1 :]
    assert (is_tagged(wrong) and Tagger(KEY).holds(wrong)) == (wrong == token)


@given(randoms, st.binary(min_size=16, max_size=64).filter(lambda key: key != KEY))
def test_another_installation_has_other_tags(random: bytes, key: bytes) -> None:
    """A token minted under one tag key does not hold under another."""
    # Two keys agree by chance once in 4 billion.
    assert not Tagger(key).holds(minted(random))


@given(st.binary(max_size=60))
def test_only_the_two_forms_are_forms(token: bytes) -> None:
    """Random bytes have the form of a key only as the mark and 32, 40 or 48 hex digits."""
    for candidate in (token, MARK + token, MARK + token.hex().encode()):
        digits = candidate.removeprefix(MARK)
        well_formed = candidate.startswith(MARK) and not set(digits) - set(HEX.encode())
        assert is_tagged(candidate) == (well_formed and len(digits) == 48)
        assert is_untagged(candidate) == (well_formed and len(digits) in (32, 40))


@pytest.mark.parametrize("digits", [32, 40])
def test_older_forms_have_a_prefix_too(digits: int) -> None:
    """A token without a tag is recognised as such, and its prefix is its first 8 digits."""
    token = MARK + b"0123456789abcdef0123456789abcdef01234567"[:digits]
    assert is_untagged(token)
    assert not is_tagged(token)
    assert prefix_of(token) == "01234567"


@pytest.mark.parametrize(
    "change",
    [bytes.upper, lambda token: token + b"\n", lambda token: b" " + token[:-1], bytes.title],
    ids=["upper", "newline", "blank", "title"],
)
def test_a_form_is_exact(change: Callable[[bytes], bytes]) -> None:
    """Upper case, a newline at the end or a blank in front is not the form of a key."""
    assert not is_tagged(change(minted(b"\xab" * RANDOM_BYTES)))


@pytest.mark.parametrize("length", [0, RANDOM_BYTES - 1, RANDOM_BYTES + 1])
def test_minting_wants_exactly_its_random_bytes(length: int) -> None:
    """Too few or too many random bytes are refused, not padded."""
    with pytest.raises(ValueError, match=f"expected 20 random bytes, got {length}"):
        Tagger(KEY).mint(bytes(length))


@given(randoms, randoms, secrets)
def test_a_digest_tells_tokens_apart(one: bytes, other: bytes, secret: bytes) -> None:
    """Digests are 16 bytes, equal for equal tokens and different for different ones."""
    key = DigestKey(secret)
    digest = key.digest(minted(one))
    assert len(digest) == 16
    assert (key.digest(minted(other)) == digest) == (one == other)
    assert DigestKey(secret).digest(minted(one)) == digest


@given(secrets, secrets)
def test_a_digest_key_is_known_by_its_id(one: bytes, other: bytes) -> None:
    """The id and the digests of a digest key depend on its secret alone."""
    assert (DigestKey(one).id == DigestKey(other).id) == (one == other)
    assert (DigestKey(one).digest(b"x") == DigestKey(other).digest(b"x")) == (one == other)
    assert len(DigestKey(one).id) == 16


@given(st.lists(secrets, min_size=1, max_size=4, unique=True))
def test_the_newest_secret_is_the_current(roots: list[bytes]) -> None:
    """The first secret makes new digests; all of them are found by their id."""
    keys = DigestKeys.from_secrets(roots)
    assert keys.current.id == DigestKey(roots[0]).id
    assert set(keys.by_id) == {DigestKey(root).id for root in roots}


@given(secrets, st.binary(max_size=16), st.binary(max_size=16))
def test_keys_for_two_purposes_are_unrelated(secret: bytes, one: bytes, other: bytes) -> None:
    """One root secret gives a different 32-byte key for each purpose."""
    # BLAKE2b fills a short purpose up with zeros.
    same = one.ljust(16, b"\0") == other.ljust(16, b"\0")
    assert (derive(secret, one) == derive(secret, other)) == same
    assert len(derive(secret, one)) == 32


@given(st.binary(min_size=16, max_size=64))
def test_no_secret_is_in_a_repr(secret: bytes) -> None:
    """Neither the secret nor the key derived from it is in the repr of a digest key or tagger."""
    shown = repr(DigestKeys.from_secrets([secret])) + repr(Tagger(secret))
    assert DigestKey(secret).id in shown
    for hidden in (secret, derive(secret, b"digest")):
        assert hidden.hex() not in shown
        assert repr(hidden)[2:-1] not in shown
