"""`tfm-guard keys rotate`."""

import asyncio
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from tfm_guard.cli.failures import naming
from tfm_guard.cli.key_views import account_option, finding_key, id_of, json_option
from tfm_guard.cli.new_tokens import print_token, require_stdout

if TYPE_CHECKING:
    from tfm_guard.records import RotatedKey

_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


class Grace(click.ParamType[timedelta]):
    """A whole number of minutes, hours or days, from 0 on."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        match = re.fullmatch(r"([0-9]{1,6})([mhd])", value)
        if match is None:
            self.fail(f"{value!r} is no duration; write it like 30m, 24h or 7d", param, ctx)
        return timedelta(**{_UNITS[match[2]]: int(match[1])})


@click.command()
@click.argument("key", metavar="KEY")
@account_option
@click.option(
    "--grace",
    type=Grace(),
    default="24h",
    show_default=True,
    help="How long the old key works on, at most 7d.",
)
@json_option
def rotate(key: str, account: str, grace: timedelta, *, as_json: bool) -> None:
    """Create a key in place of another and print its token, which is shown this once.

    KEY is the old key's prefix, of 8 digits, or its id. It works on until its grace ends, so that
    who uses it can change to the new one; `keys revoke` ends it earlier. The new key has the same
    name and scopes. The token alone goes to stdout; words go to stderr. Where the token cannot be
    written, the new key is revoked again, and the old one ends with its grace.
    """
    require_stdout()
    with finding_key(), naming(grace="--grace"):
        rotated = asyncio.run(_rotate(account, key, grace, as_json=as_json))
    click.echo(
        f'The key "{rotated.key.name}" ({rotated.key.key_prefix}) of account "{account}" takes the '
        f"place of {key}, which {_ending(grace, rotated)}.\n"
        "Keep its token now: it is not shown again.",
        err=True,
    )
    if rotated.confirmed is None:
        click.echo(
            "Some process may not know yet when the old key ends. To be sure, revoke that one.",
            err=True,
        )


def _ending(grace: timedelta, rotated: "RotatedKey") -> str:
    return f"works on until {rotated.grace_ends_at:%Y-%m-%d %H:%M %Z}" if grace else "ends at once"


async def _rotate(account: str, key: str, grace: timedelta, *, as_json: bool) -> "RotatedKey":
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        key_id = await id_of(guard, account, key)
        rotated = await guard.keys.rotate(account, key_id, grace=grace, actor="command_line")
        confirmed = rotated.confirmed is not None
        await print_token(
            guard, rotated, as_json=as_json, replaces=rotated.replaces, confirmed=confirmed
        )
        return rotated
