"""The command line's start: its help, and what it does not wait for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tfm_guard
from tfm_guard.cli import main

PROGRAM = Path(sys.executable).with_name("tfm-guard")

# What takes long to import, or is not there in every installation.
LATE = {"alembic", "argon2", "msgspec", "psycopg", "sqlalchemy", "starlette", "uvicorn"}


def every_command(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words that lead to *command* and to each below it."""
    yield path
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from every_command(below, (*path, name))


def test_these_are_the_commands() -> None:
    """There are these commands, and none that does nothing yet."""
    assert set(every_command(main)) == {
        (),
        ("accounts",),
        ("accounts", "erase"),
        ("accounts", "list"),
        ("accounts", "resume"),
        ("accounts", "set-plan"),
        ("accounts", "suspend"),
        ("db",),
        ("db", "check"),
        ("db", "prune"),
        ("db", "times"),
        ("db", "upgrade"),
        ("demo",),
        ("doctor",),
        ("keys",),
        ("keys", "create"),
        ("keys", "import"),
        ("keys", "list"),
        ("keys", "revoke"),
        ("keys", "rotate"),
        ("keys", "show"),
        ("keys", "verify"),
        ("prove",),
        ("serve",),
        ("tune",),
    }


@pytest.mark.parametrize("path", list(every_command(main)), ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    """--help of each command works without any setting and says what each option is for."""
    result = CliRunner().invoke(main, [*path, "--help"], env={"TFM_GUARD_DATABASE_URL": None})
    assert (result.exit_code, result.stderr) == (0, "")
    usage, _, words = result.stdout.partition("\n\n")
    assert "\\b" not in words
    assert usage.startswith(" ".join(["Usage: main", *path]))
    assert len(words.split()) > 10
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert all(p.help for p in command.params if isinstance(p, click.Option))


def test_the_exit_codes_are_in_the_help() -> None:
    """The codes 0 to 4 and 130 stand at the end of `tfm-guard --help`, one a line."""
    _, _, listed = CliRunner().invoke(main, ["--help"]).stdout.partition("Exit codes:\n")
    assert [line.split()[0] for line in listed.splitlines()] == ["0", "1", "2", "3", "4", "130"]


def test_help_waits_for_nothing_heavy() -> None:
    """`tfm-guard --help` imports click, and no database, HTTP or hashing library."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", PROGRAM, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert {"click", "tfm_guard"} <= imported
    assert imported & LATE == set()


def test_the_version_is_told() -> None:
    """--version prints the package's own version."""
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tfm-guard, version {tfm_guard.__version__}\n"
