"""The simulated store answers as the real one does, whatever it is asked."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from random import Random
from typing import Any
from uuid import UUID

import pytest

from tests.simulation.database import SimDatabase, SimStore
from tests.simulation.network import Postponed
from tests.simulation.timeline import START, Timeline
from tfm_guard.errors import GuardError
from tfm_guard.records import ApiKey, Tally
from tfm_guard.store import Place, Store
from tfm_guard.testing import ManualClock

ACCOUNTS = ("acme", "umbrella")
PREFIXES = tuple(f"0000000{n}" for n in range(8))
WORKERS = tuple(UUID(int=n) for n in range(1, 5))
LINKS = (None, "a", "b")
LONG_AGO, FAR_OFF = datetime(2001, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


class Direct:
    """A network over which everything arrives at once."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def ask(self, _process: Any, _server: str, execute: Callable[[], Any]) -> Awaitable[Any]:
        answer = asyncio.get_running_loop().create_future()
        while not answer.done():
            try:
                answer.set_result(execute())
            except Postponed as postponed:
                self._timeline.now = postponed.until
            except GuardError as error:
                answer.set_exception(error)
        return answer


class Questions:
    """Calls that a store can get, drawn by chance from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def draw(self) -> Callable[[Any], Awaitable[Any]]:
        """Return one question, to be asked of each store."""
        asked = (self._create, self._create, self._revoke, self._manage, self._look, self._poll)
        others = (self._register, self._strike_off, self._mark, self._use)
        managing = (self._take, self._take, self._suspend)
        return self._random.choice((*asked, *others, *managing))()

    def _create(self) -> Callable[[Any], Awaitable[Any]]:
        key = ApiKey(
            id=UUID(bytes=self._random.randbytes(16), version=4),
            key_prefix=self._random.choice(PREFIXES),
            account_id=self._random.choice(ACCOUNTS),
            name="CI",
            scopes=frozenset(self._random.sample(("send", "domains:read"), 1)),
            created_at=START,
            last_used_at=None,
            expires_at=self._random.choice((None, None, LONG_AGO, FAR_OFF)),
            replaced_by=None,
        )

        async def work(transaction: Any) -> Any:
            account = await transaction.lock_account(key.account_id)
            count = await transaction.count_active_keys(key.account_id)
            await transaction.insert_key(
                key, secret_hash="x", digest=b"d" * 16, digest_key_id="k", created_by="a test"
            )
            return account, count

        return lambda store: store.transact(work)

    def _revoke(self) -> Callable[[Any], Awaitable[Any]]:
        prefix, account_id = self._random.choice(PREFIXES), self._random.choice(ACCOUNTS)

        async def revoke(store: Any) -> Any:
            row = (await store.find_keys([prefix])).get(prefix)
            key_id = UUID(int=0) if row is None else row.id

            async def work(transaction: Any) -> Any:
                await transaction.lock_account(account_id)
                found = await transaction.lock_key(account_id, key_id)
                scopes = await transaction.active_scopes(account_id, key_id)
                if found is not None:
                    await transaction.change_key("revoked", found, revoked_at=transaction.now)
                    found = found.version, found.revoked_at is None, found.confirmed_at is None
                return found, scopes, await transaction.head()

            return await store.transact(work)

        return revoke

    def _manage(self) -> Callable[[Any], Awaitable[Any]]:
        account_id, plan = self._random.choice(ACCOUNTS), self._random.choice(("free", "pro"))

        async def work(transaction: Any) -> Any:
            await transaction.lock_account(account_id)
            await transaction.set_plan(account_id, plan)

        return lambda store: store.transact(work)

    def _take(self) -> Callable[[Any], Awaitable[Any]]:
        prefix, account_id = self._random.choice(PREFIXES), self._random.choice(ACCOUNTS)
        successor = UUID(int=self._random.randrange(2))
        replaced: dict[str, Any] = {"replaced_by": successor, "replaced_at": LONG_AGO}
        replaced["expires_at"] = self._random.choice((LONG_AGO, FAR_OFF, FAR_OFF))
        narrowed: dict[str, Any] = {"scopes": frozenset(), "name": "less"}
        kind, values = self._random.choice((("replaced", replaced), ("narrowed", narrowed)))

        async def take(store: Any) -> Any:
            row = (await store.find_keys([prefix])).get(prefix)
            key_id = UUID(int=0) if row is None else row.id

            async def work(transaction: Any) -> Any:
                found = await transaction.lock_key(account_id, key_id)
                pair = await transaction.has_active_predecessor(account_id, successor)
                if found is not None:
                    await transaction.change_key(kind, found, **values)
                return found, pair, await transaction.last_used_at(key_id)

            return await store.transact(work)

        return take

    def _suspend(self) -> Callable[[Any], Awaitable[Any]]:
        account_id = self._random.choice(ACCOUNTS)
        kind = self._random.choice(("suspended", "resumed"))

        async def work(transaction: Any) -> Any:
            account = await transaction.lock_known_account(account_id)
            states = await transaction.states(account_id, kind=kind)
            if account is not None:
                since = transaction.now if kind == "suspended" else None
                await transaction.suspend_account(account_id, since)
                await transaction.change_active_keys(kind, account_id)
            return account, states

        return lambda store: store.transact(work)

    def _look(self) -> Callable[[Any], Awaitable[Any]]:
        prefixes, account_id = self._random.sample(PREFIXES, 3), self._random.choice(ACCOUNTS)
        first = self._random.randrange(10)

        async def look(store: Any) -> Any:
            keys = await store.list_keys(account_id)
            between = await store.changes_between(first, first + 5)
            return await store.find_keys(prefixes), keys, between, await store.read_register()

        return look

    def _poll(self) -> Callable[[Any], Awaitable[Any]]:
        worker = self._random.choice(WORKERS)
        link, turn = self._random.choice(LINKS), self._random.randrange(20)
        place = Place(self._random.randrange(12), link, turn)
        polls = self._random.random() < 0.5

        async def poll(store: Any) -> Any:
            if not polls:
                return await store.record_place(worker, place)
            state = await store.poll(worker, place)
            return state and (state, await store.recent_changes(state, 1e8))

        return poll

    def _register(self) -> Callable[[Any], Awaitable[Any]]:
        worker, leaves = self._random.choice(WORKERS), self._random.random() < 0.5

        async def register(store: Any) -> None:
            await store.unregister_worker(worker)
            if not leaves:
                await store.register_worker(worker, "a test")

        return register

    def _strike_off(self) -> Callable[[Any], Awaitable[Any]]:
        silent, marked = self._random.sample(WORKERS, 2), self._random.sample(WORKERS, 1)
        seen = self._random.randrange(12)
        return lambda store: store.strike_off(silent, seen, marked=marked)

    def _mark(self) -> Callable[[Any], Awaitable[Any]]:
        prefix, confirms = self._random.choice(PREFIXES), self._random.random() < 0.5

        async def mark(store: Any) -> None:
            row = (await store.find_keys([prefix])).get(prefix)
            if row is not None and confirms:
                await store.confirm_revocation(row.id)
            elif row is not None:
                await store.set_digest(row.id, b"e" * 16, "l")

        return mark

    def _use(self) -> Callable[[Any], Awaitable[Any]]:
        prefix, account_id = self._random.choice(PREFIXES), self._random.choice(ACCOUNTS)
        flush = UUID(int=self._random.randrange(5))
        used_at = LONG_AGO.timestamp() - self._random.randrange(100)

        async def use(store: Any) -> Any:
            row = (await store.find_keys([prefix])).get(prefix)
            key_id = UUID(int=0) if row is None else row.id
            tally = Tally(key_id.bytes, int(used_at // 3600), 1, 0, used_at)
            await store.add_usage(flush, [tally])
            return await store.list_keys(account_id)

        return use


def plain(answer: Any) -> Any:
    """Return *answer* without its moments, which are each store's own."""
    if isinstance(answer, datetime):
        return None if answer > LONG_AGO and answer < FAR_OFF else answer
    if isinstance(answer, ApiKey):
        return plain(tuple(getattr(answer, name) for name in answer.__struct_fields__))
    if isinstance(answer, dict):
        return {key: plain(value) for key, value in answer.items()}
    if isinstance(answer, tuple | list):
        return [plain(value) for value in answer]
    return answer


async def answer_of(store: Any, ask: Callable[[Any], Awaitable[Any]]) -> Any:
    """Return what *store* answers, or which error it raises."""
    try:
        return plain(await ask(store))
    except GuardError as error:
        return type(error)


@pytest.mark.parametrize("seed", range(2))
async def test_answers_as_the_real_one(database_url: str, seed: int) -> None:
    """200 calls drawn by chance get the same answers from both, on SQLite and PostgreSQL."""
    timeline = Timeline(seed)
    dialect = database_url.partition(":")[0]
    clock = ManualClock(START)
    real = Store(database_url, pool_size=1, clock=clock)
    database = SimDatabase(timeline, await real.open(), dialect=dialect)
    network: Any = Direct(timeline)
    simulated = SimStore(_NOBODY, database, network)
    questions = Questions(seed)
    answered = 0
    for _ in range(200):
        ask = questions.draw()
        expected, answer = await answer_of(real, ask), await answer_of(simulated, ask)
        assert answer == expected
        answered += bool(answer)
        clock.advance(1.0)
        timeline.now += 1.0
    await real.close()
    assert answered > 30


_NOBODY: Any = None
