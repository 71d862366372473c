"""The benchmarks run, and tell all that they promise; how fast anything is, no test asserts."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.everything import PLOTS, SUBJECTS, drawn, report
from benchmarks.measuring import Figure, Result, from_json, number
from benchmarks.plots import Axis, line_chart
from benchmarks.quote import BEGINNING, END, figures_of, quoted, replaced
from tests.support.servers import ROOT

# What each says of which target, at the least.
TARGETS = {
    "warm_path": {"T1", "T7"},
    "served": {"T2"},
    "local_cache": {"T3"},
    "shared_cache": {"T4"},
    "cold": {"T5", "T6"},
    "revoking": {"T8"},
    "usage": {"T9"},
    "creating": {"T10"},
    "starting": {"T11"},
    "idle": {"T12"},
}
# Those that need no servers for long: `make bench` runs all.
BRIEFLY = ("warm_path", "cold", "starting")
MACHINE = {"cores": 2, "cpu": "a processor", "python": "3", "system": "a system", "kernel": "6"}


def run(module: str, *arguments: str) -> Any:
    """Return the JSON that a module prints."""
    command = [sys.executable, "-W", "error", "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr  # 1: a target was missed
    return json.loads(done.stdout)


def test_each_target_has_its_benchmark() -> None:
    """Every target from T1 to T12 is measured by one of the scripts that `make bench` runs."""
    assert tuple(TARGETS) == SUBJECTS
    assert set().union(*TARGETS.values()) == {f"T{number}" for number in range(1, 13)}


@pytest.mark.parametrize("subject", BRIEFLY)
def test_a_benchmark_tells_everything(subject: str) -> None:
    """In its briefest form too, a script prints S, and a verdict on each of its targets."""
    result = run(subject, "--brief", "--json")
    assert result["subject"] == subject
    assert result["s_ns"] > 0
    judged = [figure for figure in result["figures"] if figure["met"] is not None]
    assert {figure["target"] for figure in judged} == TARGETS[subject]
    assert all(figure["name"] and figure["value"] >= 0 for figure in judged)
    # Reads of the database, argon2 and right answers are counted: the same on every machine.
    assert all(figure["met"] for figure in judged if figure["target"] == "T5")


def test_the_guard_can_be_driven_like_its_contenders() -> None:
    """The driver of the contest measures this library as it does the others."""
    found = run("contenders.drive", "with_tfm_guard", "--brief")
    assert found["s_ns"] > 0
    assert len(found["added"]) == 3
    assert found["percentiles"]


@pytest.mark.parametrize(
    ("bounds", "value", "met"),
    [
        ({"most": 5}, 5, True),
        ({"most": 5}, 5.1, False),
        ({"least": 5}, 4.9, False),
        ({"least": 1, "most": 1}, 1, True),
        ({}, 1, None),
    ],
)
def test_a_figure_knows_whether_its_target_is_met(
    bounds: dict[str, float], value: float, met: object
) -> None:
    """A bound itself is still good; without a bound there is no verdict."""
    assert Figure(target="T1", name="x", value=value, unit="S", **bounds).met is met


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (4.9, "4.90"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """A number is written with three digits that count, or whole."""
    assert number(value) == text


def results(*values: float) -> list[Result]:
    """Return made-up results of the contest and of one target of at most 5 S, for each value."""
    contest = [
        Figure(target="", name=f"{who}: added to a request", value=added, unit="S")
        for who, added in (("no keys at all", 0.0), ("tfm-guard", 5.0), ("another", 80.0))
    ]
    judged = [Figure(target="T1", name="added", value=value, unit="S", most=5) for value in values]
    return [
        Result(subject="warm_path", s_ns=300, figures=judged),
        Result(subject="contest", s_ns=300, figures=contest, notes=["one does not run"]),
    ]


def content(*values: float) -> dict[str, Any]:
    """Return the same as it is committed."""
    plain = [json.loads(json.dumps(result, default=vars)) for result in results(*values)]
    return {**MACHINE, "seconds": 1, "results": plain}


def test_the_readme_tells_what_was_missed() -> None:
    """What is quoted has every contender, and the missed targets with what they demand."""
    text = quoted(content(4.0, 6.0))
    assert "| another | 80 S |" in text
    assert "Of 2 numbers with a target 1 met it." in text
    assert "| T1 | added | 6 S | ≤ 5 |" in text
    assert "No target was missed." in quoted(content(4.0))


def test_only_the_marked_part_of_the_readme_is_replaced() -> None:
    """What stands before and after stays, and to write the same again changes nothing."""
    once = replaced(f"before\n{BEGINNING}old\n{END}after\n", content(4.0))
    assert once.startswith(f"before\n{BEGINNING}`make bench-full`")
    assert once.endswith(f"{END}after\n")
    assert "old" not in once
    assert replaced(once, content(4.0)) == once


def test_a_report_names_the_machine_and_what_could_not_be_measured() -> None:
    """The page of results has the command, the machine, what was missed, and who did not run."""
    page = report(results(6.0), {**MACHINE, "seconds": 1})
    assert "Made by `make bench-full` on 2 cores of a processor" in page
    assert "Missed: T1 (added)." in page
    assert "Not measured: one does not run" in page


def test_results_survive_json() -> None:
    """What one process prints, another reads back."""
    (first, _) = results(6.0)
    again = from_json(json.dumps(first, default=vars))
    assert again == first
    assert [figure.met for figure in figures_of(content(6.0), "warm_path")] == [False]


def test_a_chart_has_every_line_and_both_axes() -> None:
    """A chart is well-formed, escapes names, and spans its points on both kinds of axes."""
    lines = {"a < b": [(1.0, 0.5), (1000.0, 2.0)], "c": [(10.0, 1.0)]}
    chart = line_chart("Title", lines, across=Axis("keys", logarithmic=True), up=Axis("S"))
    assert "a &lt; b" in chart
    assert chart.count('class="line"') == 4  # each line, and its sample beside its name
    assert ">1,000</text>" in chart
    assert drawn(PLOTS["keys"], {}) is None
