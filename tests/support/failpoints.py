"""Points in the code where a process can be made to die, or to wait until it is let go on."""

import asyncio
import os
import signal
from typing import Any, Final

from tests.support.breaks import Undo, put
from tfm_guard.link import Link
from tfm_guard.store import Store, Transaction

# Where: the class, its coroutine, and whether the point lies before it or after it.
_POINTS: Final[dict[str, tuple[type, str, bool]]] = {
    "before the transaction": (Store, "transact", True),
    "before revoking": (Store, "revoke_key", True),
    "before locking": (Transaction, "lock_key", True),
    "key locked": (Transaction, "lock_key", False),
    "before COMMIT": (Transaction, "append_changes", False),
    "after COMMIT": (Store, "transact", False),
    "revoked": (Store, "revoke_key", False),
    "before telling": (Link, "tell", True),
    "told": (Link, "tell", False),
    "before confirming": (Store, "confirm_revocation", True),
    "confirmed": (Store, "confirm_revocation", False),
    "key read": (Store, "find_keys", False),
    "registered": (Store, "register_worker", False),
}


class Failpoint:
    """What happens in this process at *point*, the first time that it is reached.

    *dies*: it kills itself. Otherwise whoever comes there waits until `release`. With *about* the
    point is where this is among what is asked for.
    """

    def __init__(self, point: str, *, dies: bool, about: str = "") -> None:
        self.reached = False
        self._dies = dies
        self._open = asyncio.Event()
        owner, name, before = _POINTS[point]
        former = getattr(owner, name)

        async def instead(*args: Any, **options: Any) -> Any:
            concerned = not about or about in args[1]
            if concerned and before:
                await self._act()
            result = await former(*args, **options)
            if concerned and not before:
                await self._act()
            return result

        self._undo: Undo = put(owner, name, instead)

    def release(self) -> None:
        """Let go on who waits, and let nobody wait any more."""
        self._open.set()

    def remove(self) -> None:
        """Put the code back as it was."""
        self.release()
        self._undo()

    async def _act(self) -> None:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.reached = True
        await self._open.wait()
