"""The example of a day: every command and every call, on each kind of database."""

import re
from collections.abc import Iterator
from subprocess import CompletedProcess

import click
import pytest
from click.testing import CliRunner

from examples import operators_day
from tfm_guard.cli import main
from tfm_guard.http.openapi import OPERATIONS

# What is shown elsewhere: it serves an example, and has no end.
NOT_IN_IT = {"demo", "tune"}  # the one needs a terminal, the other seconds of both cores


def commands(group: click.Group, *before: str) -> Iterator[str]:
    """Return the words of every command."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)
        else:
            yield " ".join([*before, name])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands here: starting a program for each takes ten times as long."""
    start = operators_day.started

    def run(arguments: list[str], stdin: str) -> CompletedProcess[str]:
        if "import" in arguments:  # it reads the process's own stdin
            return start(arguments, stdin)
        result = CliRunner().invoke(main, arguments, stdin)
        return CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    monkeypatch.setattr(operators_day, "started", run)


@pytest.mark.usefixtures("in_this_process")
def test_the_day_is_lived_through(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command and call is in it, and ends as it is said to; no token is shown."""
    monkeypatch.setenv("TFM_GUARD_DATABASE_URL", database_url)
    monkeypatch.setenv("TFM_GUARD_ACCEPT_UNTAGGED_TOKENS", "false")
    operators_day.main()
    shown = capsys.readouterr().out
    used = set(re.findall(r"^\$ tfm-guard ((?:[a-z]+-?)+(?: [a-z-]+)?)", shown, re.MULTILINE))
    for command in set(commands(main)) - NOT_IN_IT:
        assert any(line.startswith(command) for line in used), command
    sent = re.findall(r"^> ([A-Z]+) (\S+)", shown, re.MULTILINE)
    for path, method in OPERATIONS:
        pattern = re.sub(r"\{\w+\}", "[^/?]+", path) + r"(\?.*)?"
        assert any(m == method.upper() and re.fullmatch(pattern, p) for m, p in sent), path
    assert not re.search(r"tfm_k_[0-9a-f]{9}", shown)
    assert shown.endswith("# Good night.\n")
