"""`tfm-guard keys`."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from tfm_guard.cli.failures import Failure, naming
from tfm_guard.cli.import_keys import import_
from tfm_guard.cli.key_views import json_option, list_, show, verify
from tfm_guard.cli.new_tokens import print_token, require_stdout
from tfm_guard.cli.revoking import revoke
from tfm_guard.cli.rotating import rotate
from tfm_guard.clock import SystemClock

if TYPE_CHECKING:
    from tfm_guard.records import ApiKey

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Duration(click.ParamType[datetime]):
    """A whole number of minutes, hours, days or weeks."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the moment that lies *value* from now."""
        match = re.fullmatch(r"([1-9][0-9]*)([mhdw])", value)
        if match is None:
            self.fail(f"{value!r} is no duration; write it like 12h, 90d or 8w", param, ctx)
        try:
            return SystemClock().now() + timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            self.fail(f"{value!r} ends after the year 9999", param, ctx)


class Moment(click.ParamType[datetime]):
    """A time with its zone."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write it like 2030-01-31T12:00Z", param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{value!r} lacks its zone; write it like 2030-01-31T12:00Z", param, ctx)
        return moment


@click.group()
def keys() -> None:
    """Create, import, list, verify, rotate and revoke API keys."""


for command in (import_, list_, revoke, rotate, show, verify):
    keys.add_command(command)


@keys.command()
@click.option("--account", required=True, help="Whose key it is, as your application names it.")
@click.option("--name", required=True, help="What the key is for, in 1 to 100 characters.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=["send"],
    show_default=True,
    help="What the key may do. May be given several times.",
)
@click.option("--expires-in", type=Duration(), help="How long it works, like 12h, 90d or 8w.")
@click.option("--expires-at", type=Moment(), help="Until when it works, like 2030-01-31T12:00Z.")
@json_option
def create(
    account: str,
    name: str,
    scopes: tuple[str, ...],
    expires_in: datetime | None,
    expires_at: datetime | None,
    *,
    as_json: bool,
) -> None:
    """Create a key and print its token, which is shown this once.

    The token alone goes to stdout, so that it can be piped to where it is kept; words go to stderr.
    Where the token cannot be written, the key is revoked again.
    """
    if expires_in and expires_at:
        raise click.UsageError("Give --expires-in or --expires-at, not both.")
    require_stdout()
    with _naming_options(scopes):
        until = expires_in or expires_at
        key = asyncio.run(_create(account, name, scopes, until, as_json=as_json))
    ends = f", expires {key.expires_at:%Y-%m-%d %H:%M %Z}" if key.expires_at else ""
    click.echo(
        f'Created the key "{key.name}" ({key.key_prefix}) of account "{account}": '
        f"{' '.join(sorted(key.scopes))}{ends}.\n"
        "Keep its token now: it is not shown again.",
        err=True,
    )


async def _create(
    account: str,
    name: str,
    scopes: tuple[str, ...],
    expires_at: datetime | None,
    *,
    as_json: bool,
) -> "ApiKey":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        created = await guard.keys.create(
            account_id=account,
            name=name,
            scopes=scopes,
            expires_at=expires_at,
            actor="command_line",
        )
        await print_token(guard, created, as_json=as_json)
        return created.key


@contextmanager
def _naming_options(scopes: tuple[str, ...]) -> Iterator[None]:
    """Name refused values by their options; tell who put several scopes into one."""
    try:
        with naming(
            account_id="--account", name="--name", scopes="--scope", expires_at="--expires-at"
        ):
            yield
    except Failure as refused:
        if refused.message.startswith("--scope") and any("," in scope for scope in scopes):
            hint = "give each scope by itself: --scope send --scope emails:read"
            raise Failure(refused.message, hint) from refused
        raise
