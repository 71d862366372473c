"""The guard: what an application holds. The only place that builds the parts."""

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from tfm_guard.accounts import AccountManager
from tfm_guard.audit import AuditLog
from tfm_guard.bearer import Headers, as_headers
from tfm_guard.clock import Clock, SystemClock
from tfm_guard.confirmation import Confirmation
from tfm_guard.counters import Counters
from tfm_guard.errors import GuardError, InvalidToken, Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.hashing import Hashing, HashingProfile
from tfm_guard.imports import KeyImporter
from tfm_guard.keys import KeyManager
from tfm_guard.link import Link, Seals
from tfm_guard.live import LiveConnection, LiveConnections
from tfm_guard.local_cache import LocalCache, NegativeCache
from tfm_guard.outages import Outages
from tfm_guard.reader import KeyReader
from tfm_guard.records import Explanation, VerifiedKey
from tfm_guard.redis_access import RedisAccess
from tfm_guard.scopes import ScopeRegistry
from tfm_guard.settings import Settings
from tfm_guard.shared_cache import SharedCache
from tfm_guard.signs import Signs
from tfm_guard.store import Store
from tfm_guard.token import DigestKeys, Tagger, derive
from tfm_guard.usage import Usage
from tfm_guard.verifier import Verifier

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tfm_guard.http.console.texts import Texts
    from tfm_guard.http.persons import Identify

# How long a request waits for the guard to open, should it be the first to need it.
_OPENING_SECONDS: Final = 5.0


class _Parts(NamedTuple):
    """What exists while a guard is open."""

    verifier: Verifier
    live: LiveConnections
    keys: KeyManager
    accounts: AccountManager
    imports: KeyImporter
    audit: AuditLog
    signs: Signs
    form_keys: tuple[bytes, ...]
    ending: AsyncExitStack


