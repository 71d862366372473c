"""Facts about the life of a key, on both databases: created, listed, verified, revoked."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from argon2 import PasswordHasher
from sqlalchemy import insert, select

from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.clock import SystemClock
from tfm_guard.errors import GuardError, InvalidInput, InvalidToken, KeyNotFound, Unavailable
from tfm_guard.records import CreatedKey, KeyCredentials, VerifiedKey
from tfm_guard.settings import Settings
from tfm_guard.store import Store, schema
from tfm_guard.testing import CHEAP_HASHING, ManualClock, seeded_bytes
from tfm_guard.token import DigestKeys, Tagger

keys = schema.keys

# The random bytes of two prefixes.
FIRST, SECOND = b"\x01" * 4, b"\x02" * 4


def new_guard(url: str, **options: Any) -> Guard:
    """Return a guard on *url*; *options* are its clock, its randomness, and settings."""
    parts = {name: options.pop(name) for name in ("clock", "random") if name in options}
    return Guard(Settings.load({}, database_url=url, **CHEAP_HASHING, **options), **parts)


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database."""
    async with new_guard(database_url) as guard:
        yield guard


async def reason_of_refusal(guard: Guard, token: str) -> str:
    """Return why *guard* refuses *token*, as the logs have it."""
    with pytest.raises(InvalidToken) as caught:
        await guard.verify(token)
    return caught.value.reason


async def create(guard: Guard, account_id: str = "acme") -> CreatedKey:
    """Create a key for *account_id*."""
    return await guard.keys.create(account_id=account_id, name="CI")


def change_row(url: str, key_id: UUID, **values: Any) -> None:
    """Write *values* into a key's row, past the library."""
    execute(url, keys.update().where(keys.c.id == key_id).values(**values))


def row_of(url: str, key_id: UUID) -> Any:
    """Return a key's row."""
    (row,) = execute(url, select(keys).where(keys.c.id == key_id))
    return row


async def test_a_created_key_is_proven_by_its_token(guard: Guard, database_url: str) -> None:
    """The token of a new key proves who its account is and what it may do."""
    created = await guard.keys.create(
        account_id="acme", name="  CI ", scopes=["send", "domains:write", "send"]
    )
    key = created.key
    assert len(created.token) == 54
    assert created.token.startswith(f"tfm_k_{key.key_prefix}")
    verified = await guard.verify(created.token)
    assert verified == VerifiedKey.pack(
        digest=row_of(database_url, key.id).digest,
        key_id=key.id,
        key_prefix=key.key_prefix,
        account_id="acme",
        name="CI",
        expires_at=None,
        replaced_at=None,
        credentials=KeyCredentials(frozenset({"send", "domains:write"}), "api"),
    )
    assert verified.scopes == {"send", "domains:write"}
    assert verified.credentials.scopes == ("domains:write", "send")
    assert await guard.verify(created.token.encode()) == await guard.verify(created.token)


async def test_the_defaults_of_a_key(guard: Guard) -> None:
    """A key can send, never expires, was never used, and is version 4 of a UUID."""
    key = (await create(guard)).key
    assert key.scopes == {"send"}
    assert (key.expires_at, key.last_used_at, key.replaced_by) == (None, None, None)
    assert key.id.version == 4
    assert abs(datetime.now(UTC) - key.created_at) < timedelta(seconds=10)


async def test_only_a_hash_and_a_digest_are_stored(guard: Guard, database_url: str) -> None:
    """Neither the token nor its secret part stands in any table."""
    created = await create(guard)
    row = row_of(database_url, created.key.id)
    assert row.secret_hash.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert len(row.digest) == 16
    for table in schema.metadata.tables.values():
        stored = repr(execute(database_url, select(table)))
        assert created.token[14:46] not in stored
        assert repr(bytes.fromhex(created.token[14:46]))[2:-1] not in stored


