"""`tfm-guard keys import`: what it takes, what it tells, and that it can be run again."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.servers import free_port, wait_until
from tests.support.sql import execute
from tfm_guard.cli import main

PROGRAM = Path(sys.executable).with_name("tfm-guard")
HEADER = "prefix,account,name,scopes,hash"
TOKEN = "tfm_k_00112233445566778899aabbccddeeff"
SECRET = TOKEN[14:]
PLANS = {"TFM_GUARD_PLANS": '{"free": 100000}'}
CHEAP = {"TFM_GUARD_ARGON2_MEMORY_KIB": "8", "TFM_GUARD_ARGON2_TIME_COST": "1"}


def token_number(number: int) -> str:
    """Return a token of an older form, with a prefix of its own."""
    return f"tfm_k_{number:08x}{hashlib.sha256(str(number).encode()).hexdigest()[:24]}"


def csv_line(number: int, account: str = "acme") -> str:
    """Return the line of that token's key."""
    token = token_number(number)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f"{token[6:14]},{account},Key {number},send emails:read,{digest}"


def write(path: Path, lines: Iterable[str]) -> str:
    """Write *lines* to the file and return its name."""
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return str(path)


def run(url: str, *arguments: str, **variables: str) -> Result:
    """Import in this process, into the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url, **PLANS, **CHEAP, **variables}
    result = CliRunner().invoke(main, ["keys", "import", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def program(url: str, *arguments: str, stdin: Any) -> "subprocess.Popen[str]":
    """Start the installed program, in which every warning is an error."""
    return subprocess.Popen(
        [PROGRAM, "keys", "import", *arguments],
        env={"TFM_GUARD_DATABASE_URL": url, "PYTHONWARNINGS": "error", **PLANS, **CHEAP},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def count(url: str) -> int:
    """Return how many keys there are."""
    return int(execute(url, "SELECT count(*) FROM tfm_keys")[0][0])


def verified(url: str, token: str) -> dict[str, Any]:
    """Return what `keys verify` says of *token*."""
    env = {"TFM_GUARD_DATABASE_URL": url, "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS": "true"}
    result = CliRunner().invoke(main, ["keys", "verify", "--json"], input=token, env=env)
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_a_csv_file_is_imported(database_url: str, tmp_path: Path) -> None:
    """Each line becomes a key that its token proves; stderr tells how many, stdout nothing."""
    lines = [HEADER, *map(csv_line, range(250))]
    result = run(database_url, write(tmp_path / "keys.csv", lines))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.endswith("\n250 imported, 0 there already, 0 refused.\n")
    told = verified(database_url, token_number(249))
    assert told["valid"] is True
    assert told["key"]["name"] == "Key 249"
    assert told["key"]["scopes"] == ["emails:read", "send"]


def test_json_lines_are_imported(sqlite_url: str, tmp_path: Path) -> None:
    """An object a line, with scopes as a list, needs no header."""
    key = {
        "prefix": "00112233",
        "account": "acme",
        "name": "CI",
        "scopes": ["send"],
        "hash": hashlib.sha512(TOKEN.encode()).hexdigest(),
        "created_at": "2020-01-31T12:00:00Z",
        "expires_at": None,
    }
    result = run(sqlite_url, write(tmp_path / "keys.jsonl", ["", json.dumps(key), ""]))
    assert result.exit_code == 0
    assert verified(sqlite_url, TOKEN)["valid"] is True
    assert execute(sqlite_url, "SELECT created_at FROM tfm_keys") == [
        ("2020-01-31T12:00:00.000000Z",)
    ]


def test_what_was_refused_is_told_by_its_line(sqlite_url: str, tmp_path: Path) -> None:
    """Bad lines have their number, column and reason on stdout, the code is 1, the rest is in."""
    good = csv_line(1)
    lines = [
        HEADER + ",expires_at",
        good + ",",
        good.replace("send", "sned") + ",",
        good.replace("acme", "other") + ",",
        good.replace("Key 1", "") + ",",
        csv_line(2)[:-1] + ",",
        csv_line(3) + ",2020-01-01T00:00Z",
        csv_line(4) + ",tomorrow",
        csv_line(5),
        f'"{csv_line(6)}',
        "",
        csv_line(7) + ",\udcff",
        "x" * 70_000,
        csv_line(8) + ",2100-01-01T00:00+03:00",
    ]
    path = tmp_path / "keys.csv"
    path.write_bytes("\r\n".join(lines).encode(errors="surrogateescape"))
    result = run(sqlite_url, str(path))
    assert result.exit_code == 1
    told = [line.partition("; ")[0] for line in result.stdout.splitlines()]
    assert [re.sub(r" (Known:|\(\$argon2).*", "", line) for line in told] == [
        "line 3: scopes number 1: Unknown scope 'sned'.",
        "line 4: prefix: Another key has this prefix, and a prefix belongs to one key for good",
        "line 5: name: At least 1 character is needed",
        "line 6: hash: Expected an argon2 PHC string",
        "line 7: expires_at: The time must be in the future",
        "line 8: expires_at: Expected a time with its zone, like 2030-01-31T12:00Z",
        "line 9: Expected 6 cells as in the header, got 5",
        "line 10: This is no line of CSV",
        "line 12: Expected UTF-8, and at most 65536 bytes",
        "line 13: Expected UTF-8, and at most 65536 bytes",
    ]
    assert result.stderr.splitlines()[-2:] == [
        "2 imported, 0 there already, 10 refused.",
        "tfm-guard: 10 lines were refused; stdout says which and why",
    ]
    assert count(sqlite_url) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1]", "This is no JSON object"),
        ("{", "This is no JSON object"),
        ("[" * 60_000, "This is no JSON object"),
        ('{"account": "acme", "name": "CI"}', "scopes: It is missing"),
        ('{"account": "acme", "name": "CI", "scopes": "send"}', "scopes: Expected a list of texts"),
        ('{"account": 7, "name": "CI", "scopes": []}', "account: Expected a text"),
        ('{"account": null, "name": "CI", "scopes": []}', "account: Expected a text"),
        ('{"colour": "red"}', "'colour' is no column"),
        (f'{{"{TOKEN}": "red"}}', "number 1 is no column"),
        ('{"account": "a", "name": "CI", "scopes": [], "token": "x"}', "token: A token is taken"),
    ],
)
def test_json_that_is_no_key_is_refused(
    sqlite_url: str, tmp_path: Path, line: str, expected: str
) -> None:
    """A line that is no object with the columns' names and kinds is refused, and quotes nothing."""
    result = run(sqlite_url, write(tmp_path / "keys.jsonl", ["{}", line]))
    assert result.stdout.splitlines()[1].startswith(f"line 2: {expected}")
    assert SECRET not in result.output


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER + ",colour", "line 1: 'colour' is no column"),
        (f"{HEADER},{TOKEN}", "line 1: number 6 is no column"),
        ("prefix,account,scopes,hash", "line 1: the column name is missing"),
        (HEADER + ",hash", "line 1: a column is there twice"),
        (HEADER + ",token", "line 1: the column token is taken only with --with-tokens"),
        (csv_line(1), "line 1: number 1 is no column"),
        ('"', "line 1: the column account is missing"),
    ],
)
def test_a_header_that_cannot_be_used_ends_it(
    sqlite_url: str, tmp_path: Path, header: str, expected: str
) -> None:
    """With a column that is unknown, missing or twice, nothing is imported, and nothing quoted."""
    result = run(sqlite_url, write(tmp_path / "keys.csv", [header, csv_line(1)]))
    assert result.exit_code == 1
    assert f"tfm-guard: {expected}" in result.stderr
    assert SECRET not in result.output
    assert count(sqlite_url) == 0


