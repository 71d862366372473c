"""Facts about requests that nobody thought of. `make fuzz` makes many more, on SQLite too."""

from pathlib import Path

from tests.fuzz.fuzzer import fuzz

# The same requests each time, and nothing that goes over many of them.
BRIEFLY = ("--phases", "examples,coverage", "--seed", "1")


def test_every_answer_is_described(postgres_url: str, tmp_path: Path) -> None:
    """Hundreds of requests, valid or not, get the answers that are described, and none is a 5xx.

    Each operation succeeds at least once: hooks.py says how that is made certain.
    """
    outcome = fuzz(postgres_url, tmp_path, BRIEFLY)
    assert outcome.passed, outcome.report
    assert sum(outcome.answers.values()) > 300
    assert outcome.never_done == set()
    assert {status for _, status in outcome.answers if status >= 500} == set()
