"""Write what was measured into the README, from the committed results and from nothing else.

python -m benchmarks.quote
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.everything import COMMAND, CONTEST, outline
from benchmarks.measuring import Figure, markdown, number, row_of
from tests.support.servers import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "results.json"
README = ROOT / "README.md"
BEGINNING, END = "<!-- measured -->\n", "<!-- end of measured -->\n"
ADDED, SERVED = ": added to a request", ": requests/s, of no keys"


def figures_of(content: Mapping[str, Any], subject: str | None = None) -> list[Figure]:
    """Return the figures of one *subject* in the results, or of all."""
    return [
        Figure(**{name: value for name, value in figure.items() if name != "met"})
        for result in content["results"]
        if subject in {None, result["subject"]}
        for figure in result["figures"]
    ]


def contest_table(content: Mapping[str, Any]) -> str:
    """Return what each contender adds to a request, and how much of the throughput it leaves."""
    found = {figure.name: figure for figure in figures_of(content, CONTEST)}
    names = [name.removesuffix(ADDED) for name in found if name.endswith(ADDED)]
    rows = []
    for name in names[1:]:  # the first has no keys, and is what the others are compared with
        served = found.get(name + SERVED)
        share = "" if served is None else f"{number(served.value)} %"
        rows.append((name, f"{number(found[name + ADDED].value)} S", share))
    return markdown(("behind", "added to a request", "requests/s, of no keys at all"), rows)


def missed_table(content: Mapping[str, Any]) -> str:
    """Return the targets that were missed, or that none was."""
    missed = [row_of(figure) for figure in figures_of(content) if figure.met is False]
    if not missed:
        return "No target was missed.\n"
    told = markdown(
        ("target", "what", "measured", "demanded"), [(*row[:3], row[4]) for row in missed]
    )
    return f"Missed were:\n\n{told}"


def quoted(content: Mapping[str, Any]) -> str:
    """Return the README's part of the results."""
    targets = [figure for figure in figures_of(content) if figure.met is not None]
    met = sum(figure.met is True for figure in targets)
    return (
        f"`{COMMAND}` on {outline(content)}, in the middle of its runs. S is the time of one\n"
        "SHA-256 of a token in the same process.\n\n"
        f"{contest_table(content)}\n"
        f"Of {len(targets)} numbers with a target {met} met it. {missed_table(content)}"
    )


def replaced(readme: str, content: Mapping[str, Any]) -> str:
    """Return *readme* with its part about the results as they are now."""
    before, _, rest = readme.partition(BEGINNING)
    _, _, after = rest.partition(END)
    return f"{before}{BEGINNING}{quoted(content)}{END}{after}"


def main(results: Path = RESULTS, readme: Path = README) -> None:
    """Write."""
    readme.write_text(replaced(readme.read_text(), json.loads(results.read_text())))


if __name__ == "__main__":
    main()
