"""Facts about servers under faults: the most telling ones. `make faults` tries all."""

import re
from collections.abc import Iterator

import pytest

from tests.faults.deployment import Servers
from tests.faults.rows import ROWS
from tests.faults.trial import Row, Theatre
from tests.support.background import Background
from tests.support.servers import ROOT

# Of each kind some, of each defence one, and those that count requests and not milliseconds.
TELLING = {2, 3, 11, 25, 26, 27, 35, 41, 56, 63}


@pytest.fixture(scope="module")
def theatre() -> Iterator[Theatre]:
    """Try rows one after the other, on as few deployments as possible."""
    with Background() as background:
        servers = Servers(background)
        theatre = Theatre(servers, full=False)
        yield theatre
        theatre.close()
        servers.close()
        assert theatre.complaints == []


def test_the_documentation_lists_what_is_tried() -> None:
    """docs/faults.md has a line for each fault, with the promise that is tried."""
    listed = [
        line
        for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
        if re.match(r"\| \d", line)
    ]
    rows = sorted(ROWS, key=lambda row: row.number)
    assert listed == [f"| {row.number} | {row.name} | {row.promise} |" for row in rows]


@pytest.mark.alone
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"F{row.number}") for row in ROWS if row.number in TELLING]
)
def test_nothing_is_accepted_after_revoking_returned(row: Row, theatre: Theatre) -> None:
    """Under the fault the promise is kept, and it is not once its defence is switched off."""
    result = theatre.try_row(row)
    assert result.faults == [], row.promise
