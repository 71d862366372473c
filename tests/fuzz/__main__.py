"""Fuzz for long and print what came of it: python -m tests.fuzz [schemathesis' arguments]."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.fuzzer import fuzz
from tests.support.postgres import PostgresServer

_LONG = ("--max-examples", "300")


@contextmanager
def _databases(folder: Path) -> Iterator[dict[str, str]]:
    with PostgresServer() as server:
        yield {
            "sqlite": f"sqlite:///{folder}/tfm_guard.db",
            "postgresql": server.create_database("fuzzed"),
        }


def main(arguments: list[str]) -> int:
    """Fuzz the API on each kind of database; return the exit status."""
    failed = False
    with tempfile.TemporaryDirectory() as root, _databases(Path(root)) as databases:
        for kind, url in databases.items():
            folder = Path(root, kind)
            folder.mkdir()
            outcome = fuzz(url, folder, [*_LONG, *arguments])
            sys.stdout.write(f"{outcome.report}\nOn {kind}, answers by operation and status:\n")
            for (operation, status), count in sorted(outcome.answers.items()):
                sys.stdout.write(f"  {operation:16} {status} {count:6}\n")
            sys.stdout.writelines(f"never done: {each}\n" for each in outcome.never_done)
            failed |= not outcome.passed or bool(outcome.never_done)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
