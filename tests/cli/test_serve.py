"""`tfm-guard serve`: the management API in a server of its own."""

import json
import signal
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.servers import PrivateServer, free_port
from tfm_guard.cli import main

PROGRAM = Path(sys.executable).with_name("tfm-guard")


class Served(PrivateServer):
    """``tfm-guard serve`` on the database at *url*."""

    def __init__(self, url: str, *, workers: int) -> None:
        super().__init__()
        self._url = url
        self._workers = workers

    def command(self) -> Sequence[str]:
        return [str(PROGRAM), "serve", "--port", str(self.port), "--workers", str(self._workers)]

    def environment(self) -> Mapping[str, str]:
        return {**super().environment(), "TFM_GUARD_DATABASE_URL": self._url}

    def answers(self) -> bool:
        output = self.output_since_start
        started = output.count("Application startup complete.")
        return "Uvicorn running on" in output and started == self._workers


@pytest.mark.parametrize("workers", [1, 2])
def test_it_serves_the_management_api(sqlite_url: str, workers: int) -> None:
    """A key with the scope lists its account's keys there; SIGTERM ends it with 0."""
    env = {"TFM_GUARD_DATABASE_URL": sqlite_url}
    arguments = ["--account", "acme", "--name", "Managing", "--scope", "api-keys:read"]
    created = CliRunner().invoke(main, ["keys", "create", *arguments], env=env)
    with Served(sqlite_url, workers=workers) as server:
        request = urllib.request.Request(  # our own address
            f"http://127.0.0.1:{server.port}/v1/api-keys/",
            headers={"Authorization": f"Bearer {created.stdout.strip()}"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310  # as above
            (key,) = json.load(answer)
            assert "server" not in answer.headers
        assert key["name"] == "Managing"
        server.stop()
        assert server._process is not None  # noqa: SLF001  # nothing else tells
        assert server._process.returncode in (0, -signal.SIGTERM)  # noqa: SLF001  # as above
        assert created.stdout.strip() not in server.output


def test_what_is_wrong_with_the_settings_is_told_once() -> None:
    """Without a database no process is started, and how to name one is said."""
    result = CliRunner().invoke(main, ["serve"], env={"TFM_GUARD_DATABASE_URL": None})
    assert result.exit_code == 1
    assert result.stderr.startswith("tfm-guard: TFM_GUARD_DATABASE_URL is not set\n")


def test_what_is_wrong_with_the_database_has_its_own_code() -> None:
    """A database that does not answer ends it with 3 before anything is served."""
    url = f"postgresql://acme:hunter2@127.0.0.1:{free_port()}/keys"
    result = CliRunner().invoke(main, ["serve", "--port", "0"], env={"TFM_GUARD_DATABASE_URL": url})
    assert (result.exit_code, result.stdout) == (3, "")
    assert "Connection refused" in result.stderr
    assert "hunter2" not in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "not a host"])
def test_an_address_that_cannot_be_used_is_told(sqlite_url: str, host: str) -> None:
    """A port that somebody else has, or a host that is none, ends it with 1 and how to choose."""
    env = {"TFM_GUARD_DATABASE_URL": sqlite_url}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["serve", "--host", host, "--port", str(port)]
        result = CliRunner().invoke(main, arguments, env=env)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"tfm-guard: {host}, port {port}, cannot be used: ")
    assert "--port N" in result.stderr
