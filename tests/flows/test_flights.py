"""Facts about many requests for one key: they share reads, but never one made before a change."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, update

from tests.support.guards import (
    create,
    freshness_of,
    linked_guard,
    new_guard,
    prepare,
    refusal,
    revoke,
    shared_of,
    store_of,
    tagger_of,
    until,
    verifier_of,
    written,
)
from tests.support.redis import RedisServer
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.errors import InvalidToken, Unavailable
from tfm_guard.imports import BATCH, KeyToImport
from tfm_guard.records import CreatedKey, StoredKey, VerifiedKey
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

keys = schema.keys


class Gate:
    """Holds a guard's reads of the database back after they were made, while it is shut."""

    def __init__(self, guard: Guard, patch: pytest.MonkeyPatch) -> None:
        self._find_keys = store_of(guard).find_keys
        self.open = asyncio.Event()
        self.open.set()
        self.reads: list[list[str]] = []
        self._held = asyncio.Event()
        patch.setattr(store_of(guard), "find_keys", self._read)

    def shut(self) -> None:
        """Hold back the reads from now on."""
        self.open.clear()
        self._held.clear()

    async def holds_one(self) -> None:
        """Return once a read was made and is held back."""
        await self._held.wait()
        self._held.clear()

    async def _read(self, prefixes: Iterable[str]) -> dict[str, StoredKey]:
        prefixes = list(prefixes)
        gate = self.open
        rows = await self._find_keys(prefixes)
        self.reads.append(prefixes)
        if not gate.is_set():
            self._held.set()
            await gate.wait()
        return rows

    def let_through_later_ones(self) -> asyncio.Event:
        """Hold back only what is held; return what lets that go."""
        held, self.open = self.open, asyncio.Event()
        self.open.set()
        return held


@pytest.fixture
async def url(database_url: str) -> str:
    """Prepare a database for guards that poll when told to."""
    return await prepare(database_url)


@pytest.fixture
async def guard(url: str) -> AsyncIterator[Guard]:
    """Open the guard that is asked."""
    async with new_guard(url) as guard:
        yield guard


@pytest.fixture
async def other(url: str, guard: Guard) -> AsyncIterator[Guard]:
    """Open another process's guard."""
    async with new_guard(url) as other:
        yield other


@pytest.fixture
async def created(guard: Guard) -> CreatedKey:
    """Create a key that nobody has asked for."""
    return await create(guard)