async def test_keys_are_listed_newest_first(guard: Guard) -> None:
    """An account sees its own keys, in the order of their creation, the newest on top."""
    created = [await create(guard), await create(guard)]
    await create(guard, "another")
    assert await guard.keys.list("acme") == [created[1].key, created[0].key]


async def test_a_revoked_key_is_refused_and_gone(guard: Guard) -> None:
    """Once revoking has returned the token is refused, the key is not listed, others are."""
    created, other = await create(guard), await create(guard)
    done = await guard.keys.revoke("acme", created.key.id)
    assert (done.how, done.workers) == ("acknowledged", 1)
    assert 0 < done.seconds < 5
    assert await reason_of_refusal(guard, created.token) == "revoked"
    assert await guard.keys.list("acme") == [other.key]
    assert (await guard.verify(other.token)).key_id == other.key.id


async def test_what_cannot_be_revoked_is_not_there(guard: Guard, database_url: str) -> None:
    """A second time, another account's key and an id never issued are refused alike, unrecorded."""
    created = await create(guard)
    await guard.keys.revoke("acme", created.key.id)
    other = await create(guard, "another")
    before = execute(database_url, select(schema.audit)), execute(database_url, select(keys))
    messages = set()
    for key_id in (created.key.id, other.key.id, uuid4()):
        with pytest.raises(KeyNotFound) as caught:
            await guard.keys.revoke("acme", key_id)
        messages.add(caught.value.message)
    assert len(messages) == 1
    with pytest.raises(KeyNotFound):
        await guard.keys.revoke("nobody", other.key.id)
    assert before == (
        execute(database_url, select(schema.audit)),
        execute(database_url, keys.select()),
    )
    assert [row.id for row in execute(database_url, select(schema.accounts))] == ["acme", "another"]


async def test_changes_are_audited_and_fed(guard: Guard, database_url: str) -> None:
    """Creating and revoking leave one audit row and one feed row each, with who did it."""
    created = await guard.keys.create(account_id="acme", name="CI", actor="ada")
    key = created.key
    await guard.keys.revoke("acme", key.id, actor="bob")
    rows = execute(database_url, select(schema.audit).order_by(schema.audit.c.id))
    assert [(row.actor, row.action, row.target_id, row.meta) for row in rows] == [
        (
            "ada",
            "api_key.created",
            str(key.id),
            f'{{"key_prefix":"{key.key_prefix}","permissions":["send"]}}',
        ),
        ("bob", "api_key.revoked", str(key.id), f'{{"key_prefix":"{key.key_prefix}"}}'),
    ]
    assert {(row.account_id, row.target_name, row.category) for row in rows} == {
        ("acme", "CI", "Security")
    }
    feed = execute(database_url, select(schema.changes).order_by("id"))
    assert [(row.id, row.kind, row.prefix, row.version) for row in feed] == [
        (1, "created", key.key_prefix, 1),
        (2, "revoked", key.key_prefix, 2),
    ]
    assert row_of(database_url, key.id).created_by == "ada"


async def test_a_key_expires_on_sqlite(sqlite_url: str) -> None:
    """To the microsecond, from its expiry on, a key is refused, although it was in memory."""
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        expires_at = clock.now() + timedelta(seconds=1)
        created = await guard.keys.create(account_id="acme", name="CI", expires_at=expires_at)
        lasting = await create(guard)
        assert created.key.expires_at == expires_at
        for token in (created.token, lasting.token):
            await guard.verify(token)
        clock.advance(0.999999)
        for token in (created.token, lasting.token):
            assert guard.recall(as_headers(token.encode())) == await guard.verify(token)
        assert (await guard.verify(created.token)).expires_at == expires_at
        assert guard.counters.store_reads == 2
        clock.advance(0.000001)
        assert await reason_of_refusal(guard, created.token) == "expired"
        assert guard.counters.store_reads == 3
        # Memory is as good as before for the key that does not expire.
        assert (await guard.verify(lasting.token)).key_id == lasting.key.id
        assert guard.counters.store_reads == 3
        assert [key.id for key in await guard.keys.list("acme")] == [lasting.key.id]


