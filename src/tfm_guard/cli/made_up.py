"""Keys with a few days of made-up use, for who looks at the page of the demo."""

import math
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from uuid import uuid4

from tfm_guard.clock import SystemClock
from tfm_guard.errors import PlanLimitReached
from tfm_guard.guard import Guard
from tfm_guard.records import ApiKey, Tally
from tfm_guard.store import Store

_DAYS: Final = 6


class _MadeUp(NamedTuple):
    name: str
    scopes: tuple[str, ...]
    busiest: int  # requests in its busiest hour
    lasts: timedelta | None = None


_KEYS: Final = (
    _MadeUp("Web shop", ("send",), 240),
    _MadeUp("Newsletter", ("send", "emails:read"), 60),
    _MadeUp("Trial of a partner", ("send",), 9, timedelta(days=_DAYS + 5)),
)


class _EarlierClock(SystemClock):
    """A clock that is some days slow, so that what it writes looks as old as it should."""

    def now(self) -> datetime:
        return super().now() - timedelta(days=_DAYS)


async def make_up(account_id: str) -> None:
    """Put the account on its largest plan, with keys that look as if they had been used."""
    settings = Guard.from_environment(redis_url=None).settings
    keys = []
    async with Guard(settings, clock=_EarlierClock()) as guard:
        await guard.accounts.set_plan(
            account_id, max(settings.plans, key=settings.plans.__getitem__)
        )
        now = _EarlierClock().now()
        for made_up in _KEYS:
            try:
                created = await guard.keys.create(
                    account_id=account_id,
                    name=made_up.name,
                    scopes=made_up.scopes,
                    expires_at=None if made_up.lasts is None else now + made_up.lasts,
                    actor="command_line",
                )
            except PlanLimitReached:  # where settings have smaller plans than usual
                break
            keys.append((created.key, made_up.busiest))
    store = Store(settings.database_url, pool_size=1, clock=SystemClock())
    await store.open()
    try:
        tallies = [tally for key, busiest in keys for tally in _use(key, busiest)]
        await store.add_usage(uuid4(), tallies)
    finally:
        await store.close()


def _use(key: ApiKey, busiest: int) -> Iterator[Tally]:
    """Yield what a key was used in each hour: more by day, and refused now and then."""
    chance = random.Random(key.name)  # noqa: S311  # the same picture each time
    now = SystemClock().now().timestamp()
    last = int(now // 3600)
    for hour in range(last - 24 * _DAYS + 1, last + 1):
        by_day = 0.5 - 0.45 * math.cos(hour * math.tau / 24)
        accepted = round(busiest * by_day * chance.uniform(0.7, 1.0))
        refused = round(busiest * chance.uniform(0.1, 0.6)) if chance.random() < 0.04 else 0  # noqa: PLR2004
        used_at = min((hour + 0.9) * 3600, now - 90)
        yield Tally(key.id.bytes, hour, accepted, refused, used_at if accepted else None)
