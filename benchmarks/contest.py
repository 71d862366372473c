"""The same request behind other ways to ask for a key.

Each contender runs in a process of its own, those from the package index in an environment of their
own below build/, made on demand. Measured for each: a request to the app without keys, and to the
same app with them, as multiples of S; and how many requests a second uvicorn serves.

    python -m benchmarks.contest [--json] [--brief | --long]
"""

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from benchmarks.load import load, request_bytes
from benchmarks.measuring import Figure, Length, Result, median_s, run
from tests.support.servers import ROOT
from tests.support.uvicorn_process import UvicornProcess

ENVIRONMENTS = ROOT / "build" / "benchmarks"
SERVER = ("uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0", "starlette==1.10.0")
FASTAPI = ("fastapi==0.165.0", "sqlalchemy[asyncio]==2.1.9")


class Entry(NamedTuple):
    """Who takes part: its module in benchmarks/contenders, and what to install for it."""

    module: str
    packages: Sequence[str] = ()


ENTRIES: Mapping[str, Entry] = {
    "no keys at all": Entry("with_nothing"),
    "tfm-guard": Entry("with_tfm_guard"),
    "BaseHTTPMiddleware and a dict": Entry("with_dict"),
    "safe-api-keys 0.4.0": Entry("with_safe_api_keys", ("safe-api-keys==0.4.0",)),
    "keyshield 2.0.1": Entry("with_keyshield", ("keyshield[all]==2.0.1", *FASTAPI)),
    "keyshield 2.0.1, its delay off": Entry(
        "with_keyshield_undelayed", ("keyshield[all]==2.0.1", *FASTAPI)
    ),
    "fastapi-keygate 0.5.1": Entry("with_keygate", ("fastapi-keygate==0.5.1", *FASTAPI)),
}
CURVE = (1, 8, 64)  # connections


class CannotRun(Exception):
    """A contender cannot be installed or run here; the message says why."""


def last_line(text: str) -> str:
    """Return the last line of *text* that says anything."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no word")


def python_for(entry: Entry) -> Path:
    """Return the Python of the environment that has the packages of *entry*. Makes it if need be.

    Raises `CannotRun`.
    """
    if not entry.packages:
        return Path(sys.executable)
    folder = ENVIRONMENTS / entry.packages[0].partition("=")[0].partition("[")[0]
    python, ready = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join((*entry.packages, *SERVER))
    if ready.exists() and ready.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run(  # noqa: S603  # the packages named above
        [*pip, *entry.packages, *SERVER], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise CannotRun(f"not installed: {last_line(done.stderr)}")
    ready.write_text(wanted)
    return python


def drive(entry: Entry, length: Length) -> dict[str, Any]:
    """Return what a request costs. Raises `CannotRun`."""
    brief = ["--brief"] if length is Length.BRIEF else []
    command = [str(python_for(entry)), "-m", "benchmarks.contenders.drive", entry.module, *brief]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    if done.returncode:
        raise CannotRun(f"does not run: {last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class ContenderProcess(UvicornProcess):
    """uvicorn in a contender's environment."""

    def __init__(self, entry: Entry, token_file: Path) -> None:
        super().__init__(
            "benchmarks.contenders.drive:served",
            env={"DRIVEN": entry.module, "TOKEN_FILE": str(token_file)},
            extra_args=("--loop", "uvloop", "--no-access-log", "--log-level", "warning"),
        )
        self._python = python_for(entry)

    def command(self) -> Sequence[str]:
        return [str(self._python), *super().command()[1:]]


def serve(entry: Entry, seconds: float) -> list[tuple[float, float]]:
    """Return the requests per second, by the number of connections. Raises `CannotRun`."""
    with tempfile.TemporaryDirectory() as folder:
        token_file = Path(folder) / "token"
        with ContenderProcess(entry, token_file) as server:
            sent = request_bytes("/v1/emails/", token_file.read_text())
            return [
                (
                    count,
                    uvloop.run(
                        load(server.port, server.pid, sent, connections=count, seconds=seconds)
                    ).per_second,
                )
                for count in CURVE
            ]


def figures_of(name: str, found: Mapping[str, Any], bare_per_second: float | None) -> list[Figure]:
    """Return the figures of one contender."""
    added, per_second = found["added"], dict(found.get("served", ())).get(CURVE[-1])
    figures = [
        Figure(
            target="",
            name=f"{name}: added to a request",
            value=max(added[0], 0.0),
            unit="S",
            low=added[1],
            high=added[2],
        )
    ]
    if per_second is not None and bare_per_second is not None:
        share = 100 * per_second / bare_per_second
        figures.append(
            Figure(target="", name=f"{name}: requests/s, of no keys", value=share, unit="%")
        )
    return figures


def measure(length: Length) -> Result:
    """Return what was measured of each that can run here; who cannot is told on stderr."""
    result = Result(subject="contest", s_ns=median_s() * 1e9, figures=[])
    bare_per_second = None
    for name, entry in ENTRIES.items():
        try:
            found = drive(entry, length)
            if length is not Length.BRIEF:
                found["served"] = serve(entry, 1.0)
        except CannotRun as error:
            print(f"{name}: {error}", file=sys.stderr)
            result.notes.append(f"{name} {error}")
            continue
        result.curves[f"latency: {name}"] = found["percentiles"]
        if "served" in found:
            result.curves[f"served: {name}"] = found["served"]
            if bare_per_second is None:
                bare_per_second = dict(found["served"])[CURVE[-1]]
        result.figures += figures_of(name, found, bare_per_second)
    return result


if __name__ == "__main__":
    run("contest", __doc__, measure)
