"""The token: how it is minted, read, and proven.

    tfm_k_ + prefix (8 hex) + secret (32 hex) + tag (8 hex)

The prefix is public. The secret has 128 random bits, so one fast keyed digest is enough to store
and compare it (NIST SP 800-63B: from 112 bits no slow hash is needed). The tag is a MAC over the
rest under a key of the installation: it turns away forged and mistyped tokens before any cache or
database is asked, and proves nothing else.
"""

from collections.abc import Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Final, NamedTuple

MARK: Final = b"tfm_k_"
PREFIX_LENGTH: Final = 8
RANDOM_BYTES: Final = 20  # 4 for the prefix, 16 for the secret
TOKEN_LENGTH: Final = 54
DIGEST_BYTES: Final = 16

_HEX: Final = b"0123456789abcdef"
_PREFIX: Final = slice(len(MARK), len(MARK) + PREFIX_LENGTH)
_TAG_LENGTH: Final = 8
# Forms without a tag, from before this library: 32 or 40 hex digits after the mark.
_UNTAGGED_LENGTHS: Final = (len(MARK) + 32, len(MARK) + 40)


class Tagger:
    """Makes and checks tags with one installation's *key* (16 to 64 bytes)."""

    __slots__ = ("_mac",)

    def __init__(self, key: bytes) -> None:
        self._mac = blake2b(key=key, digest_size=_TAG_LENGTH // 2, person=b"tfm-guard tag")

    def mint(self, random: bytes) -> bytes:
        """Return the token made of *random*, which must be `RANDOM_BYTES` unpredictable bytes."""
        if len(random) != RANDOM_BYTES:
            raise ValueError(f"expected {RANDOM_BYTES} random bytes, got {len(random)}")
        body = MARK + random.hex().encode()
        return body + self._tag(body)

    def holds(self, token: bytes) -> bool:
        """Tell whether *token*, of the tagged form, was minted under this key (or guessed)."""
        return compare_digest(token[-_TAG_LENGTH:], self._tag(token[:-_TAG_LENGTH]))

    def _tag(self, body: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(body)
        return mac.hexdigest().encode()


class DigestKey:
    """One key of the digest by which tokens are compared, derived from a root *secret*."""

    __slots__ = ("id", "state")

    def __init__(self, secret: bytes) -> None:
        key = derive(secret, b"digest")
        self.id = blake2b(key, digest_size=8, person=b"tfm-guard key id").hexdigest()
        # A digest is a copy of this state, one update, and its end. With a label taken in, BLAKE2
        # has already compressed the key's block, which would otherwise be half the work each time.
        self.state = blake2b(b"Authorization: ", key=key, digest_size=DIGEST_BYTES)

    def __repr__(self) -> str:
        return f"DigestKey(id={self.id!r})"

    def digest(self, token: bytes) -> bytes:
        """Return the `DIGEST_BYTES` by which *token* is stored and compared.

        It is that of the header in which the token is usually sent, so that this header can be
        compared as it comes.
        """
        mac = self.state.copy()
        mac.update(b"Bearer " + token)
        return mac.digest()


class DigestKeys(NamedTuple):
    """The digest key in use and the older ones whose digests are still believed."""

    current: DigestKey
    by_id: dict[str, DigestKey]

    @classmethod
    def from_secrets(cls, secrets: Sequence[bytes]) -> "DigestKeys":
        """Derive them from root *secrets*, newest first; at least one."""
        keys = [DigestKey(secret) for secret in secrets]
        return cls(keys[0], {key.id: key for key in keys})


def derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a 32-byte key for *purpose* (at most 16 bytes long) from a root *secret*."""
    return blake2b(key=blake2b(secret).digest(), digest_size=32, person=purpose).digest()


def is_tagged(token: bytes) -> bool:
    """Tell whether *token* has the form minted here; says nothing about its tag."""
    return len(token) == TOKEN_LENGTH and _is_mark_and_hex(token)


def is_untagged(token: bytes) -> bool:
    """Tell whether *token* has one of the older forms, accepted only where they were imported."""
    return len(token) in _UNTAGGED_LENGTHS and _is_mark_and_hex(token)


def is_prefix(text: str) -> bool:
    """Tell whether *text* has the form of the prefix of a key."""
    return len(text) == PREFIX_LENGTH and not text.encode(errors="replace").translate(None, _HEX)


def prefix_of(token: bytes) -> str:
    """Return the public prefix of a *token* that has one of the two forms."""
    return token[_PREFIX].decode("ascii")


def _is_mark_and_hex(token: bytes) -> bool:
    return token.startswith(MARK) and not token[len(MARK) :].translate(None, _HEX)
