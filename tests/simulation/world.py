"""A world: some processes, one database, Redis, people, faults; and one step after another."""

import asyncio
import contextlib
import functools
import struct
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgspec

from tests.simulation import faults
from tests.simulation.actors import Actors
from tests.simulation.database import SimDatabase
from tests.simulation.invariants import Oracle, Violation
from tests.simulation.network import Network
from tests.simulation.process import Process, SimThreads
from tests.simulation.redis_servers import Deployment
from tests.simulation.timeline import Timeline
from tfm_guard import confirmation, freshness, hashing, link, reader, shared_cache, usage
from tfm_guard.settings import Settings
from tfm_guard.store import Installation
from tfm_guard.testing import CHEAP_HASHING
from tfm_guard.token import DigestKeys

_LEASE = 0.5  # seconds; other times that belong to it are shortened as much
_MAX_AGE = 4.0  # seconds that an entry counts: not ten minutes, so that some grow old
_QUIET_SECONDS = 6.0  # a write that was lost just before is given up after 5
_RECOVERING = 0.2  # how many worlds are healed at their end
_REMEMBERED = 60  # events that are shown of a world that went wrong


class World:
    """Everything there is, made from one *seed*. Raises `Violation` where an invariant fails."""

    def __init__(
        self, seed: int, *, focus: Sequence[faults.Fault] = (), verbose: bool = False
    ) -> None:
        self.seed = seed
        self.steps = 0
        self.digest = 0
        self.counts: Counter[str] = Counter()
        self.max_age = _MAX_AGE
        self.violation: Violation | None = None
        self.trace: deque[str] = deque(maxlen=_REMEMBERED)
        self._verbose = verbose
        self.timeline = Timeline(seed)
        self.random = self.timeline.random
        self.settings = _settings(self.random)
        self.installation = _installation(self.random)
        self.digest_keys = DigestKeys.from_secrets([self.installation.root_secret])
        self.with_redis = self.random.random() < 0.75
        self.network = Network(self.timeline)
        self.deployment = Deployment(self.timeline)
        dialect = self.random.choice(("sqlite", "postgresql"))
        self.database = SimDatabase(self.timeline, self.installation, dialect=dialect)
        imported = self.random.choice((0.0, 0.0, 0.5))  # how many keys come from elsewhere
        self.database.tables.imports = lambda: self.random.random() < imported
        count = self.random.choice((2, 2, 3))
        self.processes = [Process(f"p{number}", self) for number in range(count)]
        self.oracle = Oracle(self)
        self.actors = Actors(self)
        self.victim: Process | None = None  # of the last fault that was about one process
        self._eager = self.random.choice((0.5, 0.9, 1.0))  # how surely work comes before time
        self._ends: list[Callable[[], None]] = []
        chosen = [fault for fault in faults.FAULTS if self.random.random() < 0.2]
        self._faults = list(focus) or chosen
        self.timeline.after(self.random.uniform(0.3, 1.0), self._go_wrong)
        self.timeline.after(0.5, self._save_redis)

    def run(self, steps: int) -> None:
        """Take that many steps, then heal everything and see that all is well again."""
        with self._in_place():
            try:
                while self.steps < steps:
                    self._step()
                if self.random.random() < _RECOVERING:
                    self._recover()
            finally:
                for process in self.processes:
                    process.crash()

    def fail(self, invariant: int, what: str) -> None:
        """Note that an invariant does not hold; the step that this happens in is the last."""
        if self.violation is None:
            self.violation = Violation(invariant, what)
            self.trace.append(f"{self.timeline.now:10.4f}  VIOLATION  {self.violation}")

    def count(self, what: str) -> None:
        """Note that something happened that the run should have had."""
        self.counts[what] += 1

    def note(self, who: object, what: str) -> None:
        """Add to the trace."""
        if self._verbose:
            self.trace.append(f"{self.timeline.now:10.4f}  {who}  {what}")

    def note_error(self, context: dict[str, Any]) -> None:
        """Take what asyncio could only report for what it is: a fault."""
        self.fail(16, f"{context.get('message')}: {context.get('exception')!r}")

    def current_process(self) -> Process:
        """Return the process whose code is running."""
        loop = asyncio.get_running_loop()
        return next(process for process in self.processes if process.loop is loop)

    def _step(self) -> None:
        self.steps += 1
        ready = [process for process in self.processes if process.is_ready()]
        who = 0
        if ready and self._work_comes_first():
            process = self.random.choice(ready)
            who = 1 + self.processes.index(process)
            if self._verbose:
                self.note(process, describe(process.loop.ready[0]))
            process.loop.run_one()
        else:
            self.timeline.advance()
        self.digest = zlib.crc32(struct.pack("<dB", self.timeline.now, who), self.digest)
        self.oracle.check_memories()
        if self.violation is not None:
            raise self.violation

    def _work_comes_first(self) -> bool:
        """Tell whether somebody who has something to do does it before more time passes."""
        soon = self.timeline.next_time() < self.timeline.now + 0.02
        return not soon or self.random.random() < self._eager

    def _run_for(self, seconds: float) -> None:
        end = self.timeline.now + seconds
        while self.timeline.now < end:
            self._step()

    def _recover(self) -> None:
        self._faults.clear()
        for end in list(self._ends):
            end()
        self.network.heal()
        self.deployment.stuck.clear()
        self._eager = 1.0
        for process in self.processes:
            process.paused = False
            if not process.running:
                process.start()
        self.actors.calm_down()
        self.note("world", "all faults are healed")
        self._run_for(_QUIET_SECONDS)
        self.oracle.check_recovery()
        self._ask_everywhere()
        self.actors.stop()
        self._run_for(3.0)
        self.oracle.check_idle()
        self._raise_if_failed()

    def _ask_everywhere(self) -> None:
        asked = [
            (process, facts, self.actors.verify(process, facts))
            for process in self.processes
            for facts in self.oracle.good_keys()
        ]
        self._run_for(1.5)
        for process, facts, task in asked:
            if not task.done() or not task.result():
                self.fail(19, f"{process} does not accept {facts} although all is well")

    def _raise_if_failed(self) -> None:
        if self.violation is not None:
            raise self.violation

    def _go_wrong(self) -> None:
        """Have some faults happen at about the same time, and keys revoked meanwhile."""
        lease = self.installation.lease
        lasting = self.random.choice((0.3, 2.0, 8.0)) * self.random.uniform(0.5, 1.0) * lease
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self.timeline.after(self.random.random() ** 3 * lease, self._begin_fault, lasting)
        for longest in (0.1, self.random.choice((0.5, 3.0))):
            self.timeline.after(self.random.random() * longest * lease, self.actors.revoke_some)
        # As a rule all is well again before the next, so that memories are full.
        calm = self.random.choice((0.0, lasting, lasting)) + self.random.uniform(1.0, 3.0) * lease
        self.timeline.after(calm, self._go_wrong)

    def _begin_fault(self, lasting: float) -> None:
        if not self._faults:
            return
        fault = self.random.choice(self._faults)
        if self.random.random() < 0.5:
            self.timeline.after(self.random.uniform(0.0, 0.05), self.actors.revoke_some)
        end = fault(self)
        self.count(fault.__name__)
        self.note("world", fault.__name__)

        def heal() -> None:
            self._ends.remove(heal)
            end()
            self.note("world", f"{fault.__name__} ends")

        self._ends.append(heal)
        self.timeline.after(lasting, self._heal, heal)

    def _heal(self, end: Callable[[], None]) -> None:
        if end in self._ends:
            end()

    def _save_redis(self) -> None:
        snapshots = self.deployment.snapshots
        snapshots.append(dict(self.deployment.primary.values))
        del snapshots[:-12]
        self.timeline.after(1.0, self._save_redis)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put this world around the real code."""
        remember = reader.KeyReader._remember  # noqa: SLF001  # watched, not changed

        def watched(self_: Any, prefix: str, known: Any, *args: Any) -> None:
            remember(self_, prefix, known, *args)
            kept = self_._local.entries.get(prefix.encode())  # noqa: SLF001
            if kept is not None:
                process = self.current_process()
                self.oracle.check_remembered(process, known.entry, kept.deadline)

        know_entry = reader.KeyReader._know_entry  # noqa: SLF001  # watched, not changed

        def watched_too(self_: Any, prefix: str, entry: Any, *args: Any) -> Any:
            self.oracle.check_believed(self.current_process(), entry)
            return know_entry(self_, prefix, entry, *args)

        with contextlib.ExitStack() as stack:
            for target, name, value in (
                (hashing, "ThreadPoolExecutor", functools.partial(SimThreads, world=self)),
                (shared_cache, "random", self.random),
                (link, "random", self.random),
                (usage, "random", self.random),
                (link, "_PING_SECONDS", self.installation.lease / 4),
                (link, "_SILENCE_SECONDS", self.installation.lease / 2),
                (confirmation, "_LONGEST_PAUSE_SECONDS", self.installation.lease / 6),
                (confirmation, "CONFIRM_SECONDS", 2.5 * self.installation.lease),
                (shared_cache, "MAX_AGE_SECONDS", self.max_age),
                (reader, "MAX_AGE_SECONDS", self.max_age),
                (freshness, "FLOOR_SECONDS", 2 * self.max_age),
                (reader.KeyReader, "_remember", watched),
                (reader.KeyReader, "_know_entry", watched_too),
            ):
                stack.enter_context(replaced(target, name, value))
            yield


@contextlib.contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Have *target* hold *value* under *name* for a while."""
    former = vars(target)[name]
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, former)


