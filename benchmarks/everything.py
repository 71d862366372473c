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
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
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
        "S is the time of one SHA-256 of a token in the same process; what each target means, and "
        "how it is measured, is in [docs/performance.md](../../docs/performance.md).\n",
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


def named(curves: Mapping[str, Any], beginning: str) -> dict[str, Any]:
    """Return the curves whose names begin so, under the rest of their names."""
    return {
        name.removeprefix(beginning): points
        for name, points in curves.items()
        if name.startswith(beginning)
    }


def plot(name: str, curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the plot of that *name*, of *curves* by subject."""
    percent = Axis("percent of the requests that take no longer")
    if name == "latency":
        lines = named(curves[CONTEST], "latency: ")
        lines = {who: [(100 * share, time) for share, time in at] for who, at in lines.items()}
        return line_chart("A request in the process, in S", lines, across=percent, up=Axis("S", True))  # noqa: FBT003
    if name == "throughput":
        lines = named(curves[CONTEST], "served: ")
        across = Axis("connections", logarithmic=True)
        return line_chart(
            "Requests a second behind uvicorn",
            lines,
            across=across,
            up=Axis("requests/s", logarithmic=True),
        )
    if name == "keys":
        across = Axis("keys in memory", logarithmic=True)
        return line_chart("A hit in memory, in S", curves["local_cache"], across=across, up=Axis("S"))
    lines = {
        who: [(100 * share, time) for share, time in at] for who, at in curves["revoking"].items()
    }
    percent = Axis("percent of the revocations that take no longer")
    return line_chart("Until a key is refused everywhere", lines, across=percent, up=Axis("ms"))


PLOTS = ("latency", "throughput", "keys", "revoking")


def write(folder: Path, results: list[Result], about: Mapping[str, Any]) -> None:
    """Write *results* into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": COMMAND, **about, "results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "results.md").write_text(report(results, about))
    curves = {result.subject: result.curves for result in results}
    for name in PLOTS:
        if options_have(curves, name):
            (folder / f"{name}.svg").write_text(plot(name, curves))


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
