"""Ctrl-C and SIGTERM in commands that must not leave anything behind."""

import signal
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


def enter(undo: ExitStack, context: AbstractContextManager[T]) -> T:
    """Enter *context*, to be left at the end: signals wait, or one could come between the two."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        return undo.enter_context(context)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
