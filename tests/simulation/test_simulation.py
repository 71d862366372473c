"""Thousands of moments at which something may go wrong, in worlds that do go wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.breaks import BREAKS
from tests.simulation.campaign import Campaign, main

ROOT = Path(__file__).parents[2]
STEPS = 210_000

# What a search has to have met, or it has shown nothing.
MET = (
    "accepted",
    "refused",
    "wrong",
    "unavailable",
    "created",
    "over the plan",
    "revoked, acknowledged",
    "revoked, lease",
    "revoked before",
    "NotConfirmed",
    "narrowed",
    "rotated",
    "suspended, acknowledged",
    "resumed",
)


def test_every_invariant_holds_after_every_step() -> None:
    """In 210,000 steps of worlds in which all kinds of faults happen, each invariant holds."""
    campaign = Campaign(first_seed=1)
    campaign.run(steps=STEPS)
    assert not campaign.failures, campaign.report()
    assert campaign.steps >= STEPS
    assert [what for what in MET if campaign.counts[what] < 15] == []
    assert campaign.faults_left_out() == []


def test_a_seed_replays_exactly() -> None:
    """Two processes whose hashes of texts differ take the very same steps from the same seed."""
    program = (
        "from tests.simulation.campaign import explore\n"
        "for world in map(explore, (3, 12)):\n"
        "    print(world.steps, world.digest, sorted(world.counts.items()))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    )
    assert first == second
    assert len(first.splitlines()) == 2


def test_a_violation_is_told_with_its_seed_and_what_led_to_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A campaign in which an invariant fails exits with 1 and shows the last events."""
    undo = BREAKS["revoking waits for nobody"]()
    try:
        status = main(["--seed", "1", "--steps", "100000"])
    finally:
        undo()
    output = capsys.readouterr().out
    assert status == 1
    assert "invariant 1: " in output
    assert "--seed" in output
    assert "KeyManager.revoke" in output
