"""Trying one fault: what counts as tried, what must hold, and what it shows without the defence."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.faults.deployment import Deployment, Key, Servers, Shape, Told, until
from tests.faults.load import REVOKED, VALID, Answer, Load
from tests.support.servers import ServerFailed

# Less than this, and a fault was not tried.
_ACCEPTED_BEFORE: Final = 50
_ASKED_PER_SECOND: Final = 200
_VALID_SHARE: Final = 0.99
USUAL: Final = Shape()
_RECOVERY_SECONDS: Final = 5.0
_WARM_SECONDS: Final = 20.0
# How it is said that a revoked key was accepted.
LET_IN: Final = "accepted after return"


@dataclass
class Stage:
    """One trial of one fault on a deployment."""

    deployment: Deployment
    full: bool  # in all its length, or as short as still shows it
    off: str = ""  # the defence that is switched off
    missed: list[str] = field(default_factory=list)  # promises
    untried: list[str] = field(default_factory=list)  # why it cannot count
    accepted: int = 0
    wrong: int = 0
    took: float | None = None
    how: str = ""
    notes: list[str] = field(default_factory=list)
    load: Load | None = None
    # The key is not accepted in requests that start after this; none: nobody promised that yet.
    since: float | None = None

    def expect(self, held: bool, promise: str) -> None:  # noqa: FBT001  # as an assertion reads
        """Note whether a promise was kept."""
        if not held:
            self.missed.append(promise)

    def begin(self) -> None:
        """Make both keys, and have every worker accept them often enough."""
        deployment = self.deployment
        self.key: Key = deployment.create_key()
        self.valid: Key = deployment.create_key()
        self.cold: Key = deployment.create_key()  # not asked for by the load
        ports = [worker.port for worker in deployment.workers]
        self.load = Load(
            deployment.background,
            ports,
            revoked=self.key.token,
            valid=(self.valid.token, deployment.create_key().token),
        )
        load = self.load
        warm = until(
            lambda: all(
                load.count(worker, REVOKED, 200) >= _ACCEPTED_BEFORE for worker in range(len(ports))
            ),
            "every worker accepts the key",
            _WARM_SECONDS,
        )
        if not warm:
            self.untried.append("not accepted often enough before")

    def revoke(self, by: int = 0) -> Told:
        """Delete the key through one worker, and note how that went."""
        deleted = self.deployment.delete(self.key, by)
        self.took = deleted.seconds
        self.how = str(deleted.status)
        if deleted.status == 204:
            self.since = min(self.since or deleted.returned, deleted.returned)
            self.how = self.deployment.workers[by].state()["how"] or "204"
        return deleted

    def rest(self, worker: int) -> None:
        """Ask a worker nothing for now, so that it holds no old requests when it goes on."""
        assert self.load is not None
        self.load.rest(worker)

    def go_on(self, worker: int) -> None:
        """Ask it again."""
        assert self.load is not None
        self.load.go_on(worker)

    def watch(self, seconds: float) -> None:
        """Let the load go on for so long.

        Without the defence it is over as soon as the revoked key has been accepted.
        """
        end = time.monotonic() + seconds
        until(lambda: time.monotonic() >= end or self._shown(), "time to pass", seconds + 1)

    def _shown(self) -> bool:
        return bool(self.off) and self.since is not None and self._let_in(self.since) > 0

    def _let_in(self, since: float) -> int:
        return sum(answer.status == 200 for answer in self.answers(REVOKED, since=since))

    def churn(self, seconds: float) -> None:
        """Let the load go on for so long, while now and then somebody creates a key.

        That makes all processes forget what they know of keys that there are not.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._shown():
            self.deployment.create_key()
            self.watch(0.3)

    def end(self, *, excused: tuple[int, ...] = (), unavailable: bool = False) -> None:
        """Stop the load and count: *excused* workers could not answer; 503 may be promised."""
        assert self.load is not None
        stopped = time.monotonic()
        self.load.stop()
        for worker in range(len(self.deployment.workers)):
            if self.since is not None and worker not in excused:
                self._check_asked(worker, self.since, stopped)
            self._check_valid(worker, strictly=not unavailable and worker not in excused)
        if self.since is not None:
            accepted = self._let_in(self.since)
            self.accepted += accepted
            self.expect(accepted == 0, f"{accepted} {LET_IN}")

    def answers(
        self, key: str, *, since: float = 0.0, workers: tuple[int, ...] | None = None
    ) -> list[Answer]:
        """Return what was answered to requests with *key* that started after *since*."""
        assert self.load is not None
        return [
            answer
            for answer in list(self.load.answers)
            if answer.key == key
            and answer.started >= since
            and (workers is None or answer.server in workers)
        ]

    def count(self, key: str, worker: int, *, status: int = 200, since: float = 0.0) -> int:
        """Count one worker's answers with *status* to requests that started after *since*."""
        answers = self.answers(key, since=since, workers=(worker,))
        return sum(answer.status == status for answer in answers)

    def latency(
        self,
        share: float,
        *,
        since: float,
        key: str = VALID,
        workers: tuple[int, ...] | None = None,
    ) -> float:
        """Return in how many seconds a *share* of the requests started after *since* were over."""
        return quantile(
            share,
            [each.ended - each.started for each in self.answers(key, since=since, workers=workers)],
        )

    def _check_asked(self, worker: int, since: float, stopped: float) -> None:
        assert self.load is not None
        rate = self.load.started_since(since, worker, REVOKED) / (stopped - since)
        if rate < _ASKED_PER_SECOND:
            self.untried.append(f"worker {worker} was asked {rate:.0f} times a second afterwards")

    def _check_valid(self, worker: int, *, strictly: bool) -> None:
        answers = self.answers(VALID, workers=(worker,))
        right = sum(answer.status == 200 for answer in answers)
        refused = sum(answer.status in (400, 401, 403) for answer in answers)
        self.wrong += refused + (len(answers) - right - refused if strictly else 0)
        self.expect(refused == 0, f"worker {worker} refused the valid key {refused} times")
        if strictly and right < _VALID_SHARE * len(answers):
            share = right / max(len(answers), 1)
            self.missed.append(f"worker {worker} accepted the valid key {share:.1%} of times")


