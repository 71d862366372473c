"""How a command that does not succeed says so, and with which exit code."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Final

import click

from tfm_guard.errors import (
    ConfigurationError,
    GuardError,
    InvalidInput,
    Refusal,
    Unavailable,
)

_URL_VARIABLE: Final = "TFM_GUARD_DATABASE_URL"
INTERRUPTED: Final = 130  # as shells have it for Ctrl-C

# What databases say that will be so the next time too. SQLite's words, the operating system's, and
# PostgreSQL's: the driver gives no code for a connection that the server turned down.
_LASTING: Final = re.compile(
    r"No such file or directory|Not a directory|Is a directory|Permission denied|"
    r"Read-only file system|Operation not permitted|File name too long|embedded null|"
    r"file is not a database|disk image is malformed|readonly database|"
    r"unable to open database file|is another file than at the start|"
    r'(?:database|role) ".*" does not exist|authentication failed|no password supplied|'
    r"no pg_hba\.conf entry|permission denied|must be owner|InsufficientPrivilege|"
    r"ProgrammingError|invalid connection option|invalid sslmode|UndefinedTable|"
    r"server does not support SSL|certificate verify failed"
)


# The mark of a token, and more hexadecimal digits than its public prefix has.
_TOKEN: Final = re.compile(r"tfm_k_[0-9a-f]{12}", re.IGNORECASE)
# As many digits as stand after the mark, alone. One in 32 of the shortest looks like an id.
_DIGITS: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{48}")
# A UUID, random or ordered by time, without its hyphens: accounts may be named like that.
_UUID: Final = re.compile(r"[0-9a-f]{12}[47][0-9a-f]{3}[89ab][0-9a-f]{15}")


class Failure(click.ClickException):
    """The command did not succeed; *lines* say why and what to do, without anything secret."""

    exit_code = 1  # 2 is click's, for a command line that it cannot read

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.lines:
            click.echo(f"tfm-guard: {line}", file=file, err=file is None)


class NotNow(Failure):
    """The command may succeed in a moment."""

    exit_code = 3


class Program(click.Group):
    """A group of commands in which errors of the library end the program without a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except OSError as error:
            # Output that nobody takes: a full disk, a closed pipe.
            silence_stdout()
            with suppress(OSError):
                click.echo(f"tfm-guard: {error.strerror or error}", err=True)
            sys.exit(Failure.exit_code)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Before anything else is said about them, which might quote it.
        if any(_has_token(argument) for argument in args):
            raise click.UsageError(
                "A key was given on the command line, where every user of this machine can read "
                "it, and where shells keep it in their history: rotate or revoke it. Keys are "
                "read from stdin."
            )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GuardError as error:
            raise failure(error) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


def _has_token(argument: str) -> bool:
    value = argument.partition("=")[2] if argument.startswith("-") else argument
    return _TOKEN.search(argument) is not None or (
        _DIGITS.fullmatch(value.strip()) is not None and _UUID.fullmatch(value.strip()) is None
    )


@contextmanager
def naming(**places: str) -> Iterator[None]:
    """Have refused values named by *places*: the library's argument to what the user typed."""
    try:
        yield
    except InvalidInput as error:
        name, *positions = error.field
        place = places.get(str(name), str(name))
        words = [place, *(f"number {int(position) + 1}" for position in positions)]
        raise Failure(f"{' '.join(words)}: {error.message}") from error


def failure(error: GuardError) -> Failure:
    """Return what to tell about *error*."""
    if isinstance(error, ConfigurationError):
        return Failure(*error.faults, *_advice(error.faults))
    if isinstance(error, Unavailable):
        return _unavailable(error)
    if isinstance(error, Refusal):
        return (NotNow if error.retryable else Failure)(error.message)
    return Failure(str(error))


def is_lasting(error: Unavailable) -> bool:
    """Tell whether *error* will come again until somebody mends something."""
    return _LASTING.search(error.reason) is not None


def silence_stdout() -> None:
    """Send what is still to be written to stdout nowhere, or Python complains when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _unavailable(error: Unavailable) -> Failure:
    if is_lasting(error):
        return Failure(
            f"{error.reason}{_file_named(error)}",
            f"check that {_URL_VARIABLE} names the database that you mean, that its folder exists, "
            "and that you may read and write it",
        )
    return NotNow(
        f"cannot be done now: {error.reason}",
        f"check that the database runs and that {_URL_VARIABLE} names it, then try again",
    )


def _file_named(error: Unavailable) -> str:
    """Return the path of a SQLite file where SQLite's own words leave it out."""
    from tfm_guard.settings import read_database_url

    with suppress(ConfigurationError):
        url = read_database_url(os.environ.get(_URL_VARIABLE, ""))
        if url.get_backend_name() == "sqlite" and str(url.database) not in error.reason:
            return f": {url.database}"
    return ""


def _advice(faults: tuple[str, ...]) -> list[str]:
    if f"{_URL_VARIABLE} is not set" not in faults:
        return []
    return [f"set it in the environment: export {_URL_VARIABLE}=sqlite:///tfm_guard.db"]
