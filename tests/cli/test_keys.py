"""`tfm-guard keys list`, `show`, `verify` and `revoke`."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.sql import execute
from tfm_guard.cli import main
from tfm_guard.store import schema

PROGRAM = Path(sys.executable).with_name("tfm-guard")
CHEAP = {"TFM_GUARD_ARGON2_MEMORY_KIB": "8", "TFM_GUARD_ARGON2_TIME_COST": "1"}
UNTAGGED = "tfm_k_00112233445566778899aabbccddeeff"
NOT_FOUND = (
    "tfm-guard: There is no such API key.\n"
    "tfm-guard: KEY is the 8 digits after tfm_k_, or the id, of an active key of that account\n"
)
FORGED = "tfm_k_00112233445566778899aabbccddeeff0011223344556677"


def run(url: str, *arguments: str, stdin: str = "", **variables: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url, **CHEAP, **variables}
    result = CliRunner().invoke(main, arguments, env=env, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def create(url: str, account: str = "acme", name: str = "CI") -> str:
    """Create a key and return its token."""
    result = run(url, "keys", "create", "--account", account, "--name", name)
    assert result.exit_code == 0
    return result.stdout.strip()


def prefix(token: str) -> str:
    """Return the public part of *token*."""
    return token[6:14]


def verify(url: str, token: str, **variables: str) -> tuple[int, Any]:
    """Return with which code `keys verify` ends, and what it prints."""
    result = run(url, "keys", "verify", "--json", stdin=token + "\n", **variables)
    assert token[14:] not in result.output
    return result.exit_code, json.loads(result.stdout)


def test_active_keys_are_listed(database_url: str) -> None:
    """A table has the active keys of one account, newest first; an empty list is words."""
    first, second = create(database_url, name="First"), create(database_url, name="Second")
    create(database_url, account="other")
    result = run(database_url, "keys", "list", "--account", "acme")
    assert (result.exit_code, result.stderr) == (0, "")
    columns, *rows = result.stdout.splitlines()
    assert columns.split() == [
        *("prefix", "name", "scopes", "created", "(UTC)", "last", "used", "expires", "status"),
    ]
    assert [row.split()[:3] for row in rows] == [
        [prefix(second), "Second", "send"],
        [prefix(first), "First", "send"],
    ]
    assert [row.split()[-1] for row in rows] == ["never_used", "never_used"]
    none = run(database_url, "keys", "list", "--account", "nobody")
    assert (none.stdout, none.stderr) == ("", 'Account "nobody" has no active key.\n')


def test_lists_are_json_for_programs(sqlite_url: str) -> None:
    """With --json the list has each field of a key, times in RFC 3339."""
    token = create(sqlite_url)
    (key,) = json.loads(run(sqlite_url, "keys", "list", "--account", "acme", "--json").stdout)
    assert key["key_prefix"] == prefix(token)
    assert key["scopes"] == ["send"]
    assert key["created_at"].endswith("Z")
    assert (key["last_used_at"], key["expires_at"], key["replaced_by"]) == (None, None, None)
    assert key["status"] == "never_used"
    assert json.loads(run(sqlite_url, "keys", "list", "--account", "x", "--json").stdout) == []


def test_a_key_is_shown_by_prefix_or_id(sqlite_url: str) -> None:
    """Both lead to the same key, and only together with its account."""
    token = create(sqlite_url)
    show = ("keys", "show", "--account", "acme", "--json")
    by_prefix = json.loads(run(sqlite_url, *show, prefix(token)).stdout)
    assert json.loads(run(sqlite_url, *show, by_prefix["id"]).stdout) == by_prefix
    words = run(sqlite_url, "keys", "show", "--account", "acme", prefix(token)).stdout
    assert f"key_prefix    {prefix(token)}\n" in words
    assert "scopes        send\n" in words
    assert "status        never_used\n" in words
    assert by_prefix["status"] == "never_used"
    for key in (prefix(token), by_prefix["id"]):
        foreign = run(sqlite_url, "keys", "show", "--account", "other", key)
        assert (foreign.exit_code, foreign.stdout) == (1, "")
        assert foreign.stderr == NOT_FOUND
    for command in ("rotate", "revoke"):
        none = run(sqlite_url, "keys", command, "--account", "other", prefix(token))
        assert (none.exit_code, none.stderr) == (1, NOT_FOUND)


def test_a_token_is_told_by_its_key(database_url: str) -> None:
    """`keys verify` names the key that a token proves, and ends with 0."""
    token = create(database_url)
    code, told = verify(database_url, token)
    assert (code, told["valid"], told["reason"]) == (0, True, None)
    key = told["key"]
    assert (key["key_prefix"], key["account_id"], key["name"]) == (prefix(token), "acme", "CI")
    words = run(database_url, "keys", "verify", stdin=token)
    assert words.exit_code == 0
    assert "account_id    acme\n" in words.stdout


def test_the_reason_of_a_refusal_is_told(database_url: str) -> None:
    """`keys verify` ends with 1 and the reason, which clients never see; the key, if it is one."""
    token = create(database_url)
    wrong = token[:14] + token[14:46][::-1] + token[46:]
    assert verify(database_url, wrong)[1]["reason"] == "tag does not match"
    assert verify(database_url, FORGED)[1] == {
        "valid": False,
        "reason": "tag does not match",
        "key": None,
    }
    assert verify(database_url, "hunter2hunter2hunter2")[1]["reason"] == "not of the form of a key"
    execute(database_url, "UPDATE tfm_keys SET expires_at = created_at")
    assert verify(database_url, token)[1]["reason"] == "expired"
    execute(database_url, "UPDATE tfm_keys SET expires_at = NULL")
    execute(
        database_url, "UPDATE tfm_accounts SET suspended_at = (SELECT created_at FROM tfm_keys)"
    )
    assert verify(database_url, token)[1]["reason"] == "account suspended"
    assert run(database_url, "keys", "revoke", "--account", "acme", prefix(token)).exit_code == 0
    code, told = verify(database_url, token)
    assert (code, told["reason"], told["key"]["name"]) == (1, "revoked", "CI")
    assert run(database_url, "keys", "verify", stdin=token).stderr == (
        "tfm-guard: the key is refused: revoked\n"
    )


def test_old_forms_are_told(sqlite_url: str, tmp_path: Path) -> None:
    """A token without a tag is refused with its key and the setting that would accept it."""
    digest = hashlib.sha256(UNTAGGED.encode()).hexdigest()
    file = tmp_path / "keys.csv"
    file.write_text(f"prefix,account,name,scopes,hash\n00112233,acme,Old,send,{digest}\n")
    assert run(sqlite_url, "keys", "import", str(file)).exit_code == 0
    code, told = verify(sqlite_url, UNTAGGED)
    assert (code, told["key"]["name"]) == (1, "Old")
    assert "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS is not true here" in told["reason"]
    assert "TFM_GUARD" not in verify(sqlite_url, UNTAGGED[:-1] + "e")[1]["reason"]
    accepting = {"TFM_GUARD_ACCEPT_UNTAGGED_TOKENS": "true"}
    assert verify(sqlite_url, UNTAGGED, **accepting)[0] == 0
    wrong = UNTAGGED[:-1] + "e"
    assert verify(sqlite_url, wrong, **accepting)[1]["reason"] == "wrong secret"
    unknown = "tfm_k_ffffffff445566778899aabbccddeeff"
    assert verify(sqlite_url, unknown, **accepting)[1]["reason"] == "unknown prefix"


def test_revoking_says_how_it_was_made_sure(database_url: str) -> None:
    """A revoked key is refused; the words, or the JSON, say after how long and how."""
    first, second = create(database_url), create(database_url)
    done = run(database_url, "keys", "revoke", "--account", "acme", prefix(first))
    assert (done.exit_code, done.stdout) == (0, "")
    assert re.fullmatch(
        r"Revoked\. Refused everywhere after \d+ ms: "
        r"the only process has acknowledged it\.\n",
        done.stderr,
    )
    told = run(database_url, "keys", "revoke", "--account", "acme", prefix(second), "--json")
    assert json.loads(told.stdout).keys() == {"how", "workers", "seconds"}
    assert json.loads(told.stdout)["how"] == "acknowledged"
    again = run(database_url, "keys", "revoke", "--account", "acme", prefix(second))
    assert (again.exit_code, again.stderr) == (1, NOT_FOUND)
    actors = execute(database_url, "SELECT actor FROM tfm_audit WHERE action = 'api_key.revoked'")
    assert actors == [("command_line",)] * 2


def test_leaked_tokens_are_revoked_whosoever_they_are(database_url: str, tmp_path: Path) -> None:
    """--leaked finds the key of each token, an imported one and a suspended account's too."""
    mine, other, dead = create(database_url), create(database_url, "other"), create(database_url)
    digest = hashlib.sha256(UNTAGGED.encode()).hexdigest()
    file = tmp_path / "keys.csv"
    file.write_text(f"prefix,account,name,scopes,hash\n00112233,third,Old,send,{digest}\n")
    assert run(database_url, "keys", "import", str(file)).exit_code == 0
    run(database_url, "keys", "revoke", "--account", "acme", prefix(dead))
    suspend = "UPDATE tfm_accounts SET suspended_at = (SELECT max(created_at) FROM tfm_keys)"
    execute(database_url, suspend + " WHERE id = 'other'")
    tokens = [mine, other, "", dead, UNTAGGED, FORGED, "hunter2"]
    result = run(database_url, "keys", "revoke", "--leaked", "--json", stdin="\r\n".join(tokens))
    assert result.exit_code == 1
    assert result.stderr == "tfm-guard: 2 of 6 tokens prove no key\n"
    told = [
        (leak["line"], leak["outcome"], leak["key_prefix"], leak["account_id"])
        for leak in json.loads(result.stdout)
    ]
    assert told == [
        (1, "revoked", prefix(mine), "acme"),
        (2, "revoked", prefix(other), "other"),
        (4, "revoked before", prefix(dead), "acme"),
        (5, "revoked", "00112233", "third"),
        (6, "unknown", None, None),
        (7, "unknown", None, None),
    ]
    assert not any(token[14:] in result.output for token in tokens if len(token) > 14)
    assert "hunter2" not in result.output
    live = "SELECT count(*) FROM tfm_keys WHERE revoked_at IS NULL OR confirmed_at IS NULL"
    assert execute(database_url, live) == [(0,)]


