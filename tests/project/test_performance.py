"""What the pages say of performance is what was measured, and nothing else."""

import json
import re

from benchmarks.everything import PLOTS, SUBJECTS, outline, report
from benchmarks.measuring import from_json
from benchmarks.quote import README, RESULTS, replaced
from tests.support.servers import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text()


def test_the_readme_quotes_the_committed_results() -> None:
    """Its table, and its list of what was missed, are those that `make bench-full` wrote."""
    readme = README.read_text()
    assert replaced(readme, json.loads(RESULTS.read_text())) == readme


def test_the_committed_results_are_whole() -> None:
    """They have every subject and every plot, and their page is made of them."""
    content = json.loads(RESULTS.read_text())
    results = [from_json(json.dumps(result)) for result in content["results"]]
    assert [result.subject for result in results] == [*SUBJECTS, "contest"]
    assert all((RESULTS.parent / f"{name}.svg").exists() for name in PLOTS)
    assert (RESULTS.parent / "results.md").read_text() == report(results, content)


def test_the_committed_results_name_no_machine() -> None:
    """The machine is told by its kind; no path and no host is among what is committed."""
    content = json.loads(RESULTS.read_text())
    assert str(content["cores"]) in outline(content)
    everything = "".join(path.read_text() for path in RESULTS.parent.iterdir())
    assert not re.search(r"/(home|root|work|tmp)/|127\.0\.0\.1|localhost", everything)


def test_each_target_is_described_with_its_script() -> None:
    """docs/performance.md has a row for T1 to T12, and each names a script that there is."""
    rows = re.findall(r"^\| (T\d+) \|.+\| `(\w+)` \|$", PAGE, re.MULTILINE)
    assert [target for target, _ in rows] == [f"T{number}" for number in range(1, 13)]
    assert {script for _, script in rows} == set(SUBJECTS)
