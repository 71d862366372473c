"""The example under uvicorn with one worker and with several, on an empty database."""

from collections.abc import Iterator

import pytest

from tests.support.api import EMAIL, call, first_token
from tests.support.redis import RedisServer
from tests.support.servers import process_family, wait_until
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess

# Each on a connection of its own: with four workers, all but surely all of them answer some.
CONNECTIONS = 40


def statuses(url: str, token: str) -> set[int]:
    """Return how many connections, one after the other, were answered to *token*."""
    return {
        call(url, "POST", "/v1/emails/", token=token, body=EMAIL).status for _ in range(CONNECTIONS)
    }


@pytest.mark.parametrize("workers", [1, 4])
def test_all_workers_agree_about_a_key(database_url: str, workers: int) -> None:
    """Workers that start at once on an empty database all serve, and accept and refuse alike."""
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": database_url}, workers=workers) as server:
        family = process_family(server.pid)
        managing = first_token(database_url, "api-keys:read", "api-keys:write", "send")
        created = call(server.url, "POST", "/v1/api-keys/", token=managing, body={"name": "Shop"})
        token = created.json["key"]

        assert statuses(server.url, token) == {202}
        path = f"/v1/api-keys/{created.json['id']}"
        assert call(server.url, "DELETE", path, token=managing).status == 204
        assert statuses(server.url, token) == {401}

        listed = call(server.url, "GET", "/v1/api-keys/", token=managing).json
        assert [key["name"] for key in listed] == ["First"]
        assert process_family(server.pid) == family
        assert server.output.count("Application startup complete.") == workers
    assert execute(database_url, "SELECT count(*) FROM tfm_schema_version") == [(1,)]
    assert execute(database_url, "SELECT count(*) FROM tfm_secrets WHERE name = 'root'") == [(1,)]
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    ("method", "path", "token", "expected"),
    [
        ("GET", "/healthz", False, 200),
        ("GET", "/healthz/", False, 401),
        ("GET", "/", False, 401),
        ("GET", "/", True, 404),
        ("POST", "/v1/emails", True, 404),
        ("POST", "/v1/api-keys", True, 404),
        ("PUT", "/v1/emails/", True, 405),
        ("PUT", "/v1/api-keys/", True, 405),
    ],
)
def test_the_example_answers_each_path_exactly(
    example: tuple[str, str], method: str, path: str, *, token: bool, expected: int
) -> None:
    """Only /healthz needs no key; a path without its last slash is another path, no redirect."""
    url, valid = example
    assert call(url, method, path, token=valid if token else None).status == expected


@pytest.mark.parametrize("path", ["/v1/emails/", "/v1/api-keys/"])
def test_a_wrong_method_is_answered_like_every_error(example: tuple[str, str], path: str) -> None:
    """A 405 of the example and one of the management API have the same form, and name Allow."""
    url, valid = example
    answer = call(url, "PUT", path, token=valid)
    assert answer.status == 405
    assert set(answer.json["detail"]) == {"code", "message"}
    assert answer.json["detail"]["code"] == "method_not_allowed"
    assert "POST" in str(answer.headers["allow"])


def test_the_example_uses_the_redis_that_its_variable_names(
    sqlite_url: str, redis_server: RedisServer
) -> None:
    """With TFM_GUARD_REDIS_URL set, a key that was used is found in that Redis."""
    variables = {"TFM_GUARD_DATABASE_URL": sqlite_url, "TFM_GUARD_REDIS_URL": redis_server.url}
    with UvicornProcess(env=variables) as server, redis_server.client() as client:
        token = first_token(sqlite_url)
        assert call(server.url, "POST", "/v1/emails/", token=token, body=EMAIL).status == 202
        wait_until(lambda: bool(client.keys("tfm:*")), what="an entry in Redis")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Serve the example on a SQLite file; its URL and a valid token."""
    database = f"sqlite:///{tmp_path_factory.mktemp('example')}/keys.db"
    with UvicornProcess(env={"TFM_GUARD_DATABASE_URL": database}) as server:
        yield server.url, first_token(database)
