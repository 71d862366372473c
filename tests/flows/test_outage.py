"""The database goes away under load and comes back: a valid key is never called invalid."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.api import EMAIL, Answer, call, first_token
from tests.support.postgres import PostgresServer
from tests.support.servers import wait_until
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess

pytestmark = pytest.mark.alone

THREADS = 4
BACK_WITHIN_SECONDS = 5.0


class Load:
    """Threads that send emails with one valid key, over and over, and keep every answer."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._token = token
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(THREADS)]
        self.answers: list[Answer] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Send until the end of the block."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def await_answers(self, status: int, *, number: int, seconds: float = 30.0) -> None:
        """Wait until *number* further answers have come with *status*."""
        before = self._count(status)
        wait_until(
            lambda: self._count(status) >= before + number,
            what=f"{number} answers with {status}",
            seconds=seconds,
        )

    def _count(self, status: int) -> int:
        return sum(answer.status == status for answer in self.answers)

    def _send(self) -> None:
        while not self._over.is_set():
            self.answers.append(
                call(self._url, "POST", "/v1/emails/", token=self._token, body=EMAIL)
            )


def check_outage(
    database_url: str, take_away: Callable[[], None], give_back: Callable[[], None]
) -> None:
    """Take the database away from a server under load, give it back, and check every answer."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": database_url}) as server:
        load = Load(server.url, first_token(database_url))
        pid = server.pid
        with load.running():
            load.await_answers(202, number=20)
            take_away()
            load.await_answers(503, number=20)
            refused = call(server.url, "POST", "/v1/emails/", token="tfm_k_nonsense", body=EMAIL)
            wait_until(lambda: "the feed cannot be read" in server.output, what="no feed")
            give_back()
            load.await_answers(202, number=20, seconds=BACK_WITHIN_SECONDS)
            wait_until(lambda: "the feed can be read again" in server.output, what="the feed")
        assert server.pid == pid

    assert {answer.status for answer in load.answers} == {202, 503}
    assert refused.status == 401
    for answer in load.answers:
        if answer.status == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["retry-after"].isdigit()
            assert answer.headers["www-authenticate"] is None
            assert answer.json["detail"]["code"] == "unavailable"
    assert "tokens could not be verified, the last: " in server.output


def test_postgresql_stopped_under_load(postgres_server: PostgresServer, postgres_url: str) -> None:
    """Stopped at once, PostgreSQL leaves 503 with Retry-After; back on its port, 202 within 5 s."""
    check_outage(postgres_url, postgres_server.stop, postgres_server.start)


def test_sqlite_that_cannot_answer_under_load(sqlite_url: str) -> None:
    """While SQLite fails every query, clients get 503 with Retry-After; afterwards 202 at once.

    Its tables are taken away, that of the feed among them: else memory would go on counting.
    """
    tables = ("tfm_keys", "tfm_feed")

    def take_away() -> None:
        for table in tables:
            execute(sqlite_url, f"ALTER TABLE {table} RENAME TO {table}_away")

    def give_back() -> None:
        for table in tables:
            execute(sqlite_url, f"ALTER TABLE {table}_away RENAME TO {table}")

    check_outage(sqlite_url, take_away, give_back)
