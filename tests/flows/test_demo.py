"""`tfm-guard demo`, as a newcomer runs it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.redis import RedisServer
from tests.support.servers import ROOT, wait_until
from tests.support.sql import execute

PROGRAM = str(Path(sys.executable).with_name("tfm-guard"))

# Method, path, status, source and outcome of each line that shows a request.
LINE = re.compile(r" (GET|POST|DELETE) (/\S+) +([0-9]{3}) +[0-9]+\.[0-9] ms   (\S+) +(.+)")

SEND = ("POST", "/v1/emails/")
REFUSED = 'Bearer realm="api", error="invalid_token"'
LIFE = [
    (*SEND, "401", "memory", 'Bearer realm="api"'),
    ("POST", "/v1/api-keys/", "201", "database", "key ########, may send"),
    (*SEND, "202", "database", "email queued"),
    (*SEND, "202", "memory", "email queued"),
    (*SEND, "202", "database", "email queued"),
    ("DELETE", "/v1/api-keys/###…", "204", "database", "refused everywhere"),
    (*SEND, "401", "database", REFUSED),
    (*SEND, "401", "database", REFUSED),
]


# All are errors; but a file may be left open where a signal comes in the midst of an import.
WARNINGS = "error,ignore:unclosed file:ResourceWarning"


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return variables in which *folder* is where temporary files go."""
    return {"TMPDIR": str(folder), "PYTHONWARNINGS": WARNINGS, **variables}


