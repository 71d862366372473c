"""Facts about importing keys, on each kind of database."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from argon2 import PasswordHasher

from tests.support.failpoints import Failpoint
from tests.support.guards import new_guard, refusal, store_of, tagger_of, until
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import InvalidInput, PlanLimitReached
from tfm_guard.imports import BATCH, ImportOutcome, KeyToImport

UNTAGGED = "tfm_k_00112233445566778899aabbccddeeff"

BEFORE_ALL_CALENDARS = datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database, where tokens without a tag are accepted."""
    async with new_guard(database_url, accept_untagged_tokens=True) as guard:
        yield guard


def token_number(number: int) -> str:
    """Return a token of an older form, with a prefix of its own."""
    return f"tfm_k_{number:08x}{hashlib.md5(str(number).encode()).hexdigest()}"  # noqa: S324


def sha256(token: str) -> str:
    """Return the hash of *token* as files have it."""
    return hashlib.sha256(token.encode()).hexdigest()


def by_hash(token: str, /, **changes: Any) -> KeyToImport:
    """Return *token*'s key as it is known by its hash."""
    known = {
        "prefix": token[6:14],
        "account_id": "acme",
        "name": "CI",
        "scopes": ["send"],
        "secret_hash": sha256(token),
    }
    return KeyToImport(**(known | changes))


def by_token(token: str, /, **changes: Any) -> KeyToImport:
    """Return *token*'s key as it is known by its token."""
    return by_hash(token, **({"prefix": None, "secret_hash": None, "token": token} | changes))


def numbered(count: int) -> list[KeyToImport]:
    """Return that many keys, of ten accounts in turn."""
    return [by_hash(token_number(n), account_id=f"account {n % 10}") for n in range(count)]


async def add_all(guard: Guard, keys: Sequence[KeyToImport], **options: Any) -> "Counter[str]":
    """Import *keys* in batches and count what became of them."""
    counts: Counter[str] = Counter()
    for start in range(0, len(keys), BATCH):
        outcomes = await guard.imports.add(keys[start : start + BATCH], **options)
        counts.update(outcome.how for outcome in outcomes)
    return counts


@pytest.mark.parametrize(
    "secret_hash",
    [
        sha256(UNTAGGED),
        sha256(UNTAGGED).upper(),
        hashlib.sha512(UNTAGGED.encode()).hexdigest(),
        PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(UNTAGGED),
    ],
    ids=["sha256", "in capitals", "sha512", "argon2"],
)
async def test_a_key_verifies_by_the_hash_that_it_came_with(guard: Guard, secret_hash: str) -> None:
    """The token proves the imported key; a wrong one does not; afterwards it has a digest."""
    assert await guard.imports.add([by_hash(UNTAGGED, secret_hash=secret_hash)]) == [
        ImportOutcome("imported")
    ]
    url = guard.settings.database_url
    assert execute(url, "SELECT digest FROM tfm_keys") == [(None,)]
    assert await refusal(guard, UNTAGGED[:-1] + "e") == "wrong secret"
    key = await guard.verify(UNTAGGED)
    assert (key.account_id, key.name, key.scopes) == (
        "acme",
        "CI",
        frozenset({"send"}),
    )
    await verifier_settled(guard)
    (digest, stored) = execute(url, "SELECT digest, secret_hash FROM tfm_keys")[0]
    assert len(digest) == 16
    assert UNTAGGED.encode() not in digest
    assert UNTAGGED not in stored


async def verifier_settled(guard: Guard) -> None:
    """Return once the digests of proven keys are stored."""
    assert guard._parts is not None  # noqa: SLF001  # nothing else leads inside
    await guard._parts.verifier.close()  # noqa: SLF001


async def test_a_fast_hash_costs_no_argon2(guard: Guard) -> None:
    """A key with a SHA-256 is proven without the pool in which argon2 is computed."""
    await guard.imports.add([by_hash(UNTAGGED)])
    before = guard.counters.hashes
    await guard.verify(UNTAGGED)
    assert guard.counters.hashes == before
    assert execute(guard.settings.database_url, "SELECT secret_hash FROM tfm_keys") == [
        (f"sha256${sha256(UNTAGGED)}",)
    ]


