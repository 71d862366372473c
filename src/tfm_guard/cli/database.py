"""`tfm-guard db`."""

import asyncio

import click


@click.group()
def db() -> None:
    """Look after the database's tables."""


@db.command()
def upgrade() -> None:
    """Bring the database's tables to this release.

    An empty database needs no upgrade: its tables are made when it is first used.
    """
    before, after = asyncio.run(_upgrade())
    if before is None:
        click.echo(f"The tables were made, at revision {after}.", err=True)
    elif before == after:
        click.echo(f"The tables are at revision {after} already.", err=True)
    else:
        click.echo(f"The tables were upgraded from revision {before} to {after}.", err=True)


async def _upgrade() -> tuple[str | None, str]:
    from tfm_guard import Guard

    return await Guard.from_environment().upgrade_schema()