def run_demo(
    folder: Path, *arguments: str, program: Sequence[str] = (PROGRAM, "demo"), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the demo with *folder* as its working folder and for its temporary files."""
    return subprocess.run(
        [*program, *arguments],
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def life_in(output: str) -> list[tuple[str, ...]]:
    """Return the requests shown in *output*; what differs from run to run is `#`."""
    shown = re.sub(r"(?<=key )[0-9a-f]{8}|(?<=/)[0-9a-f]{3}(?=…)", _hidden, output)
    return [match.groups() for match in LINE.finditer(shown)]


def _hidden(match: re.Match[str]) -> str:
    return "#" * len(match[0])


def test_the_demo_shows_a_keys_life(tmp_path: Path) -> None:
    """Refused, created, accepted, deleted, refused: eight real answers, exit code 0, no rest."""
    done = run_demo(tmp_path, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert life_in(done.stdout) == LIFE
    assert done.stdout.endswith("All eight were answered as they must be.\n")
    assert "\x1b" not in done.stdout
    assert "tfm_k_" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_database_is_kept_in_a_given_folder(tmp_path: Path) -> None:
    """--folder is made, holds the database afterwards, and serves any number of demos."""
    folder = tmp_path / "kept" / "here"
    codes = [run_demo(tmp_path, "--once", "--folder", str(folder)).returncode for _ in range(3)]
    assert codes == [0, 0, 0]
    assert execute(
        f"sqlite:///{folder}/demo.db",
        "SELECT count(*), count(revoked_at) FROM tfm_keys",
    ) == [(6, 5)]


def test_a_request_answered_otherwise_ends_the_demo_with_1(tmp_path: Path) -> None:
    """Where settings leave no room for a second key, the demo says which request went wrong."""
    done = run_demo(tmp_path, "--once", TFM_GUARD_PLANS='{"free": 1}')
    assert done.returncode == 1
    assert [line[2] for line in life_in(done.stdout)] == ["401", "403"]
    assert done.stderr == (
        "tfm-guard: A new key, by the managing key: expected 201, got 403 plan_limit_reached\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_newer_release_ends_the_demo_with_1(tmp_path: Path) -> None:
    """Tables of a later release are refused before anything is served."""
    assert run_demo(tmp_path, "--once", "--folder", ".").returncode == 0
    url = f"sqlite:///{tmp_path}/demo.db"
    execute(url, "UPDATE tfm_schema_version SET version_num = '9999'")
    done = run_demo(tmp_path, "--once", "--folder", ".")
    assert (done.returncode, done.stdout) == (1, "")
    assert "revision 9999, newer than this release knows" in done.stderr


@contextlib.contextmanager
def running_demo(folder: Path, program: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run the demo until the end of the block, whatever happens there."""
    with subprocess.Popen(
        program,
        cwd=folder,
        env=environment(folder, PYTHONUNBUFFERED="1", PATH=os.environ["PATH"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        overdue = threading.Timer(60, process.kill)
        overdue.start()
        try:
            yield process
        finally:
            overdue.cancel()
            process.kill()


def read_until(process: subprocess.Popen[str], end: str) -> str:
    """Return what the process prints up to *end*."""
    assert process.stdout is not None
    shown = ""
    while not shown.endswith(end):
        line = process.stdout.readline()
        assert line, shown
        shown += line
    return shown


# A shell starts what runs in the background with SIGINT ignored.
IN_BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$0" demo', PROGRAM]


@pytest.mark.parametrize("program", [[PROGRAM, "demo"], IN_BACKGROUND], ids=["here", "background"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stays_up_until_it_is_ended(
    tmp_path: Path, number: signal.Signals, program: list[str]
) -> None:
    """It serves until Ctrl-C or SIGTERM, then exits 0; what it prints makes a key, and signs in."""
    with running_demo(tmp_path, program) as process:
        shown = read_until(process, "the link signs you in once:\n\n")
        shown += read_until(process, "\n\n")
        command = re.search(
            r"curl (http://127\.0\.0\.1:[0-9]+/\S+) \\\n +-H '(.+): (.+)' \\\n"
            r" +-H '(.+): (.+)' -d '(.+)'",
            shown,
        )
        assert command is not None
        url, *headers, body = command.groups()
        request = urllib.request.Request(  # noqa: S310  # http, on loopback
            url, body.encode(), dict(zip(headers[::2], headers[1::2], strict=True))
        )
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # as above
            assert response.status == 201
        (link,) = re.findall(r"^  (http://\S+/sign-in/\S+)$", shown, re.MULTILINE)
        visitor = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with visitor.open(link, timeout=10) as response:
            assert response.url.endswith("/settings/api-keys/")
            page = response.read().decode()
        assert re.findall(r"<bdi>(.+)</bdi>", page) == [
            "Mine",
            "Managing key of the demo",
            "Trial of a partner",
            "Newsletter",
            "Web shop",
        ]
        assert "5 of 50 keys of the plan “business” used" in page
        assert "6 days ago" in page
        with visitor.open(link, timeout=10) as response:
            assert response.url.endswith("/settings/api-keys/")
        with pytest.raises(urllib.error.HTTPError, match="410"):
            urllib.request.build_opener().open(link, timeout=10)
        process.send_signal(number)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_ended_while_it_starts_ends_quietly(tmp_path: Path, number: signal.Signals) -> None:
    """Ended before its requests were answered, it exits 130, without a word or a rest."""
    with running_demo(tmp_path, [PROGRAM, "demo"]) as process:
        wait_until(lambda: any(tmp_path.iterdir()), what="the temporary folder")
        process.send_signal(number)
        shown, errors = process.communicate(timeout=30)
    assert (process.returncode, shown, errors) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_with_redis_the_second_server_finds_the_key_there(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Both servers use the Redis that --redis names, and the answer shows where it came from."""
    done = run_demo(tmp_path, "--once", "--redis", redis_server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Redis at 127.0.0.1:{redis_server.port}" in done.stdout
    sources = [line[3] for line in life_in(done.stdout)]
    assert sources[:7] == [
        "memory",
        "database",
        "database",
        "memory",
        "Redis",
        "database",
        "database",
    ]
    assert sources[7] in ("Redis", "database")  # Redis has what the first server has just read


def test_a_redis_url_that_cannot_work_is_named_by_its_option(tmp_path: Path) -> None:
    """What is wrong with --redis is said of --redis, before anything is served."""
    done = run_demo(tmp_path, "--once", "--redis", "http://127.0.0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "tfm-guard: --redis: expected redis://HOST:PORT/0 or rediss://HOST:PORT/0\n"
    )


def test_any_folder_will_do(tmp_path: Path) -> None:
    """Characters that mean something in a URL mean nothing in the name of a folder."""
    name = "a?b%41c#d@e:f"
    assert run_demo(tmp_path, "--once", "--folder", name).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "demo.db").exists()


def test_a_file_that_is_no_database_is_named_by_its_folder(tmp_path: Path) -> None:
    """What cannot be used in the folder is told with --folder, exit code 1."""
    (tmp_path / "demo.db").write_text("no database, but long enough to be looked at " * 30)
    done = run_demo(tmp_path, "--once", "--folder", ".")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tfm-guard: --folder .: database: ")
    assert "file is not a database" in done.stderr
    assert "TFM_GUARD" not in done.stderr


def test_colours_are_for_terminals(tmp_path: Path) -> None:
    """On a terminal the statuses have colours."""
    reader, terminal = os.openpty()
    done = subprocess.run(
        [PROGRAM, "demo", "--once"],
        cwd=tmp_path,
        env=environment(tmp_path, TERM="xterm"),
        stdout=terminal,
        check=False,
    )
    os.close(terminal)
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert done.returncode == 0
    assert len(re.findall("\x1b\\[32m(?:401|201|202|204)\x1b\\[0m", shown)) == 8


def test_the_demo_comes_with_the_wheel(tmp_path: Path) -> None:
    """Where only the wheel is installed, the demo serves the same example."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    example = unpacked / "tfm_guard" / "cli" / "mail_api.py"
    assert example.read_bytes() == (ROOT / "examples" / "mail_api.py").read_bytes()
    done = run_demo(
        tmp_path,
        "demo",
        "--once",
        program=[sys.executable, "-c", "from tfm_guard.cli import main; main()"],
        PYTHONPATH=str(unpacked),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert life_in(done.stdout) == LIFE


def test_without_a_server_library_it_says_what_to_install(tmp_path: Path) -> None:
    """Where uvicorn is missing, the demo ends with 1 and names the extra that brings it."""
    program = "import sys; sys.modules['uvicorn'] = None; from tfm_guard.cli import main; main()"
    done = run_demo(tmp_path, "demo", "--once", program=[sys.executable, "-c", program])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "tfm-guard: the demo needs a server, uvicorn: pip install 'tfm-guard[server]'\n"
    )
