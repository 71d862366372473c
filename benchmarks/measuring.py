"""What every benchmark here needs: the yardstick S, rounds, medians with their spread, and tables.

S is the time of one SHA-256 of a token, in the process that is measured and in its rounds. Most
results are multiples of it, or of something else that is measured in turn with them: only such
numbers can be compared between machines.

Nothing but the standard library, as this also runs in environments where tfm-guard is not.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# The form that tokens have here; contenders with tokens of their own use it for S all the same.
SOME_TOKEN: Final = b"tfm_k_" + b"0123456789abcdef" * 3
_WHOLE_FROM: Final = 100
_HASHES: Final = 2_000  # for one measurement of S


class Length(IntEnum):
    """How long to measure: to see that it works, to see whether targets are met, or for results."""

    BRIEF = 0
    USUAL = 1
    LONG = 2

    def of(self, brief: int, usual: int, long: int) -> int:
        """Return the one of the three numbers that is meant for this length."""
        return (brief, usual, long)[self]


class Spread(NamedTuple):
    """The median of measurements, and the bounds within which eight in ten of them lie."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Return the median and the spread of *values*, of which there is at least one."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that a *share*, 0 to 1, of the *ordered* values do not exceed."""
    return ordered[max(math.ceil(len(ordered) * share) - 1, 0)]


@dataclass(kw_only=True)
class Figure:
    """One measured number, and between which bounds its target, if any, has it.

    *low* and *high* are the bounds of eight in ten of the measurements that it is the median of.
    """

    target: str  # "T1" to "T12", or "" for what only explains another one
    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None
    low: float | None = None
    high: float | None = None
    met: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.most is not None or self.least is not None:
            least = -math.inf if self.least is None else self.least
            most = math.inf if self.most is None else self.most
            self.met = least <= self.value <= most

    @property
    def limit(self) -> str:
        """The target in words."""
        if self.most is not None and self.most == self.least:
            return f"{self.most:g}"
        if self.most is not None:
            return f"≤ {self.most:g}"
        return "" if self.least is None else f"≥ {self.least:g}"

    @property
    def verdict(self) -> str:
        """Whether the target is met, in a word."""
        return "" if self.met is None else "met" if self.met else "MISSED"


def figure_of(
    values: Iterable[float],
    *,
    target: str,
    name: str,
    unit: str,
    most: float | None = None,
    least: float | None = None,
) -> Figure:
    """Return the median of *values* as a figure, with their spread."""
    median, low, high = spread(values)
    return Figure(
        target=target,
        name=name,
        value=median,
        unit=unit,
        most=most,
        least=least,
        low=low,
        high=high,
    )


@dataclass(kw_only=True)
class Result:
    """What a benchmark came to; *curves* are what plots are drawn of: points by name."""

    subject: str
    s_ns: float
    figures: list[Figure]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def missed(self) -> list[Figure]:
        """The figures that are not what their targets demand."""
        return [figure for figure in self.figures if figure.met is False]


def time_of_s() -> float:
    """Return S, in seconds, as it is now."""
    sha256, token = hashlib.sha256, SOME_TOKEN
    started = time.perf_counter()
    for _ in range(_HASHES):
        sha256(token).digest()
    return (time.perf_counter() - started) / _HASHES


def median_s(times: int = 9) -> float:
    """Return the median of S measured several *times*, in seconds."""
    return statistics.median(time_of_s() for _ in range(times))


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer without reading, as the cheapest app there is: what is called bare."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def receive() -> Message:
    """Be a server whose client has sent everything."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def discard(_message: Message) -> None:
    """Be a server that forgets what it is told."""


def request(authorization: bytes, path: str = "/v1/emails/") -> Scope:
    """Return what uvicorn makes of a request by a common client."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50_000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1:8000"),
            (b"accept", b"*/*"),
            (b"accept-encoding", b"gzip, deflate"),
            (b"connection", b"keep-alive"),
            (b"user-agent", b"python-httpx/0.28.1"),
            (b"authorization", authorization),
        ],
        "state": {},
    }


async def time_of_calls(target: ASGIApp, scope: Scope, calls: int) -> float:
    """Return the seconds of one call of *target*, the mean of many."""
    started = time.perf_counter()
    for _ in range(calls):
        await target(scope, receive, discard)
    return (time.perf_counter() - started) / calls


async def times_of_calls(target: ASGIApp, scope: Scope, calls: int) -> list[float]:
    """Return the seconds of each of many calls of *target*, reading the clock included."""
    clock = time.perf_counter
    times = []
    for _ in range(calls):
        started = clock()
        await target(scope, receive, discard)
        times.append(clock() - started)
    return times


def as_json(result: Result) -> str:
    """Return *result* as JSON in one line."""
    return json.dumps(asdict(result))


def from_json(text: str) -> Result:
    """Return the result that `as_json` wrote."""
    fields = json.loads(text)
    figures = [{k: v for k, v in figure.items() if k != "met"} for figure in fields.pop("figures")]
    return Result(**fields, figures=[Figure(**figure) for figure in figures])


def number(value: float) -> str:
    """Return *value* as one reads it: with three digits that count, or whole above a hundred."""
    if value == int(value) or abs(value) >= _WHOLE_FROM:
        return f"{value:,.0f}"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def row_of(figure: Figure) -> tuple[str, ...]:
    """Return the cells of *figure*."""
    between = ""
    if figure.low is not None and figure.high is not None:
        between = f"{number(figure.low)} to {number(figure.high)}"
    value = f"{number(figure.value)} {figure.unit}".strip()
    return figure.target, figure.name, value, between, figure.limit, figure.verdict


HEADINGS: Final = ("target", "what", "measured", "8 in 10", "demanded", "")


def table(figures: Iterable[Figure]) -> str:
    """Return *figures* as a table for a terminal."""
    rows = [HEADINGS, *map(row_of, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run(subject: str, description: str, measure: Callable[[Length], Result]) -> None:
    """Be the program that measures one *subject*; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--brief", action="store_true", help="only to see that it works")
    lengths.add_argument("--long", action="store_true", help="with more rounds, for results")
    options = parser.parse_args()
    length = Length.BRIEF if options.brief else Length.LONG if options.long else Length.USUAL
    started = time.monotonic()
    result = measure(length)
    result.seconds = time.monotonic() - started
    if options.json:
        print(as_json(result))
    else:
        print(f"{subject}: S = {result.s_ns:.0f} ns, measured in {result.seconds:.0f} s\n")
        print(table(result.figures))
    raise SystemExit(1 if result.missed else 0)