def test_leaked_tokens_are_found_within_lines(sqlite_url: str) -> None:
    """Of a line with other text each token is taken once; a prefix with its mark is none."""
    first, second = create(sqlite_url), create(sqlite_url)
    lines = [f'app.py:12: KEY = "{first}"  # {first}, {second}', f"log: tfm_k_{prefix(first)}…"]
    result = run(sqlite_url, "keys", "revoke", "--leaked", "--json", stdin="\n".join(lines))
    told = [
        (leak["line"], leak["outcome"], leak["key_prefix"]) for leak in json.loads(result.stdout)
    ]
    assert told == [
        (1, "revoked", prefix(first)),
        (1, "revoked", prefix(second)),
        (2, "unknown", None),
    ]
    assert "app.py" not in result.output


def test_leaked_tokens_are_told_in_a_table(sqlite_url: str) -> None:
    """Without --json the same is a table; the code is 0 if every token was of a key."""
    token = create(sqlite_url)
    result = run(sqlite_url, "keys", "revoke", "--leaked", stdin=f"{token}\n{token}\n")
    assert result.exit_code == 0
    columns, *rows = result.stdout.splitlines()
    assert columns.split() == ["line", "prefix", "outcome", "account", "name", "reason"]
    assert [row.split()[:2] for row in rows] == [["1", prefix(token)], ["2", prefix(token)]]
    nothing = run(sqlite_url, "keys", "revoke", "--leaked")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert nothing.stderr == "No token came on stdin; nothing was revoked.\n"


