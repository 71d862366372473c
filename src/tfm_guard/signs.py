"""Signs of trouble: keys that lie idle, are about to expire, or are used as never before.

A look goes through all active keys, a few at a time, and appends what is new to the audit log,
where a host application finds it. Any number of processes may look at the same time: each occasion
is said once, as the processes take turns to say something, and record what they said with it.
"""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.errors import Unavailable
from tfm_guard.records import ApiKey, KeyStatus, Looked
from tfm_guard.store import HourOfUse, Said, Store, Transaction, Turn, hour_of, start_of
from tfm_guard.unusual import REACH, Counts, Unusual, comparable, is_unusual, suspicions

_log: Final = logging.getLogger(__name__)

IDLE: Final = timedelta(days=90)
EXPIRING: Final = timedelta(days=14)
# After an unusual hour, no other is reported of the same key for so long.
QUIET: Final = timedelta(hours=24)
ACTOR: Final = "tfm-guard"

# Few keys at a time: what is said of them is said in one transaction, during which no key of the
# whole installation can be changed.
BATCH: Final = 50
# What happened in an hour is written this much after its end, by all processes.
_SETTLED: Final = timedelta(minutes=1)
_TRY_SECONDS: Final = 600.0  # how often a process asks whether to look
_BEFORE_ALL: Final = UUID(int=0)


def status_of(key: ApiKey, now: datetime) -> KeyStatus:
    """Return what there is to say about an active *key*; of several things the most pressing.

    "replaced": it has a successor, and ends with its grace. "expiring": it expires within 14 days.
    "idle": it was not used for 90 days, or in its first 90 days and since. "never_used": it was not
    used so far.
    """
    if key.replaced_by is not None:
        return "replaced"
    if key.expires_at is not None and key.expires_at - now <= EXPIRING:
        return "expiring"
    if now - _unused_since(key) >= IDLE:
        return "idle"
    return "never_used" if key.last_used_at is None else "ok"


def _unused_since(key: ApiKey) -> datetime:
    return key.created_at if key.last_used_at is None else max(key.created_at, key.last_used_at)


class _Finding(NamedTuple):
    """What may be said of a key."""

    sign: str
    occasion: datetime
    meta: Mapping[str, Any]


class Signs:
    """Looks for signs of trouble, and appends them to the audit log."""

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look once an hour, in one process of all."""
        self._task = asyncio.get_running_loop().create_task(self._look_for_ever())

    async def stop(self) -> None:
        """Look no more. What a look had not come to is for the next hour's."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def look(self) -> Looked:
        """Look at all active keys now, and append what is new to the audit log.

        Raises `Unavailable`; what was found before that is written.
        """
        _, now = await self._store.claim_look(_last_hour)
        return await self._look(now)

    async def _look_for_ever(self) -> None:
        while True:
            await self._clock.sleep(_TRY_SECONDS)
            try:
                claimed, now = await self._store.claim_look(_last_hour)
                if claimed:
                    await self._look(now)
            except Unavailable as error:
                _log.warning("signs of trouble were not looked for: %s", error.reason)
            except Exception:  # noqa: BLE001  # the next hour's look may do better
                _log.exception("signs of trouble were not looked for")

    async def _look(self, now: datetime) -> Looked:
        count, written, after = 0, Counter[str](), _BEFORE_ALL
        while keys := await self._store.active_keys(after, BATCH):
            after = keys[-1].id
            count += len(keys)
            written += await self._look_at(keys, now)
        return Looked(
            keys=count,
            idle=written["idle"],
            expiring=written["expiring"],
            unusual_use=written["unusual_use"],
        )

    async def _look_at(self, keys: list[ApiKey], now: datetime) -> Counter[str]:
        hour = _last_hour(now)
        found = {key.id: list(_status_finding(key, now)) for key in keys}
        for key_id, unusual in (await self._unusual(keys, hour)).items():
            found[key_id].append(_unusual_finding(unusual, hour))
        said = _by_key(await self._store.signs_said([*found]))
        new = {
            key_id: [finding for finding in findings if _is_new(finding, said[key_id])]
            for key_id, findings in found.items()
        }
        new = {key_id: findings for key_id, findings in new.items() if findings}
        if not new:
            return Counter()
        written, _ = await self._store.transact(partial(_say, new))
        return written

    async def _unusual(self, keys: list[ApiKey], hour: int) -> dict[UUID, Unusual]:
        """Return what was unusual about the use of which of these *keys* in that *hour*."""
        rows = await self._store.use_in([key.id for key in keys], comparable(hour))
        use: defaultdict[UUID, list[HourOfUse]] = defaultdict(list)
        for row in rows:
            use[row.key_id].append(row)
        found = {}
        for key_id, hours in use.items():
            suspected = suspicions(hour, _accepted(hours), _refused(hours))
            unusual = await self._confirmed(key_id, hour, suspected) if suspected else None
            if unusual is not None:
                found[key_id] = unusual
        return found

    async def _confirmed(
        self, key_id: UUID, hour: int, suspected: Iterable[Unusual]
    ) -> Unusual | None:
        """Return the first suspicion that all the key's hours confirm."""
        hours, first = await self._store.use_since(key_id, hour - REACH)
        for suspicion in suspected:
            counts = _refused(hours) if suspicion.kind == "more_refused" else _accepted(hours)
            if is_unusual(suspicion, hour, counts, first=first):
                return suspicion
        return None


