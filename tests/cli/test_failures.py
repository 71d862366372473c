"""What the command line says when it cannot do what it is told, and with which exit code."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import make_url

from tests.support.servers import free_port
from tests.support.sql import execute
from tfm_guard.cli import main

CREATE = ("keys", "create", "--account", "acme", "--name", "CI")

# Commands that use the database, each complete.
COMMANDS = [
    CREATE,
    ("keys", "list", "--account", "acme"),
    ("keys", "revoke", "00112233", "--account", "acme"),
    ("accounts", "set-plan", "acme", "pro"),
    ("accounts", "list"),
    ("db", "upgrade"),
]


def run(url: str | None, *arguments: str, **variables: str) -> Result:
    """Run the command with these variables and no other of the library's."""
    result = CliRunner().invoke(main, arguments, env={"TFM_GUARD_DATABASE_URL": url, **variables})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_database_it_says_how_to_name_one(command: tuple[str, ...]) -> None:
    """A missing TFM_GUARD_DATABASE_URL ends every command with 1 and an example to copy."""
    result = run(None, *command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "tfm-guard: TFM_GUARD_DATABASE_URL is not set\n"
        "tfm-guard: set it in the environment: "
        "export TFM_GUARD_DATABASE_URL=sqlite:///tfm_guard.db\n"
    )