async def test_a_key_expires_on_postgresql(postgres_url: str) -> None:
    """When its time is up memory is not believed any more, and the database's own time decides."""
    clock = ManualClock(datetime.now(UTC))
    async with new_guard(postgres_url, clock=clock) as guard:
        expires_at = datetime.now(UTC) + timedelta(seconds=60)
        created = await guard.keys.create(account_id="acme", name="CI", expires_at=expires_at)
        await clock.pass_time(1)
        assert (await guard.verify(created.token)).expires_at == expires_at
        past = datetime.now(UTC) - timedelta(microseconds=1)
        change_row(postgres_url, created.key.id, expires_at=past)
        await clock.pass_time(50)
        # Nothing has changed that the feed tells of.
        assert (await guard.verify(created.token)).expires_at == expires_at
        assert guard.counters.store_reads == 1
        await clock.pass_time(10)
        assert await reason_of_refusal(guard, created.token) == "expired"
        assert guard.counters.store_reads == 2
        assert await guard.keys.list("acme") == []


@pytest.mark.parametrize("step", [-3600, 3600])
async def test_a_stepped_wall_clock_prolongs_nothing(database_url: str, step: float) -> None:
    """Memory counts to the second as long as it would have; after that the database is asked."""
    clock = ManualClock(datetime.now(UTC))
    async with new_guard(database_url, clock=clock) as guard:
        expires_at = clock.now() + timedelta(seconds=60)
        created = await guard.keys.create(account_id="acme", name="CI", expires_at=expires_at)
        await guard.verify(created.token)
        clock.step_wall(step)
        clock.advance(1.9)
        assert guard.recall(as_headers(created.token.encode())) is not None
        change_row(database_url, created.key.id, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
        await clock.pass_time(58.1)
        assert guard.recall(as_headers(created.token.encode())) is None
        assert await reason_of_refusal(guard, created.token) == "expired"


async def test_a_suspended_account_is_refused(guard: Guard, database_url: str) -> None:
    """No key of a suspended account is accepted, and all are again when it is resumed."""
    created = await create(guard)
    accounts = schema.accounts
    execute(database_url, accounts.update().values(suspended_at=datetime.now(UTC)))
    assert await reason_of_refusal(guard, created.token) == "account suspended"
    execute(database_url, accounts.update().values(suspended_at=None))
    assert (await guard.verify(created.token)).key_id == created.key.id


async def test_a_wrong_token_is_refused(guard: Guard) -> None:
    """A flipped character, another installation's key, foreign text: each has its reason."""
    created = await create(guard)
    token = created.token
    flipped = token[:20] + ("0" if token[20] != "0" else "1") + token[21:]
    assert await reason_of_refusal(guard, flipped) == "tag does not match"
    foreign = Tagger(b"of another installation").mint(bytes(20)).decode()
    assert await reason_of_refusal(guard, foreign) == "tag does not match"
    for text in ("", token[:-1], token + "0", token.upper(), "tfm_k_é", "\uff54fm_k_", "x" * 9000):
        assert await reason_of_refusal(guard, text) == "not of the form of a key"


async def test_a_token_with_a_good_tag_still_has_to_be_a_keys(
    guard: Guard, database_url: str
) -> None:
    """With the tag key alone nobody gets in: neither with a new prefix nor with a known one."""
    created = await create(guard)
    store = Store(database_url, pool_size=1, clock=SystemClock())
    tagger = Tagger((await store.open()).tag_key)
    await store.close()
    unknown = tagger.mint(bytes(20)).decode()
    assert await reason_of_refusal(guard, unknown) == "unknown prefix"
    forged = tagger.mint(bytes.fromhex(created.key.key_prefix) + bytes(16)).decode()
    assert await reason_of_refusal(guard, forged) == "wrong secret"


@pytest.mark.parametrize(
    ("fault", "field", "kind"),
    [
        ({"name": ""}, ("name",), "string_too_short"),
        ({"name": " \t"}, ("name",), "string_too_short"),
        ({"name": "x" * 101}, ("name",), "string_too_long"),
        ({"name": "a\0b"}, ("name",), "string_control"),
        ({"name": "a\u202eb"}, ("name",), "string_control"),
        ({"scopes": ["send", "everything"]}, ("scopes", 1), "unknown_scope"),
        ({"scopes": "send"}, ("scopes",), "list_type"),
        ({"expires_at": datetime(2040, 1, 1)}, ("expires_at",), "timezone_aware"),  # noqa: DTZ001
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, ("expires_at",), "datetime_future"),
        ({"account_id": ""}, ("account_id",), "string_too_short"),
        ({"account_id": " acme"}, ("account_id",), "string_blank"),
        ({"account_id": "x" * 256}, ("account_id",), "string_too_long"),
    ],
)
async def test_a_faulty_key_is_not_created(
    guard: Guard,
    database_url: str,
    fault: dict[str, Any],
    field: tuple[str | int, ...],
    kind: str,
) -> None:
    """What is wrong is named by its field, and nothing at all is written."""
    with pytest.raises(InvalidInput) as caught:
        await guard.keys.create(**{"account_id": "acme", "name": "CI", **fault})
    assert (caught.value.field, caught.value.kind) == (field, kind)
    for table in (keys, schema.accounts, schema.audit, schema.changes):
        assert execute(database_url, select(table)) == []


