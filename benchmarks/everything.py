"""Measure every target, T1 to T12, each subject in a process of its own.

Prints a table, and exits 1 if a target is missed. With --results it measures longer, has the
contenders run too, and writes what came of it into a folder: JSON, Markdown and plots.

    python -m benchmarks.everything [--json] [--brief] [--results FOLDER]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import HEADINGS, Result, from_json, markdown, row_of, table
from benchmarks.plots import Axis, line_chart
from tests.support.servers import ROOT

# In the order of the targets.
SUBJECTS = (
    "warm_path",
    "served",
    "local_cache",
    "shared_cache",
    "cold",
    "revoking",
    "usage",
    "creating",
    "starting",
    "idle",
)
CONTEST = "contest"
COMMAND = "make bench-full"


def measure(subject: str, *options: str) -> Result:
    """Return what one subject came to."""
    command = [sys.executable, "-m", f"benchmarks.{subject}", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if not done.stdout:
        raise SystemExit(f"{subject} did not come to an end")
    return from_json(done.stdout)


def machine() -> dict[str, Any]:
    """Return an outline of this machine that names nobody."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    system = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "python": platform.python_version(),
        "system": system.get("PRETTY_NAME", platform.system()).strip('"'),
        "kernel": platform.release().partition("-")[0],
    }


def outline(found: Mapping[str, Any]) -> str:
    """Return the machine in a sentence."""
    return (
        f"{found['cores']} cores of {found['cpu']}, Python {found['python']}, {found['system']}, "
        f"Linux {found['kernel']}"
    )


def report(results: list[Result], about: Mapping[str, Any]) -> str:
    """Return the results as a page in Markdown."""
    parts = [
        f"# Results\n\nMade by `{COMMAND}` on {outline(about)}, in {about['seconds']:.0f} s.\n",
        (
            "S is the time of one SHA-256 of a token in the same process; what each target means, "
            "and how it is measured, is in [docs/performance.md](../../docs/performance.md).\n"
        ),
    ]
    missed = [figure for result in results for figure in result.missed]
    told = ", ".join(f"{figure.target} ({figure.name})" for figure in missed) or "none"
    parts.append(f"Missed: {told}.\n")
    for result in results:
        parts.append(f"## {result.subject.replace('_', ' ')}\n\nS = {result.s_ns:.0f} ns\n")
        parts.append(markdown(HEADINGS, map(row_of, result.figures)))
        parts += [f"Not measured: {note}\n" for note in result.notes]
    parts += [f"![{name}]({name}.svg)\n" for name in PLOTS]
    return "\n".join(parts)


class Plot(NamedTuple):
    """A plot: where its lines come from, the curves whose names begin so, and its axes."""

    title: str
    subject: str
    beginning: str
    across: Axis
    up: Axis
    in_percent: bool = False


PLOTS = {
    "latency": Plot(
        "A request in the process, in S",
        CONTEST,
        "latency: ",
        Axis("percent of the requests that take no longer"),
        Axis("S", logarithmic=True),
        in_percent=True,
    ),
    "throughput": Plot(
        "Requests a second behind uvicorn",
        CONTEST,
        "served: ",
        Axis("connections", logarithmic=True),
        Axis("requests/s", logarithmic=True),
    ),
    "keys": Plot(
        "A hit in memory, in S",
        "local_cache",
        "",
        Axis("keys in memory", logarithmic=True),
        Axis("S"),
    ),
    "revoking": Plot(
        "Until a key is refused everywhere",
        "revoking",
        "",
        Axis("percent of the revocations that take no longer"),
        Axis("ms", logarithmic=True),
        in_percent=True,
    ),
}


def drawn(plot: Plot, curves: Mapping[str, Any]) -> str | None:
    """Return *plot* with those of the *curves* that it is of; none if there are none."""
    factor = 100 if plot.in_percent else 1
    lines = {
        name.removeprefix(plot.beginning): [(factor * across, up) for across, up in points]
        for name, points in curves.items()
        if name.startswith(plot.beginning)
    }
    return line_chart(plot.title, lines, across=plot.across, up=plot.up) if lines else None


def write(folder: Path, results: list[Result], about: Mapping[str, Any]) -> None:
    """Write *results* into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": COMMAND, **about, "results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "results.md").write_text(report(results, about))
    curves = {result.subject: result.curves for result in results}
    for name, plot in PLOTS.items():
        if (picture := drawn(plot, curves[plot.subject])) is not None:
            (folder / f"{name}.svg").write_text(picture)


def main() -> None:
    """Measure, print, and write if asked to; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--brief", action="store_true", help="only to see that it works")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="measure longer, and write")
    options = parser.parse_args()
    subjects = [*SUBJECTS, CONTEST] if options.results else SUBJECTS
    length = ["--brief"] if options.brief else ["--long"] if options.results else []
    results, started = [], time.monotonic()
    for subject in subjects:
        results.append(measure(subject, *length))
        print(f"{subject}: {results[-1].seconds:.0f} s", file=sys.stderr)
    about = {**machine(), "seconds": round(time.monotonic() - started)}
    if options.results:
        write(options.results, results, about)
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        figures = [figure for result in results for figure in result.figures if figure.target]
        print(f"{outline(about)}; {about['seconds']} s\n\n{table(figures)}")
    missed = [figure for result in results for figure in result.missed]
    print(f"\n{len(missed)} missed" if missed else "\nAll met.", file=sys.stderr)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
