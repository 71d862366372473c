"""`tfm-guard keys revoke`."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from tfm_guard.cli.failures import Failure, NotNow
from tfm_guard.cli.key_views import id_of, json_option
from tfm_guard.cli.tables import print_json, print_table
from tfm_guard.cli.tokens import read_tokens
from tfm_guard.errors import KeyNotFound, NotConfirmed, Unavailable

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.records import Explanation, Revocation

# Revoked at the same time: each may have to wait for a process that does not answer.
_AT_ONCE: Final = 16

REVOKED: Final = "revoked"
REVOKED_BEFORE: Final = "revoked before"
UNCONFIRMED: Final = "revoked, unconfirmed"
UNKNOWN: Final = "unknown"
NOT_NOW: Final = "not now"


class Leak(NamedTuple):
    """What became of a leaked token, of which nothing but the prefix of a key it proves is told."""

    line: int
    outcome: str
    key_prefix: str | None = None
    account_id: str | None = None
    name: str | None = None
    reason: str | None = None


@click.command()
@click.argument("key", metavar="[KEY]", required=False)
@click.option("--account", help="Whose key it is. Needed with KEY.")
@click.option("--leaked", is_flag=True, help="Revoke all keys whose tokens are on stdin.")
@json_option
def revoke(key: str | None, account: str | None, *, leaked: bool, as_json: bool) -> None:
    """Revoke a key for good; return when it is refused everywhere.

    KEY is its prefix, of 8 digits, or its id. With --leaked the tokens of any number of keys, of
    whichever accounts, are read from stdin, one a line; each is told by its line and its prefix.
    The exit code is then 1 if one proves no key, and 3 if one could not be revoked now.

    Exit code 3 says that the key is revoked, and that it could not be made sure in time that every
    process knows: run it again.
    """
    if leaked in {key is not None, account is not None}:
        raise click.UsageError("Give KEY and --account, or --leaked.")
    if leaked:
        _revoke_leaked(as_json=as_json)
        return
    done = asyncio.run(_revoke(str(account), str(key)))
    if as_json:
        print_json({name: getattr(done, name) for name in done.__struct_fields__})
    click.echo(
        f"Revoked. Refused everywhere after {done.seconds * 1000:.0f} ms, "
        f"by {done.how} of {done.workers} processes."
        if done.how == "acknowledged"
        else f"Revoked. Refused everywhere after {done.seconds:.1f} s: a process did not answer, "
        "and its lease has ended.",
        err=True,
    )


async def _revoke(account: str, key: str) -> "Revocation":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        key_id = await id_of(guard, account, key)
        return await guard.keys.revoke(account, key_id, actor="command_line")


def _revoke_leaked(*, as_json: bool) -> None:
    tokens = read_tokens("tfm-guard keys revoke --leaked")
    leaks = asyncio.run(_revoke_all(tokens))
    if as_json:
        print_json([leak._asdict() for leak in leaks])
    elif leaks:
        columns = ("line", "prefix", "outcome", "account", "name", "reason")
        print_table(columns, [_cells(leak) for leak in leaks])
    outcomes = [leak.outcome for leak in leaks]
    lacking = outcomes.count(UNCONFIRMED) + outcomes.count(NOT_NOW)
    if lacking:
        raise NotNow(f"{lacking} of {len(leaks)} keys are not known to be refused; run it again")
    if unknown := outcomes.count(UNKNOWN):
        raise Failure(f"{unknown} of {len(leaks)} tokens prove no key")


async def _revoke_all(tokens: Sequence[tuple[int, str]]) -> list[Leak]:
    from tfm_guard.guard import Guard

    permits = asyncio.Semaphore(_AT_ONCE)

    async def one(guard: Guard, line: int, token: str) -> Leak:
        async with permits:
            return await _revoke_leak(guard, line, token)

    async with Guard.from_environment() as guard:
        return await asyncio.gather(*(one(guard, line, token) for line, token in tokens))


async def _revoke_leak(guard: "Guard", line: int, token: str) -> Leak:
    try:
        told = await guard.explain(token)
    except Unavailable as error:
        return Leak(line, NOT_NOW, reason=error.reason)
    if told.key is None:
        return Leak(line, UNKNOWN, reason=told.reason)
    try:
        await guard.keys.revoke(told.key.account_id, told.key.id, actor="command_line")
    except KeyNotFound:
        return _leak(line, REVOKED_BEFORE, told)
    except NotConfirmed:
        return _leak(line, UNCONFIRMED, told)
    except Unavailable as error:
        return _leak(line, NOT_NOW, told, error.reason)
    return _leak(line, REVOKED, told)


def _leak(line: int, outcome: str, told: "Explanation", reason: str | None = None) -> Leak:
    key: Any = told.key
    return Leak(line, outcome, key.prefix, key.account_id, key.name, reason)


def _cells(leak: Leak) -> tuple[str, ...]:
    texts = (leak.key_prefix, leak.outcome, leak.account_id, leak.name, leak.reason)
    return str(leak.line), *(text or "–" for text in texts)