async def test_a_key_may_grant_nothing(guard: Guard) -> None:
    """A key made with no scopes proves its account and may do nothing."""
    created = await guard.keys.create(account_id="acme", name="CI", scopes=[])
    verified = await guard.verify(created.token)
    assert verified.scopes == frozenset()
    assert verified.credentials.scopes == ()


async def test_the_hosts_own_scopes_can_be_granted(database_url: str) -> None:
    """A scope that the application registered is granted like a built-in one."""
    async with new_guard(database_url, scopes={"invoices:read": "Read invoices"}) as guard:
        created = await guard.keys.create(account_id="acme", name="CI", scopes=["invoices:read"])
        assert (await guard.verify(created.token)).scopes == {"invoices:read"}


async def test_a_closed_guard_has_no_keys_to_manage(database_url: str) -> None:
    """Managing wants an open guard and says so; verifying opens it."""
    guard = new_guard(database_url)
    with pytest.raises(GuardError, match="not open"):
        await create(guard)
    async with guard:
        created = await create(guard)
        async with guard:
            assert "open" in repr(guard)
        assert (await guard.verify(created.token)).key_id == created.key.id
    assert "closed" in repr(guard)
    # Closed on purpose, it is not opened by a request.
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await guard.verify(created.token)
        assert caught.value.reason == "the guard is closed"
        assert guard.recall(as_headers(created.token.encode())) is None
    async with guard:
        assert (await guard.verify(created.token)).key_id == created.key.id


async def test_a_guard_is_opened_by_the_first_token(database_url: str) -> None:
    """A guard that nobody opened opens itself, once, however many tokens come at once."""
    async with new_guard(database_url) as first:
        created = await create(first)
    guard = new_guard(database_url)
    found = await asyncio.gather(*(guard.verify(created.token) for _ in range(20)))
    assert {key.key_id for key in found} == {created.key.id}
    assert len(execute(database_url, select(schema.workers))) == 1
    await guard.close()
    assert execute(database_url, select(schema.workers)) == []


