"""What lasts is told in the log at once, and then at intervals: not for every request."""

import logging
import math
from types import TracebackType
from typing import Final

from tfm_guard.clock import Clock
from tfm_guard.errors import GuardError, InvalidToken, Unavailable

_log: Final = logging.getLogger(__name__)

_INTERVAL_SECONDS: Final = 10.0


class Seldom:
    """Tells when to speak of what happens again and again.

    A log line for each time would hide what else the log says.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._count = 0
        self._quiet_until = -math.inf

    def due(self) -> int:
        """Count one more time; return how many to speak of now, or 0 to say nothing yet."""
        self._count += 1
        now = self._clock.monotonic()
        if now < self._quiet_until:
            return 0
        self._quiet_until = now + _INTERVAL_SECONDS
        count, self._count = self._count, 0
        return count


class Outages:
    """Says that keys cannot be verified: at once, and then at intervals for as long as it lasts.

    As a context it notes what keeps the block from knowing about a token, and raises that as
    `Unavailable`. It may be entered by several at the same time.
    """

    def __init__(self, clock: Clock) -> None:
        self._seldom = Seldom(clock)

    def __enter__(self) -> None:
        """Begin a block; there is nothing to prepare."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, InvalidToken):
            return
        if isinstance(error, Unavailable):
            self.note(error.reason)
        elif isinstance(error, GuardError):
            self.note(str(error))
            raise Unavailable("the guard cannot be opened") from error
        elif isinstance(error, Exception):
            # A fault of ours. Nothing is known about the token, so nothing is said about it.
            self.note(type(error).__name__, fault=error)
            raise Unavailable("internal error") from error

    def note(self, reason: str, *, fault: Exception | None = None) -> None:
        """Note a token that could not be verified, for *reason*; show where a *fault* arose."""
        if count := self._seldom.due():
            message = "%d tokens could not be verified, the last: %s"
            _log.error(message, count, reason, exc_info=fault)