@pytest.fixture
def gate(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Stand between the guard and its database."""
    return Gate(guard, monkeypatch)


def end_lease(guard: Guard) -> None:
    """Let a guard trust nothing until it polls."""
    freshness_of(guard).fresh_until = 0.0


def ask(guard: Guard, created: CreatedKey) -> asyncio.Task[VerifiedKey]:
    """Begin a request."""
    return asyncio.create_task(guard.verify(created.token))


async def accepted(requests: Iterable[asyncio.Task[VerifiedKey]], created: CreatedKey) -> bool:
    """Tell whether all of *requests* are answered with the key."""
    return {key.key_id for key in await asyncio.gather(*requests)} == {created.key.id}


async def reason_of(request: asyncio.Task[VerifiedKey]) -> str:
    """Return why *request* is refused."""
    with pytest.raises(InvalidToken) as caught:
        await request
    return caught.value.reason


async def test_a_thousand_requests_for_a_cold_key(guard: Guard, created: CreatedKey) -> None:
    """1,000 at once cost one read and no argon2, and are all answered right."""
    hashes = guard.counters.hashes
    assert await accepted([ask(guard, created) for _ in range(1000)], created)
    assert (guard.counters.store_reads, guard.counters.hashes - hashes) == (1, 0)


async def test_a_thousand_requests_for_a_key_without_digest(
    guard: Guard, url: str, created: CreatedKey
) -> None:
    """1,000 at once for a key that only argon2 can prove cost one read and one argon2."""
    row = keys.c.id == created.key.id
    execute(url, update(keys).where(row).values(digest=None, digest_key_id=None))
    hashes = guard.counters.hashes
    assert await accepted([ask(guard, created) for _ in range(1000)], created)
    assert (guard.counters.store_reads, guard.counters.hashes - hashes) == (1, 1)


async def test_a_thousand_requests_of_right_and_wrong_tokens(
    guard: Guard, created: CreatedKey
) -> None:
    """Of 1,000 at once for one prefix, with two secrets, each gets the answer to its own."""
    secret = verifier_of(guard)._tagger.mint(bytes.fromhex(created.key.key_prefix) + bytes(16))  # noqa: SLF001
    wrong = [asyncio.create_task(guard.verify(secret)) for _ in range(500)]
    right = [ask(guard, created) for _ in range(500)]
    refused = await asyncio.gather(*wrong, return_exceptions=True)
    assert {type(answer) for answer in refused} == {InvalidToken}
    assert await accepted(right, created)
    assert guard.counters.store_reads == 1


async def test_many_cold_keys_share_queries(guard: Guard) -> None:
    """300 keys asked for at once cost two queries."""
    tokens = [tagger_of(guard).mint(random.randbytes(20)).decode() for _ in range(300)]
    made = [
        KeyToImport(account_id="acme", name=str(number), scopes=["send"], token=token)
        for number, token in enumerate(tokens)
    ]
    for start in range(0, 300, BATCH):
        await guard.imports.add(made[start : start + BATCH])
    found = await asyncio.gather(*map(guard.verify, tokens))
    assert [key.name for key in found] == [str(number) for number in range(300)]
    assert guard.counters.store_reads == 2


async def test_a_change_overtakes_a_slow_proof(
    guard: Guard, url: str, created: CreatedKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was revoked while argon2 decided about its token is not accepted any more."""
    execute(url, update(keys).values(digest=None, digest_key_id=None))
    hashing = verifier_of(guard)._hashing  # noqa: SLF001  # nothing else leads inside
    verify, asked, go = hashing.verify, asyncio.Event(), asyncio.Event()

    async def held_up(*args: Any) -> bool:
        asked.set()
        await go.wait()
        return bool(await verify(*args))

    monkeypatch.setattr(hashing, "verify", held_up)
    asking = asyncio.create_task(guard.verify(created.token))
    await asked.wait()
    await guard.keys.revoke("acme", created.key.id)
    go.set()
    with pytest.raises(Unavailable) as caught:
        await asking
    assert "changed while" in caught.value.reason
    assert await refusal(guard, created.token) == "revoked"


async def test_requests_join_a_sent_read_while_fresh(
    guard: Guard, gate: Gate, created: CreatedKey
) -> None:
    """While fresh, who comes when the read is under way waits for that same one."""
    gate.shut()
    first = ask(guard, created)
    await gate.holds_one()
    more = [ask(guard, created) for _ in range(999)]
    gate.open.set()  # those created before have their turn before it takes effect
    assert await accepted([first, *more], created)
    assert len(gate.reads) == 1


async def test_requests_share_the_next_read_while_not_fresh(
    guard: Guard, gate: Gate, created: CreatedKey
) -> None:
    """While not fresh, who comes when a read is under way waits for the next: two for 1,000."""
    end_lease(guard)
    gate.shut()
    first = [ask(guard, created) for _ in range(500)]
    await gate.holds_one()
    more = [ask(guard, created) for _ in range(500)]
    gate.open.set()  # those created before have their turn before it takes effect
    assert await accepted([*first, *more], created)
    assert len(gate.reads) == 2


async def check_overtaken(
    guard: Guard, gate: Gate, created: CreatedKey, revoking: Callable[[], Awaitable[None]]
) -> None:
    """Revoke while a read is held back: it is not believed, by those who come later least."""
    gate.shut()
    before = ask(guard, created)
    await gate.holds_one()
    held = gate.let_through_later_ones()
    await revoking()
    assert await refusal(guard, created.token) == "revoked"
    held.set()
    assert await reason_of(before) == "revoked"
    assert guard.recall(as_headers(created.token.encode())) is None
    assert await refusal(guard, created.token) == "revoked"


async def test_a_request_after_revoking_gets_no_answer_from_before(
    guard: Guard, gate: Gate, created: CreatedKey
) -> None:
    """Requests after revoking are refused at once; one whose read was overtaken reads again."""
    await check_overtaken(guard, gate, created, lambda: revoke(guard, created))


async def test_a_request_after_revoking_elsewhere(
    guard: Guard, other: Guard, gate: Gate, created: CreatedKey
) -> None:
    """The same holds for a key that another process revokes, once this one has read the feed."""
    await check_overtaken(guard, gate, created, lambda: revoke(other, created, guard))


async def test_a_request_after_revoking_elsewhere_without_a_lease(
    guard: Guard, other: Guard, gate: Gate, created: CreatedKey
) -> None:
    """A process without a lease, told of nothing, lets no later request on to an earlier read."""
    end_lease(guard)
    gate.shut()
    before = ask(guard, created)
    await gate.holds_one()
    held = gate.let_through_later_ones()
    other.keys._confirmation._lease = 0.0  # noqa: SLF001  # its lease has ended already
    assert (await other.keys.revoke("acme", created.key.id)).how == "lease"
    after = ask(guard, created)
    held.set()  # the request created before has its turn before it takes effect
    assert await accepted([before], created)
    assert await reason_of(after) == "revoked"


async def test_a_request_after_the_end_of_a_key_gets_no_answer_from_before(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes when a key has expired does not take what a read found while it had not."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        gate = Gate(guard, monkeypatch)
        created = await create(guard, expires_at=clock.now() + timedelta(seconds=1))
        gate.shut()
        before = ask(guard, created)
        await gate.holds_one()
        held = gate.let_through_later_ones()
        clock.advance(1)
        after = ask(guard, created)
        held.set()  # the request created before has its turn before it takes effect
        assert await accepted([before], created)
        assert await reason_of(after) == "expired"


async def test_a_read_from_before_a_flush_is_not_kept(
    guard: Guard, url: str, gate: Gate, created: CreatedKey
) -> None:
    """When everything is forgotten while a read is under way, what it finds is not remembered."""
    gate.shut()
    before = ask(guard, created)
    await gate.holds_one()
    execute(url, delete(schema.workers))
    await freshness_of(guard).poll()
    assert freshness_of(guard).is_fresh()
    gate.open.set()
    assert await accepted([before], created)
    assert guard.recall(as_headers(created.token.encode())) is None
    await guard.verify(created.token)
    assert len(gate.reads) == 2
    assert guard.recall(as_headers(created.token.encode())) is not None


async def test_a_read_from_before_a_change_is_not_shared(
    url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before a revocation is written neither to memory nor to Redis."""
    async with linked_guard(url, redis_server.url) as guard:
        gate = Gate(guard, monkeypatch)
        created = await create(guard)
        gate.shut()
        before = ask(guard, created)
        await gate.holds_one()
        await revoke(guard, created)
        gate.open.set()
        assert await reason_of(before) == "revoked"
        await written(shared_of(guard))
        with redis_server.client() as raw:
            assert raw.dbsize() == 0


async def test_an_answer_of_redis_after_the_lease_is_not_believed(
    sqlite_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lease ends while Redis is asked, the database is asked too."""
    await prepare(sqlite_url)
    async with (
        linked_guard(sqlite_url, redis_server.url) as one,
        linked_guard(sqlite_url, redis_server.url) as another,
    ):
        created = await create(one)
        await one.verify(created.token)
        await written(shared_of(one))
        find = shared_of(another).find

        async def slowly(*args: Any, **options: Any) -> Any:
            entries = await find(*args, **options)
            end_lease(another)
            return entries

        monkeypatch.setattr(shared_of(another), "find", slowly)
        assert (await another.verify(created.token)).key_id == created.key.id
        assert (another.counters.shared_hits, another.counters.store_reads) == (1, 1)


async def test_a_proof_from_before_a_change_is_not_kept(
    guard: Guard, url: str, created: CreatedKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the key is revoked while argon2 proves it, the proof leaves nothing in memory."""
    row = keys.c.id == created.key.id
    execute(url, update(keys).where(row).values(digest=None, digest_key_id=None))
    proven, go_on = asyncio.Event(), asyncio.Event()
    set_digest = store_of(guard).set_digest

    async def held(*args: Any) -> None:
        proven.set()
        await go_on.wait()
        await set_digest(*args)

    monkeypatch.setattr(store_of(guard), "set_digest", held)
    before = ask(guard, created)
    await proven.wait()
    await revoke(guard, created)
    go_on.set()
    assert await accepted([before], created)
    assert guard.recall(as_headers(created.token.encode())) is None
    assert await refusal(guard, created.token) == "revoked"


async def test_a_wrong_answer_from_before_a_creation_is_not_kept(
    guard: Guard, url: str, gate: Gate, created: CreatedKey
) -> None:
    """A refusal read before a key was created does not end up in the negative cache after it."""
    execute(url, delete(keys).where(keys.c.id == created.key.id).returning(keys.c.id))
    gate.shut()
    before = ask(guard, created)
    await gate.holds_one()
    await create(guard, name="another key, but who reads the refusal cannot tell")
    gate.open.set()
    with pytest.raises(InvalidToken):
        await before
    assert await refusal(guard, created.token) == "unknown prefix"
    assert (guard.counters.negative_hits, len(gate.reads)) == (0, 2)
    await refusal(guard, created.token)
    assert (guard.counters.negative_hits, len(gate.reads)) == (1, 2)


@pytest.mark.parametrize("place", [0, 5, 9])
async def test_a_cancelled_request_goes_alone(
    guard: Guard, gate: Gate, created: CreatedKey, place: int
) -> None:
    """Whichever of ten requests is cancelled, be it the first, the other nine are answered."""
    gate.shut()
    requests = [ask(guard, created) for _ in range(10)]
    await gate.holds_one()
    gone = requests.pop(place)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.open.set()
    assert await accepted(requests, created)
    assert len(gate.reads) == 1


async def test_a_read_goes_on_without_those_who_asked(
    guard: Guard, gate: Gate, created: CreatedKey
) -> None:
    """When all requests are cancelled their read still ends, and is remembered."""
    gate.shut()
    request = ask(guard, created)
    await gate.holds_one()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    gate.open.set()
    assert await accepted([ask(guard, created)], created)
    assert len(gate.reads) == 1


@pytest.mark.alone
async def test_no_answer_within_a_second(guard: Guard, gate: Gate, created: CreatedKey) -> None:
    """Who gets no answer is told so after 1 s, be it the first to ask or one that joined later."""
    gate.shut()
    loop = asyncio.get_running_loop()

    async def seconds() -> float:
        started = loop.time()
        with pytest.raises(Unavailable) as caught:
            await guard.verify(created.token)
        assert caught.value.reason == "no answer within 1 s"
        return loop.time() - started

    first = asyncio.create_task(seconds())
    await gate.holds_one()
    for waited in await asyncio.gather(first, seconds(), seconds()):
        assert 0.9 < waited < 1.5
    gate.open.set()
    assert await accepted([ask(guard, created)], created)
    await until(lambda: guard.recall(as_headers(created.token.encode())) is not None, what="memory")