async def test_a_guard_closed_while_it_opens_is_closed(database_url: str) -> None:
    """Closing waits for the opening that is under way, and leaves neither tasks nor register."""
    tasks = asyncio.all_tasks()
    guard = new_guard(database_url)
    token = "tfm_k_" + "0" * 48
    first = asyncio.create_task(guard.verify(token))
    while guard._opening is None:  # noqa: SLF001  # the moment that this is about
        await asyncio.wait({first}, timeout=0)
    await guard.close()
    with pytest.raises((InvalidToken, Unavailable)):
        await first
    assert "closed" in repr(guard)
    with pytest.raises(Unavailable) as caught:
        await guard.verify(token)
    assert caught.value.reason == "the guard is closed"
    assert asyncio.all_tasks() == tasks
    assert execute(database_url, select(schema.workers)) == []


def prefixes(*wanted: bytes) -> Callable[[int], bytes]:
    """Return randomness by which minted tokens have the *wanted* prefixes, one after the other."""
    left, random = list(wanted), seeded_bytes(7)
    return lambda count: left.pop(0) + random(16) if count == 20 else random(count)


async def test_a_taken_prefix_is_minted_again(database_url: str) -> None:
    """A key whose prefix exists, even revoked, gets another, and only one key is created."""
    async with new_guard(database_url, random=prefixes(FIRST, FIRST, FIRST, SECOND)) as guard:
        first = await create(guard)
        await guard.keys.revoke("acme", first.key.id)
        second = await create(guard)
        assert (first.key.key_prefix, second.key.key_prefix) == ("01010101", "02020202")
        assert (await guard.verify(second.token)).key_id == second.key.id
        assert await guard.keys.list("acme") == [second.key]
    assert [row.kind for row in execute(database_url, select(schema.changes).order_by("id"))] == [
        "created",
        "revoked",
        "created",
    ]


async def test_minting_gives_up(database_url: str) -> None:
    """Randomness that repeats itself ends in Unavailable, with nothing written, not in a loop."""
    async with new_guard(database_url, random=prefixes(*[FIRST] * 17)) as guard:
        created = await create(guard)
        with pytest.raises(Unavailable) as caught:
            await create(guard)
        assert caught.value.reason == "16 minted prefixes in a row were taken"
        assert await guard.keys.list("acme") == [created.key]


async def test_the_same_randomness_makes_the_same_prefixes(
    sqlite_url: str, postgres_url: str
) -> None:
    """With a seed, tokens differ between installations only by the tag."""
    tokens = []
    for url in (sqlite_url, postgres_url):
        async with new_guard(url, random=seeded_bytes(3)) as guard:
            tokens.append((await create(guard)).token)
    assert tokens[0][:46] == tokens[1][:46]
    assert tokens[0][46:] != tokens[1][46:]


async def test_a_digest_spares_argon2(guard: Guard, database_url: str) -> None:
    """A key with a digest is accepted and refused without computing any argon2."""
    created = await create(guard)
    async with new_guard(database_url) as another:
        assert (await another.verify(created.token)).key_id == created.key.id
        assert another.counters.hashes == 0
    # The hash still proves the token, but a different digest is a final no.
    change_row(database_url, created.key.id, digest=bytes(16))
    async with new_guard(database_url) as another:
        assert await reason_of_refusal(another, created.token) == "wrong secret"
        assert another.counters.hashes == 0


@pytest.mark.parametrize(
    "lost",
    [
        {"digest_key_id": "0011223344556677"},
        {"digest": None, "digest_key_id": None},
        {"digest": None},
    ],
    ids=["unknown digest key", "imported", "without digest"],
)
async def test_argon2_decides_once(guard: Guard, database_url: str, lost: dict[str, Any]) -> None:
    """Where no digest can be compared argon2 proves the token, and the new digest is stored."""
    created, other = await create(guard), await create(guard)
    before = row_of(database_url, created.key.id)
    change_row(database_url, created.key.id, **lost)
    for hashes in (1, 0):
        async with new_guard(database_url) as another:
            for _ in range(3):
                assert (await another.verify(created.token)).key_id == created.key.id
            assert another.counters.hashes == hashes
    assert row_of(database_url, created.key.id) == before
    assert len(execute(database_url, select(schema.changes))) == 2
    assert other.key in await guard.keys.list("acme")