def test_all_faults_of_the_settings_are_told_at_once(sqlite_url: str) -> None:
    """Each wrong variable has its line, and no value that could be secret is in it."""
    result = run(
        sqlite_url,
        *CREATE,
        TFM_GUARD_SECRETS="hunter2",
        TFM_GUARD_PLANS='{"gold": 5}',
        TFM_GUARD_DATABASE_POOL_SIZE="many",
    )
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert sorted(line.split(":")[1].strip() for line in lines) == [
        "TFM_GUARD_DATABASE_POOL_SIZE",
        "TFM_GUARD_PLANS",
        "TFM_GUARD_SECRETS",
    ]
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "mysql://acme:hunter2@localhost/keys",
        "postgresql://acme:hunter2@localhost:port/keys",
        "postgresql://acme:hunter2@[::1/keys",
        "sqlite://",
        "sqlite://hunter2.db",
        "sqlite:///:memory:",
        "sqlite:///keys.db?mode=hunter2",
        "postgres://acme:hunter2@localhost/keys",
        "postgresql+asyncpg://acme:hunter2@localhost/keys",
        "postgresql://acme:top@hunter2@127.0.0.1/keys",
        "postgresql://acme:top@hunter2/word@127.0.0.1/keys",
        "postgresql://acme:hunter2/keys",
        "postgresql://acme:hunter2@localhost:99999/keys",
    ],
)
def test_a_url_that_cannot_work_is_explained_without_showing_it(url: str) -> None:
    """The fault names the variable and the forms it may have; the password stays out of it."""
    result = run(url, *CREATE)
    assert result.exit_code == 1
    assert result.stderr.startswith("tfm-guard: TFM_GUARD_DATABASE_URL")
    assert re.search("sqlite:///|postgresql://|%40|%3F", result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert "hunter2" not in result.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_database_that_does_not_answer_is_told_apart(command: tuple[str, ...]) -> None:
    """Exit code 3 means that trying again may help; the cause is named, the password is not."""
    port = free_port()
    result = run(f"postgresql://acme:hunter2@127.0.0.1:{port}/keys", *command)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "Connection refused" in result.stderr
    assert "TFM_GUARD_DATABASE_URL" in result.stderr
    assert "hunter2" not in result.stderr


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    """A SQLite file in a folder that does not exist ends with 1, its path and what to look at."""
    path = tmp_path / "nowhere" / "keys.db"
    result = run(f"sqlite:///{path}", *CREATE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{path}: No such file or directory" in result.stderr
    assert "that its folder exists" in result.stderr


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    """A file of another kind ends with 1 and its path."""
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 100)
    result = run(f"sqlite:///{path}", *CREATE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"file is not a database: {path}" in result.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"username": "nobody-at-all"}, "nobody-at-all"),
        ({"query": {"sslmode": "perhaps"}}, "sslmode"),
        ({"query": {"colour": "red"}}, "colour"),
    ],
)
def test_what_postgresql_will_never_grant_is_told_apart(
    postgres_url: str, change: dict[str, Any], expected: str
) -> None:
    """A database, role or option that is not there ends with 1 and the server's first line."""
    url = make_url(postgres_url).set(**change).render_as_string(hide_password=False)
    result = run(url, *CREATE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert expected in result.stderr.splitlines()[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_tables_of_a_newer_release_are_left_alone(
    database_url: str, command: tuple[str, ...]
) -> None:
    """A database that a later release has upgraded is refused with 1, and told so."""
    run(database_url, "db", "upgrade")
    execute(database_url, "UPDATE tfm_schema_version SET version_num = '9999'")
    result = run(database_url, *command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "revision 9999, newer than this release knows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--scope", "send", "--scope", "sned"),
            "--scope number 2: Unknown scope 'sned'. Known: send,",
        ),
        (("--name", " "), "--name: At least 1 character is needed"),
        (("--name", "x" * 101), "--name: At most 100 characters are allowed, and 101 came"),
        (("--account", ""), "--account: At least 1 character is needed"),
        (("--name", "\u200b\u200d"), "--name: At least 1 visible character is needed"),
        (("--expires-at", "2020-01-01T00:00Z"), "--expires-at: The time must be in the future"),
    ],
)
def test_a_value_that_is_not_acceptable_is_named(
    sqlite_url: str, arguments: tuple[str, ...], expected: str
) -> None:
    """A refused value ends with 1 and names the option as it was typed, and nothing is created."""
    result = run(sqlite_url, *CREATE, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"tfm-guard: {expected}")
    assert execute(sqlite_url, "SELECT count(*) FROM tfm_keys") == [(0,)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "create", "--account", "acme"),
        ("keys", "create", "--name", "CI"),
        (*CREATE, "--expires-in", "90"),
        (*CREATE, "--expires-in", "0d"),
        (*CREATE, "--expires-in", "-1d"),
        (*CREATE, "--expires-in", "9999999999w"),
        (*CREATE, "--expires-in", "9999999w"),
        (*CREATE, "--expires-at", "tomorrow"),
        (*CREATE, "--expires-at", "2100-01-31"),
        (*CREATE, "--expires-in", "1d", "--expires-at", "2100-01-31T12:00Z"),
        (*CREATE, "--database", "sqlite:///keys.db"),
        ("accounts", "set-plan", "acme"),
        ("keys", "destroy"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(
    sqlite_url: str, arguments: tuple[str, ...]
) -> None:
    """A mistake in the arguments is told from a refusal, and happens before any database."""
    result = run(sqlite_url, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    with pytest.raises(Exception, match="no such table"):
        execute(sqlite_url, "SELECT * FROM tfm_keys")


def test_the_plan_limit_is_told(sqlite_url: str) -> None:
    """At the limit no key is created, and the message has the plan, the limit and what to do."""
    results = [run(sqlite_url, *CREATE) for _ in range(3)]
    assert [result.exit_code for result in results] == [0, 0, 1]
    assert results[2].stdout == ""
    assert results[2].stderr == (
        "tfm-guard: The plan 'free' allows 2 active API keys; this account has 2. "
        "Delete one or choose a larger plan.\n"
    )


def test_one_key_is_one_key(sqlite_url: str) -> None:
    """A limit of one is told in the singular."""
    results = [run(sqlite_url, *CREATE, TFM_GUARD_PLANS='{"free": 1}') for _ in range(2)]
    assert results[1].stderr.startswith(
        "tfm-guard: The plan 'free' allows 1 active API key; this account has 1. "
    )


def test_scopes_in_one_option_are_told_apart(sqlite_url: str) -> None:
    """Scopes separated by a comma are shown as they came, with how to give them."""
    result = run(sqlite_url, *CREATE, "--scope", "send,emails:read")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert "Unknown scope 'send,emails:read'" in first
    assert second == ("tfm-guard: give each scope by itself: --scope send --scope emails:read")


def test_an_account_is_named_as_it_was_typed(sqlite_url: str) -> None:
    """Where the account is an argument, it is told by the argument's name."""
    result = run(sqlite_url, "accounts", "set-plan", " ", "pro")
    assert result.exit_code == 1
    assert result.stderr.startswith("tfm-guard: ACCOUNT: At least 1 character")


def test_an_unknown_plan_is_told_with_the_known_ones(sqlite_url: str) -> None:
    """A misspelt plan ends with 1 and the list of plans."""
    result = run(sqlite_url, "accounts", "set-plan", "acme", "por")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "tfm-guard: PLAN: Unknown plan 'por'. Known: free, starter, pro, business\n"
    )


def test_a_port_in_use_is_told() -> None:
    """The demo on a port that somebody else has ends with 1 and asks for another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(None, "demo", "--once", "--port", str(port))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"tfm-guard: port {port} cannot be used: Address already in use; choose another: --port N\n"
    )
