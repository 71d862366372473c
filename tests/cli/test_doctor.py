"""`tfm-guard doctor`: what it finds, and what it says to change."""

import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.redis import RedisServer
from tests.support.servers import free_port
from tests.support.sql import execute
from tfm_guard.cli import main
from tfm_guard.clock import SystemClock

CHEAP = {"TFM_GUARD_ARGON2_MEMORY_KIB": "8", "TFM_GUARD_ARGON2_TIME_COST": "1"}


def run(url: str, *arguments: str, **variables: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url, **CHEAP, **variables}
    result = CliRunner().invoke(main, ["doctor", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def examine(url: str, **variables: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the findings, by what they are about."""
    result = run(url, "--json", **variables)
    return result.exit_code, {one["part"]: one for one in json.loads(result.stdout)}


def make_tables(url: str) -> None:
    """Make the tables at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url}
    assert CliRunner().invoke(main, ["db", "upgrade"], env=env).exit_code == 0


def test_all_is_well(database_url: str, redis_server: RedisServer) -> None:
    """With a database and a Redis that are in order nothing is wrong, and the code is 0."""
    make_tables(database_url)
    code, found = examine(database_url, TFM_GUARD_REDIS_URL=redis_server.url)
    assert code == 0
    clocks = {"Redis's clock"} | ({"database's clock"} if "postgres" in database_url else set())
    parts = {"settings", "database", "tables", "lease", "processes", "Redis", "Redis's policy"}
    assert found.keys() == parts | clocks | {"argon2"}
    advised = {part for part, one in found.items() if one["state"] != "good"}
    assert advised == {"Redis's policy", "argon2"}
    assert "maxmemory" in found["Redis's policy"]["advice"]
    assert "OWASP" in found["argon2"]["advice"]
    assert all((one["advice"] is None) == (one["state"] == "good") for one in found.values())


def test_for_people_it_is_a_table_with_advice_below(sqlite_url: str) -> None:
    """The table has a line for each part, and what to change stands below with its part."""
    result = run(sqlite_url)
    assert result.exit_code == 0
    table, *advice = result.stdout.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == [
        *("part", "settings", "database", "Redis", "argon2"),
    ]
    assert [words.partition(":")[0] for words in advice] == ["database", "Redis", "argon2"]


def test_nothing_is_made(database_url: str) -> None:
    """Where there are no tables that is said, and there are none afterwards, nor a file."""
    code, found = examine(database_url)
    assert code == 0
    if database_url.startswith("sqlite"):
        assert found["database"]["state"] == "advice"
        assert "made when first used" in found["database"]["advice"]
        assert not Path(database_url.removeprefix("sqlite:///")).exists()
    else:
        assert "made when first used" in found["tables"]["found"]
        with pytest.raises(Exception, match="tfm_keys"):
            execute(database_url, "SELECT * FROM tfm_keys")


def test_faulty_settings_end_it(sqlite_url: str) -> None:
    """All faults of the settings are told, as by every command."""
    result = run(sqlite_url, TFM_GUARD_PLANS="{}", TFM_GUARD_SECRETS="short")
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 2


def test_a_database_that_does_not_answer_ends_with_3() -> None:
    """The rest is looked at all the same; the password is nowhere."""
    url = f"postgresql://acme:hunter2@127.0.0.1:{free_port()}/keys"
    result = run(url)
    assert result.exit_code == 3
    assert "hunter2" not in result.output
    code, found = examine(url)
    assert (code, found["database"]["state"]) == (3, "unreachable")
    assert "Connection refused" in found["database"]["found"]
    assert found["argon2"]["state"] != "wrong"


def test_a_file_that_is_no_database_ends_with_1(tmp_path: Path) -> None:
    """What will be so the next time, too, is wrong and not just out of reach."""
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 100)
    code, found = examine(f"sqlite:///{path}")
    assert (code, found["database"]["state"]) == (1, "wrong")


def test_a_folder_that_is_missing_is_wrong(tmp_path: Path) -> None:
    """A file that no command could make is told by its folder, which is not made."""
    folder = tmp_path / "nowhere"
    code, found = examine(f"sqlite:///{folder}/keys.db")
    assert (code, found["database"]["state"]) == (1, "wrong")
    assert found["database"]["found"] == f"the folder {folder} does not exist"
    assert "make it" in found["database"]["advice"]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("revision", "advice"), [("0000", "tfm-guard db upgrade"), ("9999", "install the release")]
)
def test_tables_of_another_release_are_wrong(database_url: str, revision: str, advice: str) -> None:
    """Older tables want an upgrade, newer ones another release."""
    make_tables(database_url)
    execute(database_url, f"UPDATE tfm_schema_version SET version_num = '{revision}'")  # noqa: S608
    code, found = examine(database_url)
    assert (code, found["tables"]["state"]) == (1, "wrong")
    assert advice in found["tables"]["advice"]


