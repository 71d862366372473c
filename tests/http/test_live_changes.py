"""What is live when its key loses something short of everything, or all for a while."""

from datetime import timedelta

import pytest
from starlette.types import Scope

from tests.http.support import bearer, websocket_scope
from tests.support.guards import create, new_guard
from tests.support.live import ACCEPT, CONNECT, Echo, Peer, closed, disconnected, say, text
from tfm_guard import APIKeyMiddleware
from tfm_guard.records import CreatedKey
from tfm_guard.testing import ManualClock


def socket_scope(created: CreatedKey) -> Scope:
    """Return the scope of a WebSocket with that key."""
    return websocket_scope(bearer(created.token), denial=True)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("taken", ["suspended", "narrowed", "rotated without a grace"])
async def test_it_ends_with_what_it_was_let_in_for(
    sqlite_url: str, taken: str, *, idle: bool
) -> None:
    """When the call has returned nothing passes any more, and the connection is closed."""
    async with new_guard(sqlite_url, clock=ManualClock()) as guard:
        created = await create(guard, scopes=["send", "domains:read"])
        app, peer = Echo(), Peer(CONNECT)
        async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
            await peer.sends(ACCEPT)
            if taken == "suspended":
                await guard.accounts.suspend("acme")
            elif taken == "narrowed":
                await guard.keys.change("acme", created.key.id, scopes=["send"])
            else:
                await guard.keys.rotate("acme", created.key.id, grace=timedelta())
            if not idle:
                peer.incoming.put_nowait(text("too late"))
            await running
        assert app.heard == [CONNECT, disconnected()]
        assert peer.sent == [ACCEPT, closed()]


async def test_it_ends_with_a_grace_that_began_meanwhile(sqlite_url: str) -> None:
    """Opened with a key that had no end, it goes on through the grace, and not beyond."""
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        app, peer = Echo(), Peer(CONNECT)
        async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)) as running:
            await peer.sends(ACCEPT)
            await guard.keys.rotate("acme", created.key.id, grace=timedelta(seconds=60))
            await clock.pass_time(59.5)
            peer.incoming.put_nowait(text("in time"))
            await peer.sends(ACCEPT, say("in time"))
            await clock.pass_time(0.5)
            peer.incoming.put_nowait(text("too late"))
            await running
        assert app.heard == [CONNECT, text("in time"), disconnected()]
        assert peer.sent == [ACCEPT, say("in time"), closed()]


async def test_a_new_name_ends_nothing(sqlite_url: str) -> None:
    """A WebSocket goes on when its key is renamed, or its account resumed."""
    async with new_guard(sqlite_url, clock=ManualClock()) as guard:
        created = await create(guard)
        app, peer = Echo(), Peer(CONNECT)
        async with peer.runs(APIKeyMiddleware(app, guard=guard), socket_scope(created)):
            await peer.sends(ACCEPT)
            await guard.keys.change("acme", created.key.id, name="Shop")
            await guard.accounts.resume("acme")
            peer.incoming.put_nowait(text("hello"))
            await peer.sends(ACCEPT, say("hello"))
