"""Throwing an error into a coroutine, or a task that it starts, where they wait the n-th time."""

import ast
import asyncio
import gc
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import tfm_guard

SOURCE = Path(tfm_guard.__file__).parent
# What a guard does by itself, however requests fare: by which functions.
BACKGROUND = {
    "Freshness._poll_for_ever",
    "Freshness._record",
    "Link._stay_connected",
    "Publisher._send_all",
    "Verifier._renew_digest",
    "SharedCache._write_fills",
    "Breaker._probe_until_closed",
    "Usage._flush_for_ever",
    "Signs._look_for_ever",
}


class Place(NamedTuple):
    """Where code of the package waits: a file of it, and a span of lines and columns."""

    file: str
    first: tuple[int, int]
    last: tuple[int, int]

    def holds(self, other: "Place") -> bool:
        """Tell whether *other* is a place within this one."""
        return self.file == other.file and self.first <= other.first and other.last <= self.last


class Disturbance:
    """Throws what *make_error* makes where the disturbed task waits for the *number*-th time."""

    def __init__(self, number: int, make_error: Callable[[], BaseException]) -> None:
        self._number = number
        self._make_error = make_error
        self.waits: list[tuple[Place, ...]] = []  # where the package's own code stood, each time
        self.struck: tuple[Place, ...] = ()  # the same, where the error was thrown
        self.over = False

    def error_for(self, waiting: Any) -> BaseException | None:
        """Note that *waiting*, a coroutine, waits; return what is to be thrown into it."""
        if self.over:
            return None
        self.waits.append(tuple(_places(waiting)))
        if len(self.waits) != self._number:
            return None
        self.struck = self.waits[-1]
        return self._make_error()


_disturbance: ContextVar[Disturbance | None] = ContextVar("disturbance", default=None)


class _Disturbed(Coroutine[Any, Any, Any]):
    """A coroutine that tells a disturbance each time it waits."""

    def __init__(self, inner: Coroutine[Any, Any, Any], disturbance: Disturbance) -> None:
        self._inner = inner
        self._disturbance = disturbance

    def send(self, value: Any) -> Any:
        return self._told(self._inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._told(self._inner.throw(*error))

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError("only tasks run it")

    def _told(self, awaited: Any) -> Any:
        error = self._disturbance.error_for(self._inner)
        if error is None:
            return awaited
        if isinstance(error, asyncio.CancelledError) and awaited is not None:
            awaited.cancel()  # as a task does that is cancelled
        return self.throw(error)


@contextmanager
def disturbing(disturbance: Disturbance) -> Iterator[None]:
    """Disturb every task that is started inside, and those that these start.

    Those in `BACKGROUND` are let be: no request waits for them.
    """
    loop = asyncio.get_running_loop()

    def start(
        loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> "asyncio.Task[Any]":
        if coroutine.__qualname__ in BACKGROUND:
            # Nor are the tasks that it starts in its turn.
            options["context"] = context = copy_context()
            context.run(_disturbance.set, None)
            return asyncio.Task(coroutine, loop=loop, **options)
        found = _disturbance.get()
        return asyncio.Task(
            coroutine if found is None else _Disturbed(coroutine, found), loop=loop, **options
        )

    loop.set_task_factory(start)
    token = _disturbance.set(disturbance)
    try:
        yield
    finally:
        _disturbance.reset(token)


def _places(waiting: Any) -> Iterator[Place]:
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None)
        if frame is not None:
            # Code objects may be equal without being of the same file.
            place = _place(frame.f_code.co_filename, frame.f_code, frame.f_lasti)
            if place is not None:
                yield place
        waiting = getattr(waiting, "cr_await", None)


@cache
def _place(path: str, code: CodeType, instruction: int) -> Place | None:
    """Return where *code* from *path* has that instruction; None where that is not the package."""
    if not Path(path).is_relative_to(SOURCE):
        return None
    line, last_line, column, last_column = list(code.co_positions())[instruction // 2]
    assert line is not None
    assert last_line is not None
    assert column is not None
    assert last_column is not None
    file = str(Path(path).relative_to(SOURCE))
    return Place(file, (line, column), (last_line, last_column))


class AsyncFunction:
    """An async function of the package, as its source has it."""

    def __init__(self, file: str, parents: tuple[str, ...], node: ast.AsyncFunctionDef) -> None:
        self.name = node.name
        self.path = ".".join((file.removesuffix(".py").replace("/", "."), *parents, node.name))
        self.waits: dict[Place, str] = {}
        self.mentions: set[str] = set()
        self.within = ".".join(self.path.split(".")[:-1])
        todo: list[ast.AST] = list(node.body)
        while todo:
            part = todo.pop()
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(part, (ast.Await, ast.AsyncWith, ast.AsyncFor)):
                place = Place(
                    file,
                    (part.lineno, part.col_offset),
                    (part.end_lineno or 0, part.end_col_offset or 0),
                )
                self.waits[place] = ast.unparse(part).splitlines()[0]
            if isinstance(part, ast.Name):
                self.mentions.add(part.id)
            if isinstance(part, ast.Attribute):
                self.mentions.add(part.attr)
            todo += ast.iter_child_nodes(part)


def async_functions() -> dict[str, AsyncFunction]:
    """Return all async functions of the package, by the path of their names."""
    found: dict[str, AsyncFunction] = {}

    def look(file: str, parents: tuple[str, ...], node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.AsyncFunctionDef):
                function = AsyncFunction(file, parents, child)
                found[function.path] = function
            named = isinstance(child, (ast.AsyncFunctionDef, ast.FunctionDef, ast.ClassDef))
            look(file, (*parents, child.name) if named else parents, child)  # type: ignore[attr-defined]

    for path in sorted(SOURCE.rglob("*.py")):
        look(str(path.relative_to(SOURCE)), (), _parse(path))
    return found


def _parse(path: Path) -> ast.Module:
    # CPython 3.11 counts how deep it is in one place: where a collection during the parse finds a
    # task whose exception nobody has seen, its traceback is printed, which parses too.
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def reachable(*starts: str, stop: set[str]) -> dict[str, AsyncFunction]:
    """Return what *starts* can lead to, without *stop*: all whose names it mentions, and so on.

    That is more than what is called. A function within another is mentioned only there.
    """
    functions = async_functions()
    assert stop <= functions.keys()
    reached = {start: functions[start] for start in starts}
    todo = list(reached.values())
    while todo:
        function = todo.pop()
        for other in functions.values():
            visible = other.within not in functions or other.within in reached
            if (
                other.path not in reached | dict.fromkeys(stop)
                and other.name in function.mentions
                and visible
            ):
                reached[other.path] = other
                todo.append(other)
    return reached
