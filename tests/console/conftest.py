"""The page on a server of its own, and a real browser, which is installed where there is none."""

import contextlib
import itertools
import subprocess
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page

from tests.support.browser import begin_to_find_chromium, running_browser
from tests.support.console import ConsoleServer, console_server, sign_in

# Opens a tab: `visit(role, javascript=…)`.
Visit = Callable[..., Page]

_numbers = itertools.count(1)
_finding: list["subprocess.Popen[bytes]"] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to install a browser where there is none, while other tests run."""
    if any("visit" in getattr(item, "fixturenames", ()) for item in session.items):
        process = begin_to_find_chromium()
        if process is not None:
            _finding.append(process)


def pytest_sessionfinish() -> None:
    """Cut no installation off in its middle."""
    for process in _finding:
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleServer]:
    """Serve the page."""
    with console_server(tmp_path_factory.mktemp("console")) as server:
        yield server


@pytest.fixture(scope="module")
def contexts(server: ConsoleServer) -> Iterator[dict[bool, BrowserContext]]:
    """Run one browser for all tests of a module, with script and without.

    Not longer: while it runs, the event loop of this thread is Playwright's.
    """
    with running_browser() as browser:
        yield {
            script: browser.new_context(base_url=server.url, java_script_enabled=script)
            for script in (True, False)
        }


@pytest.fixture
def account() -> str:
    """Name an account of the test's own."""
    return f"account{next(_numbers)}"


@pytest.fixture
def visit(
    server: ConsoleServer, contexts: dict[bool, BrowserContext], account: str
) -> Iterator[Visit]:
    """Open tabs; in none of them may the browser complain, least of all of the policy."""
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # The status of an answer is not a complaint.
        if message.type in ("error", "warning") and "status of 4" not in message.text:
            complaints.append(message.text)

    with contextlib.ExitStack() as tabs:

        def open_tab(role: str = "owner", *, javascript: bool = True) -> Page:
            context = contexts[javascript]
            sign_in(context, server.url, account, role)
            page = context.new_page()
            tabs.callback(page.close)
            page.set_default_timeout(15_000)
            page.on("console", note)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            return page

        yield open_tab
    assert complaints == []