async def test_a_key_by_its_token_has_hash_and_digest_at_once(guard: Guard) -> None:
    """Given its token, a key has what a created one has, and verifies without any slow hash."""
    tagged = tagger_of(guard).mint(bytes(range(20))).decode()
    outcomes = await guard.imports.add([by_token(UNTAGGED), by_token(tagged, prefix="00010203")])
    assert [outcome.how for outcome in outcomes] == ["imported", "imported"]
    rows = execute(guard.settings.database_url, "SELECT secret_hash, digest FROM tfm_keys")
    assert all(row.secret_hash.startswith("$argon2id$") and len(row.digest) == 16 for row in rows)
    hashes = guard.counters.hashes
    assert (await guard.verify(tagged)).key_prefix == "00010203"
    assert (await guard.verify(UNTAGGED)).key_prefix == "00112233"
    assert guard.counters.hashes == hashes


async def test_an_imported_key_is_as_it_was(guard: Guard) -> None:
    """Times, scopes and name are kept, the audit log and the feed name the key, once each."""
    made, ends = datetime(2020, 1, 31, 12, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    key = by_hash(
        UNTAGGED, name=" Shop ", scopes=["send", "emails:read"], created_at=made, expires_at=ends
    )
    await guard.imports.add([key], actor="command_line")
    (listed,) = await guard.keys.list("acme")
    assert (listed.name, listed.created_at, listed.expires_at) == ("Shop", made, ends)
    assert listed.scopes == {"send", "emails:read"}
    url = guard.settings.database_url
    assert execute(url, "SELECT actor, action, target_id FROM tfm_audit") == [
        ("command_line", "api_key.imported", str(listed.id))
    ]
    assert execute(url, "SELECT id, kind, prefix, version FROM tfm_changes") == [
        (1, "created", "00112233", 1)
    ]


async def test_importing_clears_what_was_refused(guard: Guard) -> None:
    """A token that was refused as unknown is accepted as soon as its key has been imported."""
    assert await refusal(guard, UNTAGGED) == "unknown prefix"
    assert await refusal(guard, UNTAGGED) == "unknown prefix"
    assert guard.counters.negative_hits == 1
    await guard.imports.add([by_hash(UNTAGGED)])
    assert (await guard.verify(UNTAGGED)).key_prefix == "00112233"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prefix": "0011223"}, ("prefix",)),
        ({"prefix": "0011223G"}, ("prefix",)),
        ({"prefix": "AABBCCDD"}, ("prefix",)),
        ({"prefix": None}, ("prefix",)),
        ({"account_id": ""}, ("account_id",)),
        ({"account_id": " acme"}, ("account_id",)),
        ({"account_id": UNTAGGED}, ("account_id",)),
        ({"name": "\u202e"}, ("name",)),
        ({"name": "x" * 101}, ("name",)),
        ({"name": f"key {UNTAGGED}"}, ("name",)),
        ({"scopes": ["send", "sned"]}, ("scopes", 1)),
        ({"scopes": [UNTAGGED]}, ("scopes", 0)),
        ({"secret_hash": None}, ("secret_hash",)),
        ({"secret_hash": "0" * 63}, ("secret_hash",)),
        ({"secret_hash": UNTAGGED}, ("secret_hash",)),
        ({"token": UNTAGGED}, ("secret_hash",)),
        ({"secret_hash": None, "token": UNTAGGED + "0"}, ("token",)),
        ({"secret_hash": None, "token": UNTAGGED + "0" * 16}, ("token",)),
        ({"secret_hash": None, "token": UNTAGGED, "prefix": "00112234"}, ("prefix",)),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, ("expires_at",)),
        ({"expires_at": datetime(2100, 1, 1)}, ("expires_at",)),  # noqa: DTZ001  # on purpose
        ({"created_at": datetime(2100, 1, 1, tzinfo=UTC)}, ("created_at",)),
        (
            {"created_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))},
            ("created_at",),
        ),
    ],
)
async def test_what_cannot_be_is_refused(
    sqlite_url: str, changes: dict[str, Any], field: tuple[Any, ...]
) -> None:
    """A key that breaks a rule is refused with the field that breaks it, and nothing quotes it."""
    key = by_hash(UNTAGGED, **changes)
    async with new_guard(sqlite_url) as guard:
        (outcome,) = await guard.imports.add([key])
    assert outcome.how == "refused"
    assert isinstance(outcome.refusal, InvalidInput)
    assert outcome.refusal.field == field
    assert execute(sqlite_url, "SELECT count(*) FROM tfm_keys") == [(0,)]
    assert UNTAGGED[14:] not in f"{outcome!r} {outcome.refusal} {key!r}"


