"""`tfm-guard prove` against deployments that keep their word, and against some that do not."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
import sqlalchemy
from click.testing import CliRunner, Result

from tests.support import deployment
from tests.support.deployment import CERTIFICATE, MANAGING, Deployment, Reply
from tests.support.guards import create, new_guard, prepare
from tests.support.redis import RedisServer
from tests.support.servers import free_port, wait_until
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard.cli import main
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.store import schema

PROGRAM = Path(sys.executable).with_name("tfm-guard")
APP = "tests.support.whoami_api:app"
FEW = ("--connections", "4", "--seconds", "1")
BROKEN = "tfm-guard: the deployment did not keep its promise\n"
NOT_SHOWN = "tfm-guard: it could not be shown that the guarantee holds\n"


def prove(*arguments: str, token: str = MANAGING, ca: Path | None = None) -> Result:
    """Run the command in this process with few connections and for a short time."""
    env = {"TFM_GUARD_DATABASE_URL": None, "SSL_CERT_FILE": str(ca) if ca else None}
    result = CliRunner().invoke(main, ["prove", *FEW, *arguments], input=token, env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def told(result: Result) -> str:
    """Return what stderr has, without the line that says what is being done."""
    first, _, rest = result.stderr.partition("\n")
    assert first.startswith("Asking GET ")
    return rest


class Site(NamedTuple):
    """A server and its database."""

    server: UvicornProcess
    database: str


class Managing(NamedTuple):
    """A managing key, made for one test."""

    token: str
    id: UUID


def managing_key(database: str, scopes: Sequence[str] = ("api-keys:write",)) -> Managing:
    """Create a managing key."""

    async def work() -> Managing:
        async with new_guard(database) as guard:
            created = await create(guard, name="Managing", scopes=scopes)
            return Managing(created.token, created.key.id)

    return asyncio.run(work())


def revoked_keys(database: str, managing: Managing) -> list[bool]:
    """Return of each key that *managing* has made whether it is revoked."""
    made = (schema.keys.c.revoked_at != None).label("revoked")  # noqa: E711  # SQL
    query = sqlalchemy.select(made).where(schema.keys.c.created_by == f"api_key:{managing.id}")
    return [bool(revoked) for (revoked,) in execute(database, query)]


@pytest.fixture(autouse=True)
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask more often than the command does, so that it takes less time to have asked enough."""
    monkeypatch.setattr("tfm_guard.cli.probe._PAUSE", 0.02)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve from two workers on a file."""
    database = f"sqlite:///{tmp_path_factory.mktemp('prove')}/keys.db"
    with UvicornProcess(APP, env={"TFM_GUARD_DATABASE_URL": database}, workers=2) as server:
        yield Site(server, database)


def test_the_guarantee_is_shown_of_workers_on_a_file(site: Site) -> None:
    """Two workers behind one address: exit code 0, a row and a sentence, and the key is gone."""
    managing = managing_key(site.database)
    result = prove(site.server.url, token=f" {managing.token}\n")
    assert (result.exit_code, told(result)) == (0, "")
    returned, _, header, row, _, _, sentence, _ = result.stdout.splitlines()
    assert returned.startswith("DELETE returned after ")
    assert returned.endswith(" ms; answered: 204")
    assert header.split()[:2] == ["address", "connections"]
    address, connections, accepted, *_, after, unclear = row.split()
    assert (address, connections, after, unclear) == (site.server.url, "4", "0", "0")
    assert int(accepted) >= 4 * 5
    assert sentence.startswith("It held: within 1 s, all ")
    assert "tfm_k_" not in result.output
    assert revoked_keys(site.database, managing) == [True]


def test_the_guarantee_is_shown_of_servers_with_redis(
    postgres_url: str, redis_server: RedisServer
) -> None:
    """Two addresses on PostgreSQL and Redis, another path, as JSON: each refused on all sides."""
    managing = managing_key(postgres_url)
    variables = {"TFM_GUARD_DATABASE_URL": postgres_url, "TFM_GUARD_REDIS_URL": redis_server.url}
    with (
        UvicornProcess(APP, env=variables) as first,
        UvicornProcess(APP, env=variables) as second,
    ):
        result = prove(first.url, second.url, "--json", "--path", "/whoami", token=managing.token)
    assert (result.exit_code, told(result)) == (0, "")
    report = json.loads(result.stdout)
    assert (report["verdict"], report["reasons"]) == ("held", [])
    assert report["delete_answers"] == ["204"]
    assert [one["address"] for one in report["addresses"]] == [first.url, second.url]
    for one in report["addresses"]:
        assert one["connections"] == 4
        assert one["accepted_before"] >= 4 * 5
        assert one["accepted_after"] == 0
        assert one["fewest_refused_after"] >= 10
        assert one["refused_after"] >= 4 * 10
        assert one["first_refused_seconds"] > 0
        assert one["last_accepted_seconds"] < report["return_seconds"]
        assert one["managing_accepted"] >= 4
        assert one["managing_refused"] == 0
    assert revoked_keys(postgres_url, managing) == [True]


def test_a_process_that_has_stopped_has_the_deletion_confirmed_later(postgres_url: str) -> None:
    """While another process says nothing DELETE answers 503; only the next answer is its return."""
    lease = 3.4  # so that a lease and a half, which is waited, is more than DELETE waits
    asyncio.run(prepare(postgres_url, lease=lease, poll=0.25))
    managing = managing_key(postgres_url)
    variables = {"TFM_GUARD_DATABASE_URL": postgres_url}
    with UvicornProcess(APP, env=variables) as asked, UvicornProcess(APP, env=variables) as stopped:
        stopped.freeze()
        result = prove(asked.url, "--json", token=managing.token)
        stopped.thaw()
    assert (result.exit_code, told(result)) == (0, "")
    report = json.loads(result.stdout)
    first, last = report["delete_answers"]
    # Asked for again just before that is shown, or just after.
    assert (first, last in {"204", "404 not_found"}) == ("503 unconfirmed", True)
    assert report["return_seconds"] >= 1.5 * lease
    (one,) = report["addresses"]
    assert one["first_refused_seconds"] < CONFIRM_SECONDS
    assert one["accepted_after"] == 0
    assert revoked_keys(postgres_url, managing) == [True]


def test_an_address_of_another_deployment_is_told(site: Site, sqlite_url: str) -> None:
    """Where one address leads to another database, the new key is refused there: exit code 1."""
    managing = managing_key(site.database)
    with UvicornProcess(APP, env={"TFM_GUARD_DATABASE_URL": sqlite_url}) as stranger:
        result = prove(site.server.url, stranger.url, token=managing.token)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{stranger.url}: the new key was refused 10 times, before it was deleted" in told(
        result
    )
    assert "check that all addresses lead to the same deployment" in told(result)
    assert revoked_keys(site.database, managing) == [True]


def test_a_managing_key_without_its_scope_is_told(site: Site) -> None:
    """A key that may not create keys ends it with 1 and the name of the scope."""
    managing = managing_key(site.database, ["api-keys:read"])
    result = prove(site.server.url, token=managing.token)
    assert (result.exit_code, result.stdout) == (1, "")
    first, second = told(result).splitlines()
    assert first.endswith(
        f"{site.server.url}: the managing key may not create a key: 403 insufficient_scope"
    )
    assert "api-keys:write" in second
    assert revoked_keys(site.database, managing) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_in_the_middle_it_deletes_its_key(site: Site, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end it with 130, and the key that it had made is deleted."""
    managing = managing_key(site.database)
    with subprocess.Popen(
        [PROGRAM, "prove", site.server.url, "--seconds", "600", "--connections", "100"],
        env={"PYTHONWARNINGS": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(managing.token)
        process.stdin.close()
        process.stdin = None  # communicate() would close it again
        wait_until(lambda: bool(revoked_keys(site.database, managing)), what="a key made by prove")
        process.send_signal(number)
        shown, errors = process.communicate(timeout=60)
    assert (process.returncode, shown) == (130, "")
    assert errors.splitlines()[-1].endswith(" was deleted (204)")
    assert revoked_keys(site.database, managing) == [True]


def test_at_a_terminal_the_managing_key_is_asked_for(site: Site) -> None:
    """At a terminal it asks for the key, and does not show what is typed."""
    managing = managing_key(site.database)
    typist, terminal = os.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", PROGRAM, "prove", site.server.url, *FEW],
        env={"PYTHONWARNINGS": "error", "PATH": os.environ["PATH"]},
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    ) as process:
        shown = b""
        while b"Managing key: " not in shown:
            shown += os.read(typist, 1000)
        os.write(typist, f"{managing.token}\n".encode())
        assert process.stdout is not None
        assert "It held: " in process.stdout.read()
    shown += os.read(typist, 100_000)
    os.close(terminal)
    os.close(typist)
    assert process.returncode == 0
    assert b"tfm_k_" not in shown


def test_the_key_it_makes_can_do_nothing_and_ends_by_itself() -> None:
    """Its key has no scope, and expires five minutes after the asking is to end."""
    before = datetime.now(UTC)
    with Deployment() as honest:
        assert prove(honest.url).exit_code == 0
    (body,) = honest.created
    assert (body["name"], body["permissions"]) == ("tfm-guard prove", [])
    life = datetime.fromisoformat(body["expires_at"]) - before
    assert timedelta(minutes=5) < life < timedelta(minutes=6)


class Late(Deployment):
    """Confirms at once, and accepts for another half second."""

    def new(self) -> Reply:
        return deployment.OK if self.since_deletion < 0.5 else deployment.REFUSED


class Resurrecting(Deployment):
    """Refuses after the deletion, and half a second later accepts again."""

    def new(self) -> Reply:
        return deployment.REFUSED if 0 <= self.since_deletion < 0.5 else deployment.OK


@pytest.mark.parametrize("kind", [Late, Resurrecting])
def test_a_deleted_key_that_is_accepted_is_found(kind: type[Deployment]) -> None:
    """Accepted after DELETE has returned, at once or later: exit code 4, and how often."""
    with kind() as liar:
        result = prove(liar.url, "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["verdict"] == "broken"
    (one,) = report["addresses"]
    assert one["accepted_after"] >= 4
    assert one["last_accepted_seconds"] > report["return_seconds"]
    assert told(result) == BROKEN + (
        f"tfm-guard: {liar.url}: {one['accepted_after']} requests that began after DELETE had "
        "returned were accepted\n"
    )


class RefusingAll(Deployment):
    """Revokes more than it was asked to."""

    def managing(self) -> Reply:
        return deployment.OK if self.since_deletion < 0 else deployment.REFUSED


def test_a_valid_key_that_is_refused_is_found() -> None:
    """The managing key answered 401 is a broken promise, too: exit code 4."""
    with RefusingAll() as liar:
        result = prove(liar.url)
    assert result.exit_code == 4
    assert "the managing key is valid and was refused with 401 in " in told(result)


class Unconfirmed(Deployment):
    """Cannot confirm."""

    def delete(self) -> Reply:
        return deployment.UNCONFIRMED


def test_a_deletion_that_is_never_confirmed_shows_nothing() -> None:
    """DELETE is sent five times, as clients retry; still 503, the exit code is 3."""
    with Unconfirmed() as undecided:
        result = prove(undecided.url)
    assert result.exit_code == 3
    assert result.stdout.startswith("DELETE did not return; answered: 503 unconfirmed, 503 ")
    assert told(result).startswith(f"{NOT_SHOWN}tfm-guard: DELETE was sent 5 times and never ")
    assert undecided.deletions == 5


class ConfirmingLater(Deployment):
    """Confirms when asked again; until then the key may still be accepted."""

    def delete(self) -> Reply:
        return deployment.UNCONFIRMED if self.deletions < 3 else deployment.NO_CONTENT

    def new(self) -> Reply:
        return deployment.OK if self.deletions < 3 else deployment.REFUSED


class LosingTheAnswer(Deployment):
    """Deletes and hangs up; asked again, it says that the key is gone."""

    def delete(self) -> Reply:
        return (0, "", {}) if self.deletions == 1 else deployment.NOT_FOUND


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        (ConfirmingLater, ["503 unconfirmed", "503 unconfirmed", "204"]),
        (LosingTheAnswer, ["it hung up without an answer", "404 not_found"]),
    ],
)
def test_a_deletion_may_be_confirmed_later(kind: type[Deployment], answers: list[str]) -> None:
    """Only what begins after the confirmation counts; all answers to DELETE are told."""
    with kind() as hesitant:
        result = prove(hesitant.url, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["delete_answers"] == answers


class KnowingNoKey(Deployment):
    """Says of the key that it has just made that there is none."""

    def delete(self) -> Reply:
        return deployment.NOT_FOUND


def test_a_first_deletion_answered_404_confirms_nothing() -> None:
    """404 to the first DELETE says that this address does not know the key: exit code 3."""
    with KnowingNoKey() as ignorant:
        result = prove(ignorant.url)
    assert result.exit_code == 3
    assert "DELETE was sent once and never confirmed; answered: 404 not_found" in told(result)


class Stumbling(Deployment):
    """Neither accepts nor refuses after the deletion."""

    def new(self) -> Reply:
        return deployment.OK if self.since_deletion < 0 else deployment.UNAVAILABLE


def test_answers_that_say_nothing_are_shown() -> None:
    """503 to the deleted key is neither accepted nor refused: it is listed, exit code 3."""
    with Stumbling() as unsteady:
        result = prove(unsteady.url)
    assert result.exit_code == 3
    assert f"Unclear answers to the new key at {unsteady.url}: 503 unavailable (" in result.stdout
    assert "neither accepted nor refused: 503 unavailable (" in told(result)
    assert "refused the key only 0 times after DELETE had returned" in told(result)


class Open(Deployment):
    """Asks for no key."""

    def other(self) -> Reply:
        return deployment.OK


def test_a_path_that_needs_no_key_proves_nothing() -> None:
    """Where a made-up key is not refused, the path is the wrong one: exit code 1, key deleted."""
    with Open() as public:
        result = prove(public.url, "--path", "/public")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        f"{public.url}: expected 401 invalid_token to GET /public with a made-up key, got 200\n"
        in told(result)
    )
    assert public.deletions == 1