async def test_a_database_that_takes_no_writes_still_proves_keys(postgres_url: str) -> None:
    """On a server that became read-only argon2 proves what cannot be renewed; nobody is refused."""
    clock = ManualClock()
    async with new_guard(postgres_url, clock=clock) as guard:
        created = await create(guard)
        change_row(postgres_url, created.key.id, digest=None)
        name = postgres_url.rpartition("/")[2]
        execute(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        hang_up = """SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
            WHERE application_name = 'tfm-guard' AND datname = current_database()"""
        assert execute(postgres_url, hang_up)
        for _ in range(2):
            assert (await guard.verify(created.token)).key_id == created.key.id
        # One to create the key, one to prove it; then memory knows.
        assert guard.counters.hashes == 2
        await clock.pass_time(2)
        # Such a server may be behind: reading its feed renews no lease, and each time it is asked.
        for hashes in (3, 4):
            assert (await guard.verify(created.token)).key_id == created.key.id
            assert guard.counters.hashes == hashes
    assert row_of(postgres_url, created.key.id).digest is None


async def test_renewing_a_digest_holds_up_nobody(sqlite_url: str) -> None:
    """While another program writes, keys without a digest are accepted, and renewed afterwards."""
    async with new_guard(sqlite_url, plans={"free": 3}) as guard:
        created = [await create(guard) for _ in range(3)]
    execute(sqlite_url, keys.update().values(digest=None))
    async with new_guard(sqlite_url) as guard:
        writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        # A single write that waits takes longer.
        async with asyncio.timeout(4):
            for key in created:
                assert (await guard.verify(key.token)).key_id == key.key.id
        assert [row_of(sqlite_url, key.key.id).digest for key in created] == [None] * 3
        writer.execute("ROLLBACK")
        writer.close()
    assert None not in [row_of(sqlite_url, key.key.id).digest for key in created]
    async with new_guard(sqlite_url) as guard:
        for key in created:
            await guard.verify(key.token)
        assert guard.counters.hashes == 0


async def test_a_revoked_key_costs_one_argon2(guard: Guard, database_url: str) -> None:
    """A revoked key with a digest of an unknown key is refused for good after one argon2."""
    created = await create(guard)
    await guard.keys.revoke("acme", created.key.id)
    change_row(database_url, created.key.id, digest_key_id="0011223344556677")
    for hashes in (1, 0):
        async with new_guard(database_url) as another:
            for _ in range(5):
                assert await reason_of_refusal(another, created.token) == "revoked"
            assert another.counters.hashes == hashes
    # Not even where nothing is remembered.
    for _ in range(3):
        async with new_guard(database_url) as another:
            assert await reason_of_refusal(another, created.token) == "revoked"
            assert another.counters.hashes == 0


async def test_a_hash_that_asks_for_the_machine_is_not_computed(
    guard: Guard, database_url: str
) -> None:
    """A row whose argon2 wants 1 GiB ten times over refuses its token without computing it."""
    created, other = await create(guard), await create(guard)
    greedy = "$argon2id$v=19$m=1048576,t=10,p=1$c2FsdHNhbHRzYWx0$MDEyMzQ1Njc4OWFiY2RlZg"
    change_row(database_url, created.key.id, digest=None, secret_hash=greedy)
    async with new_guard(database_url) as another:
        assert await reason_of_refusal(another, created.token) == "wrong secret"
        assert (await another.verify(other.token)).key_id == other.key.id
        assert another.counters.hashes == 0


async def test_argon2_can_say_no(guard: Guard, database_url: str) -> None:
    """Without a digest to compare, a token that is not the hash's is refused, none stored."""
    created, other = await create(guard), await create(guard)
    secret_hash = row_of(database_url, other.key.id).secret_hash
    change_row(database_url, created.key.id, digest=None, secret_hash=secret_hash)
    async with new_guard(database_url) as another:
        for _ in range(3):
            assert await reason_of_refusal(another, created.token) == "wrong secret"
        # The second time the token is known to prove nothing.
        assert (another.counters.hashes, another.counters.negative_hits) == (1, 2)
    assert row_of(database_url, created.key.id).digest is None


OLD, NEW, NEWEST = ("0123456789abcdef" * 2, "fedcba9876543210" * 2, "00112233445566778899" * 2)


async def test_old_secrets_keep_working(database_url: str) -> None:
    """Secrets may be replaced step by step: while the old one is listed no argon2 is needed."""
    async with new_guard(database_url, secrets=[OLD]) as guard:
        created = await create(guard)
    for secrets in ([OLD], [NEW, OLD], [NEW], [NEWEST, OLD, NEW], [NEWEST]):
        async with new_guard(database_url, secrets=secrets) as guard:
            assert (await guard.verify(created.token)).key_id == created.key.id
            assert guard.counters.hashes == 0
        current = DigestKeys.from_secrets([secret.encode() for secret in secrets]).current
        row = row_of(database_url, created.key.id)
        assert row.digest_key_id == current.id
        assert row.digest == current.digest(created.token.encode())


async def test_forgotten_secrets_cost_one_argon2(database_url: str) -> None:
    """A secret replaced at once refuses nobody, and costs each key one argon2."""
    async with new_guard(database_url, secrets=[OLD]) as guard:
        created = await create(guard)
    for secrets in ([NEW], [OLD]):
        for hashes in (1, 0):
            async with new_guard(database_url, secrets=secrets) as guard:
                for _ in range(2):
                    assert (await guard.verify(created.token)).key_id == created.key.id
                assert guard.counters.hashes == hashes


async def test_the_databases_own_secret_is_always_believed(database_url: str) -> None:
    """Moving from the database's own secret to others, and on, costs no argon2."""
    async with new_guard(database_url) as guard:
        created, late = await create(guard), await create(guard)
    for secrets in ([NEW], [NEWEST, NEW], [NEWEST]):
        async with new_guard(database_url, secrets=secrets) as guard:
            assert (await guard.verify(created.token)).key_id == created.key.id
            assert guard.counters.hashes == 0
    # Long after the move, a key that was not used meanwhile.
    async with new_guard(database_url, secrets=[NEWEST]) as guard:
        assert (await guard.verify(late.token)).key_id == late.key.id
        assert guard.counters.hashes == 0
    assert (
        row_of(database_url, late.key.id).digest_key_id
        == DigestKeys.from_secrets([NEWEST.encode()]).current.id
    )


@pytest.mark.parametrize("digits", [32, 40])
async def test_untagged_tokens_are_taken_only_where_allowed(
    guard: Guard, database_url: str, digits: int
) -> None:
    """A key imported from before the tag works where the deployment says so, and nowhere else."""
    token = "tfm_k_" + "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"[:digits]
    created = await create(guard)
    row = row_of(database_url, created.key.id)._asdict()
    row |= {"id": uuid4(), "prefix": "0a1b2c3d", "digest": None, "digest_key_id": None}
    row |= {"secret_hash": PasswordHasher(1, 8, 1).hash(token)}
    execute(database_url, insert(keys).values(row))
    for hashes in (1, 0):
        async with new_guard(database_url, accept_untagged_tokens=True) as lenient:
            verified = await lenient.verify(token)
            assert (verified.key_prefix, verified.account_id) == ("0a1b2c3d", "acme")
            assert await reason_of_refusal(lenient, token[:-1] + "0") == "wrong secret"
            assert lenient.counters.hashes == hashes
            # A token of today's length is held to its tag all the same.
            forged = token[:6] + "ffffffff" + "0" * 40
            assert await reason_of_refusal(lenient, forged) == "tag does not match"
    assert await reason_of_refusal(guard, token) == "not of the form of a key"