def test_revoking_tells_of_a_process_that_did_not_answer(sqlite_url: str) -> None:
    """Where a lease had to end the words say so, in place of that all have acknowledged it."""
    token = create(sqlite_url)
    execute(
        sqlite_url,
        "INSERT INTO tfm_workers (id, name, seen, turn, registered_at) "
        "SELECT id, 'silent', 0, 0, created_at FROM tfm_keys LIMIT 1",
    )
    done = run(sqlite_url, "keys", "revoke", "--account", "acme", prefix(token))
    assert done.exit_code == 0
    assert re.fullmatch(
        r"Revoked\. Refused everywhere after \d+\.\d s: not every process answered, "
        r"and none can trust what it remembers any more\.\n",
        done.stderr,
    )


def test_what_is_not_known_to_be_refused_ends_with_3(sqlite_url: str) -> None:
    """Where a process does not answer in time, the key is revoked, and the code asks to go on."""
    mine, other = create(sqlite_url), create(sqlite_url)
    # A process that has seen nothing, in a database whose leases are long.
    execute(sqlite_url, "UPDATE tfm_settings SET value = '600' WHERE name = 'lease_seconds'")
    execute(
        sqlite_url,
        "INSERT INTO tfm_workers (id, name, seen, turn, registered_at) "
        "SELECT id, 'silent', 0, 0, created_at FROM tfm_keys LIMIT 1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfm_guard.confirmation.CONFIRM_SECONDS", 0.1)
        one = run(sqlite_url, "keys", "revoke", "--account", "acme", prefix(mine))
        leaked = run(sqlite_url, "keys", "revoke", "--leaked", stdin=f"{other}\n{FORGED}\n")
    assert one.exit_code == 3
    assert "The change is made" in one.stderr
    assert leaked.exit_code == 3
    assert leaked.stderr == ("tfm-guard: 1 of 2 keys are not known to be refused; run it again\n")
    assert "revoked, unconfirmed" in leaked.stdout
    execute(sqlite_url, "DELETE FROM tfm_workers")
    assert run(sqlite_url, "keys", "revoke", "--account", "acme", prefix(mine)).exit_code == 0


