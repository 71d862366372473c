"""The page on a server of its own, with accounts to look at."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid4

from playwright.sync_api import Browser, BrowserContext, Page

from tests.support.guards import store_of
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard import Guard
from tfm_guard.records import ApiKey, Tally
from tfm_guard.store import schema
from tfm_guard.testing import CHEAP_HASHING

T = TypeVar("T")

LIST = "/settings/api-keys/"
PLANS = '{"free": 2, "starter": 5, "business": 50}'


class ConsoleServer(NamedTuple):
    """A server with the page, and its database."""

    url: str
    database: str

    def work(self, work: Callable[[Guard], Awaitable[T]]) -> T:
        """Do something with a guard on the same database.

        In a thread: the event loop of this one is Playwright's.
        """
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(asyncio.run, self._work(work)).result()

    async def _work(self, work: Callable[[Guard], Awaitable[T]]) -> T:
        plans = {"free": 2, "starter": 5, "business": 50}
        settings: dict[str, Any] = {**CHEAP_HASHING, "plans": plans}
        async with Guard.from_urls(database=self.database, **settings) as guard:
            return await work(guard)

    def visit(self, browser: Browser, account: str, role: str = "owner", **options: Any) -> Page:
        """Return a tab in which somebody with that role in that account is signed in."""
        context = browser.new_context(base_url=self.url, **options)
        sign_in(context, self.url, account, role)
        return context.new_page()


def sign_in(context: BrowserContext, url: str, account: str, role: str) -> None:
    """Give a browser the cookie that says who uses it."""
    context.add_cookies([{"name": "who", "value": f"{account}-{role}", "url": url}])


@contextmanager
def console_server(folder: Path) -> Iterator[ConsoleServer]:
    """Serve the page, with its database in *folder*, until the end of the block."""
    database = f"sqlite:///{folder}/console.db"
    variables = {
        "TFM_GUARD_DATABASE_URL": database,
        "TFM_GUARD_PLANS": PLANS,
        **{f"TFM_GUARD_{name.upper()}": str(value) for name, value in CHEAP_HASHING.items()},
    }
    app = "tests.support.console_api:app"
    with UvicornProcess(app, env=variables, ready_path=LIST) as server:
        yield ConsoleServer(server.url, database)


async def make_up_use(guard: Guard, keys: dict[ApiKey, int]) -> None:
    """Write four weeks of use of *keys*, each with its requests in a busy hour."""
    now = datetime.now(UTC)
    hour = int(now.timestamp()) // 3600
    tallies = []
    for key, most in keys.items():
        for ago in range(28 * 24):
            wave = 0.55 + 0.45 * math.sin((hour - ago) * math.tau / 24)
            count = round(most * wave * (0.3 if (hour - ago) // 24 % 7 in (2, 3) else 1))
            refused = most // 2 if ago in (30, 31, 75) else 0
            used_at = now.timestamp() - 3600 * ago - 40
            tallies.append(Tally(key.id.bytes, hour - ago, count, refused, used_at))
    await store_of(guard).add_usage(uuid4(), tallies)


async def fill(guard: Guard, account: str) -> None:
    """Give *account* keys of every kind, some of them in use."""
    await guard.accounts.set_plan(account, "business")

    async def create(name: str, *scopes: str, days: int | None = None) -> ApiKey:
        end = None if days is None else datetime.now(UTC) + timedelta(days=days)
        created = await guard.keys.create(
            account_id=account,
            name=name,
            scopes=scopes,
            expires_at=end,
            actor="person:ana@example.com",
        )
        return created.key

    shop = await create("Web shop", "send")
    letter = await create("Newsletter", "send", "emails:read", "webhooks:write")
    await create("Trial of a partner", "send", days=5)
    await create("Never deployed", "domains:read")
    old = await create("CI", "send")
    await make_up_use(guard, {shop: 220, letter: 35, old: 12})
    await guard.keys.rotate(account, old.id, actor="person:ben@example.com")
    age = datetime.now(UTC) - timedelta(days=41)
    for key in (shop, letter):
        # In a thread: the guard may be writing, and goes on only while the event loop does.
        await asyncio.to_thread(_backdate, guard, key.id, age)


def _backdate(guard: Guard, key_id: UUID, moment: datetime) -> None:
    keys, audit = schema.keys, schema.audit
    url = guard.settings.database_url
    execute(url, keys.update().where(keys.c.id == key_id).values(created_at=moment))
    rows = audit.c.target_id == str(key_id)
    execute(url, audit.update().where(rows).values(created_at=moment))


@contextmanager
def silent_process(server: ConsoleServer, *, link: str | None = None) -> Iterator[None]:
    """Have a process in the register that says nothing, until the end of the block.

    Revoking waits for it: some 3 s, or, where it has a *link*, for longer than it ever waits.
    """
    workers = schema.workers
    row = {
        "id": uuid4(),
        "name": "silent",
        "link": link,
        "seen": 0,
        "turn": 0,
        "registered_at": datetime.now(UTC),
    }
    execute(server.database, workers.insert().values(**row))
    try:
        yield
    finally:
        execute(server.database, workers.delete().where(workers.c.id == row["id"]))