def test_tokens_are_taken_when_said_so(database_url: str, tmp_path: Path) -> None:
    """With --with-tokens keys come by their tokens, which are neither printed nor kept."""
    lines = [
        "account,name,scopes,token",
        f"acme,CI,send,{TOKEN}",
        f"acme,CI,send,{TOKEN}0",
        f"acme,{TOKEN},send,{token_number(1)}",
        f"{TOKEN},CI,send,{token_number(1)}",
        f"acme,CI,{TOKEN},{token_number(1)}",
    ]
    path = write(tmp_path / "keys.csv", lines)
    result = run(database_url, path, "--with-tokens")
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "1 imported, 0 there already, 4 refused.\n"
        "tfm-guard: 4 lines were refused; stdout says which and why\n"
    )
    assert verified(database_url, TOKEN)["valid"] is True
    assert SECRET not in result.output
    for table in ("tfm_keys", "tfm_audit", "tfm_accounts"):
        assert SECRET not in repr(execute(database_url, f"SELECT * FROM {table}"))  # noqa: S608


def test_tokens_come_from_a_protected_file_alone(sqlite_url: str, tmp_path: Path) -> None:
    """A file with tokens that others may read is refused, with the command that protects it."""
    path = write(tmp_path / "keys.csv", ["account,name,scopes,token", f"acme,CI,send,{TOKEN}"])
    Path(path).chmod(0o640)
    result = run(sqlite_url, path, "--with-tokens")
    assert result.exit_code == 1
    assert "chmod 600" in result.stderr
    assert not list(tmp_path.glob("*.db"))
    with open(path) as keys:  # noqa: PTH123  # as a shell does
        process = program(sqlite_url, "-", "--with-tokens", stdin=keys)
    assert "chmod 600" in process.communicate()[1]
    assert process.returncode == 1


