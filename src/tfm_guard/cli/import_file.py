"""Reading keys from CSV or JSON lines: one line at a time, however long the file is."""

import asyncio
import csv
import os
import re
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tfm_guard.cli.failures import Failure
from tfm_guard.errors import InvalidInput

if TYPE_CHECKING:
    from tfm_guard.imports import KeyToImport

_LONGEST_LINE: Final = 65_536  # bytes
_CHUNK: Final = 65_536  # bytes
_MOST_FAULTS: Final = 10  # told of a header

_REQUIRED: Final = ("account", "name", "scopes")
_OPTIONAL: Final = ("prefix", "hash", "token", "created_at", "expires_at")
_COLUMNS: Final = (*_REQUIRED, *_OPTIONAL)
# What the library's fields are called here.
COLUMN_OF: Final = {"account_id": "account", "secret_hash": "hash"}
# Unlike a token, a hash or a prefix, which must not be shown should they stand where a name should.
_SHOWABLE: Final = re.compile(r"[A-Za-z][A-Za-z_ -]{0,39}")


class Line(NamedTuple):
    """A line of the file: the key in it, or why there is none."""

    number: int
    key: "KeyToImport | None"
    refusal: InvalidInput | None


class Source:
    """The file of keys open at *descriptor*, or a pipe; only *with_tokens* it may have tokens."""

    def __init__(self, descriptor: int, *, with_tokens: bool) -> None:
        self._descriptor = descriptor
        self._with_tokens = with_tokens
        self._columns: Sequence[str] | None = None  # of CSV
        status = os.fstat(descriptor)
        # None where nobody knows how much will come.
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self.bytes_read = 0
        if with_tokens and not stat.S_ISCHR(status.st_mode) and status.st_mode & 0o077:
            raise Failure(
                "others than its owner may read or write the file, and it is to hold tokens",
                "protect it, like this: chmod 600 FILE",
            )

    async def lines(self) -> AsyncIterator[Line]:
        """Yield the lines that are not blank; the header of CSV is none.

        Raises `Failure` for a header that cannot be used.
        """
        is_json: bool | None = None
        number = 0
        async for raw in self._raw_lines():
            number += 1
            text = _text(raw, first=number == 1)
            if text is not None and not text.strip():
                continue
            if is_json is None:
                is_json = text is not None and text.lstrip().startswith("{")
                if not is_json:
                    self._columns = self._read_header(text, number)
                    continue
            try:
                if text is None:
                    raise _refused("line", f"Expected UTF-8, and at most {_LONGEST_LINE} bytes")
                cells = _json_cells(text) if is_json else self._csv_cells(text)
                yield Line(number, self._key(cells), None)
            except InvalidInput as refusal:
                yield Line(number, None, refusal)

    def _read_header(self, text: str | None, number: int) -> Sequence[str]:
        try:
            columns = [] if text is None else [cell.strip() for cell in _split(text)]
        except InvalidInput:
            columns = []
        faults = [
            f"line {number}: {_shown(column, position)} is no column"
            for position, column in enumerate(columns)
            if column not in _COLUMNS
        ]
        faults += [
            f"line {number}: the column {column} is missing"
            for column in _REQUIRED
            if column not in columns
        ]
        if len(set(columns)) < len(columns):
            faults.append(f"line {number}: a column is there twice")
        if "token" in columns and not self._with_tokens:
            faults.append(f"line {number}: the column token is taken only with --with-tokens")
        if faults:
            raise Failure(
                *faults[:_MOST_FAULTS],
                f"the first line of CSV names the columns; there are: {', '.join(_COLUMNS)}",
            )
        return columns

    def _csv_cells(self, text: str) -> dict[str, str]:
        assert self._columns is not None  # noqa: S101  # the header comes first
        cells = _split(text)
        if len(cells) != len(self._columns):
            raise _refused(
                "line", f"Expected {len(self._columns)} cells as in the header, got {len(cells)}"
            )
        pairs = zip(self._columns, cells, strict=True)
        return {name: cell for name, cell in pairs if cell or name in _REQUIRED}

    def _key(self, cells: Mapping[str, Any]) -> "KeyToImport":
        from tfm_guard.imports import KeyToImport

        if "token" in cells and not self._with_tokens:
            raise _refused("token", "A token is taken only with --with-tokens")
        for name in _REQUIRED:
            if name not in cells:
                raise _refused(name, "It is missing")
        scopes = cells["scopes"]
        return KeyToImport(
            account_id=cells["account"],
            name=cells["name"],
            scopes=scopes.replace(",", " ").split() if isinstance(scopes, str) else scopes,
            prefix=cells.get("prefix"),
            secret_hash=cells.get("hash"),
            token=cells.get("token"),
            created_at=_moment(cells, "created_at"),
            expires_at=_moment(cells, "expires_at"),
        )

    async def _raw_lines(self) -> AsyncIterator[bytes | None]:
        """Yield each line without its end; None in place of one that is too long."""
        rest: bytes | None = b""
        async for chunk in self._chunks():
            first, *others = chunk.split(b"\n")
            rest = None if rest is None else rest + first
            for other in others:
                yield _unless_long(rest)
                rest = other
            rest = _unless_long(rest)
        if rest != b"":
            yield rest

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            await _readable(self._descriptor)
            chunk = os.read(self._descriptor, _CHUNK)
            if not chunk:
                return
            self.bytes_read += len(chunk)
            yield chunk


async def _readable(descriptor: int) -> None:
    """Return when there is something to read.

    The event loop goes on meanwhile: this process is one that others wait for when they revoke.
    """
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # a file on disk, which is always readable
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _unless_long(line: bytes | None) -> bytes | None:
    return line if line is not None and len(line) <= _LONGEST_LINE else None


def _text(raw: bytes | None, *, first: bool) -> str | None:
    """Return the text of a line; none if it is too long or not UTF-8."""
    try:
        return None if raw is None else raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        return None


def _split(text: str) -> list[str]:
    """Return the cells of a line of CSV."""
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error:
        raise _refused("line", "This is no line of CSV; a cell cannot hold a line break") from None


def _json_cells(text: str) -> dict[str, Any]:
    """Return the members of a JSON object that are not null."""
    import msgspec

    try:
        members = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):  # which would quote nothing, but help nobody
        raise _refused("line", "This is no JSON object") from None
    for position, (name, value) in enumerate(members.items()):
        if name not in _COLUMNS:
            raise _refused("line", f"{_shown(name, position)} is no column")
        if name == "scopes":
            good = isinstance(value, list) and all(isinstance(scope, str) for scope in value)
            expected = "a list of texts"
        else:
            good, expected = isinstance(value, str), "a text"
            good = good or (value is None and name in _OPTIONAL)
        if not good:
            raise _refused(name, f"Expected {expected}")
    return {name: value for name, value in members.items() if value is not None}


def _moment(cells: Mapping[str, Any], name: str) -> datetime | None:
    if name not in cells:
        return None
    try:
        return datetime.fromisoformat(cells[name])
    except ValueError:
        raise _refused(name, "Expected a time with its zone, like 2030-01-31T12:00Z") from None


def _shown(column: str, position: int) -> str:
    """Return *column*, unless it could be a value that nobody should see."""
    return repr(column) if _SHOWABLE.fullmatch(column) else f"number {position + 1}"


def _refused(field: str, message: str) -> InvalidInput:
    return InvalidInput((field,), "line", message)