def test_a_lease_that_cannot_hold_is_wrong(sqlite_url: str) -> None:
    """A lease that ends before the feed is read again makes every request ask the database."""
    make_tables(sqlite_url)
    execute(sqlite_url, "UPDATE tfm_settings SET value = '0.5' WHERE name = 'lease_seconds'")
    code, found = examine(sqlite_url)
    assert (code, found["lease"]["state"]) == (1, "wrong")
    assert found["lease"]["found"].startswith("0.5 s, ")


def test_a_redis_that_is_away_ends_with_3(sqlite_url: str) -> None:
    """The code is 3; the password is nowhere."""
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    code, found = examine(sqlite_url, TFM_GUARD_REDIS_URL=url)
    assert (code, found["Redis"]["state"]) == (3, "unreachable")
    assert "hunter2" not in json.dumps(found)


def test_a_replica_is_told(sqlite_url: str, redis_server: RedisServer) -> None:
    """A Redis that follows another one is not taken for a master."""
    with redis_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        try:
            code, found = examine(sqlite_url, TFM_GUARD_REDIS_URL=redis_server.url)
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
    assert code == 3
    assert "the URL must lead to the master" in found["Redis"]["found"]


@pytest.mark.parametrize(
    ("policy", "memory", "state"),
    [
        ("noeviction", "0", "advice"),
        ("noeviction", "10mb", "advice"),
        ("volatile-lru", "10mb", "advice"),
        ("allkeys-lru", "10mb", "good"),
    ],
)
def test_the_policy_of_redis_is_judged(
    sqlite_url: str, redis_server: RedisServer, policy: str, memory: str, state: str
) -> None:
    """Only with a limit and a policy that lets any entry go there is nothing to advise."""
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", memory)
    try:
        _, found = examine(sqlite_url, TFM_GUARD_REDIS_URL=redis_server.url)
    finally:
        redis_server.restart()
    assert found["Redis's policy"]["state"] == state
    assert found["Redis's policy"]["found"].startswith(policy)


class Ahead(SystemClock):
    """A clock of this machine that is five seconds ahead of the others'."""

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=5)


def test_clocks_that_differ_are_wrong(
    postgres_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clocks more than a second apart are told, with which of them is ahead."""
    make_tables(postgres_url)
    monkeypatch.setattr(sys.modules["tfm_guard.cli.doctor"], "SystemClock", Ahead)
    code, found = examine(postgres_url, TFM_GUARD_REDIS_URL=redis_server.url)
    assert code == 1
    for part in ("database's clock", "Redis's clock"):
        assert re.fullmatch(r"(5\.0|4\.9)\d+ s behind", found[part]["found"])
        assert "NTP" in found[part]["advice"]


def test_costly_hashing_is_told(sqlite_url: str) -> None:
    """What takes longer than a quarter of a second here is advised to be lowered."""
    variables = {"TFM_GUARD_ARGON2_MEMORY_KIB": "65536", "TFM_GUARD_ARGON2_TIME_COST": "8"}
    _, found = examine(sqlite_url, **variables)
    assert "lower TFM_GUARD_ARGON2_MEMORY_KIB" in found["argon2"]["advice"]
