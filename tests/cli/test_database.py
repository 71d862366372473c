"""`tfm-guard db check` and `db prune`."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.guards import create, new_guard
from tests.support.sql import execute
from tfm_guard.cli import main
from tfm_guard.freshness import FLOOR_SECONDS
from tfm_guard.store import schema


def run(url: str, *arguments: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    result = CliRunner().invoke(main, ["db", *arguments], env={"TFM_GUARD_DATABASE_URL": url})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def url(database_url: str) -> str:
    """Make a database with three keys, of which the last is revoked."""

    async def work() -> None:
        async with new_guard(database_url) as guard:
            keys = [await create(guard) for _ in range(3)]
            await guard.keys.revoke("acme", keys[2].key.id)

    asyncio.run(work())
    return database_url


def test_a_database_in_use_has_no_fault(url: str) -> None:
    """Nothing is found wrong in tables that only the library wrote."""
    result = run(url, "check")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "Nothing wrong was found.\n")
    assert json.loads(run(url, "check", "--json").stdout) == {"faults": []}


# What stands for longer conditions below.
SHORT = {
    "ONE": "prefix = (SELECT prefix FROM tfm_changes WHERE id = 1)",
    "TWO": "prefix = (SELECT prefix FROM tfm_changes WHERE id = 2)",
    "ID_OF": "SELECT id FROM tfm_keys WHERE",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["UPDATE tfm_feed SET head = 9"], "the head of the feed is 9, its latest change 4"),
        (["DELETE FROM tfm_changes WHERE id = 2"], "1 changes from 1 on are missing"),
        (["DELETE FROM tfm_feed"], "the feed has 0 heads"),
        (["INSERT INTO tfm_feed VALUES (2, 4)"], "the feed has 2 heads"),
        (["DELETE FROM tfm_settings WHERE name = 'lease_seconds'"], "tfm_settings lacks: lease_"),
        (["DELETE FROM tfm_secrets WHERE name = 'tag'"], "tfm_secrets lacks: tag"),
        (["UPDATE tfm_keys SET version = 7 WHERE ONE"], "another version"),
        (["DELETE FROM tfm_keys WHERE revoked_at IS NOT NULL"], "changes of keys that do not"),
        (["UPDATE tfm_keys SET digest_key_id = NULL"], "half a digest"),
        (["UPDATE tfm_keys SET revoked_at = NULL"], "confirmed, and that are not revoked"),
        (
            [
                "INSERT INTO tfm_accounts (id, plan) VALUES ('', 'free')",
                "UPDATE tfm_keys SET account_id = '' WHERE ONE",
            ],
            "active keys of an account that was erased",
        ),
        (
            ["UPDATE tfm_keys SET replaced_by = id WHERE ONE"],
            "replaced keys without an end",
        ),
        (
            [
                "INSERT INTO tfm_accounts (id, plan) VALUES ('other', 'free')",
                "UPDATE tfm_keys SET account_id = 'other' WHERE TWO",
                "UPDATE tfm_keys SET replaced_by = (ID_OF TWO) WHERE ONE",
            ],
            "successor is missing or of another account",
        ),
        (
            ["UPDATE tfm_keys SET replaced_by = (ID_OF TWO)"],
            "successor that is another key's, too",
        ),
        (
            [
                "UPDATE tfm_keys SET replaced_by = (ID_OF TWO) WHERE ONE",
                "UPDATE tfm_keys SET replaced_by = id WHERE TWO",
            ],
            "successor was replaced before their grace ended",
        ),
    ],
)
def test_what_cannot_be_is_found(url: str, changes: list[str], expected: str) -> None:
    """A row that no release would write ends the check with 1 and says what is wrong."""
    for change in changes:
        execute(url, re.sub("ONE|TWO|ID_OF", lambda found: SHORT[found[0]], change))
    result = run(url, "check")
    assert (result.exit_code, result.stdout) == (1, "")
    assert expected in result.stderr
    (fault, *_) = json.loads(run(url, "check", "--json").stdout)["faults"]
    assert fault in result.stderr


def test_tables_of_another_release_are_a_fault(url: str) -> None:
    """The check tells the revisions, and looks no further."""
    execute(url, "UPDATE tfm_schema_version SET version_num = '0000'")
    result = run(url, "check")
    assert (result.exit_code, result.stderr) == (
        1,
        "tfm-guard: the tables are at revision 0000, this release needs 0001\n",
    )


@pytest.mark.parametrize("command", ["check", "prune"])
def test_looking_makes_no_tables(database_url: str, command: str) -> None:
    """On a database without tables both end with 1, and make neither tables nor a file."""
    result = run(database_url, command)
    assert result.exit_code == 1
    if not database_url.startswith("sqlite"):
        assert "there are no tables in the database" in result.stderr
    else:
        assert "the database's file is not there" in result.stderr
        assert not Path(database_url.removeprefix("sqlite:///")).exists()
    with pytest.raises(Exception, match="tfm_keys"):
        execute(database_url, "SELECT * FROM tfm_keys")


def age(url: str, change: int, seconds: float) -> None:
    """Make it look as if a change was made that many seconds ago."""
    changes = schema.changes
    moment = datetime.now(UTC) - timedelta(seconds=seconds)
    execute(url, changes.update().where(changes.c.id == change).values(created_at=moment))


def left(url: str) -> list[Any]:
    """Return the numbers of the changes that are left."""
    return [row[0] for row in execute(url, "SELECT id FROM tfm_changes ORDER BY id")]


def test_old_changes_are_pruned(url: str) -> None:
    """What is older than any memory goes, from the oldest on and without a gap."""
    assert run(url, "prune").stderr == "Removed rows: 0 of changes, 0 of usage, 0 of audit.\n"
    for change, seconds in ((1, 60), (2, 60), (3, -60), (4, 60)):
        age(url, change, FLOOR_SECONDS + seconds)
    result = run(url, "prune", "--json")
    assert json.loads(result.stdout) == {"changes": 2, "usage": 0, "audit": 0}
    assert left(url) == [3, 4]
    assert run(url, "check").exit_code == 0


def test_the_latest_change_stays(url: str) -> None:
    """However old all changes are, the one at the head of the feed is kept."""
    for change in range(1, 5):
        age(url, change, 10 * FLOOR_SECONDS)
    assert run(url, "prune").stderr == "Removed rows: 3 of changes, 0 of usage, 0 of audit.\n"
    assert left(url) == [4]
    assert run(url, "check").exit_code == 0


def test_many_changes_are_pruned_in_parts(url: str) -> None:
    """More than one transaction takes are removed by several, and none is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfm_guard.store.store._PRUNED_AT_ONCE", 1)
        for change in range(1, 5):
            age(url, change, 10 * FLOOR_SECONDS)
        assert run(url, "prune").stderr == "Removed rows: 3 of changes, 0 of usage, 0 of audit.\n"
    assert left(url) == [4]


def test_the_audit_log_is_kept_as_long_as_said(url: str) -> None:
    """Rows of the audit log go after 365 days, or as --audit-days says, but not within 90."""
    rows = schema.audit
    for number, days in ((1, 366), (2, 100)):
        moment = datetime.now(UTC) - timedelta(days=days)
        execute(url, rows.update().where(rows.c.id == number).values(created_at=moment))
    assert json.loads(run(url, "prune", "--json").stdout)["audit"] == 1
    assert run(url, "prune", "--audit-days", "89").exit_code == 2
    assert json.loads(run(url, "prune", "--audit-days", "90", "--json").stdout)["audit"] == 1
    assert execute(url, "SELECT id FROM tfm_audit ORDER BY id") == [(3,), (4,)]


def test_old_usage_is_pruned(url: str) -> None:
    """Hours of use go after 92 days."""
    (key_id, *_), *_ = execute(url, schema.keys.select())
    for days in (91, 93):
        hour = datetime.now(UTC) - timedelta(days=days)
        row = {"key_id": key_id, "hour": hour, "accepted": 1, "refused": 0}
        execute(url, schema.usage_hours.insert().values(**row))
    assert json.loads(run(url, "prune", "--json").stdout)["usage"] == 1
