"""A real browser: the machine's own Chromium, driven by Playwright."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.support.servers import ROOT, ServerFailed

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_APT_GET = ("apt-get", "-o", "DPkg::Lock::Timeout=300")  # seconds
_UPDATE = (*_APT_GET, "update")
_INSTALL = (*_APT_GET, "install", "--yes", "--no-install-recommends", "chromium")
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str:
    """Return the path of a Chromium, which root installs; ServerFailed tells what to install."""
    found, said = _on_path(), ""
    if found is None and os.geteuid() == 0 and shutil.which(_APT_GET[0]):
        # Of several processes one installs it; the others wait, and find it.
        with Path(__file__).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = _install() if _on_path() is None else ""
        found = _on_path()
    if found is None:
        raise ServerFailed(
            f"no Chromium: there is no {', no '.join(_NAMES)} on PATH. Install one; on Debian, as "
            f"root: apt-get install --no-install-recommends chromium\n{said}".rstrip()
        )
    return found


def begin_to_find_chromium() -> "subprocess.Popen[bytes] | None":
    """Start a process that installs Chromium, if there is none yet and it can be installed.

    `find_chromium` waits for it, and tells what went wrong.
    """
    if _on_path() is not None:
        return None
    # No thread: others fork.
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _on_path() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def _install() -> str:
    """Install Chromium; return the end of what that said."""
    output = ""
    for command in (_UPDATE, _INSTALL):
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            text=True,
        )
        output += done.stdout
    return output[-2000:]


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run a browser without a window, with a profile of its own, until the end of the block.

    It keeps pages for going back to, as people's browsers do and Playwright's own setting does not.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(),
            args=_FLAGS,
            chromium_sandbox=False,
            ignore_default_args=["--disable-back-forward-cache"],
        )
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    find_chromium()