async def test_one_that_is_refused_does_not_stop_the_others(guard: Guard) -> None:
    """Of five keys, with every second one unfit, three are imported, told in their order."""
    keys = [by_hash(token_number(n), name="" if n % 2 else "CI") for n in range(5)]
    outcomes = await guard.imports.add(keys)
    assert [outcome.how for outcome in outcomes] == ["imported", "refused"] * 2 + ["imported"]
    assert len(await guard.keys.list("acme")) == 3


async def test_the_same_again_is_there_already(guard: Guard) -> None:
    """A second import of the same changes nothing, by hash or by token, also after first use."""
    keys = [by_hash(token_number(1)), by_token(token_number(2))]
    assert await add_all(guard, keys) == {"imported": 2}
    assert await add_all(guard, keys) == {"present": 2}
    # One that came by its hash is known by its token, too.
    assert await add_all(guard, [by_token(token_number(1))]) == {"present": 1}
    await guard.verify(token_number(1))
    await verifier_settled(guard)
    assert await add_all(guard, [*keys, by_token(token_number(1))]) == {"present": 3}
    assert execute(guard.settings.database_url, "SELECT count(*) FROM tfm_changes") == [(2,)]


async def test_a_revoked_key_does_not_come_back(guard: Guard) -> None:
    """A key that was revoked after its import is there already, and stays revoked."""
    await guard.imports.add([by_hash(UNTAGGED)])
    (key,) = await guard.keys.list("acme")
    await guard.keys.revoke("acme", key.id)
    assert await add_all(guard, [by_hash(UNTAGGED)]) == {"present": 1}
    assert await refusal(guard, UNTAGGED) == "revoked"


@pytest.mark.parametrize(
    "changes", [{"account_id": "other"}, {"secret_hash": sha256("another token")}]
)
async def test_a_prefix_belongs_to_one_key(guard: Guard, changes: dict[str, Any]) -> None:
    """Another key with the prefix of one in the database, or of one in the batch, is refused."""
    first, second = by_hash(UNTAGGED), by_hash(UNTAGGED, **changes)
    for keys in ([first, second, first], [second]):
        outcomes = await guard.imports.add(keys)
        refused = outcomes[1] if len(keys) > 1 else outcomes[0]
        assert isinstance(refused.refusal, InvalidInput)
        assert (refused.refusal.field, refused.refusal.kind) == (("prefix",), "prefix_taken")
    assert len(await guard.keys.list("acme")) == 1
    assert await guard.keys.list("other") == []


async def test_the_plan_holds_for_imports_too(database_url: str) -> None:
    """Beyond the plan's limit keys are refused, counting those that exist, unless it is said so."""
    async with new_guard(database_url, plans={"free": 3}, accept_untagged_tokens=True) as guard:
        await guard.keys.create(account_id="acme", name="CI")
        keys = [by_hash(token_number(n)) for n in range(4)]
        outcomes = await guard.imports.add(keys)
        assert [outcome.how for outcome in outcomes] == ["imported"] * 2 + ["refused"] * 2
        assert isinstance(outcomes[3].refusal, PlanLimitReached)
        assert (outcomes[3].refusal.current, outcomes[3].refusal.limit) == (3, 3)
        assert await add_all(guard, keys, beyond_plan=True) == {"present": 2, "imported": 2}
        assert len(await guard.keys.list("acme")) == 5