def test_a_new_key_is_json_for_programs(sqlite_url: str) -> None:
    """With --json `keys create` prints the key together with its token."""
    arguments = ("--account", "acme", "--name", "CI", "--json")
    told = json.loads(run(sqlite_url, "keys", "create", *arguments).stdout)
    assert told["key_prefix"] == prefix(told["token"])
    assert verify(sqlite_url, told["token"])[1]["key"]["id"] == told["id"]


def test_a_key_is_rotated(database_url: str) -> None:
    """`keys rotate` prints the token of the successor alone; both work until the grace ends."""
    old = create(database_url)
    rotate = ("keys", "rotate", "--account", "acme")
    done = run(database_url, *rotate, prefix(old), "--grace", "2h")
    assert done.exit_code == 0
    new = done.stdout.removesuffix("\n")
    (row,) = (row for row in execute(database_url, schema.keys.select()) if row.replaced_by)
    end = f"{row.expires_at:%Y-%m-%d %H:%M} UTC"
    assert done.stderr == (
        f'The key "CI" ({prefix(new)}) of account "acme" takes the place of {prefix(old)}, '
        f"which works on until {end}.\nKeep its token now: it is not shown again.\n"
    )
    assert [verify(database_url, token)[0] for token in (old, new)] == [0, 0]
    (successor, replaced) = json.loads(
        run(database_url, "keys", "list", "--account", "acme", "--json").stdout
    )
    assert replaced["replaced_by"] == successor["id"]
    again = run(database_url, *rotate, prefix(old))
    assert (again.exit_code, again.stdout) == (1, "")
    assert run(database_url, "db", "check").exit_code == 0


def test_without_a_grace_the_old_key_ends_at_once(sqlite_url: str) -> None:
    """It is said so, and so it is."""
    old = create(sqlite_url)
    rotate = ("keys", "rotate", "--account", "acme", prefix(old), "--grace", "0m")
    done = run(sqlite_url, *rotate)
    assert f"takes the place of {prefix(old)}, which ends at once.\n" in done.stderr
    assert verify(sqlite_url, old)[0] == 1


def test_a_rotated_key_is_json_for_programs(sqlite_url: str) -> None:
    """With --json the successor comes with its token, its predecessor, and what is sure."""
    old = create(sqlite_url)
    rotate = ("keys", "rotate", "--account", "acme", prefix(old), "--grace", "0m", "--json")
    told = json.loads(run(sqlite_url, *rotate).stdout)
    assert told["confirmed"] is True
    assert verify(sqlite_url, told["token"])[0] == 0
    key = verify(sqlite_url, old)[1]
    assert (key["reason"], key["key"]["id"]) == ("expired", told["replaces"])


