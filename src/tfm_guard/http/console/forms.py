"""Forms: what they carry to show that they are ours, and how they are read."""

from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Final
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request

from tfm_guard.clock import Clock
from tfm_guard.errors import Refusal
from tfm_guard.records import Person

MAXIMUM_BODY_BYTES: Final = 65_536
_MAXIMUM_FIELDS: Final = 200
_FORM: Final = "application/x-www-form-urlencoded"
# A form may stay open for so long.
_MAXIMUM_AGE_SECONDS: Final = 24 * 3600
_SALT_BYTES: Final = 8
_MAC_BYTES: Final = 16


class FormExpired(Refusal):
    """The form is too old, was given to another person, or is none of ours."""

    code = "form_expired"
    status = 403

    def __init__(self, message: str) -> None:
        super().__init__(message)


class FormTooLarge(Refusal):
    """The form is longer than any that makes sense here."""

    code = "body_too_large"
    status = 413

    def __init__(self) -> None:
        super().__init__(f"A form may have at most {MAXIMUM_BODY_BYTES} bytes.")


class FormUnreadable(Refusal):
    """What came is no form, or not one that this page has."""

    code = "invalid_form"
    status = 422

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Seals:
    """Seals what goes to a person's browser and comes back: with one of *keys*, newest first."""

    def __init__(
        self, keys: Sequence[bytes], person: Person, clock: Clock, random: Callable[[int], bytes]
    ) -> None:
        self._keys = keys
        self._person = person
        self._clock = clock
        self._random = random

    def token(self) -> str:
        """Return what shows that a form was given to this person; different each time."""
        text = f"{int(self._clock.now().timestamp()):x}-{self._random(_SALT_BYTES).hex()}"
        return self._seal("form", text)

    def is_token(self, sealed: str) -> bool:
        """Tell whether *sealed* is such a token, of not more than a day ago."""
        text = self._open("form", sealed)
        if text is None:
            return False
        age = self._clock.now().timestamp() - int(text.partition("-")[0], 16)
        return age <= _MAXIMUM_AGE_SECONDS

    def note(self, text: str) -> str:
        """Return *text*, which has no dot, so that `read_note` believes it."""
        return self._seal("note", text)

    def read_note(self, sealed: str) -> str | None:
        """Return the text of a note that was made for this person."""
        return self._open("note", sealed)

    def _seal(self, purpose: str, text: str) -> str:
        return f"{text}.{self._mac(self._keys[0], purpose, text)}"

    def _open(self, purpose: str, sealed: str) -> str | None:
        text, _, mac = sealed.partition(".")
        expected = [self._mac(key, purpose, text) for key in self._keys]
        if any(compare_digest(mac.encode(), each.encode()) for each in expected):
            return text
        return None

    def _mac(self, key: bytes, purpose: str, text: str) -> str:
        content = msgspec.json.encode([purpose, self._person.account_id, self._person.id, text])
        return blake2b(content, key=key, digest_size=_MAC_BYTES).hexdigest()


class Form:
    """The fields of a form that was sent."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._fields = fields

    def all(self, name: str) -> list[str]:
        """Return all values of a field."""
        return [value for key, value in self._fields if key == name]

    def one(self, name: str) -> str:
        """Return the value of a field, or nothing; of several the first."""
        return next(iter(self.all(name)), "")


async def read_form(request: Request, *, known: Collection[str], unreadable: str) -> Form:
    """Return the form in the body of *request*; it may have no fields but those *known*.

    Raises `FormTooLarge`, or `FormUnreadable` with that message.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY_BYTES:
            raise FormTooLarge
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise FormUnreadable(unreadable)
    try:
        fields = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=_MAXIMUM_FIELDS,
        )
    except ValueError:  # no ASCII, no UTF-8, no pairs, or too many
        raise FormUnreadable(unreadable) from None
    if any(name not in known for name, _ in fields):
        raise FormUnreadable(unreadable)
    return Form(fields)