def test_a_wrong_managing_key_is_told() -> None:
    """A managing key that is refused ends it with 1, and the key is not shown."""
    with Deployment() as honest:
        result = prove(honest.url, token="tfm_k_wrong")
    assert (result.exit_code, result.stdout) == (1, "")
    assert told(result) == (
        f"tfm-guard: {honest.url}: the managing key was refused: 401 invalid_token\n"
        "tfm-guard: give the token of a key that has the scope api-keys:write\n"
    )


@pytest.mark.parametrize("first", [True, False])
def test_an_address_that_does_not_answer_is_told(*, first: bool) -> None:
    """Nobody listens at one of the addresses: exit code 3 names it; what was made is deleted."""
    silent = f"http://127.0.0.1:{free_port()}"
    with Deployment() as honest:
        result = prove(*([silent, honest.url] if first else [honest.url, silent]))
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"tfm-guard: {silent}: Connection refused\n" in told(result)
    assert (len(honest.created), honest.deletions) == ((0, 0) if first else (1, 1))


class Empty(Deployment):
    """Has nothing at any path."""

    def create(self, body: dict[str, Any]) -> tuple[Reply, object]:  # noqa: ARG002  # it has none
        return deployment.NOT_FOUND, None


def test_an_address_without_a_management_api_is_told() -> None:
    """Something else at the address ends it with 1 and what is expected there."""
    with Empty() as other:
        result = prove(other.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{other.url}: expected 201 to POST /v1/api-keys/, got 404 not_found" in told(result)


def test_https_is_verified() -> None:
    """A certificate must lead to a known authority; SSL_CERT_FILE names one of one's own."""
    with Deployment(tls=True) as honest:
        unknown = prove(honest.url)
        assert (unknown.exit_code, unknown.stdout, honest.created) == (1, "", [])
        assert f"{honest.url}: its certificate cannot be verified: self" in told(unknown)
        assert "SSL_CERT_FILE" in told(unknown)
        assert prove(honest.url, ca=CERTIFICATE).exit_code == 0


def test_a_deployment_below_a_path_is_reached() -> None:
    """What follows the host in an address comes before every path."""
    with Deployment() as mounted:
        assert prove(f"{mounted.url}/mail/").exit_code == 0
    assert mounted.paths == {"/mail/v1/api-keys/"}


@pytest.mark.parametrize("token", ["", "\n", "two words", "tfm_k_\u00e9", "tfm_k_a\r\nx: y"])
def test_stdin_must_have_one_token(token: str) -> None:
    """Nothing, or what no header can hold, is refused before anything is asked."""
    with Deployment() as honest:
        result = prove(honest.url, token=token)
    assert (result.exit_code, result.stdout, honest.created) == (1, "", [])
    assert "stdin: expected one token, that of a managing key" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["127.0.0.1:8000"],
        ["ftp://127.0.0.1"],
        ["http://"],
        ["http://hunter2@127.0.0.1"],
        ["http://127.0.0.1:port"],
        ["http://127.0.0.1/?hunter2"],
        ["http://127.0.0.1", "--path", "whoami"],
        ["http://127.0.0.1", "--path", "/who am i"],
        ["http://127.0.0.1", "--connections", "0"],
        ["http://127.0.0.1", "--seconds", "0"],
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(arguments: list[str]) -> None:
    """A mistake in the arguments is told before the key is read."""
    result = prove(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert "hunter2" not in result.stderr