def describe(handle: asyncio.Handle) -> str:
    """Say what a callback is about to do."""
    callback: Any = handle._callback  # type: ignore[attr-defined]  # noqa: SLF001  # shown, not used
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return str(getattr(callback, "__qualname__", callback))
    coroutine: Any = task.get_coro()
    place = ""
    while getattr(coroutine, "cr_frame", None) is not None:
        place += f" > {coroutine.__qualname__}:{coroutine.cr_frame.f_lineno}"
        coroutine = coroutine.cr_await
    return f"task {getattr(task, 'number', '?')}{place}"


def _settings(random: Random) -> Settings:
    settings = Settings.load(
        {},
        database_url="sqlite:///simulated",
        plans={"free": 4},
        local_cache_size=random.choice((1, 2, 100)),
        **CHEAP_HASHING,
    )
    # In less time than a setting may say: all that happens regularly is faster here.
    return msgspec.structs.replace(settings, usage_flush_seconds=_LEASE)


def _installation(random: Random) -> Installation:
    return Installation(
        id="simulated",
        root_secret=random.randbytes(32),
        tag_key=random.randbytes(32),
        lease=_LEASE,
        unfed=_LEASE * random.choice((3, 5)),
        poll_interval=_LEASE / 3,
        linked_poll_interval=_LEASE / 2,
    )