async def _say(new: Mapping[UUID, list[_Finding]], transaction: Transaction) -> Counter[str]:
    """Append what is *new* to the audit log, of the keys of which it still is."""
    turn = Turn(transaction)
    await turn.take()
    said = _by_key(await turn.said(new))
    written: list[Said] = []
    for key in await turn.keep_keys(new):
        unusual = [finding for finding in new[key.id] if finding.sign == "unusual_use"]
        # As the key is now: it may have been used in the meantime.
        for finding in [*_status_finding(key, transaction.now), *unusual]:
            if not _is_new(finding, said[key.id]):
                continue
            written.append(Said(key.id, finding.sign, finding.occasion))
            await transaction.audit(
                account_id=key.account_id,
                actor=ACTOR,
                action=f"api_key.{finding.sign}",
                target_id=key.id,
                target_name=key.name,
                meta={"key_prefix": key.key_prefix, **finding.meta},
            )
    if written:
        await turn.note(written)
    return Counter(each.sign for each in written)


def _status_finding(key: ApiKey, now: datetime) -> Iterable[_Finding]:
    match status_of(key, now):
        case "expiring":
            assert key.expires_at is not None  # noqa: S101  # or it would not be expiring
            yield _Finding("expiring", key.expires_at, {"expires_at": key.expires_at})
        case "idle":
            since = _unused_since(key)
            yield _Finding("idle", since, {"unused_since": since})


def _unusual_finding(unusual: Unusual, hour: int) -> _Finding:
    start = start_of(hour)
    meta = {
        "change": unusual.kind,
        "hour": start,
        "requests": unusual.requests,
        "usual": unusual.usual,
    }
    return _Finding("unusual_use", start, meta)


def _is_new(finding: _Finding, said: Mapping[str, datetime]) -> bool:
    last = said.get(finding.sign)
    if last is None:
        return True
    if finding.sign == "unusual_use":
        return finding.occasion - last >= QUIET
    return finding.occasion != last


def _by_key(said: Iterable[Said]) -> defaultdict[UUID, dict[str, datetime]]:
    found: defaultdict[UUID, dict[str, datetime]] = defaultdict(dict)
    for each in said:
        found[each.key_id][each.sign] = each.occasion
    return found


def _last_hour(now: datetime) -> int:
    """Return the last hour of which all is written."""
    return hour_of(now - _SETTLED) - 1


def _accepted(hours: Iterable[HourOfUse]) -> Counts:
    return {each.hour: each.accepted for each in hours}


def _refused(hours: Iterable[HourOfUse]) -> Counts:
    return {each.hour: each.refused for each in hours}