def test_a_dry_run_says_what_would_be(sqlite_url: str, tmp_path: Path) -> None:
    """With --dry-run the report is that of the import, and no key is there afterwards."""
    lines = [HEADER, csv_line(1), csv_line(1, "other"), csv_line(2), csv_line(1)]
    path = write(tmp_path / "keys.csv", lines)
    dry = run(sqlite_url, path, "--dry-run")
    assert count(sqlite_url) == 0
    done = run(sqlite_url, path)
    assert dry.stdout == done.stdout != ""
    assert "2 to be imported, 1 there already, 1 refused." in dry.stderr
    assert "2 imported, 1 there already, 1 refused." in done.stderr
    assert (dry.exit_code, done.exit_code) == (1, 1)


def test_the_report_as_json(sqlite_url: str, tmp_path: Path) -> None:
    """With --json each refusal is an object on a line of its own, and so are the numbers, last."""
    lines = [HEADER, csv_line(1), csv_line(2)[1:]]
    result = run(sqlite_url, write(tmp_path / "keys.csv", lines), "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            "line": 3,
            "field": "prefix",
            "message": "Expected 8 lowercase hexadecimal digits",
        },
        {"dry_run": False, "imported": 1, "present": 0, "refused": 1},
    ]


def test_the_plan_is_kept_unless_said_otherwise(sqlite_url: str, tmp_path: Path) -> None:
    """What is more than the plan allows is refused; --beyond-plan brings the rest."""
    path = write(tmp_path / "keys.csv", [HEADER, *map(csv_line, range(3))])
    plans = {"TFM_GUARD_PLANS": '{"free": 2}'}
    first = run(sqlite_url, path, **plans)
    assert first.stdout.startswith("line 4: The plan 'free' allows 2 active API keys; ")
    second = run(sqlite_url, path, "--beyond-plan", **plans)
    assert (second.exit_code, count(sqlite_url)) == (0, 3)
    assert "1 imported, 2 there already, 0 refused." in second.stderr


def test_old_forms_are_warned_of(sqlite_url: str, tmp_path: Path) -> None:
    """Where keys without a tag will not verify, that is said, with the variable; else it is not."""
    path = write(tmp_path / "keys.csv", [HEADER, csv_line(1)])
    assert "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS is not true" in run(sqlite_url, path).stderr
    accepting = run(sqlite_url, path, TFM_GUARD_ACCEPT_UNTAGGED_TOKENS="true")
    assert accepting.stderr == "0 imported, 1 there already, 0 refused.\n"


