"""Tokens come from stdin or from a prompt, never from arguments, which every user can read."""

import sys
from typing import Final

import click

from tfm_guard.cli.connection import is_visible_ascii
from tfm_guard.cli.failures import INTERRUPTED, Failure

_MOST_READ: Final = 1000  # bytes; a token has 54
_MOST_READ_OF_MANY: Final = 16 * 2**20  # bytes; of some 300,000 tokens


def read_token(prompt: str, whose: str, usage: str) -> str:
    """Return one token, from a terminal unseen, else from stdin; *usage* is how to give it."""
    if _stdin_is_terminal(usage):
        text = _ask(prompt)
    else:
        # What is not UTF-8 is no token either, and told like that.
        text = sys.stdin.buffer.read(_MOST_READ).decode(errors="replace")
    token = text.strip()
    if not is_visible_ascii(token):
        raise Failure(
            f"stdin: expected one token, {whose}, and nothing else",
            f"give it like this: {usage} < token.txt",
        )
    return token


def read_tokens(usage: str) -> list[tuple[int, str]]:
    """Return the tokens on stdin, one a line, with the numbers of their lines.

    At a terminal they are asked for until nothing is entered.
    """
    if _stdin_is_terminal(usage):
        return list(enumerate(iter(lambda: _ask("Key (none to end)").strip(), ""), start=1))
    content = sys.stdin.buffer.read(_MOST_READ_OF_MANY + 1)
    if len(content) > _MOST_READ_OF_MANY:
        raise Failure(f"stdin: more than {_MOST_READ_OF_MANY} bytes; give them in several parts")
    lines = content.decode("utf-8-sig", errors="replace").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def _stdin_is_terminal(usage: str) -> bool:
    if sys.stdin is None:  # closed by who started the program
        raise Failure(f"stdin is closed; give the token there: {usage} < token.txt")
    return sys.stdin.isatty()


def _ask(prompt: str) -> str:
    try:
        return str(click.prompt(prompt, default="", show_default=False, hide_input=True, err=True))
    except click.Abort:
        raise click.exceptions.Exit(INTERRUPTED) from None
