"""`tfm-guard prove`: whether a running deployment keeps the promise that revoking makes."""

import json
import ssl
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import click

from tfm_guard.cli.connection import KEYS_PATH, Address, is_visible_ascii
from tfm_guard.cli.failures import Failure, NotNow
from tfm_guard.cli.findings import Deletion, Findings, Verdict, find, in_words, judge
from tfm_guard.cli.probe import Access, Crowd, probe_key
from tfm_guard.cli.signals import enter, take_signals
from tfm_guard.cli.tables import print_table
from tfm_guard.cli.tokens import read_token

_COLUMNS: Final = (
    "address",
    "connections",
    "accepted before",
    "first refused",
    "last accepted",
    "refused after",
    "accepted after",
    "unclear",
)


class BrokenPromise(Failure):
    """A deleted key was accepted, or a valid one refused."""

    exit_code = 4


class AddressType(click.ParamType[Address]):
    """Where a deployment is."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        try:
            return Address.parse(value)
        except ValueError:
            # Not shown as it came: it may hold a password.
            self.fail("expected http://HOST:PORT or https://HOST, without a user", param, ctx)


class PathType(click.ParamType[str]):
    """A path on the deployment."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not (value.startswith("/") and is_visible_ascii(value)):
            self.fail(f"{value!r} is no path; it begins with / and has no spaces", param, ctx)
        return str(value)


@click.command()
@click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True, type=AddressType())
@click.option(
    "--path",
    type=PathType(),
    default=KEYS_PATH,
    show_default=True,
    help="What to GET. It must need a key; which scope does not matter.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 1000),
    default=64,
    show_default=True,
    help="How many to open to each address.",
)
@click.option(
    "--seconds",
    type=click.IntRange(1, 600),
    default=10,
    show_default=True,
    help="How long to go on asking after the deletion.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def prove(
    addresses: tuple[Address, ...], path: str, connections: int, seconds: int, *, as_json: bool
) -> None:
    """Show that a deleted key is refused by a running deployment, everywhere and at once.

    Each ADDRESS, like https://api.example.com, leads to one or more processes of the deployment. A
    managing key of it, with the scope api-keys:write, is read from stdin or asked for.

    With it, a key without scopes is created, used on many connections to every address, and deleted
    through the first one, while all go on asking. The exit code is 0 if no request that began after
    DELETE had returned was accepted, 4 if one was or if a valid key was refused, 1 or 3 if it could
    not be shown. The key that was created is deleted in any case.
    """
    addresses = tuple(dict.fromkeys(addresses))
    access = Access(
        addresses,
        read_token("Managing key", "that of a managing key", "tfm-guard prove ADDRESS"),
        path,
        ssl.create_default_context(),
    )
    click.echo(f"Asking GET {path} over {connections} connections to each address …", err=True)
    with ExitStack() as undo:
        take_signals(undo)
        key = enter(undo, lambda: probe_key(access, seconds))
        crowd = Crowd(access, key, each=connections)
        with crowd.asking():
            deletion = crowd.delete()
            if deletion.returned is not None:
                crowd.keep_asking(seconds)
    found = [_findings(crowd, address, deletion) for address in addresses]
    verdict, reasons = judge(found, deletion)
    if as_json:
        click.echo(json.dumps(_report(found, deletion, verdict, reasons, seconds), indent=2))
    else:
        _print(found, deletion)
    if verdict is Verdict.BROKEN:
        raise BrokenPromise("the deployment did not keep its promise", *reasons)
    if verdict is Verdict.NOT_SHOWN:
        raise NotNow("it could not be shown that the guarantee holds", *reasons)
    if not as_json:
        _print_that_it_held(found, seconds)


def _findings(crowd: Crowd, address: Address, deletion: Deletion) -> Findings:
    askers = [asker for asker in crowd.askers if asker.address == address]
    opened = sum(asker.opened for asker in askers)
    return find(address.text, opened, [asker.samples for asker in askers], deletion)


def _report(
    found: Sequence[Findings],
    deletion: Deletion,
    verdict: Verdict,
    reasons: Sequence[str],
    seconds: int,
) -> dict[str, Any]:
    return {
        "verdict": verdict.value,
        "reasons": reasons,
        "delete_answers": deletion.answers,
        "return_seconds": _seconds_to_return(deletion),
        "asked_seconds": seconds,
        "addresses": [asdict(one) for one in found],
    }


def _seconds_to_return(deletion: Deletion) -> float | None:
    return None if deletion.returned is None else deletion.returned - deletion.sent


def _print(found: Sequence[Findings], deletion: Deletion) -> None:
    taken = _seconds_to_return(deletion)
    how = "did not return" if taken is None else f"returned after {_milliseconds(taken)}"
    click.echo(f"DELETE {how}; answered: {', '.join(deletion.answers)}\n")
    print_table(_COLUMNS, [_cells(one) for one in found], numbers=True)
    click.echo("\nTimes count from the sending of DELETE, before and after from its return.")
    for one in found:
        for whose, unclear in (
            ("the new key", Counter(one.unclear_before) + Counter(one.unclear_after)),
            ("the managing key", one.managing_unclear),
        ):
            if unclear:
                click.echo(f"Unclear answers to {whose} at {one.address}: {in_words(unclear)}.")


def _cells(one: Findings) -> tuple[str, ...]:
    unclear = (one.unclear_before, one.unclear_after, one.managing_unclear)
    return (
        one.address,
        str(one.connections),
        str(one.accepted_before),
        _milliseconds(one.first_refused_seconds),
        _milliseconds(one.last_accepted_seconds),
        str(one.refused_after),
        str(one.accepted_after),
        str(sum(sum(answers.values()) for answers in unclear)),
    )


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.1f} ms"


def _print_that_it_held(found: Sequence[Findings], seconds: int) -> None:
    refused = sum(one.refused_after for one in found)
    opened = sum(one.connections for one in found)
    click.echo(
        f"It held: within {seconds} s, all {refused} requests that began after DELETE had returned "
        f"were refused,\non {opened} connections. A process that none of them led to was not asked."
    )
