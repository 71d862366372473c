"""The documentation says what is so: its programs run, its tables match the code."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import click
import msgspec
import pytest

from tests.support.servers import ROOT
from tests.support.sql import execute
from tfm_guard import Guard, errors
from tfm_guard.cli import main
from tfm_guard.confirmation import _MARGIN as MARGIN
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.counters import Counters
from tfm_guard.errors import Refusal
from tfm_guard.freshness import FLOOR_SECONDS
from tfm_guard.http import management, messages, persons
from tfm_guard.http.messages import CreatedKeyResponse, KeyRow
from tfm_guard.records import AuditRow, KeyStatus, Looked
from tfm_guard.scopes import BUILT_IN_SCOPES
from tfm_guard.settings import Settings
from tfm_guard.shared_cache import MAX_AGE_SECONDS
from tfm_guard.signs import BATCH, EXPIRING, IDLE

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Put after a program that defines an app: it must serve, and refuse who has no key.
VISIT = """
if "app" in globals():
    from starlette.testclient import TestClient

    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 401
"""


# Put after the program of docs/management-api.md: what it says of people who are signed in.
VISIT_SIGNED_IN = """
from starlette.testclient import TestClient

KEYS, ELSEWHERE = "/console/v1/api-keys/", {"Sec-Fetch-Site": "cross-site"}


def code(answer):
    return answer.status_code, answer.json()["detail"]["code"]


def signed_in(session):
    return TestClient(app, cookies={"session": session})


with signed_in("session-of-7") as manager:
    created = manager.post(KEYS, json={"name": "CI"})
    assert created.status_code == 201
    path, token = KEYS + created.json()["id"], created.json()["key"]
    assert code(manager.post(KEYS, json={"name": "x"}, headers=ELSEWHERE)) == (403, "cross_origin")
    assert code(manager.post(KEYS + "self/revoke")) == (401, "missing_credentials")

    member = signed_in("session-of-8")
    member.portal = manager.portal  # in the same event loop
    for seen in (KEYS, path + "/usage", "/console/v1/audit-log"):
        assert member.get(seen).status_code == 200
    for method, refused in (
        ("POST", KEYS),
        ("PATCH", path),
        ("DELETE", path),
        ("POST", path + "/rotate"),
        ("POST", KEYS + "self/revoke"),
    ):
        assert code(member.request(method, refused, json={"name": "x"})) == (403, "not_allowed")

    assert code(TestClient(app).get(KEYS)) == (401, "missing_credentials")
    by_key = {"Authorization": f"Bearer {token}"}
    assert code(manager.get(KEYS, headers=by_key)) == (403, "insufficient_scope")
    assert manager.post("/v1/send", headers=by_key).status_code == 202
    logged = manager.get("/console/v1/audit-log").json()["items"]
    assert [row["actor"] for row in logged] == ["person:7"]

    behind = TestClient(APIKeyMiddleware(app, guard=guard), cookies={"session": "session-of-7"})
    assert code(behind.get(KEYS)) == (401, "missing_credentials")
    assert manager.delete(path).status_code == 204
"""


PROGRAM = re.compile(r"^```python complete\n(.+?)^```$", re.DOTALL | re.MULTILINE)


def programs() -> list[Any]:
    """Return every program that is marked as complete, with where it stands as its id."""
    return [
        pytest.param(program, id=f"{page.name}-{number}")
        for page in PAGES
        for number, program in enumerate(PROGRAM.findall(page.read_text()))
    ]


def run(program: str, folder: Path) -> None:
    """Run *program* in *folder*: it ends well, and writes nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def table(text: str, *columns: str) -> list[tuple[str, ...]]:
    """Return the cells of the table in *text* that has these columns, without backquotes."""
    _, _, rest = text.partition("| " + " | ".join(columns) + " |\n")
    assert rest, columns
    lines = rest.partition("\n\n")[0].splitlines()[1:]
    return [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in lines]


def refusals(module: ModuleType) -> dict[str, tuple[int, str]]:
    """Return status and code of each refusal in *module*, by the name of its class."""
    return {
        name: (kind.status, kind.code)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Refusal) and kind is not Refusal
    }


