"""The file of an SQLite database: made once, and the same one for as long as it is in use."""

import contextlib
import os
import sqlite3
import weakref
from pathlib import Path

import aiosqlite


class SqliteFile:
    """The file at *path*. Only `adopt` makes it; no connection ever does.

    SQLite makes an empty file where there is none. A process whose file was moved away would thus
    find a database without keys, and refuse every valid one.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()  # whatever the working folder becomes
        self.connections = weakref.WeakSet[aiosqlite.Connection]()
        self._identity: tuple[int, int] | None = None

    def adopt(self) -> None:
        """Make the file if there is none, and take it for the database. Raises `OSError`."""
        # A file that is there is never opened: closing it again would end all locks that this
        # process holds on it (POSIX advisory locks), those of other connections among them, and
        # the next process to leave would take itself for the last, and remove the journal.
        with contextlib.suppress(FileExistsError):
            # It will hold secrets: nobody but its owner is to read it.
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._identity = _identity(self.path.stat())

    def check(self) -> None:
        """Raise `sqlite3.OperationalError` unless the file adopted is still at its path."""
        try:
            present = _identity(self.path.stat())
        except OSError as error:
            raise sqlite3.OperationalError(f"{self.path}: {error.strerror}") from None
        if present != self._identity:
            raise sqlite3.OperationalError(f"{self.path} is another file than at the start")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
