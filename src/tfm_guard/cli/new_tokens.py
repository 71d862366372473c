"""Printing the token of a new key, which is shown this once; and what to do where that fails."""

import sys
from typing import TYPE_CHECKING, Any

import click

from tfm_guard.cli.failures import Failure, silence_stdout
from tfm_guard.cli.key_views import as_dict
from tfm_guard.cli.tables import json_text
from tfm_guard.errors import Refusal

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.records import ApiKey, CreatedKey


def require_stdout() -> None:
    """Raise `Failure` if stdout was closed by who started the program."""
    if sys.stdout is None:
        raise Failure("stdout is closed, and the token would be lost; no key was created")


async def print_token(guard: "Guard", created: "CreatedKey", *, as_json: bool, **more: Any) -> None:
    """Print the token alone, or the key with it as JSON, and what there is *more* to say then.

    Where it cannot be written, the key is revoked again.
    """
    text = created.token
    if as_json:
        text = json_text({"token": created.token, **as_dict(created.key), **more})
    try:
        click.echo(text)  # and flushes
    except OSError as error:
        silence_stdout()
        cause = f"the token could not be written to stdout: {error.strerror}"
        raise Failure(cause, await _take_back(guard, created.key)) from error


async def _take_back(guard: "Guard", key: "ApiKey") -> str:
    """Revoke a key whose token is lost; return what to tell."""
    try:
        await guard.keys.revoke(key.account_id, key.id, actor="command_line")
    except Refusal as refusal:
        return (
            f"the key {key.key_prefix} of account {key.account_id} exists, and could not be "
            f"revoked: {refusal.reason}; revoke it"
        )
    return f"the key {key.key_prefix} was revoked again"
