"""How `tfm-guard prove` asks: a key of its own, and many connections, each with its thread."""

import secrets
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from itertools import count
from typing import Final, NamedTuple

import click

from tfm_guard.cli.connection import KEYS_PATH, Address, Answer, Connection, Lost
from tfm_guard.cli.failures import Failure, NotNow
from tfm_guard.cli.findings import ACCEPTANCES, REFUSALS, Deletion, Outcome, Sample, outcome_of
from tfm_guard.clock import SystemClock

_NAME: Final = "tfm-guard prove"
_SPARE_LIFE: Final = timedelta(minutes=5)  # of the key, beyond the asking; longer than all waits
_PAUSE: Final = 0.1  # seconds between two requests of a connection
_STAGGER: Final = 0.01  # seconds between two openings, so that no one process takes a burst of them
_MANAGING_EVERY: Final = 10  # requests
_WARMING_SECONDS: Final = 30.0
_OVERTIME_SECONDS: Final = 10.0
# DELETE is retried as the service's clients do it, a little longer: after Retry-After, or else so:
_RETRY_PAUSES: Final = (0.25, 0.5, 1.0, 2.0)
_LONGEST_RETRY_AFTER: Final = 30


class Access(NamedTuple):
    """How a deployment is reached: its *addresses*, its managing key, the *path* to ask."""

    addresses: Sequence[Address]
    managing: str
    path: str
    tls: ssl.SSLContext

    def connect(self, address: Address) -> "closing[Connection]":
        """Return a new connection to *address*, closed at the end of a with block."""
        return closing(Connection(address, self.tls))


@dataclass
class ProbeKey:
    """The key that the probe made; *gone* once a DELETE has said so."""

    id: str
    prefix: str
    token: str = field(repr=False)
    gone: bool = False


@contextmanager
def probe_key(access: Access, seconds: int) -> Iterator[ProbeKey]:
    """Create a key that outlives *seconds* of asking; delete it at the end if nobody has."""
    key = _create(access, seconds)
    try:
        yield key
    finally:
        if not key.gone:
            click.echo(f"tfm-guard: {_take_back(access, key)}", err=True)


def _create(access: Access, seconds: int) -> ProbeKey:
    """Create a key without any scope: it can do nothing, and is accepted or refused like others."""
    address = access.addresses[0]
    ends = SystemClock().now() + timedelta(seconds=seconds) + _SPARE_LIFE
    body = {"name": _NAME, "permissions": [], "expires_at": ends.isoformat()}
    with access.connect(address) as connection:
        try:
            answer = connection.ask("POST", KEYS_PATH, access.managing, body)
        except Lost as lost:
            raise lost.at(address) from lost
    if answer.status != HTTPStatus.CREATED:
        raise _no_key(address, answer)
    made = answer.read_json()
    try:
        return ProbeKey(str(made["id"]), str(made["key_prefix"]), str(made["key"]))
    except (KeyError, TypeError):
        raise Failure(f"{address.text}: what answers to POST {KEYS_PATH} makes no keys") from None


def _no_key(address: Address, answer: Answer) -> Failure:
    if answer.status == HTTPStatus.UNAUTHORIZED:
        return Failure(
            f"{address.text}: the managing key was refused: {answer}",
            "give the token of a key that has the scope api-keys:write",
        )
    if answer.status == HTTPStatus.FORBIDDEN:
        said = f"{address.text}: the managing key may not create a key: {answer}"
        return Failure(said, *filter(None, [answer.message]))
    if answer.passing:
        return NotNow(f"{address.text}: no key can be created now: {answer}", "try again")
    return Failure(
        f"{address.text}: expected 201 to POST {KEYS_PATH}, got {answer}",
        "give the address below which the management API is, such as https://api.example.com",
    )


