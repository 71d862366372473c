"""A process: a guard in an event loop of its own, which may be paused, crash, and start again."""

from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tests.simulation.database import SimStore
from tests.simulation.loop import SimLoop, SimTask, new_loop
from tests.simulation.redis_servers import SimRedisAccess
from tests.simulation.timeline import SimClock
from tfm_guard import Guard
from tfm_guard.freshness import Freshness
from tfm_guard.redis_access import RedisAccess
from tfm_guard.store import Store

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")


class SimGuard(Guard):
    """A guard whose store and Redis are simulated."""

    def __init__(self, process: "Process", world: "World") -> None:
        self._process = process
        self._world = world
        super().__init__(world.settings, clock=process.clock, random=process.random)

    def _new_store(self) -> Store:
        return cast("Store", SimStore(self._process, self._world.database, self._world.network))

    def _new_redis(self) -> RedisAccess | None:
        world = self._world
        if not world.with_redis:
            return None
        access = SimRedisAccess(self._process, world.deployment, world.network, world.timeline)
        return cast("RedisAccess", access)


class Process:
    """One process: its *loop* and *guard* are replaced whenever it starts again."""

    guard: SimGuard
    loop: SimLoop

    def __init__(self, name: str, world: "World") -> None:
        random = world.timeline.random
        self.name = name
        self.paused = False
        self.running = False
        self.lives = 0
        self.next_random = b""
        self._world = world
        self.clock = SimClock(
            world.timeline,
            rate=random.choice((0.99, 1.0, 1.01)),
            off=random.choice((0, 0, 3600, -3600)),
        )
        self.start()

    def __repr__(self) -> str:
        return f"{self.name}.{self.lives}"

    def start(self) -> None:
        """Begin another life."""
        self.lives += 1
        self.running, self.paused = True, False
        self.next_random = b""
        self.loop = new_loop(self._world.timeline, self.clock, self._world.note_error)
        self.guard = SimGuard(self, self._world)
        self.spawn(self._open())

    def crash(self) -> None:
        """End without another word."""
        self.running = False
        self.loop.crash()

    def is_ready(self) -> bool:
        """Tell whether it has something to do and can do it."""
        return bool(self.loop.ready) and self.running and not self.paused

    def spawn(self, work: Coroutine[Any, Any, T]) -> "SimTask[T]":
        """Have *work* done by a task in this process."""
        return cast("SimTask[T]", self.loop.create_task(work))

    async def _open(self) -> None:
        # A server whose start-up fails is opened by its first request.
        try:
            await self.guard.open()
        except Exception as error:  # noqa: BLE001  # whatever it is, requests will meet it again
            self._world.note(self, f"not opened: {error!r}")

    def random(self, count: int) -> bytes:
        """Give the guard *count* random bytes; those to make a token of, if they were chosen."""
        chosen, self.next_random = self.next_random, b""
        if len(chosen) == count:
            return chosen
        return self._world.timeline.random.randbytes(count)

    def floor(self, prefix: str) -> int:
        """Return the version below which this process believes nothing about a key."""
        return 0 if self.parts is None else self.freshness.floor(prefix)

    @property
    def freshness(self) -> Freshness:
        """The open guard's place in the feed."""
        found: Freshness = self.parts.verifier._freshness  # noqa: SLF001  # as above
        return found

    @property
    def parts(self) -> Any:
        """What the open guard is made of; none if it is not open."""
        return self.guard._parts  # noqa: SLF001  # nothing else leads inside


class SimThreads:
    """What argon2 has in the place of its pool of threads: *count* jobs at a time, each slow."""

    def __init__(self, count: int, thread_name_prefix: str, *, world: "World") -> None:
        del thread_name_prefix
        self.busy = 0
        self._count = count
        self._world = world
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closed = False

    def submit(self, job: Callable[[], Any]) -> "Future[Any]":
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._waiting.append((future, job))
        self._begin()
        return future

    def shutdown(self, *, wait: bool) -> None:
        assert not wait
        self._closed = True

    def _begin(self) -> None:
        while self._waiting and self.busy < self._count:
            future, job = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self.busy += 1
                seconds = self._world.timeline.random.choice((0.01, 0.01, 0.8))
                seconds *= self._world.timeline.random.random()
                self._world.timeline.after(seconds, self._end, future, job)

    def _end(self, future: "Future[Any]", job: Callable[[], Any]) -> None:
        self.busy -= 1
        try:
            future.set_result(job())
        except Exception as error:  # noqa: BLE001  # whoever asked gets to know
            future.set_exception(error)
        self._begin()
