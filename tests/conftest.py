"""Databases for every test, tests that run alone, and the rule that none is left out unnoticed."""

import fcntl
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer

_numbers = itertools.count(1)
# Locked by every test while it runs, for itself alone or together with those of other processes.
_room = Path(__file__).open("rb")  # noqa: SIM115  # open until the process ends
# Seconds within which a server answers, or counts as away.
_LIMITS = (
    "store.database.READ_SECONDS",
    "store.database._POOL_SECONDS",
    "link.TIMEOUT_SECONDS",
    "redis_access.TIMEOUT_SECONDS",
    "shared_cache.TIMEOUT_SECONDS",
    "deadlines.DEADLINE_SECONDS",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Run a test that is marked `alone` when no other process of this run has one under way."""
    alone = item.get_closest_marker("alone") is not None
    fcntl.flock(_room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        # Several such tests need not wait for the others each.
        if not (alone and nextitem and nextitem.get_closest_marker("alone")):
            fcntl.flock(_room, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a busy machine take its time for answers, but in tests that are marked `alone`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("alone") is None:
            for limit in _LIMITS:
                patch.setattr(f"tfm_guard.{limit}", 10.0)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Run one PostgreSQL server for the whole session."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Create an empty PostgreSQL database for one test; the test may stop the server."""
    postgres_server.start()
    name = f"test_{next(_numbers)}"
    yield postgres_server.create_database(name)
    postgres_server.start()
    postgres_server.recycle_database(name)


@pytest.fixture(scope="session")
def redis_server_of_session() -> Iterator[RedisServer]:
    """Run one Redis server for the whole session."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(redis_server_of_session: RedisServer) -> Iterator[RedisServer]:
    """Give one test an empty Redis server, with the settings that it came with.

    The test may stop it or freeze it; one that changes its configuration restarts it.
    """
    redis_server_of_session.start()
    with redis_server_of_session.client() as client:
        client.flushall()
    yield redis_server_of_session
    redis_server_of_session.start()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Name an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/tfm_guard.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Run the test once on each kind of database, empty at first."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url = request.getfixturevalue(fixture)
    assert isinstance(url, str)
    return url


def _fail_if_left_out(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a skip or an expected failure a failure: what a machine lacks must not look tested."""
    if report.outcome == "skipped":
        reason = getattr(report, "wasxfail", "") or report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped or xfailed, which nothing may be: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what was skipped while running."""
    report = yield
    _fail_if_left_out(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that was skipped as a whole."""
    report = yield
    _fail_if_left_out(report)
    return report