async def test_a_rehearsal_says_the_same_and_imports_nothing(database_url: str) -> None:
    """Over several batches a rehearsal tells of each key what the import then makes of it."""
    keys = [by_hash(token_number(n % 150), account_id=f"account {n % 60}") for n in range(300)]
    keys[20] = by_hash(token_number(20), name="")
    async with new_guard(database_url, plans={"free": 2}) as guard:
        await guard.imports.add(keys[:10])
        rehearsed: list[ImportOutcome] = []
        with guard.imports.rehearsal() as rehearsal:
            for start in range(0, len(keys), BATCH):
                batch = keys[start : start + BATCH]
                rehearsed += await guard.imports.rehearse(batch, rehearsal)
        assert execute(database_url, "SELECT count(*) FROM tfm_keys") == [(10,)]
        done: list[ImportOutcome] = []
        for start in range(0, len(keys), BATCH):
            done += await guard.imports.add(keys[start : start + BATCH])
    assert [(one.how, str(one.refusal)) for one in rehearsed] == [
        (one.how, str(one.refusal)) for one in done
    ]
    assert {one.how for one in done} == {"imported", "present", "refused"}


async def test_a_thousand_keys(guard: Guard) -> None:
    """A thousand keys of ten accounts are imported, with as many changes without a gap."""
    assert await add_all(guard, numbered(1000)) == {"imported": 1000}
    url = guard.settings.database_url
    assert execute(url, "SELECT count(*), min(id), max(id) FROM tfm_changes") == [(1000, 1, 1000)]
    assert execute(url, "SELECT count(*) FROM tfm_audit") == [(1000,)]
    assert await store_of(guard).find_faults() == []
    assert (await guard.verify(token_number(999))).account_id == "account 9"


@pytest.mark.parametrize("point", ["before COMMIT", "after COMMIT"])
async def test_an_import_that_broke_off_is_taken_up_again(guard: Guard, point: str) -> None:
    """Cancelled just before or after a COMMIT, an import left whole batches; again, it goes on."""
    keys = numbered(250)
    await add_all(guard, keys[:100])
    failpoint = Failpoint(point, dies=False)
    broken = asyncio.create_task(guard.imports.add(keys[100:200]))
    await until(lambda: failpoint.reached, what="the failpoint")
    broken.cancel()
    await asyncio.wait({broken})
    assert broken.cancelled()
    failpoint.remove()
    committed = 200 if point == "after COMMIT" else 100
    assert await add_all(guard, keys) == {"present": committed, "imported": 250 - committed}
    url = guard.settings.database_url
    assert execute(url, "SELECT count(*), max(id) FROM tfm_changes") == [(250, 250)]


async def test_two_imports_at_the_same_time(database_url: str) -> None:
    """Of one file imported twice at once each key is imported once; nobody fails."""
    keys = numbered(300)
    async with new_guard(database_url) as one, new_guard(database_url) as other:
        counts = await asyncio.gather(
            add_all(one, keys),
            add_all(other, [*reversed(keys)]),
        )
    assert counts[0]["imported"] + counts[1]["imported"] == 300
    assert counts[0]["present"] + counts[1]["present"] == 300
    rows = "SELECT count(*), min(id), max(id) FROM tfm_changes"
    assert execute(database_url, rows) == [(300, 1, 300)]


async def test_two_imports_never_exceed_a_plan(database_url: str) -> None:
    """Two imports of different keys into one account get it no further than its limit."""
    async with (
        new_guard(database_url, plans={"free": 10}) as one,
        new_guard(database_url, plans={"free": 10}) as other,
    ):
        await one.accounts.set_plan("acme", "free")  # its making would be a lock, too
        await asyncio.gather(
            add_all(one, [by_hash(token_number(n)) for n in range(8)]),
            add_all(other, [by_hash(token_number(n)) for n in range(8, 16)]),
        )
        assert len(await one.keys.list("acme")) == 10


async def test_more_than_a_batch_is_refused(guard: Guard) -> None:
    """One transaction takes 100 keys at the most."""
    with pytest.raises(ValueError, match="at most 100 keys, got 101"):
        await guard.imports.add(numbered(101))


async def test_an_imported_key_expires(guard: Guard) -> None:
    """A key whose end has passed since is refused as expired."""
    url = guard.settings.database_url
    soon = datetime.now(UTC) + timedelta(hours=1)
    await guard.imports.add([by_hash(UNTAGGED, expires_at=soon)])
    execute(url, "UPDATE tfm_keys SET expires_at = created_at")
    assert await refusal(guard, UNTAGGED) == "expired"
