"""Facts about who acts no more, and what a log that was shortened still tells."""

import pytest

from tests.support.guards import create, new_guard
from tfm_guard.errors import InsufficientScope, InvalidToken


async def test_who_may_manage_no_more_changes_nothing(database_url: str) -> None:
    """What a manager had begun is refused once its scope is taken away, and once it is revoked."""
    async with new_guard(database_url) as guard:
        manager = await create(guard, scopes=["send", "api-keys:write"])
        other = await create(guard)
        caller = await guard.verify(manager.token)
        await guard.keys.change("acme", manager.key.id, scopes=["send"])
        for error in (InsufficientScope, InvalidToken):
            with pytest.raises(error):
                await guard.keys.change("acme", other.key.id, scopes=[], caller=caller)
            with pytest.raises(error):
                await guard.keys.rotate("acme", other.key.id, caller=caller)
            with pytest.raises(error):
                await create(guard, name="mine", caller=caller)
            if error is InsufficientScope:
                await guard.keys.revoke("acme", manager.key.id)
        assert await guard.keys.get("acme", other.key.id) == other.key


async def test_a_cursor_misses_nothing_after_an_account_was_erased(database_url: str) -> None:
    """The number of a row that was deleted does not come again."""
    async with new_guard(database_url) as guard:
        await guard.keys.create(account_id="gone", name="CI")
        cursor = (await guard.audit.events()).cursor
        await guard.accounts.erase("gone")
        created = await create(guard)
        events = await guard.audit.events(after=cursor)
        assert [event.target_id for event in events.items] == [str(created.key.id)]
