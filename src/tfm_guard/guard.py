"""The guard: what an application holds. The only place that builds the parts."""

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from tfm_guard.accounts import AccountManager
from tfm_guard.clock import Clock, SystemClock
from tfm_guard.errors import GuardError, InvalidToken, Unavailable
from tfm_guard.hashing import Hashing, HashingProfile
from tfm_guard.keys import KeyManager
from tfm_guard.records import VerifiedKey
from tfm_guard.scopes import ScopeRegistry
from tfm_guard.settings import Settings
from tfm_guard.store import Store
from tfm_guard.token import DigestKeys, Tagger
from tfm_guard.verifier import Verifier

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_log: Final = logging.getLogger(__name__)

# How long a request waits for the guard to open, should it be the first to need it.
_OPENING_SECONDS: Final = 5.0


class _Parts(NamedTuple):
    """What exists while a guard is open."""

    store: Store
    hashing: Hashing
    verifier: Verifier
    keys: KeyManager
    accounts: AccountManager


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
        self._opened = 0
        self._opening: asyncio.Task[_Parts] | None = None
        self._failures = 0
        start_anew = weakref.WeakMethod(self._start_anew)
        os.register_at_fork(after_in_child=lambda: _call(start_anew))

    @classmethod
    def from_urls(cls, *, database: str, **settings: Any) -> Self:
        """Return a guard on *database*: `sqlite:///FILE` or `postgresql://…`.

        *settings* are those of `tfm_guard.settings.Settings`; what is not given is taken from its
        TFM_GUARD_* variable, else its default. Raises `ConfigurationError` with every fault.
        """
        return cls(Settings.load(os.environ, database_url=database, **settings))

    @classmethod
    def from_environment(cls, **settings: Any) -> Self:
        """Return a guard set up by TFM_GUARD_* variables alone, but for *settings*."""
        return cls(Settings.load(os.environ, **settings))

    def __repr__(self) -> str:
        return f"Guard({self._store!r}, {'open' if self._parts else 'closed'})"

    @property
    def keys(self) -> KeyManager:
        """Creates, lists and revokes keys. The guard must be open."""
        return self._opened_parts().keys

    @property
    def accounts(self) -> AccountManager:
        """Puts accounts on plans. The guard must be open."""
        return self._opened_parts().accounts

    async def verify(self, token: str | bytes) -> VerifiedKey:
        """Return the key that *token* proves, opening the guard if it is not yet.

        Raises `InvalidToken`, or `Unavailable` where it cannot be known now: never treat that
        one as a no.
        """
        try:
            raw = token if isinstance(token, bytes) else token.encode("ascii")
        except UnicodeEncodeError:
            raise InvalidToken("not of the form of a key") from None
        try:
            parts = self._parts or await self._open_for_request()
            key = await parts.verifier.verify(raw)
        except InvalidToken:
            raise  # often without the database, and so no sign that it is back
        except Unavailable as error:
            self._note_failure(error.reason)
            raise
        except Exception as error:
            # A fault of ours, or a database that cannot be used. Either way nothing is known.
            self._note_failure(f"{type(error).__name__}: {error}")
            _log.debug("verifying failed", exc_info=True)
            raise Unavailable("internal error") from error
        self._note_success()
        return key

    async def open(self) -> None:
        """Open the guard: bring up an empty database, load its secrets, start the parts.

        Raises `SchemaError` if the database is of another release, `Unavailable` if it cannot be
        reached.
        """
        try:
            await self._open_parts()
        except BaseException:
            if self._parts is None:
                await self._store.close()
            raise
        self._opened += 1

    async def close(self) -> None:
        """Undo one `open`; with the last, end what is under way and close the connections."""
        self._opened = max(self._opened - 1, 0)
        if self._opened > 0 or self._parts is None:
            return
        parts, self._parts = self._parts, None
        parts.hashing.close()
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

    def management_app(self) -> "ASGIApp":
        """Return the ASGI app that serves `/v1/api-keys/`; it verifies its callers itself."""
        # Imported here: the HTTP floor stands on this one.
        from tfm_guard.http.management import ManagementApp  # noqa: PLC0415

        return ManagementApp(self)

    async def _open_for_request(self) -> _Parts:
        try:
            async with asyncio.timeout(_OPENING_SECONDS):
                return await self._open_parts()
        except TimeoutError:
            raise Unavailable("the guard is still being opened") from None

    async def _open_parts(self) -> _Parts:
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

    async def _build(self) -> _Parts:
        installation = await self._store.open()
        settings = self.settings
        secrets = [secret.encode() for secret in settings.secrets] or [installation.root_secret]
        digest_keys = DigestKeys.from_secrets(secrets)
        tagger = Tagger(installation.tag_key)
        hashing = Hashing(
            HashingProfile(
                settings.argon2_time_cost,
                settings.argon2_memory_kib,
                settings.argon2_parallelism,
            )
        )
        return _Parts(
            store=self._store,
            hashing=hashing,
            verifier=Verifier(
                store=self._store,
                hashing=hashing,
                tagger=tagger,
                digest_keys=digest_keys,
                realm=settings.realm,
                accept_untagged=settings.accept_untagged_tokens,
            ),
            keys=KeyManager(
                store=self._store,
                hashing=hashing,
                tagger=tagger,
                digest_key=digest_keys.current,
                scopes=self.scopes,
                plans=settings.plans,
                clock=self._clock,
                random=self._random,
            ),
            accounts=AccountManager(store=self._store, plans=settings.plans),
        )

    def _new_store(self) -> Store:
        return Store(
            self.settings.database_url,
            pool_size=self.settings.database_pool_size,
            clock=self._clock,
        )

    def _opened_parts(self) -> _Parts:
        if self._parts is None:
            raise GuardError("The guard is not open. Use it inside: async with guard: ...")
        return self._parts

    def _note_failure(self, reason: str) -> None:
        # Once per outage, not once per request: a log that repeats itself hides what else it says.
        if not self._failures:
            _log.error("keys cannot be verified now: %s", reason)
        self._failures += 1

    def _note_success(self) -> None:
        if self._failures:
            _log.warning("keys can be verified again, after %d failures", self._failures)
            self._failures = 0

    def _start_anew(self) -> None:
        """Leave to the parent process, after a fork, its connections and threads."""
        self._parts = None
        self._opened = 0
        self._opening = None
        self._store = self._new_store()


def _call(method: "weakref.WeakMethod[Callable[[], None]]") -> None:
    if (bound := method()) is not None:
        bound()
