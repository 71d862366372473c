"""Let schemathesis loose on the management API, served by uvicorn, and count what came back."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.fuzz.seen import Seen
from tests.support.api import call, first_token
from tests.support.servers import ROOT
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard.scopes import BUILT_IN_SCOPES

DESCRIPTION: Final = "/v1/openapi.json"
# Which valid requests are refused is judged by a check of our own.
_ARGUMENTS: Final = ("--exclude-checks", "positive_data_acceptance")


class Outcome(NamedTuple):
    """What schemathesis found, and how often which operation was answered with which status."""

    passed: bool
    report: str
    answers: Counter[tuple[str, int]]
    operations: frozenset[str]

    @property
    def never_done(self) -> set[str]:
        """The operations that never succeeded."""
        done = {operation for operation, status in self.answers if status in range(200, 300)}
        return {*self.operations} - done


def fuzz(database_url: str, folder: Path, arguments: Sequence[str] = ()) -> Outcome:
    """Fuzz the API on an empty database; *folder* takes what is written meanwhile."""
    tokens = [first_token(database_url, *BUILT_IN_SCOPES) for _ in range(2)]
    seen = folder / "seen"
    env = {"TFM_GUARD_DATABASE_URL": database_url}
    with UvicornProcess("tests.fuzz.served:app", env=env, ready_path=DESCRIPTION) as server:
        kept = call(server.url, "GET", "/v1/api-keys/", token=tokens[0]).json
        described = call(server.url, "GET", DESCRIPTION)
        done = _run_schemathesis(
            server.url,
            folder,
            arguments,
            FUZZ_URL=server.url,
            FUZZ_TOKEN=tokens[0],
            FUZZ_MAKER_TOKEN=tokens[1],
            FUZZ_KEPT=",".join(row["id"] for row in kept),
            FUZZ_SEEN=str(seen),
        )
    answers = Seen.counted(seen)
    # Schemathesis does not ask for the description again.
    answers["getDescription", described.status] += 1
    operations = frozenset(_operations(described.json))
    return Outcome(done.returncode == 0, done.stdout + done.stderr, answers, operations)


def _run_schemathesis(
    url: str, folder: Path, arguments: Sequence[str], **env: str
) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("schemathesis")
    return subprocess.run(
        [program, "run", f"{url}{DESCRIPTION}", *_ARGUMENTS, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def _operations(description: dict[str, Any]) -> list[str]:
    return [
        operation["operationId"]
        for methods in description["paths"].values()
        for operation in methods.values()
    ]
