"""`tfm-guard keys list`, `show` and `verify`: what there is to know about keys."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from tfm_guard.cli.failures import Failure
from tfm_guard.cli.tables import print_json, print_table, short
from tfm_guard.cli.tokens import read_token
from tfm_guard.errors import KeyNotFound

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.records import ApiKey, Explanation, KeyStatus

_COLUMNS: Final = ("prefix", "name", "scopes", "created (UTC)", "last used", "expires", "status")

_UNTAGGED: Final = (
    "it has no tag, as it was issued elsewhere, and TFM_GUARD_ACCEPT_UNTAGGED_TOKENS is not true "
    "here"
)

account_option = click.option(
    "--account", required=True, help="Whose key it is, as your application names it."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("list")
@click.option("--account", required=True, help="Whose keys, as your application names it.")
@json_option
def list_(account: str, *, as_json: bool) -> None:
    """List the active keys of an account, newest first."""
    found = asyncio.run(_list(account))
    if as_json:
        print_json([{**as_dict(key), "status": status} for key, status in found])
    elif found:
        print_table(_COLUMNS, [_cells(key, status) for key, status in found])
    else:
        click.echo(f'Account "{account}" has no active key.', err=True)


@click.command()
@click.argument("key", metavar="KEY")
@account_option
@json_option
def show(key: str, account: str, *, as_json: bool) -> None:
    """Show an active key. KEY is its prefix, of 8 digits, or its id."""
    with finding_key():
        found, status = asyncio.run(_show(account, key))
    fields = {**as_dict(found), "status": status}
    if as_json:
        print_json(fields)
    else:
        for name, value in fields.items():
            click.echo(f"{name:14}{_in_words(value)}")


@click.command()
@json_option
def verify(*, as_json: bool) -> None:
    """Say which key a token proves, or why it is refused.

    The token is read from stdin, or asked for. It is looked up in the database alone, whatever the
    processes of the application remember. The exit code is 1 if it is refused.
    """
    token = read_token("Key", "that of a key", "tfm-guard keys verify")
    told = asyncio.run(_explain(token))
    if as_json:
        print_json(_verdict(told))
    elif told.key is not None:
        for name, value in _proven(told).items():
            click.echo(f"{name:14}{_in_words(value)}")
    if told.reason is not None:
        raise Failure(f"the key is refused: {told.reason}")


def as_dict(key: "ApiKey") -> dict[str, Any]:
    """Return what there is to show of *key*, by the names that it has in JSON."""
    return {name: getattr(key, name) for name in key.__struct_fields__}


@contextmanager
def finding_key() -> Iterator[None]:
    """Have it told what KEY may be where no such key is found."""
    try:
        yield
    except KeyNotFound as error:
        raise Failure(
            error.message,
            "KEY is the 8 digits after tfm_k_, or the id, of an active key of that account",
        ) from error


async def id_of(guard: "Guard", account: str, key: str) -> UUID:
    """Return the id of the account's *key*, given by its id or its prefix."""
    try:
        return UUID(key)
    except ValueError:
        return await guard.keys.id_of(account, key)


async def _list(account: str) -> "list[tuple[ApiKey, KeyStatus]]":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        return [(key, guard.keys.status(key)) for key in await guard.keys.list(account)]


async def _show(account: str, key: str) -> "tuple[ApiKey, KeyStatus]":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        found = await guard.keys.get(account, await id_of(guard, account, key))
        return found, guard.keys.status(found)


async def _explain(token: str) -> "Explanation":
    from tfm_guard.guard import Guard
    from tfm_guard.records import Explanation
    from tfm_guard.token import is_untagged

    async with Guard.from_environment() as guard:
        told = await guard.explain(token)
        accepted = guard.settings.accept_untagged_tokens or not is_untagged(token.encode())
        return told if told.key is None or accepted else Explanation(key=told.key, reason=_UNTAGGED)


def _verdict(told: "Explanation") -> dict[str, Any]:
    key = None if told.key is None else _proven(told)
    return {"valid": told.reason is None, "reason": told.reason, "key": key}


def _proven(told: "Explanation") -> dict[str, Any]:
    assert told.key is not None  # noqa: S101  # asked by who calls
    key = told.key
    return {
        "id": key.id,
        "key_prefix": key.prefix,
        "account_id": key.account_id,
        "name": key.name,
        "scopes": key.scopes,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "suspended_at": key.suspended_at,
    }


def _cells(key: "ApiKey", status: "KeyStatus") -> tuple[str, ...]:
    return (
        key.key_prefix,
        key.name,
        " ".join(sorted(key.scopes)),
        short(key.created_at),
        short(key.last_used_at),
        short(key.expires_at),
        status,
    )


def _in_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, frozenset):
        return " ".join(sorted(value)) or "–"
    return f"{value:%Y-%m-%d %H:%M:%S %Z}" if hasattr(value, "tzinfo") else str(value)
