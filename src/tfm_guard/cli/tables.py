"""What commands print: tables for people, JSON for programs."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False
) -> None:
    """Print *rows* under their *columns*; with *numbers*, all but the first stand to the right."""
    table = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def print_json(value: Any) -> None:
    """Print *value* as programs read it."""
    click.echo(json_text(value))


def json_text(value: Any) -> str:
    """Return *value* as programs read it."""
    return json.dumps(value, indent=2, default=_plain)


def short(moment: datetime | None) -> str:
    """Return *moment* as it stands in a table, to the minute."""
    return "–" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


def _plain(value: Any) -> Any:
    """Return what stands for *value* in JSON: RFC 3339 for times, sorted lists for sets."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return sorted(value) if isinstance(value, frozenset) else str(value)
