"""The commands, and what each prints where."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.cli import main
from tfm_guard.records import ApiKey, VerifiedKey

PROGRAM = Path(sys.executable).with_name("tfm-guard")
CREATE = ("keys", "create", "--account", "acme", "--name", "CI")


def run(url: str, *arguments: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    return CliRunner().invoke(main, arguments, env={"TFM_GUARD_DATABASE_URL": url})


def run_program(
    arguments: Sequence[str], *, url: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the installed program, in which every warning is an error."""
    return subprocess.run(
        [PROGRAM, *arguments],
        env={"TFM_GUARD_DATABASE_URL": url, "PYTHONWARNINGS": "error", **(variables or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def verify(url: str, token: str) -> VerifiedKey:
    """Return what the library takes *token* for."""

    async def work() -> VerifiedKey:
        async with Guard.from_urls(database=url) as guard:
            return await guard.verify(token)

    return asyncio.run(work())


def list_keys(url: str, account_id: str) -> list[ApiKey]:
    """Return the active keys of the account."""

    async def work() -> list[ApiKey]:
        async with Guard.from_urls(database=url) as guard:
            return await guard.keys.list(account_id)

    return asyncio.run(work())


def test_the_token_alone_goes_to_stdout_and_proves_the_key(database_url: str) -> None:
    """What `keys create` prints on stdout is one line that can be piped: a token that works."""
    done = run_program([*CREATE, "--scope", "send", "--scope", "emails:read"], url=database_url)
    assert done.returncode == 0
    token = done.stdout.removesuffix("\n")
    key = verify(database_url, token)
    assert (key.account_id, key.name, key.expires_at) == ("acme", "CI", None)
    assert key.scopes == {"send", "emails:read"}
    assert done.stderr == (
        f'Created the key "CI" ({key.key_prefix}) of account "acme": emails:read send.\n'
        "Keep its token now: it is not shown again.\n"
    )


def test_a_key_may_send_unless_said_otherwise(sqlite_url: str) -> None:
    """Without --scope the key has the scope send and no other."""
    token = run(sqlite_url, *CREATE).stdout.strip()
    assert verify(sqlite_url, token).scopes == {"send"}


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        ("45m", timedelta(minutes=45)),
        ("12h", timedelta(hours=12)),
        ("90d", timedelta(days=90)),
        ("2w", timedelta(days=14)),
    ],
)
def test_a_key_may_expire_after_some_time(
    sqlite_url: str, duration: str, expected: timedelta
) -> None:
    """--expires-in counts from now, in minutes, hours, days or weeks."""
    before = datetime.now(UTC)
    result = run(sqlite_url, *CREATE, "--expires-in", duration)
    after = datetime.now(UTC)
    (key,) = list_keys(sqlite_url, "acme")
    assert key.expires_at is not None
    assert before + expected <= key.expires_at <= after + expected
    assert f"expires {key.expires_at:%Y-%m-%d %H:%M} UTC" in result.stderr


def test_a_key_may_expire_at_a_time(sqlite_url: str) -> None:
    """--expires-at takes a time with any zone."""
    run(sqlite_url, *CREATE, "--expires-at", "2100-01-31T12:00+03:00")
    (key,) = list_keys(sqlite_url, "acme")
    assert key.expires_at == datetime(2100, 1, 31, 9, 0, tzinfo=UTC)


def test_the_audit_log_names_the_command_line(sqlite_url: str) -> None:
    """Who made a key from a terminal is told apart from the application and from other keys."""
    run(sqlite_url, *CREATE)
    assert execute(sqlite_url, "SELECT actor, action FROM tfm_audit") == [
        ("command_line", "api_key.created")
    ]


def test_a_larger_plan_makes_room(database_url: str) -> None:
    """An account at its plan's limit can hold more keys once `accounts set-plan` has run."""
    assert [run(database_url, *CREATE).exit_code for _ in range(3)] == [0, 0, 1]
    result = run(database_url, "accounts", "set-plan", "acme", "starter")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == 'Account "acme" is on the plan "starter".\n'
    assert run(database_url, *CREATE).exit_code == 0


def test_upgrade_makes_the_tables_of_an_empty_database(database_url: str) -> None:
    """`db upgrade` says what it did; a second one finds nothing to do."""
    results = [run_program(["db", "upgrade"], url=database_url) for _ in range(2)]
    assert [(done.returncode, done.stdout, done.stderr) for done in results] == [
        (0, "", "The tables were made, at revision 0001.\n"),
        (0, "", "The tables are at revision 0001 already.\n"),
    ]


def test_settings_come_from_their_variables(sqlite_url: str) -> None:
    """The command line knows the scopes and plans that the application's environment adds."""
    variables = {
        "TFM_GUARD_SCOPES": json.dumps({"invoices:read": "Read invoices"}),
        "TFM_GUARD_PLANS": json.dumps({"free": 1, "gold": 9}),
    }
    arguments = [*CREATE, "--scope", "invoices:read"]
    codes = [run_program(arguments, url=sqlite_url, variables=variables).returncode]
    codes += [run_program(arguments, url=sqlite_url, variables=variables).returncode]
    set_plan = ["accounts", "set-plan", "acme", "gold"]
    codes += [run_program(set_plan, url=sqlite_url, variables=variables).returncode]
    codes += [run_program(arguments, url=sqlite_url, variables=variables).returncode]
    assert codes == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "redirection", [">/dev/full", "| true", "| { exec <&-; cat >&2 /dev/null; }"]
)
def test_a_token_that_cannot_be_written_leaves_no_key(sqlite_url: str, redirection: str) -> None:
    """Where stdout takes no token the key is revoked again, stderr says so, and the code is 1."""
    command = f'"$0" "$@" {redirection}; echo "${{PIPESTATUS[0]}}" >&2'
    done = subprocess.run(
        ["bash", "-c", command, PROGRAM, *CREATE],
        env={
            "TFM_GUARD_DATABASE_URL": sqlite_url,
            "PYTHONWARNINGS": "error",
            "PATH": os.environ["PATH"],
        },
        capture_output=True,
        text=True,
        check=False,
    )
    told, cause, code = done.stderr.splitlines()
    assert told.startswith("tfm-guard: the token could not be written to stdout: ")
    assert cause.endswith("was revoked again")
    assert code == "1"
    assert list_keys(sqlite_url, "acme") == []
    actions = execute(sqlite_url, "SELECT action FROM tfm_audit ORDER BY id")
    assert actions == [("api_key.created",), ("api_key.revoked",)]


def test_without_a_stdout_no_key_is_made(sqlite_url: str) -> None:
    """A closed stdout is noticed before anything is created."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', PROGRAM, *CREATE],
        env={"TFM_GUARD_DATABASE_URL": sqlite_url, "PYTHONWARNINGS": "error"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "tfm-guard: stdout is closed, and the token would be lost; no key was created\n"
    )
    assert list_keys(sqlite_url, "acme") == []


def test_help_that_cannot_be_written_ends_with_1() -> None:
    """Any other output that nobody takes ends the command with 1 and its cause."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" --help >/dev/full', PROGRAM],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "tfm-guard: No space left on device\n")