class Guard:
    """API keys on one database: verifies them, manages them, and makes the apps that show them.

    Open it with `async with guard:`, or give `guard.lifespan` to Starlette, or mount
    `APIKeyMiddleware`, which opens it at start-up or else at the first request. Opening may be
    nested; the last close closes.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.settings = settings
        self.scopes = ScopeRegistry(settings.scopes)
        self._clock = clock or SystemClock()
        self._random = random
        self._store = self._new_store()  # made here, so that a faulty URL is told at once
        self._parts: _Parts | None = None
        # The key that a request's headers prove if memory knows it, else none. It is the verifier's
        # own while the guard is open: the warm path has no room for a detour.
        self.recall: Callable[[Headers], VerifiedKey | None] = _recall_nothing
        self.counters = Counters()
        self._opened = 0
        self._closed = False
        self._opening: asyncio.Task[_Parts] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._abandoned: list[Store] = []
        self._outages = Outages(self._clock)
        start_anew = weakref.WeakMethod(self._start_anew)
        os.register_at_fork(after_in_child=lambda: _call(start_anew))

    @classmethod
    def from_urls(cls, *, database: str, redis: str | None = None, **settings: Any) -> Self:
        """Return a guard on *database*: `sqlite:///FILE` or `postgresql://…`.

        *redis*, `redis://…` or `rediss://…`, is a cache that its processes share.
        *settings* are those of `tfm_guard.settings.Settings`; what is not given is taken from its
        TFM_GUARD_* variable, else its default. Raises `ConfigurationError` with every fault.
        """
        return cls(Settings.load(os.environ, database_url=database, redis_url=redis, **settings))

    @classmethod
    def from_environment(cls, **settings: Any) -> Self:
        """Return a guard set up by TFM_GUARD_* variables alone, but for *settings*."""
        return cls(Settings.load(os.environ, **settings))

    def __repr__(self) -> str:
        return f"Guard({self._store!r}, {'open' if self._parts else 'closed'})"

    @property
    def keys(self) -> KeyManager:
        """Creates, lists, changes, rotates and revokes keys. The guard must be open."""
        return self._opened_parts().keys

    @property
    def accounts(self) -> AccountManager:
        """Puts accounts on plans, suspends, resumes and erases them. The guard must be open."""
        return self._opened_parts().accounts

    @property
    def audit(self) -> AuditLog:
        """Lists the audit log, and follows it with a cursor. The guard must be open."""
        return self._opened_parts().audit

    @property
    def signs(self) -> Signs:
        """Looks for signs of trouble with keys, and writes them to the audit log.

        The guard must be open; then it looks once an hour by itself.
        """
        return self._opened_parts().signs

    @property
    def imports(self) -> KeyImporter:
        """Takes over keys that were issued elsewhere. The guard must be open."""
        return self._opened_parts().imports

    async def ready(self) -> None:
        """Open the guard if it is not yet, as the first request does. Raises `Unavailable`."""
        with self._outages:
            await self._open_for_request()

    async def verify(self, token: str | bytes) -> VerifiedKey:
        """Return the key that *token* proves, opening the guard if it is not yet.

        Raises `InvalidToken`, or `Unavailable` where it cannot be known now: never treat that
        one as a no.
        """
        try:
            raw = token if isinstance(token, bytes) else token.encode("ascii")
        except UnicodeEncodeError:
            raise InvalidToken("not of the form of a key") from None
        with self._outages:
            verifier = (await self._open_for_request()).verifier
            return verifier.recall(as_headers(raw)) or await verifier.look_up(raw)

    async def explain(self, token: str) -> Explanation:
        """Return which key *token* proves, active or not, and why it is refused, if it is.

        For operators: who sent the token must not learn it. The guard must be open. Raises
        `Unavailable`.
        """
        return await self._opened_parts().verifier.explain(token.encode(errors="replace"))

    async def holds(self, key: VerifiedKey) -> bool:
        """Tell whether *key*, verified a while ago, is still active, with all its scopes.

        For what goes on for long, such as a streamed response; as cheap as verifying:
        `while await guard.holds(request.user): yield ...`. Raises `Unavailable` where it cannot be
        known now: never treat that one as a no.
        """
        with self._outages:
            return await (await self._open_for_request()).verifier.holds(key)

    def watch(self, key: VerifiedKey) -> AbstractContextManager[LiveConnection]:
        """Return a connection that ends with *key*, as a context.

        `check` it first: the key may have changed since it was verified. Raises `Unavailable` if
        the guard is not open.
        """
        if self._parts is None:
            raise Unavailable("the guard is closed")
        return self._parts.live.watch(key)

    async def open(self) -> None:
        """Open the guard: bring up an empty database, load its secrets, start the parts.

        Raises `SchemaError` if the database is of another release, `Unavailable` if it cannot be
        reached.
        """
        self._closed = False
        try:
            await self._open_parts()
        except BaseException:
            if self._parts is None:
                await self._store.close()
            raise
        self._opened += 1

    async def close(self) -> None:
        """Undo one `open`; with the last, end what is under way and close the connections.

        From then on tokens get `Unavailable`, until it is opened again.
        """
        self._opened = max(self._opened - 1, 0)
        if self._opened:
            return
        self._closed = True
        if self._opening is not None:
            await asyncio.wait({self._opening})
        if self._parts is None:
            return
        parts, self._parts = self._parts, None
        self.recall = _recall_nothing
        await parts.ending.aclose()
        await self._store.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def lifespan(self, _app: Any) -> AsyncIterator[None]:
        """Keep the guard open while an app runs: `Starlette(lifespan=guard.lifespan)`."""
        async with self:
            yield

    async def upgrade_schema(self) -> tuple[str | None, str]:
        """Bring the database's tables to this release; return their revision before and after."""
        try:
            return await self._store.upgrade()
        finally:
            if self._parts is None:
                await self._store.close()

    def management_app(self, *, identify: "Identify | None" = None) -> "ASGIApp":
        """Return the ASGI app that serves `/v1/api-keys/`; it verifies its callers itself.

        They are keys, and where *identify* is given, also people who are signed in to the host
        application: an async function that takes Starlette's `HTTPConnection` and returns the
        `Person`, or none.
        """
        # Imported here: the HTTP floor stands on this one.
        from tfm_guard.http.management import ManagementApp  # noqa: PLC0415

        return ManagementApp(self, identify)

    def console(
        self,
        *,
        identify: "Identify",
        sign_in_url: str | None = None,
        plans_url: str | None = None,
        api_url: str | None = None,
        first_steps: Mapping[str, str] | None = None,
        texts: "Texts | None" = None,
    ) -> "ASGIApp":
        """Return the ASGI app that shows people the keys of their account: Settings → API Keys.

        *identify* tells who sent a request, as with `management_app`. *sign_in_url* is where those
        go of whom it does not know, *plans_url* those who need room for more keys. *first_steps*
        are programs by their title that an account without keys is shown, with `{api_url}` for
        *api_url*, which is where the page itself is found if not given. *texts* are the words of
        the page, in another language. Needs Jinja2, the extra `console`.
        """
        # Imported here: the HTTP floor stands on this one.
        from tfm_guard.http.console.app import ConsoleApp, Links  # noqa: PLC0415

        async def form_keys() -> tuple[bytes, ...]:
            return (await self._open_for_request()).form_keys

        return ConsoleApp(
            self,
            identify=identify,
            form_keys=form_keys,
            links=Links(sign_in_url, plans_url, api_url),
            first_steps=first_steps,
            texts=texts,
            clock=self._clock,
            random=self._random,
        )

    async def _open_for_request(self) -> _Parts:
        if self._parts is not None and self._loop is asyncio.get_running_loop():
            return self._parts
        if self._closed:
            raise Unavailable("the guard is closed")
        try:
            async with asyncio.timeout(_OPENING_SECONDS):
                return await self._open_parts()
        except TimeoutError:
            raise Unavailable("the guard is still being opened") from None

    async def _open_parts(self) -> _Parts:
        self._enter_loop()
        if self._parts is not None:
            return self._parts
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._build())
            self._opening.add_done_callback(self._end_opening)
        # Shielded: others may wait for the same opening.
        return await asyncio.shield(self._opening)

    def _end_opening(self, opening: "asyncio.Task[_Parts]") -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._parts = opening.result()
            self.recall = self._parts.verifier.recall

    def _enter_loop(self) -> None:
        """Leave behind what belongs to an event loop that has ended."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise GuardError("A guard serves one event loop; make one guard for each")
        if self._loop is not None:
            self._store.leave()
        self._start_anew()
        self._loop = loop

    async def _build(self) -> _Parts:
        settings, store, clock, counters = self.settings, self._store, self._clock, self.counters
        async with AsyncExitStack() as ending:
            installation = await store.open()
            # The database's own secret stays the last one believed, so that moving on to others
            # makes no key slower.
            secrets = [*(secret.encode() for secret in settings.secrets), installation.root_secret]
            digest_keys = DigestKeys.from_secrets(secrets)
            tagger = Tagger(installation.tag_key)
            hashing = Hashing(
                HashingProfile(
                    settings.argon2_time_cost,
                    settings.argon2_memory_kib,
                    settings.argon2_parallelism,
                ),
                counters,
            )
            ending.callback(hashing.close)
            freshness = Freshness(
                store=store,
                installation=installation,
                clock=clock,
                random=self._random,
                counters=counters,
            )
            shared = link = None
            redis = self._new_redis()
            if redis is not None:
                ending.push_async_callback(redis.close)
                names = f"tfm:{installation.id}:v1:"
                shared = SharedCache(
                    redis,
                    names=f"{names}key:",
                    seal_key=derive(secrets[0], b"seal"),
                    clock=clock,
                    counters=counters,
                )
                ending.push_async_callback(shared.close)
                await shared.open()
                link = Link(
                    redis.connect,
                    names=names,
                    seals=Seals([derive(secret, b"link") for secret in secrets]),
                    freshness=freshness,
                    clock=clock,
                    random=self._random,
                    counters=counters,
                )
            local = LocalCache(settings.local_cache_size)
            usage = Usage(
                store=store,
                local=local,
                freshness=freshness,
                flush_seconds=settings.usage_flush_seconds,
                clock=clock,
                random=self._random,
                counters=counters,
            )
            ending.push_async_callback(usage.close)  # after all that verifies has ended
            verifier = Verifier(
                local=local,
                negative=NegativeCache(settings.local_cache_size),
                reader=KeyReader(
                    store=store,
                    shared=shared,
                    local=local,
                    freshness=freshness,
                    digest_key_id=digest_keys.current.id,
                    realm=settings.realm,
                    clock=clock,
                    counters=counters,
                ),
                freshness=freshness,
                store=store,
                hashing=hashing,
                tagger=tagger,
                digest_keys=digest_keys,
                accept_untagged=settings.accept_untagged_tokens,
                usage=usage,
                clock=clock,
                counters=counters,
            )
            ending.push_async_callback(verifier.close)
            store.on_commit(freshness.apply)
            ending.push_async_callback(freshness.stop)
            await freshness.start()
            usage.start()
            if link is not None:
                ending.push_async_callback(link.stop)
                await link.start()
            confirmation = Confirmation(
                store=store,
                installation=installation,
                freshness=freshness,
                link=link,
                clock=clock,
            )
            ending.push_async_callback(confirmation.close)
            keys = KeyManager(
                store=store,
                confirmation=confirmation,
                hashing=hashing,
                tagger=tagger,
                digest_key=digest_keys.current,
                scopes=self.scopes,
                plans=settings.plans,
                clock=clock,
                random=self._random,
            )
            live = LiveConnections(freshness=freshness, holds=self.holds, clock=clock)
            ending.push_async_callback(live.close)
            accounts = AccountManager(store=store, confirmation=confirmation, plans=settings.plans)
            signs = Signs(store=store, clock=clock)
            ending.push_async_callback(signs.stop)
            signs.start()
            audit = AuditLog(store=store)
            form_keys = tuple(derive(secret, b"form") for secret in secrets)
            imports = KeyImporter(
                store=store,
                hashing=hashing,
                tagger=tagger,
                digest_keys=digest_keys,
                scopes=self.scopes,
                plans=settings.plans,
                clock=clock,
                random=self._random,
            )
            return _Parts(
                verifier, live, keys, accounts, imports, audit, signs, form_keys, ending.pop_all()
            )

    def _new_store(self) -> Store:
        return Store(
            self.settings.database_url,
            pool_size=self.settings.database_pool_size,
            clock=self._clock,
        )

    def _new_redis(self) -> RedisAccess | None:
        url = self.settings.redis_url
        return None if url is None else RedisAccess(url, pool_size=self.settings.redis_pool_size)

    def _opened_parts(self) -> _Parts:
        if self._parts is None:
            raise GuardError("The guard is not open. Use it inside: async with guard: ...")
        return self._parts

    def _start_anew(self) -> None:
        """Leave connections, threads and place to the process, or the event loop, they are of."""
        if self._parts is not None:
            # Kept, not collected: closing it here would end connections that are another's.
            self._abandoned.append(self._store)
        self._parts = None
        self.recall = _recall_nothing
        self._opened = 0
        self._opening = None
        self._loop = None
        self._store = self._new_store()


def _recall_nothing(_headers: Headers) -> None:
    return None


def _call(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    if (bound := method()) is not None:
        bound()
