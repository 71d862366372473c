"""`tfm-guard accounts`."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.sql import execute
from tfm_guard.cli import main

CHEAP = {"TFM_GUARD_ARGON2_MEMORY_KIB": "8", "TFM_GUARD_ARGON2_TIME_COST": "1"}


def run(url: str, *arguments: str, stdin: str = "") -> Result:
    """Run the command in this process, on the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url, **CHEAP}
    result = CliRunner().invoke(main, arguments, env=env, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def create(url: str, account: str) -> str:
    """Create a key and return its token."""
    return run(url, "keys", "create", "--account", account, "--name", "CI").stdout.strip()


def reason(url: str, token: str) -> Any:
    """Return why *token* is refused, if it is."""
    return json.loads(run(url, "keys", "verify", "--json", stdin=token).stdout)["reason"]


def test_accounts_are_listed(database_url: str) -> None:
    """A table, or JSON, has every account by its id, with its plan and its active keys."""
    none = run(database_url, "accounts", "list")
    assert (none.stdout, none.stderr) == ("", "There are no accounts.\n")
    create(database_url, "beta")
    run(database_url, "accounts", "set-plan", "acme", "pro")
    columns, *rows = run(database_url, "accounts", "list").stdout.splitlines()
    assert columns.split() == ["account", "plan", "active", "keys", "suspended", "(UTC)"]
    assert [row.split() for row in rows] == [["acme", "pro", "0", "–"], ["beta", "free", "1", "–"]]
    assert json.loads(run(database_url, "accounts", "list", "--json").stdout) == [
        {"id": "acme", "plan": "pro", "suspended_at": None, "active_keys": 0},
        {"id": "beta", "plan": "free", "suspended_at": None, "active_keys": 1},
    ]


def test_a_suspended_account_is_resumed(database_url: str) -> None:
    """Between `suspend` and `resume` its keys are refused, and those of others are not."""
    token, other = create(database_url, "acme"), create(database_url, "beta")
    suspended = run(database_url, "accounts", "suspend", "acme")
    assert (suspended.exit_code, suspended.stdout) == (0, "")
    assert "is suspended: its keys are refused everywhere" in suspended.stderr
    assert reason(database_url, token) == "account suspended"
    assert reason(database_url, other) is None
    assert run(database_url, "accounts", "resume", "acme").exit_code == 0
    assert reason(database_url, token) is None
    actors = "SELECT actor, action FROM tfm_audit WHERE action LIKE 'account.%' ORDER BY id"
    assert execute(database_url, actors) == [
        ("command_line", "account.suspended"),
        ("command_line", "account.resumed"),
    ]


def test_an_account_is_erased_when_it_is_named_twice(database_url: str) -> None:
    """`erase` asks for the id again; then keys and audit log are gone, the prefix stays taken."""
    token = create(database_url, "acme")
    for typed in ("acmo\n", ""):
        result = run(database_url, "accounts", "erase", "acme", stdin=typed)
        assert result.exit_code == 1
        assert "nothing was erased" in result.stderr
    assert reason(database_url, token) is None
    assert run(database_url, "accounts", "erase", "acme", stdin="acme\n").exit_code == 0
    assert reason(database_url, token) == "wrong secret"
    assert execute(database_url, "SELECT count(*) FROM tfm_audit") == [(0,)]
    assert execute(database_url, "SELECT prefix FROM tfm_keys") == [(token[6:14],)]
    assert run(database_url, "accounts", "list").stdout == ""
    assert run(database_url, "db", "check").exit_code == 0


def test_an_account_is_erased_without_asking(sqlite_url: str) -> None:
    """With --yes a script can erase an account."""
    create(sqlite_url, "acme")
    result = run(sqlite_url, "accounts", "erase", "acme", "--yes")
    assert (result.exit_code, result.stderr) == (0, 'Account "acme" is erased.\n')


@pytest.mark.parametrize("command", ["suspend", "resume", "erase"])
def test_an_account_that_is_not_there_is_told(sqlite_url: str, command: str) -> None:
    """Nobody is suspended, resumed or erased by a mistyped id."""
    result = run(sqlite_url, "accounts", command, "nobody", stdin="nobody\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "There is no account 'nobody'." in result.stderr
