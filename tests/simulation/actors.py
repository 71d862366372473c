"""What people and programs do to the guards: they verify, create, revoke, and go away."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tests.simulation.invariants import KeyFacts
from tfm_guard.errors import GuardError, InvalidToken, KeyNotFound, PlanLimitReached, Unavailable
from tfm_guard.records import Change, CreatedKey
from tfm_guard.token import RANDOM_BYTES, Tagger

if TYPE_CHECKING:
    from tests.simulation.loop import SimTask
    from tests.simulation.process import Process
    from tests.simulation.world import World

T = TypeVar("T")

ACCOUNTS = ("acme", "umbrella")
_FEW = 3  # good keys: more are made then
_HOT = 5  # keys that nearly all requests are about
_SCOPES = ("send", "domains:read", "webhooks:read", "emails:read")


class Actors:
    """Everyone who asks something of the processes of *world*."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._random = world.timeline.random
        self._pause = self._random.choice((0.05, 0.2, 0.4))  # seconds between arrivals
        self._tagger = Tagger(world.installation.tag_key)
        self._calls: list[tuple[Process, SimTask[Any]]] = []
        self._cancelled: set[SimTask[Any]] = set()
        self._early: set[bytes] = set()  # tokens that were asked about before they were made
        self._verifying_only = False
        self._stopped = False
        self._deeds: list[Callable[[], None]] = [
            *[self._verify_one] * 12,
            self._verify_many,
            self._verify_wrong,
            self._create,
            self.revoke,
            self.revoke_again,
            *[self._take] * 2,
            self._resume,
            self._cancel,
            self._list,
        ]
        world.database.on_commit.append(self._try_what_changed)
        world.database.on_registered.append(self._revoke_just_then)
        world.timeline.after(0.0, self._arrive)

    def calm_down(self) -> None:
        """Do nothing but verify from now on."""
        self._verifying_only = True
        self._pause = 0.2

    def stop(self) -> None:
        """Do nothing more."""
        self._stopped = True

    def verify(self, process: "Process", facts: KeyFacts) -> "SimTask[bool]":
        """Have *process* asked about a key; the task tells whether it accepts it."""
        return self._call(process, self._ask(process, facts))

    def _arrive(self) -> None:
        if self._stopped:
            return
        if self._verifying_only:
            self._verify_one()
        elif len(self._world.oracle.good_keys()) < _FEW:
            self._create()
            self._verify_one()
        else:
            self._random.choice(self._deeds)()
        self._world.timeline.after(self._random.expovariate(1 / self._pause), self._arrive)

    def _call(self, process: "Process", work: Coroutine[Any, Any, T]) -> "SimTask[T]":
        if len(self._calls) > 64:
            self._calls = [(p, task) for p, task in self._calls if not task.done()]
        task = process.spawn(work)
        self._calls.append((process, task))
        return task

    def _some_process(self) -> "Process | None":
        running = [process for process in self._world.processes if process.running]
        return self._random.choice(running) if running else None

    def _some_key(self) -> KeyFacts | None:
        if self._random.random() < 0.8 and (good := self._world.oracle.good_keys()):
            return self._random.choice(good[-_HOT:])
        keys = list(self._world.oracle.keys.values())
        return self._random.choice(keys[-_HOT:]) if keys else None

    def _verify_one(self) -> None:
        process, facts = self._some_process(), self._some_key()
        if process is None:
            return
        if facts is None:
            self._verify_wrong()
        else:
            self.verify(process, facts)

    def _verify_many(self) -> None:
        facts = self._some_key()
        for process in self._world.processes:
            if process.running and facts is not None:
                for _ in range(self._random.randrange(1, 4)):
                    self.verify(process, facts)

    def _verify_wrong(self) -> None:
        process, facts = self._some_process(), self._some_key()
        if process is not None:
            prefix = self._random.randbytes(4) if facts is None else bytes.fromhex(facts.prefix)
            token = self._tagger.mint(prefix + self._random.randbytes(16))
            self._call(process, self._ask_wrong(process, token))

    def _create(self) -> None:
        if (process := self._some_process()) is not None:
            self._call(process, self._make(process, self._random.choice(ACCOUNTS)))

    def revoke_some(self) -> None:
        """Have some process revoke a key, or two at about the same time.

        Rather not the one that a fault has just been about: what it remembers is the question.
        """
        process = self._some_process()
        if process is self._world.victim:
            process = self._some_process()
        for _ in range(self._random.choice((1, 1, 2))):
            self._random.choice((self.revoke, self.revoke, self._take))(process)
        if self._random.random() < 0.3:
            self.revoke_again(process)

    def revoke(self, process: "Process | None" = None) -> None:
        """Have *process*, or some other, revoke a key."""
        if self._verifying_only:
            return
        if process is None or not process.running:
            process = self._some_process()
        facts = self._world.oracle.some_remembered_key() or self._some_key()
        if process is not None and facts is not None:
            self._call(process, self._end(process, facts))

    def revoke_again(self, process: "Process | None" = None) -> None:
        """Have *process*, or some other, join the wait for a revocation, or be told it is over."""
        if self._verifying_only:
            return
        if process is None or not process.running:
            process = self._some_process()
        begun = [f for f in self._world.oracle.keys.values() if f.committed < float("inf")]
        if process is not None and begun:
            self._call(process, self._end(process, self._random.choice(begun[-_HOT:])))

    def _take(self, process: "Process | None" = None) -> None:
        """Have *process*, or some other, take something from a key, or all from an account."""
        if self._verifying_only:
            return
        if process is None or not process.running:
            process = self._some_process()
        facts = self._world.oracle.some_remembered_key() or self._some_key()
        if process is not None and facts is not None:
            work = self._random.choice((self._change, self._rotate, self._suspend))
            self._call(process, work(process, facts))

    def _resume(self) -> None:
        if self._verifying_only:
            return
        suspended = [*self._world.database.tables.suspended]
        process = self._some_process()
        if process is not None and suspended:
            self._call(process, self._let_go_on(process, self._random.choice(suspended)))

    def _list(self) -> None:
        if (process := self._some_process()) is not None:
            self._call(process, self._look(process))

    def _cancel(self) -> None:
        waiting = [
            (p, task) for p, task in self._calls if not task.done() and p.loop is task.get_loop()
        ]
        if waiting:
            process, task = self._random.choice(waiting)
            self._cancelled.add(task)
            process.loop.call_soon(task.cancel)

    def _try_what_changed(self, changes: list[Change]) -> None:
        """Ask about a key that is being revoked at the moments that matter."""
        for change in changes:
            facts = self._world.oracle.keys.get(change.prefix)
            if facts is not None and change.kind not in {"created", "renamed"}:
                seconds = self._random.choice((0.0, 0.01, 0.3, 2.0)) * self._random.random()
                self._world.timeline.after(seconds, self._verify_everywhere, facts)

    def _revoke_just_then(self) -> None:
        """Now and then, have a key revoked at about the time at which a process joins."""
        if self._random.random() < 0.5:
            self._world.timeline.after(self._random.uniform(0.0, 0.2), self.revoke)

    def _verify_everywhere(self, facts: KeyFacts) -> None:
        if self._stopped:
            return
        for process in self._world.processes:
            if process.running:
                self.verify(process, facts)

    def _ask_too_early(self, token: bytes) -> None:
        self._early.add(token)
        for process in self._world.processes:
            if process.running:
                self._call(process, self._ask_wrong(process, token))

    # What happens inside a process.

    async def _ask(self, process: "Process", facts: KeyFacts) -> bool:
        world = self._world
        began, at = world.steps, world.timeline.now
        hits = process.guard.counters.negative_hits
        try:
            key = await process.guard.verify(facts.token)
        except InvalidToken as error:
            world.count("refused")
            world.oracle.refused(
                process,
                facts,
                error.reason,
                began=began,
                at=at,
                from_memory=process.guard.counters.negative_hits > hits,
            )
        except Unavailable:
            world.count("unavailable")
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
        else:
            world.count("accepted")
            world.oracle.accepted(process, facts, key, began, at)
            return True
        return False

    async def _ask_wrong(self, process: "Process", token: bytes) -> None:
        try:
            await process.guard.verify(token)
        except (InvalidToken, Unavailable):
            self._world.count("wrong")
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
        else:
            self._world.oracle.accepted_unknown(process, token)

    async def _make(self, process: "Process", account_id: str) -> None:
        expires_at = None
        if self._random.random() < 0.3:
            seconds = self._random.uniform(0.5, 6.0)
            expires_at = self._world.database.now + timedelta(seconds=seconds)
        if self._random.random() < 0.2:
            chosen = self._random.randbytes(RANDOM_BYTES)
            self._ask_too_early(self._tagger.mint(chosen))
            await asyncio.sleep(0.01)
            process.next_random = chosen  # what the guard makes its next token of
        try:
            created = await process.guard.keys.create(
                account_id=account_id, name="a key", scopes=_SCOPES, expires_at=expires_at
            )
        except PlanLimitReached:
            self._world.count("over the plan")
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
        else:
            self._world.count("created")
            self._take_note(created)

    def _take_note(self, created: CreatedKey) -> None:
        token = created.token.encode()
        facts = self._world.oracle.created(token, created.key, asked_before=token in self._early)
        self._verify_everywhere(facts)

    async def _end(self, process: "Process", facts: KeyFacts) -> None:
        try:
            done = await process.guard.keys.revoke(facts.account_id, facts.key_id)
        except KeyNotFound:
            # Said only of a key whose revocation has been confirmed: as good as returning.
            self._world.count("revoked before")
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
            return
        else:
            self._world.count(f"revoked, {done.how}")
        self._world.oracle.returned(facts)
        self._verify_everywhere(facts)

    async def _change(self, process: "Process", facts: KeyFacts) -> None:
        """Take one scope, or none, which joins the wait for what was taken before; or rename."""
        kept = self._random.choice((None, facts.scopes_left, *[_less(facts)] * 4))
        try:
            await process.guard.keys.change(
                facts.account_id, facts.key_id, name=f"key {self._world.steps}", scopes=kept
            )
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
            return
        self._world.count("renamed" if kept is None else "narrowed")
        if kept is not None:
            self._world.oracle.narrowed(facts, kept)
        self._verify_everywhere(facts)

    async def _rotate(self, process: "Process", facts: KeyFacts) -> None:
        grace = timedelta(seconds=self._random.choice((0.0, 0.0, 0.3, 2.0)))
        try:
            rotated = await process.guard.keys.rotate(facts.account_id, facts.key_id, grace=grace)
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
            return
        how = "NotConfirmed" if rotated.confirmed is None else rotated.confirmed.how
        self._world.count("rotated")
        self._world.count(f"rotated, {how}")
        if rotated.confirmed is not None:
            self._world.oracle.rotated(facts)
        self._take_note(rotated)
        self._verify_everywhere(facts)

    async def _suspend(self, process: "Process", facts: KeyFacts) -> None:
        account_id = facts.account_id
        account = self._world.oracle.accounts[account_id]
        number = account.suspensions
        if account.suspended == float("inf"):
            number += 1  # unless others come first
        self._world.timeline.after(self._random.uniform(0.1, 3.0), self._resume)
        try:
            done = await process.guard.accounts.suspend(account_id)
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
            return
        self._world.count(f"suspended, {done.how}")
        self._world.oracle.suspended(account_id, number)
        self._verify_everywhere(facts)

    async def _let_go_on(self, process: "Process", account_id: str) -> None:
        try:
            await process.guard.accounts.resume(account_id)
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)
            return
        self._world.count("resumed")
        for facts in self._world.oracle.good_keys()[-_HOT:]:
            self._verify_everywhere(facts)

    async def _look(self, process: "Process") -> None:
        try:
            await process.guard.keys.list(self._random.choice(ACCOUNTS))
        except BaseException as error:  # noqa: BLE001  # it is judged there
            self._judge(process, error)

    def _judge(self, process: "Process", error: BaseException) -> None:
        """Accept what may be raised; report all else."""
        if isinstance(error, GuardError):
            self._world.count(type(error).__name__)
            return
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task in self._cancelled:
            raise error
        if isinstance(error, GeneratorExit):
            raise error
        self._world.fail(8, f"{process} raises {error!r}")


def _less(facts: KeyFacts) -> frozenset[str]:
    return frozenset(sorted(facts.scopes_left)[1:])