def quantile(share: float, numbers: list[float]) -> float:
    """Return what a *share* of *numbers* does not exceed."""
    return sorted(numbers)[math.ceil(share * len(numbers)) - 1] if numbers else math.inf


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault, and what is promised under it."""

    number: int
    name: str
    promise: str
    trial: Callable[[Stage], None]
    off: str  # the defence that is switched off to show that the trial then fails
    shows: str = LET_IN  # what is missed then: part of the words in which the trial says so
    shape: Shape = USUAL


@dataclass(frozen=True)
class Result:
    """What trying a row showed, with the defence and without it."""

    row: Row
    on: Stage
    off: Stage
    recovered: bool

    @property
    def faults(self) -> list[str]:
        """What is wrong with it; nothing where the promise was kept and the defence matters."""
        found = [f"not tried: {reason}" for reason in self.on.untried]
        found += self.on.missed
        if not self.recovered:
            found.append(f"not well {_RECOVERY_SECONDS:g} s after the fault was healed")
        if not self.shown:
            found.append(f"held without its defence ({self.row.off})")
        return found

    @property
    def shown(self) -> str:
        """What was missed without the defence, of what it is for."""
        return next((missed for missed in self.off.missed if self.row.shows in missed), "")

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table that is printed."""
        took = "" if self.on.took is None else f"{self.on.took:.3f} s"
        accepted = str(self.on.accepted)
        off = str(self.off.accepted) if self.row.shows == LET_IN else self.shown
        verdict = "; ".join(self.faults) or "ok"
        how = "; ".join([*([self.on.how] if self.on.how else []), *self.on.notes])
        name = f"F{self.row.number} {self.row.name}"
        return name, took, how, accepted, str(self.on.wrong), off or "held", verdict


class Theatre:
    """Tries rows, on as few deployments as possible: one is used again while it is well."""

    def __init__(self, servers: Servers, *, full: bool) -> None:
        self._servers = servers
        self._full = full
        self._deployment: Deployment | None = None
        self.complaints: list[str] = []  # about servers that did not end when they were told to

    def try_row(self, row: Row) -> Result:
        """Try a row with its defence, then without it."""
        on, recovered = self._try_once(row, None)
        off, _ = self._try_once(row, row.off)
        return Result(row, on, off, recovered)

    def close(self) -> None:
        """End the last deployment."""
        deployment, self._deployment = self._deployment, None
        if deployment is not None:
            try:
                deployment.close()
            except ServerFailed as error:
                self.complaints.append(str(error))

    def _try_once(self, row: Row, off: str | None) -> tuple[Stage, bool]:
        deployment = self._deployment_of(row.shape)
        stage = Stage(deployment, self._full, off or "")
        recovered = False
        try:
            if off is not None:
                deployment.break_all(off)
            row.trial(stage)
        except Exception as error:  # noqa: BLE001  # one row must not end the others
            stage.untried.append(f"{type(error).__name__}: {error}")
        finally:
            if stage.load is not None:
                stage.load.stop()
            recovered = self._recovers(deployment)
        if not recovered:
            self.close()
        return stage, recovered

    def _recovers(self, deployment: Deployment) -> bool:
        try:
            deployment.mend()
            return until(
                lambda: deployment.is_well(deployment.admin), "recovery", _RECOVERY_SECONDS
            )
        except Exception:  # noqa: BLE001  # whatever it is, it is not well
            return False

    def _deployment_of(self, shape: Shape) -> Deployment:
        if self._deployment is not None and self._deployment.shape != shape:
            self.close()
        if self._deployment is None:
            self._deployment = Deployment(self._servers, shape)
            self._deployment.start()
        return self._deployment