def test_an_import_that_was_killed_is_taken_up_again(database_url: str, tmp_path: Path) -> None:
    """After SIGKILL in the middle the same file brings what is missing, and each key once."""
    lines = [HEADER, *map(csv_line, range(1000))]
    path = write(tmp_path / "keys.csv", lines)
    run(database_url, write(tmp_path / "none.csv", [HEADER]))  # makes the tables
    process = program(database_url, path, stdin=subprocess.DEVNULL)
    wait_until(lambda: count(database_url) > 0, what="the first batch")
    process.kill()
    process.communicate()
    came = count(database_url)
    assert came % 100 == 0
    assert 0 < came < 1000
    result = run(database_url, path)
    assert f"{1000 - came} imported, {came} there already, 0 refused." in result.stderr
    assert execute(database_url, "SELECT count(*), max(id) FROM tfm_changes") == [(1000, 1000)]


def test_a_pipe_that_stalls_does_not_stall_the_process(sqlite_url: str) -> None:
    """While nothing comes on stdin the process goes on reading the feed; Ctrl-C ends it."""
    process = program(sqlite_url, "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(f"{HEADER}\n{csv_line(1)}\n")
    process.stdin.flush()
    seen = "SELECT count(*) FROM tfm_workers WHERE seen = 7"

    def advanced() -> bool:
        return bool(execute(sqlite_url, seen)[0][0])

    wait_until(lambda: Path(sqlite_url[10:]).exists(), what="the file")
    wait_until(lambda: _has_worker(sqlite_url), what="its place in the register")
    execute(sqlite_url, "UPDATE tfm_feed SET head = 7")
    execute(
        sqlite_url,
        "INSERT INTO tfm_changes SELECT value, 'created', '00000000', 1, "
        "'2026-01-01T00:00:00.000000Z' FROM json_each('[1,2,3,4,5,6,7]')",
    )
    wait_until(advanced, what="what it has seen")
    process.send_signal(2)
    assert process.wait() == 130
    process.communicate()


def _has_worker(url: str) -> bool:
    try:
        return execute(url, "SELECT count(*) FROM tfm_workers") == [(1,)]
    except Exception:  # noqa: BLE001  # no tables yet
        return False


def test_a_file_that_cannot_be_read_is_told(sqlite_url: str) -> None:
    """A file that is not there ends with 1 and its name; a folder likewise."""
    result = run(sqlite_url, "/nowhere.csv")
    assert (result.exit_code, result.stderr) == (
        1,
        "tfm-guard: /nowhere.csv: No such file or directory\n",
    )
    assert run(sqlite_url, "/").exit_code == 1


def test_a_database_that_goes_away_is_told(tmp_path: Path) -> None:
    """Where the database does not answer the code is 3, and what was done so far is told."""
    url = f"postgresql://acme:hunter2@127.0.0.1:{free_port()}/keys"
    result = run(url, write(tmp_path / "keys.csv", [HEADER, csv_line(1)]))
    assert result.exit_code == 3
    assert "0 imported, 0 there already, 0 refused." in result.stderr


def test_progress_is_shown_at_a_terminal(sqlite_url: str, tmp_path: Path) -> None:
    """On stderr there is a progress bar where it is a terminal, and none elsewhere."""
    path = write(tmp_path / "keys.csv", [HEADER, *map(csv_line, range(150))])
    ours, terminal = os.openpty()
    process = subprocess.Popen(
        [PROGRAM, "keys", "import", path],
        env={"TFM_GUARD_DATABASE_URL": sqlite_url, **PLANS, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    process.communicate()
    os.close(terminal)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "Importing" in shown
    assert "100%" in shown
    assert "150 imported" in shown
    assert "Importing" not in run(sqlite_url, path).stderr
