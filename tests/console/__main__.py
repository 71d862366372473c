"""Makes a picture of each state of the page: `make screenshots`."""

import io
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page

from tests.support.browser import running_browser
from tests.support.console import (
    LIST,
    ConsoleServer,
    console_server,
    fill,
    silent_process,
)
from tests.support.servers import ROOT
from tfm_guard import Guard

PICTURES = ROOT / "docs" / "screenshots"
WIDE = {"width": 1120, "height": 700}
NARROW = {"width": 390, "height": 760}
# Right to left, as long as can be, markup, and ordinary ones.
NAMES = (
    *(f"Shop in {town}" for town in ("Bern", "Graz", "Lyon", "Porto", "Turin", "Ghent")),
    "מפתח של החנות",
    "x" * 100,
    "<b>CI</b> & more",
)

Scene = Callable[[Page], None]


def show_list(page: Page) -> None:
    """The list."""
    page.goto(LIST)


def show_form(page: Page) -> None:
    """The form for a new key."""
    page.goto(f"{LIST}new")


def show_faults(page: Page) -> None:
    """That form, with a name that is refused."""
    page.goto(f"{LIST}new")
    page.get_by_label("Name").fill("Shop\u202egpj.exe")
    page.get_by_role("button", name="Create API key").click()
    page.get_by_role("alert").wait_for()


def show_created(page: Page) -> None:
    """The one time that a key is shown."""
    page.goto(f"{LIST}new")
    page.get_by_label("Name").fill("Importer")
    page.get_by_role("button", name="Create API key").click()
    page.get_by_role("heading", name="Copy your key now").wait_for()


def show_question(page: Page) -> None:
    """The question whether to delete a key."""
    page.goto(LIST)
    page.get_by_role("link", name="Delete Newsletter").click()


def show_rotation(page: Page) -> None:
    """The form to rotate a key."""
    page.goto(LIST)
    page.get_by_role("link", name="Rotate Newsletter").click()


def show_key(page: Page, days: str = "7 days") -> None:
    """One key, over some time."""
    page.goto(LIST)
    page.get_by_role("link", name="Web shop", exact=True).click()
    page.get_by_role("link", name=days, exact=True).click()


def show_search(page: Page) -> None:
    """What is found of many keys, by name."""
    page.goto(f"{LIST}?sort=name&q=shop")


def show_rotated(page: Page) -> None:
    """The one time that the key is shown that takes another's place."""
    show_rotation(page)
    page.get_by_role("button", name="Rotate key").click()
    page.get_by_role("heading", name="Copy your key now").wait_for()


def show_deleted(page: Page) -> None:
    """What is said when a key is refused everywhere."""
    page.goto(LIST)
    page.get_by_role("link", name="Delete Importer").first.click()
    page.get_by_role("button", name="Delete key").click()
    page.get_by_text("Every server refuses it.").wait_for()


def show_waiting(page: Page) -> None:
    """What is said while a key is being deleted."""
    show_question(page)
    # Held here, and not by the server, or the picture would wait for the answer.
    page.evaluate("addEventListener('submit', (event) => event.preventDefault())")
    page.get_by_role("button", name="Delete key").click()
    page.get_by_text("Deleting…").wait_for()


def show_unconfirmed(page: Page) -> None:
    """What is said when that could not be confirmed."""
    show_question(page)
    page.get_by_role("button", name="Delete key").click()
    page.get_by_text("It stays in the list").wait_for()


def main() -> None:
    """Make all pictures."""
    PICTURES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        console_server(Path(folder)) as server,
        running_browser() as browser,
    ):
        server.work(lambda guard: fill(guard, "acme"))

        def take(name: str, scene: Scene, account: str = "acme", **options: Any) -> None:
            _take(server, browser, name, scene, account, **options)

        take("list", show_list)
        take("list-dark", show_list, color_scheme="dark")
        take("list-narrow", show_list, viewport=NARROW)
        take("list-member", show_list, role="member")
        take("key", show_key)
        for days in ("24 hours", "30 days", "90 days"):
            take(f"key-{days.replace(' ', '-')}", partial(show_key, days=days))
        take("key-dark", show_key, color_scheme="dark")
        take("key-narrow", show_key, viewport=NARROW)
        take("create", show_form)
        take("create-faults", show_faults)
        take("rotate", show_rotation)
        take("delete", show_question)
        take("created", show_created)
        take("created-dark", show_created, color_scheme="dark")
        take("empty", show_list, account="new")
        take("signed-out", show_list, account="")
        server.work(lambda guard: _create(guard, "full", "Web shop", "CI"))
        take("limit", show_list, account="full")
        server.work(lambda guard: _create(guard, "many", *NAMES, plan="business"))
        take("search", show_search, account="many")
        take("names", show_list, account="many")
        take("deleted", show_deleted)
        with silent_process(server, link="away"):
            take("delete-waiting", show_waiting)
            take("delete-unconfirmed", show_unconfirmed)
        server.work(lambda guard: _create(guard, "rotated", "Newsletter", plan="business"))
        take("rotated", show_rotated, account="rotated")


async def _create(guard: Guard, account: str, *names: str, plan: str = "free") -> None:
    await guard.accounts.set_plan(account, plan)
    for name in names:
        await guard.keys.create(account_id=account, name=name)


def _take(
    server: ConsoleServer,
    browser: Browser,
    name: str,
    scene: Scene,
    account: str,
    *,
    role: str = "owner",
    **options: Any,
) -> None:
    page = server.visit(browser, account, role, **{"viewport": WIDE, **options})
    scene(page)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(128).save(PICTURES / f"{name}.png", optimize=True)
    page.context.close()
    sys.stdout.write(f"docs/screenshots/{name}.png\n")


if __name__ == "__main__":
    main()
