"""The audit log: who did what to which key, and what was noticed about it."""

from datetime import timedelta
from typing import Final, get_args

from tfm_guard.errors import InvalidInput
from tfm_guard.records import AuditEvents, AuditPage, AuditRange
from tfm_guard.store import Store

DEFAULT_RANGE: Final[AuditRange] = "30d"
DEFAULT_LIMIT: Final = 100
MAXIMUM_LIMIT: Final = 500

_LENGTHS: Final[dict[AuditRange, timedelta]] = {
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "90d": timedelta(days=90),
}


class AuditLog:
    """Reads the audit log. Rows are only ever added to it."""

    def __init__(self, *, store: Store) -> None:
        self._store = store

    async def list(
        self,
        account_id: str,
        *,
        range: AuditRange = DEFAULT_RANGE,  # noqa: A002  # as it is called on the wire
        category: str | None = None,
        action: str | None = None,
        actor: str | None = None,
        target_id: str | None = None,
        limit: int = DEFAULT_LIMIT,
    ) -> AuditPage:
        """Return the rows of *account_id* in the last *range*, newest first, 1 to 500 at most.

        With *category*, *action*, *actor* or *target_id* only those that have exactly these; the
        page's total counts the rest of them too. Raises `InvalidInput` and `Unavailable`.
        """
        if range not in _LENGTHS:
            known = ", ".join(get_args(AuditRange))
            raise InvalidInput(("range",), "enum", f"Unknown range {range!r:.40}. Known: {known}")
        _check_limit(limit)
        wanted = {
            "category": category,
            "action": action,
            "actor": actor,
            "target_id": target_id,
        }
        items, total = await self._store.newest_audit_rows(
            account_id,
            within=_LENGTHS[range],
            where={name: value for name, value in wanted.items() if value is not None},
            limit=limit,
        )
        return AuditPage(items=items, range=range, total=total)

    async def events(
        self, *, after: int = 0, limit: int = DEFAULT_LIMIT, account_id: str | None = None
    ) -> AuditEvents:
        """Return the first 1 to 500 rows after the cursor *after*, in the order of their commits.

        Of *account_id*, or of all accounts. Whoever keeps the cursor that comes with them, and
        asks for what comes after it, is told of each row once; where there is nothing new, the
        cursor is the one given. Raises `InvalidInput` and `Unavailable`.
        """
        _check_limit(limit)
        if not 0 <= after < 2**63:
            raise InvalidInput(("after",), "range", f"Expected a cursor, got {after!r:.40}")
        items = await self._store.audit_rows_after(after, account_id=account_id, limit=limit)
        return AuditEvents(items=items, cursor=items[-1].id if items else after)


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAXIMUM_LIMIT:
        raise InvalidInput(("limit",), "range", f"Expected 1 to {MAXIMUM_LIMIT}, got {limit!r:.40}")
