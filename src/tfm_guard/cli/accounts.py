"""`tfm-guard accounts`."""

import asyncio

import click

from tfm_guard.cli.failures import naming


@click.group()
def accounts() -> None:
    """Put accounts on plans."""


@accounts.command("set-plan")
@click.argument("account")
@click.argument("plan")
def set_plan(account: str, plan: str) -> None:
    """Put ACCOUNT on PLAN, which limits how many active keys it may hold.

    An account that was never mentioned is on the plan "free". Keys that exist stay, also where
    there are more of them than PLAN allows.
    """
    with naming(account_id="ACCOUNT", plan="PLAN"):
        asyncio.run(_set_plan(account, plan))
    click.echo(f'Account "{account}" is on the plan "{plan}".', err=True)


async def _set_plan(account: str, plan: str) -> None:
    from tfm_guard import Guard

    async with Guard.from_environment() as guard:
        await guard.accounts.set_plan(account, plan)
