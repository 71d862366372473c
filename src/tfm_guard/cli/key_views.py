"""`tfm-guard keys list`, `show` and `verify`: what there is to know about keys."""

import asyncio
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from tfm_guard.cli.failures import Failure
from tfm_guard.cli.tables import print_json, print_table, short
from tfm_guard.cli.tokens import read_token

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.records import ApiKey, Explanation

_COLUMNS: Final = ("prefix", "name", "scopes", "created (UTC)", "last used", "expires")

account_option = click.option(
    "--account", required=True, help="Whose key it is, as your application names it."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("list")
@click.option("--account", required=True, help="Whose keys, as your application names it.")
@json_option
def list_(account: str, *, as_json: bool) -> None:
    """List the active keys of an account, newest first."""
    keys = asyncio.run(_list(account))
    if as_json:
        print_json([as_dict(key) for key in keys])
    elif keys:
        print_table(_COLUMNS, [_cells(key) for key in keys])
    else:
        click.echo(f'Account "{account}" has no active key.', err=True)


@click.command()
@click.argument("key", metavar="KEY")
@account_option
@json_option
def show(key: str, account: str, *, as_json: bool) -> None:
    """Show an active key. KEY is its prefix, of 8 digits, or its id."""
    found = asyncio.run(_show(account, key))
    if as_json:
        print_json(as_dict(found))
    else:
        for name, value in as_dict(found).items():
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


async def id_of(guard: "Guard", account: str, key: str) -> UUID:
    """Return the id of the account's *key*, given by its id or its prefix."""
    try:
        return UUID(key)
    except ValueError:
        return await guard.keys.id_of(account, key)


async def _list(account: str) -> "list[ApiKey]":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        return await guard.keys.list(account)


async def _show(account: str, key: str) -> "ApiKey":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        return await guard.keys.get(account, await id_of(guard, account, key))


async def _explain(token: str) -> "Explanation":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        return await guard.explain(token)


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


def _cells(key: "ApiKey") -> tuple[str, ...]:
    return (
        key.key_prefix,
        key.name,
        " ".join(sorted(key.scopes)),
        short(key.created_at),
        short(key.last_used_at),
        short(key.expires_at),
    )


def _in_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, frozenset):
        return " ".join(sorted(value)) or "–"
    return f"{value:%Y-%m-%d %H:%M:%S %Z}" if hasattr(value, "tzinfo") else str(value)