def _take_back(access: Access, key: ProbeKey) -> str:
    """Delete the key through the first address that does it; return what to tell."""
    said = []
    for address in access.addresses:
        with access.connect(address) as connection:
            answer = _try_to_delete(connection, access.managing, key)
        if key.gone:
            return f"the key {key.prefix} was deleted ({answer})"
        said.append(f"{address.text}: {answer}")
    return (
        f"the key {key.prefix} could not be deleted ({'; '.join(said)}); it has no scope, and ends "
        f"by itself within {_SPARE_LIFE.seconds // 60} minutes after the asking was to end"
    )


def _try_to_delete(connection: Connection, managing: str, key: ProbeKey) -> Answer | Lost:
    """Send DELETE; an answer that says so marks the key as gone, be it confirmed or not."""
    try:
        answer = connection.ask("DELETE", KEYS_PATH + key.id, managing)
    except Lost as lost:
        return lost
    key.gone = answer.code == "unconfirmed" or answer.status in (
        HTTPStatus.NO_CONTENT,
        HTTPStatus.NOT_FOUND,
    )
    return answer


def _confirms(answer: Answer, tries: int) -> bool:
    """Tell whether *answer* says that the key is refused everywhere.

    404 says so when DELETE is sent again: the confirmation was lost on the way.
    """
    if answer.status == HTTPStatus.NOT_FOUND:
        return tries > 1
    return answer.status == HTTPStatus.NO_CONTENT


def _seconds_to_wait(answer: Answer | Lost, otherwise: float) -> float:
    """Return what the answer asks for in whole seconds, as clients understand it."""
    asked = answer.retry_after if isinstance(answer, Answer) else ""
    return float(min(int(asked), _LONGEST_RETRY_AFTER)) if asked.isdecimal() else otherwise