@pytest.mark.parametrize(("grace", "code"), [("8d", 1), ("1w", 2), ("-1h", 2), ("soon", 2)])
def test_a_grace_that_cannot_be_is_told(sqlite_url: str, grace: str, code: int) -> None:
    """A grace is 0 to 7 days; a longer one is refused by the option's name."""
    old = create(sqlite_url)
    result = run(sqlite_url, "keys", "rotate", "--account", "acme", prefix(old), f"--grace={grace}")
    assert (result.exit_code, result.stdout) == (code, "")
    assert "--grace" in result.stderr


def test_a_successor_whose_token_is_lost_is_revoked(sqlite_url: str) -> None:
    """Where stdout takes no token the new key is revoked again, and the code is 1."""
    old = create(sqlite_url)
    with open("/dev/full", "w") as full:  # noqa: PTH123  # as a shell does
        done = subprocess.run(
            [PROGRAM, "keys", "rotate", "--account", "acme", prefix(old)],
            env={"TFM_GUARD_DATABASE_URL": sqlite_url, **CHEAP},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.endswith(" was revoked again\n")
    (left,) = json.loads(run(sqlite_url, "keys", "list", "--account", "acme", "--json").stdout)
    assert left["key_prefix"] == prefix(old)


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "revoke"),
        ("keys", "revoke", "00112233"),
        ("keys", "revoke", "--account", "acme"),
        ("keys", "revoke", "--leaked", "00112233"),
        ("keys", "revoke", "--leaked", "--account", "acme"),
        ("keys", "verify", "00112233"),
    ],
)
def test_what_cannot_be_meant_ends_with_2(sqlite_url: str, arguments: tuple[str, ...]) -> None:
    """A key without its account, or both ways of naming keys at once, is a mistake."""
    assert run(sqlite_url, *arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "verify", FORGED),
        ("keys", "revoke", "--account", "acme", FORGED),
        ("keys", "show", f"--account={FORGED}"),
        ("keys", "create", "--account", "acme", "--name", f"my {UNTAGGED.upper()[6:]} {UNTAGGED}"),
        (UNTAGGED,),
        ("prove", f"http://127.0.0.1/{FORGED}"),
        ("keys", "verify", FORGED.upper()),
        ("keys", "show", "--account", "acme", UNTAGGED[6:]),
        ("keys", "show", f"--account={UNTAGGED[6:]}"),
        ("keys", "create", "--account", "acme", "--name", FORGED[6:46]),
        ("keys", "revoke", "--account", "acme", FORGED[6:]),
    ],
)
def test_a_token_among_the_arguments_is_refused(
    sqlite_url: str, arguments: tuple[str, ...]
) -> None:
    """A token in argv ends every command with 2 and what to do about it, and is not repeated."""
    result = run(sqlite_url, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rotate or revoke it" in result.stderr
    assert UNTAGGED[14:] not in result.stderr.lower()
    assert not Path(sqlite_url.removeprefix("sqlite:///")).exists()


@pytest.mark.parametrize(
    "account",
    ["00112233", "6f1c3c1e-3c0f-4a52-9a55-0d9f6c1b2a77", "6f1c3c1e3c0f4a529a550d9f6c1b2a77"],
)
def test_an_id_is_not_taken_for_a_token(sqlite_url: str, account: str) -> None:
    """Prefixes and UUIDs, with hyphens or without, may stand among the arguments."""
    result = run(sqlite_url, "keys", "list", f"--account={account}")
    assert (result.exit_code, result.stderr) == (0, f'Account "{account}" has no active key.\n')


@pytest.mark.parametrize("stdin", ["", "one two", "\u00e9"])
def test_one_token_is_asked_for(sqlite_url: str, stdin: str) -> None:
    """Nothing, or more than a word, is no token; how to give one is told."""
    result = run(sqlite_url, "keys", "verify", stdin=stdin)
    assert result.exit_code == 1
    assert "tfm-guard keys verify < token.txt" in result.stderr


def test_a_closed_stdin_is_told(sqlite_url: str) -> None:
    """Without a stdin the commands that read tokens say so, with 1."""
    for command in (("keys", "verify"), ("keys", "revoke", "--leaked"), ("keys", "import", "-")):
        done = subprocess.run(
            ["sh", "-c", 'exec "$0" "$@" <&-', PROGRAM, *command],
            env={"TFM_GUARD_DATABASE_URL": sqlite_url, "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("tfm-guard: stdin is closed; give the ")
