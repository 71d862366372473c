"""A real browser: the machine's own Chromium, driven by Playwright."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tests.support.servers import ServerFailed

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends", "chromium")
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
    found = _on_path()
    if found is None and os.geteuid() == 0 and shutil.which(_INSTALL[0]):
        subprocess.run(_INSTALL, check=False, capture_output=True)
        found = _on_path()
    if found is None:
        raise ServerFailed(f"no Chromium: install it, as root: {' '.join(_INSTALL)}")
    return found


def _on_path() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


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