class Crowd:
    """The connections to all addresses of *access*, *each* so many, and what they were answered."""

    def __init__(self, access: Access, key: ProbeKey, *, each: int) -> None:
        self.askers = [
            _Asker(access, key.token, address, self)
            for _ in range(each)
            for address in access.addresses
        ]
        self.returned = threading.Event()
        self.ended = threading.Event()
        self._access = access
        self._key = key
        self._clock = SystemClock()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask on all connections until the end of the block, once each has accepted the key.

        Raises `Failure` if one of them does not.
        """
        with ThreadPoolExecutor(len(self.askers), "tfm-guard-prove") as threads:
            try:
                working = []
                for asker in self.askers:
                    working.append(threads.submit(asker.work))
                    self.ended.wait(_STAGGER / len(self._access.addresses))
                self._wait_for_all()
                yield
            finally:
                self.ended.set()
        for future in working:
            future.result()

    def delete(self) -> Deletion:
        """Delete the key through the first address, and note when that was confirmed."""
        with self._access.connect(self._access.addresses[0]) as connection:
            with suppress(Lost):  # so that the time to return is not the time to connect
                connection.ask("GET", self._access.path, self._access.managing)
            answers: list[str] = []
            sent = self._clock.monotonic()
            for pause in (*_RETRY_PAUSES, None):
                answer = _try_to_delete(connection, self._access.managing, self._key)
                answers.append(str(answer))
                if isinstance(answer, Answer) and _confirms(answer, len(answers)):
                    self.returned.set()
                    return Deletion(sent, tuple(answers), answer.ended)
                if pause is None or not answer.passing:
                    break
                self.ended.wait(_seconds_to_wait(answer, pause))
        return Deletion(sent, tuple(answers), None)

    def keep_asking(self, seconds: float) -> None:
        """Return after *seconds*, or later if a slow connection was not asked often enough."""
        self.ended.wait(seconds)
        overtime = self._clock.monotonic() + _OVERTIME_SECONDS
        while self._clock.monotonic() < overtime and any(
            asker.asked_after < REFUSALS for asker in self.askers
        ):
            self.ended.wait(_PAUSE)

    def _wait_for_all(self) -> None:
        deadline = self._clock.monotonic() + _WARMING_SECONDS
        for asker in self.askers:
            asker.settled.wait(max(0.0, deadline - self._clock.monotonic()))
        for asker in self.askers:
            if asker.trouble is not None:
                raise asker.trouble
        for address in self._access.addresses:
            askers = [asker for asker in self.askers if asker.address == address]
            if cold := [asker for asker in askers if not asker.settled.is_set()]:
                raise NotNow(
                    f"{address.text}: on {len(cold)} of {len(askers)} connections the new key was "
                    f"not accepted {ACCEPTANCES} times within {_WARMING_SECONDS:g} s; "
                    f"last answer: {cold[0].last_words}",
                    "check that all addresses lead to the same deployment",
                )


class _Asker:
    """One connection, asked in a thread of its own from `work` until the crowd has ended."""

    def __init__(self, access: Access, token: str, address: Address, crowd: Crowd) -> None:
        self.address = address
        self.samples: list[Sample] = []
        self.settled = threading.Event()  # accepted the key often enough, or failed
        self.trouble: Failure | None = None
        self.asked_after = 0  # with the new key, since DELETE returned
        self._accepted = 0  # of the new key
        self._refused = 0  # likewise
        self._access = access
        self._token = token
        self._crowd = crowd
        self._clock = SystemClock()
        self._connection = Connection(address, access.tls)

    @property
    def opened(self) -> int:
        """How often it had to connect; at least once."""
        return self._connection.opened

    @property
    def last_words(self) -> str:
        """What came back last."""
        return self.samples[-1].words if self.samples else "none"

    def work(self) -> None:
        """Ask with the new key, now and then with the managing one, at a steady pace."""
        try:
            self._see_that_keys_matter()
            for number in count(1):
                self._sample(managing=number % _MANAGING_EVERY == 0)
                # DELETE's return ends the pause before it at once: that moment matters most.
                pausing = self._crowd.returned
                if pausing.is_set():
                    pausing = self._crowd.ended
                pausing.wait(_PAUSE)
                if self._crowd.ended.is_set():
                    break
        except Failure as trouble:
            self.trouble = trouble
        finally:
            self.settled.set()
            self._connection.close()

    def _see_that_keys_matter(self) -> None:
        """Raise `Failure` unless a made-up key gets the refusal that the deleted one must get."""
        made_up = f"tfm_k_{secrets.token_hex(24)}"
        try:
            answer = self._connection.ask("GET", self._access.path, made_up)
        except Lost as lost:
            raise lost.at(self.address) from lost
        outcome = outcome_of(answer)
        if outcome is Outcome.REFUSED:
            return
        said = (
            f"{self.address.text}: expected 401 invalid_token to GET {self._access.path} with a "
            f"made-up key, got {answer}"
        )
        if outcome is Outcome.UNCLEAR and answer.status != HTTPStatus.UNAUTHORIZED:
            raise NotNow(said, "try again")
        raise Failure(said, "--path must name a path that needs a key, on every address")

    def _sample(self, *, managing: bool) -> None:
        after = self._crowd.returned.is_set()
        sample = self._ask(managing=managing)
        self.samples.append(sample)
        if not managing:
            self.asked_after += after
            self._count(sample.outcome)

    def _ask(self, *, managing: bool) -> Sample:
        token = self._access.managing if managing else self._token
        asked = self._clock.monotonic()
        try:
            answer = self._connection.ask("GET", self._access.path, token)
        except Lost as lost:
            ended = self._clock.monotonic()
            return Sample(asked, ended, managing, Outcome.UNCLEAR, str(lost))
        return Sample(answer.started, answer.ended, managing, outcome_of(answer), str(answer))

    def _count(self, outcome: Outcome) -> None:
        self._accepted += outcome is Outcome.ACCEPTED
        self._refused += outcome is Outcome.REFUSED
        if self._accepted >= ACCEPTANCES:
            self.settled.set()
        elif self._accepted == 0 and self._refused >= REFUSALS:
            raise Failure(
                f"{self.address.text}: the new key was refused {self._refused} times, before it "
                "was deleted",
                "check that all addresses lead to the same deployment",
            )
