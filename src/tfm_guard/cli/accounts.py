"""`tfm-guard accounts`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from tfm_guard.cli.failures import Failure, naming
from tfm_guard.cli.key_views import json_option
from tfm_guard.cli.tables import print_json, print_table, short

if TYPE_CHECKING:
    from tfm_guard.accounts import AccountManager

T = TypeVar("T")


@click.group()
def accounts() -> None:
    """List accounts, put them on plans, suspend, resume and erase them."""


@accounts.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List the accounts that keys or plans were ever given to, by their ids."""
    found = _run(lambda manager: manager.list())
    if as_json:
        print_json([{name: getattr(one, name) for name in one.__struct_fields__} for one in found])
    elif found:
        print_table(
            ("account", "plan", "active keys", "suspended (UTC)"),
            [(one.id, one.plan, str(one.active_keys), short(one.suspended_at)) for one in found],
        )
    else:
        click.echo("There are no accounts.", err=True)


@accounts.command("set-plan")
@click.argument("account")
@click.argument("plan")
def set_plan(account: str, plan: str) -> None:
    """Put ACCOUNT on PLAN, which limits how many active keys it may hold.

    An account that was never mentioned is on the plan "free". Keys that exist stay, also where
    there are more of them than PLAN allows.
    """
    with naming(account_id="ACCOUNT", plan="PLAN"):
        _run(lambda manager: manager.set_plan(account, plan))
    click.echo(f'Account "{account}" is on the plan "{plan}".', err=True)


@accounts.command()
@click.argument("account")
def suspend(account: str) -> None:
    """Have all keys of ACCOUNT refused until it is resumed; return when they are, everywhere.

    Exit code 3 says that it is suspended, and that it could not be made sure in time that every
    process knows: run it again.
    """
    _run(lambda manager: manager.suspend(account, actor="command_line"))
    click.echo(f'Account "{account}" is suspended: its keys are refused everywhere.', err=True)


@accounts.command()
@click.argument("account")
def resume(account: str) -> None:
    """Have the keys of ACCOUNT, which is suspended, accepted again."""
    _run(lambda manager: manager.resume(account, actor="command_line"))
    click.echo(f'Account "{account}" is not suspended: its keys are accepted.', err=True)


@accounts.command()
@click.argument("account")
@click.option("--yes", is_flag=True, help="Do not ask.")
def erase(account: str, *, yes: bool) -> None:
    """Revoke all keys of ACCOUNT, then delete all that is known of it. This cannot be undone.

    Its name, its keys, their usage and its audit log go; the prefixes of its keys stay taken. Asks
    for the account's id once more, unless --yes is given. Exit code 3 says that it has begun, and
    that it could not be made sure in time that every process refuses its keys: run it again.
    """
    if not yes and _ask_for_id() != account:
        raise Failure("that is another id; nothing was erased")
    _run(lambda manager: manager.erase(account))
    click.echo(f'Account "{account}" is erased.', err=True)


def _ask_for_id() -> str:
    try:
        return str(click.prompt("Type the account's id to erase it", err=True))
    except click.Abort:
        raise Failure("nothing was erased; without a terminal, give --yes") from None


def _run(work: "Callable[[AccountManager], Awaitable[T]]") -> T:
    async def run() -> T:
        from tfm_guard.guard import Guard

        async with Guard.from_environment() as guard:
            return await work(guard.accounts)

    return asyncio.run(run())