def commands(command: click.Command, path: str) -> Iterator[str]:
    """Yield each command below *command* that does something."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")
    else:
        yield path


def test_there_are_complete_programs() -> None:
    """Each mounts the guard, for programs or people, manages keys, has the page, or streams."""
    found = [parameter.id for parameter in programs()]
    assert found == [
        "README.md-0",
        "README.md-1",
        "console.md-0",
        "live-connections.md-0",
        "management-api.md-0",
    ]


@pytest.mark.parametrize("program", programs())
def test_a_complete_program_runs(program: str, tmp_path: Path) -> None:
    """It runs as it stands in an empty folder; the app that it defines, if any, refuses."""
    run(program + VISIT, tmp_path)
    assert (tmp_path / "tfm_guard.db").exists()


def test_people_may_do_what_the_page_says(tmp_path: Path) -> None:
    """In its example members look, managers change, and the middleware lets neither in."""
    (program,) = PROGRAM.findall((ROOT / "docs" / "management-api.md").read_text())
    run(program + VISIT_SIGNED_IN, tmp_path)


def test_the_settings_table_is_complete() -> None:
    """Each setting has its row, with its default as one would write it into the variable."""
    documented = {row[0]: row[1] for row in table(README, "variable", "default", "meaning")}
    defaults = Settings(database_url="")
    expected = {}
    for field in msgspec.structs.fields(Settings):
        value = getattr(defaults, field.name)
        text = (
            "none"
            if value in (None, ())
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        expected[f"TFM_GUARD_{field.name.upper()}"] = "required" if field.required else text
    assert documented == expected


def test_the_errors_table_is_complete() -> None:
    """The README has each status and code of errors.py and of the management API, and no other."""
    rows = table(README, "status", "code", "when")
    modules = (errors, management, messages, persons)
    ours = {each for module in modules for each in refusals(module).values()}
    assert sorted((int(row[0]), row[1]) for row in rows) == sorted(ours)


def test_the_errors_page_names_each_class() -> None:
    """docs/errors.md has each class with its status, its code, and a challenge if it sends one."""
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = table(text, "class", "status", "code", "challenge", "to do")
    assert {row[0]: (int(row[1]), row[2]) for row in rows} == refusals(errors)
    for name, _, _, challenge, _ in rows:
        kind = getattr(errors, name)
        assert bool(challenge) == kind.challenged
        assert (f'error="{kind.bearer_error}"' in challenge) == (kind.bearer_error is not None)


def test_every_counter_is_named() -> None:
    """The README lists the numbers that `guard.counters` has, all of them."""
    section = README.partition("`guard.counters` has")[2].partition("[docs/caching")[0]
    assert set(re.findall(r"`([a-z_]+)`", section)) == set(Counters.__struct_fields__)


def test_the_rows_of_the_management_api_are_documented() -> None:
    """The README names the fields of the answers that create and list keys."""
    create, listing, *_ = table(README, "call", "needs", "answers")
    assert re.findall(r"`([a-z_]+)`", create[2]) == list(CreatedKeyResponse.__struct_fields__)
    assert re.findall(r"`([a-z_]+)`", listing[2]) == list(KeyRow.__struct_fields__)


def test_the_durations_are_those_of_a_new_database(tmp_path: Path) -> None:
    """The lease, the longest wait and the interval in the pages are what the code has."""
    url = f"sqlite:///{tmp_path}/keys.db"
    asyncio.run(Guard.from_urls(database=url).upgrade_schema())
    shared = dict(map(tuple, execute(url, "SELECT name, value FROM tfm_settings")))
    lease = float(shared["lease_seconds"])
    page = (ROOT / "docs" / "caching.md").read_text()
    assert f"until {lease:g} s after the start" in page
    assert f"({shared['poll_seconds']} s, the same for all" in page
    wait, unfed = lease * (1 + MARGIN), float(shared["unfed_seconds"])
    assert f"{shared['linked_poll_seconds']} s while it has a link" in page
    assert f"read the feed within the last {unfed:g} s" in page
    assert f"{wait:g} s ({1 + MARGIN:g} leases)" in page
    assert f"| {unfed + lease * MARGIN:g} s |" in page
    assert f"After {CONFIRM_SECONDS:g} s it raises" in page
    assert f"kept for {FLOOR_SECONDS / 60:g} minutes" in page
    assert f"less than {MAX_AGE_SECONDS / 60:g} minutes ago" in page


def test_the_audit_log_is_documented() -> None:
    """docs/audit-log.md has each field of a row, and each status of a key in its precedence."""
    page = (ROOT / "docs" / "audit-log.md").read_text()
    fields = [
        name.strip(" `") for row in table(page, "field", "what") for name in row[0].split(",")
    ]
    assert fields == list(AuditRow.__struct_fields__)
    assert [row[0] for row in table(page, "status", "when")] == list(get_args(KeyStatus))
    assert f"expires within {EXPIRING.days} days" in page
    assert f"last use was {IDLE.days} days ago" in page
    assert f"{BATCH} at a time" in page


def test_the_actions_in_the_audit_log_are_documented(tmp_path: Path) -> None:
    """docs/audit-log.md has each action; setting a plan is none, and erasing deletes the rows."""
    page = (ROOT / "docs" / "audit-log.md").read_text()
    cells = [row[0] for row in table(page, "action", "when")]
    documented = {action.strip(" `") for cell in cells for action in cell.split(",")}
    signs = {f"api_key.{sign}" for sign in Looked.__struct_fields__ if sign != "keys"}
    done = asyncio.run(_all_actions(f"sqlite:///{tmp_path}/keys.db"))
    assert documented == done | signs | {"api_key.imported"}


async def _all_actions(url: str) -> set[str]:
    """Do to an account and its key all that is done from Python, at last erase it."""
    async with Guard.from_urls(database=url) as guard:
        await guard.accounts.set_plan("acme", "pro")
        assert (await guard.audit.list("acme")).items == []
        key = (await guard.keys.create(account_id="acme", name="CI", scopes=["send"])).key
        await guard.keys.change("acme", key.id, name="CD", scopes=[])
        await guard.keys.rotate("acme", key.id)
        await guard.keys.revoke("acme", key.id)
        await guard.accounts.suspend("acme")
        await guard.accounts.resume("acme")
        await guard.accounts.suspend("acme")
        actions = {row.action for row in (await guard.audit.list("acme")).items}
        await guard.accounts.erase("acme")
        assert (await guard.audit.list("acme")).items == []
        # The same id is then a new account.
        await guard.keys.create(account_id="acme", name="CI", scopes=["send"])
        account = await guard.accounts.get("acme")
        assert (account.plan, account.suspended_at) == ("free", None)
        return actions


def test_nothing_says_that_every_request_asks_the_database() -> None:
    """What was so before there were caches stands on no page."""
    for page in PAGES:
        assert "every request asks" not in page.read_text().lower()


def test_every_scope_is_named() -> None:
    """The README lists the built-in scopes, all of them."""
    section = README.partition("### Scopes and plans")[2].partition("\n\nA plan")[0]
    named = set(re.findall(r"`([a-z:-]+)`", section))
    assert named == set(BUILT_IN_SCOPES)


def test_every_command_is_named() -> None:
    """The README and docs/command-line.md each have a row for every command."""
    existing = set(commands(main, "tfm-guard"))
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert {row[0] for row in table(README, "command", "what")} == existing
    rows = table(page, "command", "what it does")
    assert {re.split(r" -| [A-Z]", row[0])[0] for row in rows} == existing
    options = set(re.findall(r"--[a-z][a-z0-9-]+", page))
    assert options == {option for path in existing for option in _options(path)}


def _options(path: str) -> list[str]:
    command: click.Command = main
    for name in path.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return [name for param in command.params for name in param.opts if name.startswith("--")]


def test_the_exit_codes_are_those_of_the_help() -> None:
    """docs/command-line.md and `tfm-guard --help` list the same exit codes."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert main.epilog is not None
    assert [row[0] for row in table(page, "code", "meaning")] == re.findall(
        r"^ *([0-9]+)  ", main.epilog, re.MULTILINE
    )


def test_every_make_target_exists() -> None:
    """What the README tells to run with make, the Makefile has."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"(?:^\$|^ {3}) make ([a-z-]+)", README, re.MULTILINE))
    assert told == {"demo", "test"}
    assert told <= targets


def test_the_transcript_is_what_the_demo_prints(tmp_path: Path) -> None:
    """The README's first screen is the demo's output but for numbers that differ each time."""
    _, _, rest = README.partition("```console\n$ make demo\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("tfm-guard"), "demo", "--once"],
        env={},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert _without_numbers(done.stdout) == _without_numbers(rest.partition("```")[0])


def _without_numbers(shown: str) -> str:
    changing = (r"(?<=127\.0\.0\.1:)\d+", r"(?<=in )/\S+", r" +[0-9.]+(?= ms)")
    ids = (r"(?<=key )[0-9a-f]{8}", r"(?<=/)[0-9a-f]{3}(?=…)")
    return re.sub("|".join([*changing, *ids]), "#", shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """A link to a file of this repository, and to a heading in it, leads to one that exists."""
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [h.lower().replace(" ", "-") for h in headings], link
