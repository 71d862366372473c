"""What keeps people out of a page, as axe finds it."""

from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.sync_api import Page

_AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
# Of axe's rules, those of WCAG 2.2 A and AA, and its own best practices.
_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_OF_TABLES = ["cat.aria", "cat.tables", "cat.keyboard"]
_NARROW = 320  # CSS pixels: 1280, enlarged to 400 % (WCAG 2.2, 1.4.10)


def findings(page: Page) -> list[str]:
    """Return what axe finds wrong with the page as it is, and with its contrast in the dark.

    On a narrow screen too, where nothing may stick out sideways, and tables look different.
    """
    size = page.viewport_size
    page.evaluate(_AXE)
    found = _run(page, "tag", _TAGS)
    page.emulate_media(color_scheme="dark")
    found += _run(page, "rule", ["color-contrast"])
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": _NARROW, "height": 640})
    if page.locator("table").count():
        found += _run(page, "tag", _OF_TABLES)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert size is not None
    page.set_viewport_size(size)
    return found + ([f"{width} wide on a screen of {_NARROW}"] if width > _NARROW else [])


def _run(page: Page, kind: str, values: list[str]) -> list[str]:
    """Return what some rules of axe, which is loaded, find."""
    # Passed rules are not reported: that would take half of the time.
    options: dict[str, Any] = {
        "runOnly": {"type": kind, "values": values},
        "resultTypes": ["violations"],
    }
    results = page.evaluate("(options) => axe.run(options)", options)
    return [
        f"{violation['id']}: {node['html']}"
        for violation in results["violations"]
        for node in violation["nodes"]
    ]
