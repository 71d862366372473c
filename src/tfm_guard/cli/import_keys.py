"""`tfm-guard keys import`."""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import click

from tfm_guard.cli.failures import Failure
from tfm_guard.cli.import_file import COLUMN_OF, Line, Source
from tfm_guard.errors import InvalidInput, Refusal

if TYPE_CHECKING:
    from tfm_guard.guard import Guard
    from tfm_guard.imports import ImportOutcome, Rehearsal


@click.command("import")
@click.argument("file")
@click.option("--dry-run", is_flag=True, help="Say what would become of each key; import none.")
@click.option(
    "--with-tokens",
    is_flag=True,
    help="Take whole keys, in the column token: from a pipe, or a file that its owner alone reads.",
)
@click.option(
    "--beyond-plan", is_flag=True, help="Import also what is more than an account's plan allows."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object a line.")
def import_(
    file: str, *, dry_run: bool, with_tokens: bool, beyond_plan: bool, as_json: bool
) -> None:
    """Import keys that were issued elsewhere from FILE, or from stdin if that is -.

    FILE is CSV whose first line names the columns, or has a JSON object on each line. Columns:
    prefix, account, name, scopes (with blanks between; in JSON a list), hash (of the whole key: an
    argon2 PHC string, or SHA-256 or SHA-512 in hexadecimal), and if you like created_at and
    expires_at. Such a key is proven by that hash the first time it is used.

    Each line that is refused is told with its number and the reason, on stdout; the others are
    imported, up to 100 in one transaction. The exit code is 1 if a line was refused. To run the
    same file again is safe: it brings what is missing and counts what is there already.
    """
    report = Report(as_json=as_json)
    with ExitStack() as undo:
        descriptor = _open(file, undo)
        source = Source(descriptor, with_tokens=with_tokens)
        bar = undo.enter_context(Bar(source))
        work = _import(source, report, bar, dry_run=dry_run, beyond_plan=beyond_plan)
        try:
            asyncio.run(work)
        finally:
            bar.clear()
            report.end(dry_run=dry_run)
    if report.counts["refused"]:
        raise Failure(f"{report.counts['refused']} lines were refused; stdout says which and why")


class Report:
    """Tells what was refused, at once, and counts the rest."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self.counts = Counter({"imported": 0, "present": 0, "refused": 0})

    def add(self, line: Line, outcome: "ImportOutcome | None" = None) -> None:
        """Take note of what became of *line*."""
        refusal = line.refusal if outcome is None else outcome.refusal
        self.counts["refused" if outcome is None else outcome.how] += 1
        if refusal is None:
            return
        place, message = _in_words(refusal)
        if self._as_json:
            click.echo(json.dumps({"line": line.number, "field": place, "message": message}))
        else:
            click.echo(f"line {line.number}: {f'{place}: ' if place else ''}{message}")

    def end(self, *, dry_run: bool) -> None:
        """Tell the numbers."""
        if self._as_json:
            click.echo(json.dumps({"dry_run": dry_run, **self.counts}))
        done = "to be imported" if dry_run else "imported"
        click.echo(
            f"{self.counts['imported']} {done}, {self.counts['present']} there already, "
            f"{self.counts['refused']} refused.",
            err=True,
        )


class Bar:
    """How far *source* was read, on a terminal."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._shown = source.size is not None and sys.stderr.isatty()
        self._bar: Any = click.progressbar(
            length=source.size or 0, file=sys.stderr, hidden=not self._shown, label="Importing"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Make room for words."""
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def advance(self) -> None:
        """Show how far it has come."""
        if self._shown:
            self._bar.update(self._source.bytes_read - self._bar.pos)
            self._bar.render_progress()


def _open(file: str, undo: ExitStack) -> int:
    if file == "-":
        if sys.stdin is None:  # closed by who started the program
            raise Failure("stdin is closed; give the keys there, or name a file")
        return sys.stdin.fileno()
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"{file}: {error.strerror}") from error
    undo.callback(os.close, descriptor)
    return descriptor


async def _import(
    source: Source, report: Report, bar: Bar, *, dry_run: bool, beyond_plan: bool
) -> None:
    from tfm_guard.guard import Guard

    async with Guard.from_environment() as guard:
        _warn_of_old_forms(guard)
        with ExitStack() as undo:
            rehearsal = undo.enter_context(guard.imports.rehearsal()) if dry_run else None
            async for batch in _batches(source):
                outcomes = iter(await _take(guard, batch, rehearsal, beyond_plan=beyond_plan))
                bar.clear()
                for line in batch:
                    report.add(line, None if line.key is None else next(outcomes))
                bar.advance()


async def _take(
    guard: "Guard", batch: Sequence[Line], rehearsal: "Rehearsal | None", *, beyond_plan: bool
) -> "list[ImportOutcome]":
    keys = [line.key for line in batch if line.key is not None]
    if rehearsal is not None:
        return await guard.imports.rehearse(keys, rehearsal, beyond_plan=beyond_plan)
    return await guard.imports.add(keys, beyond_plan=beyond_plan, actor="command_line")


async def _batches(source: Source) -> AsyncIterator[list[Line]]:
    from tfm_guard.imports import BATCH

    batch: list[Line] = []
    async for line in source.lines():
        batch.append(line)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _warn_of_old_forms(guard: "Guard") -> None:
    if not guard.settings.accept_untagged_tokens:
        click.echo(
            "Keys of 32 or 40 digits after tfm_k_ have no tag and will be refused: "
            "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS is not true here.\n"
            "Set it for the application, too, if there are such keys among these.",
            err=True,
        )


def _in_words(refusal: Refusal) -> tuple[str, str]:
    """Return where in the line something is wrong, if that is known, and what."""
    if not isinstance(refusal, InvalidInput):
        return "", refusal.message
    name, *positions = refusal.field
    words = [COLUMN_OF.get(str(name), str(name)), *(f"number {int(p) + 1}" for p in positions)]
    return ("" if name == "line" else " ".join(words)), refusal.message
