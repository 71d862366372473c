"""What every private server shares: a port, a folder, a start, an end, and being frozen."""

import atexit
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[2]
_LAUNCH = Path(__file__).with_name("launch.py")

# Seconds, for a machine that is busy with other things; a start usually takes under one.
START_DEADLINE = 60.0
STOP_DEADLINE = 30.0
# How many ports to try until one is still free when the server has come so far as to take it.
_PORTS_TO_TRY = 5


class ServerFailed(Exception):
    """A private server did not start, stop or answer; the message ends with its last output."""


class Account(NamedTuple):
    """A user of this machine, by number."""

    uid: int
    gid: int


def unprivileged_account() -> Account | None:
    """Return whom to run a server as that refuses root, or None where we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(user.pw_uid, user.pw_gid)
    raise ServerFailed("run the tests as an ordinary user: there is no 'postgres' or 'nobody'")


def free_port() -> int:
    """Return a loopback port that nobody listens on.

    It lies below the range that outgoing connections take theirs from: otherwise a client that
    keeps trying a stopped server could connect to itself, and so keep the port from the server.
    For the same reason each process of a test run has ports of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for port in random.sample(range(15_000 + worker, 32_000, workers), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("no free port between 15000 and 32000 on 127.0.0.1 in 100 tries")


def wait_until(
    condition: Callable[[], bool], *, what: str, seconds: float = START_DEADLINE
) -> None:
    """Poll *condition* of another process until it holds; TimeoutError names *what* was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/*pid*/stat from the state on; a missing process is a zombie."""
    try:
        # The name before ")" may itself hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", "0"]


def process_ended(pid: int) -> bool:
    """Tell whether *pid* runs no more (a zombie that nobody has collected does not run)."""
    return _stat(pid)[0] in "ZX"


def process_stopped(pid: int) -> bool:
    """Tell whether *pid* executes nothing until it gets SIGCONT."""
    return _stat(pid)[0] in "TZX"


def process_family(pid: int) -> list[int]:
    """Return *pid* and all its living descendants, parents first."""
    parents = {
        int(entry.name): int(_stat(int(entry.name))[1]) for entry in Path("/proc").glob("[0-9]*")
    }
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send one signal to each of *pids* that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop_processes(pids: Sequence[int]) -> None:
    send_signal(pids, signal.SIGSTOP)
    wait_until(lambda: all(map(process_stopped, pids)), what=f"SIGSTOP to {pids} took effect")


class PrivateServer(ABC):
    """A server on a free loopback port that belongs to this process alone and ends with it.

    ``with`` starts it and removes it. From its first start on, its port and its folder stay the
    same over stop and start.
    Start it from a thread that lives as long as the server should: when that thread ends, the
    kernel takes it for the end of the parent.
    """

    # What ends it in an orderly way; also sent by the kernel if this process is killed.
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    working_folder: ClassVar[Path] = Path("/")

    def __init__(self, *, account: Account | None = None) -> None:
        self.port = free_port()
        self.account = account or Account(os.getuid(), os.getgid())
        self.folder = Path(tempfile.mkdtemp(prefix="tfm-guard-test-"))
        os.chown(self.folder, *self.account)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports_to_try = _PORTS_TO_TRY
        self._frozen: list[int] = []
        self._thawer: subprocess.Popen[bytes] | None = None
        self._kept_output = ""
        self._previous_output = 0
        atexit.register(self.close)

    def __repr__(self) -> str:
        state = "frozen" if self._frozen else "running" if self.running else "stopped"
        return f"<{type(self).__name__} 127.0.0.1:{self.port} {state}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the program (an absolute path) and its arguments."""

    @abstractmethod
    def answers(self) -> bool:
        """Tell whether the server does its work now."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables it sees: ours, without those that would configure it by chance."""
        return {k: v for k, v in os.environ.items() if not k.startswith(("PG", "TFM_GUARD_"))}

    @property
    def running(self) -> bool:
        """Whether the process exists, be it frozen."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id; ServerFailed unless it runs."""
        if self._process is None or self._process.poll() is not None:
            raise self.failure("is not running")
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has written to stdout and stderr, over all starts, also after its end."""
        log = self.folder / "output"
        return log.read_text(errors="replace") if log.exists() else self._kept_output

    @property
    def output_since_start(self) -> str:
        """The part of *output* written since the last start."""
        return self.output[self._previous_output :]

    def start(self) -> None:
        """Start and wait until it answers; a frozen server goes on, a running one is left alone.

        If its port is in use by now, its first start chooses another.
        """
        self.thaw()
        if self.running:
            return
        for others_left in reversed(range(self._ports_to_try)):
            try:
                self._start()
                break
            except ServerFailed:
                in_use = "address already in use" in self.output_since_start.lower()
                if not (in_use and others_left):
                    raise
                self.port = free_port()
        # Others know the port now.
        self._ports_to_try = 1

    def _start(self) -> None:
        self._previous_output = len(self.output)
        with (self.folder / "output").open("ab") as log:
            self._process = subprocess.Popen(
                self.launched(self.command()),
                cwd=self.working_folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the test run, which then ends its servers itself.
                start_new_session=True,
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            try:
                wait_until(self._ready, what="an answer")
            except TimeoutError as error:
                raise self.failure("did not answer in time") from error
            undo.pop_all()

    def stop(self) -> None:
        """End it in its own way and wait for that; frozen, it does nothing more before it ends."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End it and all its children with SIGKILL."""
        if self.running:
            self.freeze()
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it and start it again on the same port, with the same folder."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop it and all its children where they are (SIGSTOP): connections stay, answers do not.

        A process of its own holds the way back, a pipe from us: should we be killed, it closes.
        """
        if self._frozen:
            return
        # The parent first: stopped, it has no further children.
        _stop_processes([self.pid])
        self._frozen = process_family(self.pid)
        _stop_processes(self._frozen)
        self._thawer = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -CONT "$@"', "thaw", *map(str, self._frozen)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def thaw(self) -> None:
        """Let a frozen server go on; any other is left alone."""
        if self._thawer is not None:
            self._thawer.communicate()
        self._frozen, self._thawer = [], None

    def close(self) -> None:
        """Stop it for good and remove its folder."""
        atexit.unregister(self.close)
        try:
            self.stop()
        finally:
            self._kept_output = self.output
            shutil.rmtree(self.folder, ignore_errors=True)

    def launched(self, program: Sequence[str]) -> list[str]:
        """Return the command that runs *program* as our account and lets it not outlive us."""
        wrapper = [sys.executable, "-I", "-S", str(_LAUNCH)]
        numbers = (os.getpid(), int(self.stop_signal), *self.account)
        return [*wrapper, *map(str, numbers), *program]

    def failure(self, what: str) -> ServerFailed:
        """Return the error that says *what* happened, with the last lines of output."""
        lines = self.output.splitlines()[-20:]
        return ServerFailed("\n  ".join([f"{self!r} {what}; its last output:", *lines]))

    def _ready(self) -> bool:
        if not self.running:
            raise self.failure("ended instead of starting")
        return self.answers()

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            self.thaw()
            return
        # A signal sent to a frozen process is the first thing that it sees when it goes on.
        targets = self._frozen or [self._process.pid]
        send_signal(targets, number)
        self.thaw()
        try:
            self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            failure = self.failure(f"was not ended by {number.name} and had to be killed")
            self.kill()
            raise failure from None
        # Those that the process did not wait for itself.
        wait_until(lambda: all(map(process_ended, targets)), what=f"the end of {targets}")
