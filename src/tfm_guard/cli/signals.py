"""Ctrl-C and SIGTERM in commands that must not leave anything behind."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Final, TypeVar

T = TypeVar("T")

_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


def take_signals(undo: ExitStack) -> None:
    """Have Ctrl-C and SIGTERM end the command with a KeyboardInterrupt, until *undo* is left.

    Both may be ignored so far: shells start what runs in the background like that.
    """
    for number in _ENDING:
        undo.callback(signal.signal, number, signal.getsignal(number))
        signal.signal(number, signal.default_int_handler)


def enter(undo: ExitStack, make: Callable[[], AbstractContextManager[T]]) -> T:
    """Enter what *make* makes, to be left at the end. Signals wait, or one could come between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        return undo.enter_context(make())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
