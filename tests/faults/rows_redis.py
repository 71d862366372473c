"""Faults of Redis and of the way to it."""

from tests.faults.deployment import Shape
from tests.faults.trial import Row, Stage

_COLD = Shape(remembers=1)


def _frozen(stage: Stage) -> None:
    stage.begin()
    stage.deployment.redis.freeze()
    deleted = stage.revoke()
    stage.watch(1.5)
    stage.expect(deleted.status == 204, f"revoking answered {deleted.status}")
    stage.expect(deleted.seconds <= 3.5, "revoking took more than 3.5 s")
    worst = stage.latency(1.0, since=0.0)
    later = stage.latency(0.5, since=deleted.returned)
    stage.notes.append(f"p50 {later * 1000:.1f} ms with the breaker open")
    stage.expect(worst <= 0.6, f"a request took {worst:.2f} s")
    stage.expect(later <= 0.05, f"p50 was {later:.3f} s with the breaker open")
    stage.end()


ROWS = [
    Row(
        number=7,
        name="Redis frozen",
        promise="authentication goes on from the database; revoking returns in 3.5 s",
        trial=_frozen,
        off="no_breaker",
        shape=_COLD,
    ),
]
