"""`tfm-guard db`."""

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click

from tfm_guard.cli.failures import Failure
from tfm_guard.cli.key_views import json_option
from tfm_guard.cli.tables import print_json, print_table

if TYPE_CHECKING:
    from tfm_guard.store import Look, Store, Times

# For so long the audit log is shown.
_SHOWN_DAYS: Final = 90


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


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(*, as_json: bool) -> None:
    """Check that what is in the tables can be so.

    Among others: that the tables are of this release, the feed of changes has no gap and ends at
    its head, each rotated key has one successor, and no key of an erased account is active. Changes
    nothing. The exit code is 1 if something cannot be so.
    """
    faults = asyncio.run(_check())
    if as_json:
        print_json({"faults": faults})
    if faults:
        raise Failure(*faults)
    click.echo("Nothing wrong was found.", err=True)


@db.command()
@click.option(
    "--audit-days",
    type=click.IntRange(_SHOWN_DAYS, 36_500),
    default=365,
    show_default=True,
    help="How long to keep the audit log.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prune(audit_days: int, *, as_json: bool) -> None:
    """Remove what is needed no more. Run it daily.

    That is: each change of a key that every process has long applied, older than 20 minutes, twice
    as long as anything is remembered; the use of keys longer than 92 days ago; and the audit log,
    as far as it is older than you keep it. Keys stay, revoked ones too: their prefixes are taken
    for good.
    """
    removed = asyncio.run(_prune(timedelta(days=audit_days)))
    if as_json:
        print_json(removed)
    told = ", ".join(f"{count} of {what}" for what, count in removed.items())
    click.echo(f"Removed rows: {told}.", err=True)


@db.command()
@click.option("--lease-seconds", type=click.FloatRange(1, 20), help="How long memory counts.")
@click.option(
    "--poll-seconds", type=click.FloatRange(0.05, 5), help="Between two reads of the feed."
)
@click.option(
    "--linked-poll-seconds",
    type=click.FloatRange(0.05, 10),
    help="Likewise, for processes that hear of changes over Redis.",
)
@click.option(
    "--unfed-seconds",
    type=click.FloatRange(10, 300),
    help="How long memory counts while only Redis answers.",
)
@click.option(
    "--ended", is_flag=True, help="Strike processes off that are dead and still in the register."
)
@json_option
def times(*, ended: bool, as_json: bool, **given: float | None) -> None:
    """Print the times that all processes share; with options, change them.

    They change only while no process runs: two that know different leases could not promise each
    other anything. So end all processes, `tfm-guard serve` too, change the times, and start them
    again. One that was killed stays in the register; --ended strikes off whoever is there, and then
    waits, for about a minute, until none can trust its memory any more. One that lives nevertheless
    comes back meanwhile, and nothing changes.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    if ended and not wanted:
        raise click.UsageError("--ended goes with a time to change.")
    now = asyncio.run(_change_times(wanted, ended=ended))
    if as_json:
        print_json(now)
    else:
        print_table(("time", "seconds"), [(name, f"{value:g}") for name, value in now.items()])


@asynccontextmanager
async def existing_store(*, pool_size: int = 1) -> AsyncIterator["Store"]:
    """Open the database as it is; nothing is made if it is not there, or empty."""
    from tfm_guard.clock import SystemClock
    from tfm_guard.settings import Settings
    from tfm_guard.store import Store

    settings = Settings.load(os.environ)
    store = Store(settings.database_url, pool_size=pool_size, clock=SystemClock())
    try:
        yield store
    finally:
        await store.close()


async def _require_tables(store: "Store") -> None:
    if fault := fault_of(await store.look()):
        raise Failure(fault)


def fault_of(look: "Look | None") -> str | None:
    """Return why a database cannot be looked into; none where it can."""
    if look is None:
        return (
            "the database's file is not there; check TFM_GUARD_DATABASE_URL, or make the file: "
            "tfm-guard db upgrade"
        )
    if look.revision is None:
        return (
            "there are no tables in the database; they are made when it is first used, "
            "or by: tfm-guard db upgrade"
        )
    return None


async def _upgrade() -> tuple[str | None, str]:
    from tfm_guard import Guard

    return await Guard.from_environment().upgrade_schema()


async def _check() -> list[str]:
    async with existing_store() as store:
        await _require_tables(store)
        return await store.find_faults()


async def _change_times(wanted: dict[str, float], *, ended: bool) -> dict[str, float]:
    from tfm_guard.clock import SystemClock

    async with existing_store() as store:
        await _require_tables(store)
        old = await store.shared_times()
        new = old._replace(**wanted)
        if not wanted:
            return new._asdict()
        if faults := faults_of(new):
            raise Failure(*faults)
        if ended and await store.strike_all_off():
            seconds = old.unfed_seconds + old.lease_seconds
            click.echo(f"Waiting {seconds:g} s, for none of them to trust its memory.", err=True)
            await SystemClock().sleep(seconds)
        if present := await store.change_times(new):
            raise Failure(
                f"in the register: {', '.join(present)}",
                "the times change only while no process runs: end all; of those that were killed, "
                "say so with --ended",
            )
        return new._asdict()


def faults_of(times: "Times") -> list[str]:
    """Return why the times do not go together."""
    named = {
        name: f"--{name.replace('_', '-')} {value:g}" for name, value in times._asdict().items()
    }
    faults = [
        f"{named[name]}: it must be a number of seconds"
        for name, value in times._asdict().items()
        if not math.isfinite(value)
    ]
    lease = named["lease_seconds"]
    if times.lease_seconds < 2 * times.poll_seconds:
        faults.append(f"{lease}: it must be at least twice as long as {named['poll_seconds']}")
    if times.lease_seconds <= times.linked_poll_seconds:
        faults.append(f"{lease}: it must be longer than {named['linked_poll_seconds']}")
    if times.unfed_seconds < 2 * times.lease_seconds:
        faults.append(f"{named['unfed_seconds']}: it must be at least twice as long as {lease}")
    return faults


async def _prune(audit_age: timedelta) -> dict[str, int]:
    from tfm_guard.freshness import FLOOR_SECONDS

    async with existing_store() as store:
        await _require_tables(store)
        return {
            "changes": await store.prune_changes(timedelta(seconds=FLOOR_SECONDS)),
            "usage": await store.prune_usage(),
            "audit": await store.prune_audit(audit_age),
        }
