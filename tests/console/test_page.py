"""Settings → API Keys in a real browser: with the mouse, by keyboard, and without script."""

import itertools
import re
from datetime import timedelta

import pytest
from playwright.sync_api import Error, Page, expect

from tests.console.conftest import Visit
from tests.support.axe import findings
from tests.support.console import LIST, ConsoleServer, fill, silent_process
from tfm_guard import Guard
from tfm_guard.errors import InvalidToken
from tfm_guard.records import ApiKey, CreatedKey

TOKEN = re.compile(r"tfm_k_[0-9a-f]{48}")
HOSTILE = "</title><script>document.title='taken'</script>"
RIGHT_TO_LEFT = "מפתח של החנות"


def create(page: Page, name: str = "CI") -> str:
    """Create a key with the form, and return the token that is shown."""
    page.goto(LIST)
    page.get_by_role("link", name="Create API key").click()
    page.get_by_label("Name").fill(name)
    page.get_by_role("button", name="Create API key").click()
    return shown_token(page)


def shown_token(page: Page) -> str:
    """Return the token that the page shows."""
    expect(page.get_by_role("heading", name="Copy your key now")).to_be_visible()
    (token,) = TOKEN.findall(page.inner_text("main"))
    assert isinstance(token, str)
    return token


def assert_gone(page: Page, token: str) -> None:
    """Assert that nothing of the secret is in the tab, nor in what it keeps."""
    secret = token[14:]
    assert secret not in page.content()
    assert secret not in page.url
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
    assert secret not in page.evaluate(kept)
    assert secret not in str(page.context.cookies())


def is_accepted(server: ConsoleServer, token: str) -> bool:
    """Tell whether a guard on the same database accepts the token."""

    async def verify(guard: Guard) -> bool:
        try:
            await guard.verify(token)
        except InvalidToken:
            return False
        return True

    return server.work(verify)


def seed(server: ConsoleServer, account: str, *names: str) -> list[CreatedKey]:
    """Create keys in an account with room for them."""

    async def work(guard: Guard) -> list[CreatedKey]:
        await guard.accounts.set_plan(account, "business")
        return [await guard.keys.create(account_id=account, name=name) for name in names]

    return server.work(work)


def keys_of(server: ConsoleServer, account: str) -> list[ApiKey]:
    """Return the account's active keys."""
    return server.work(lambda guard: guard.keys.list(account))


def test_a_key_is_created_and_shown_once(server: ConsoleServer, visit: Visit) -> None:
    """The token that is shown works, can be copied, and is gone when it was stored."""
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(LIST)
    expect(page.get_by_role("heading", name="No keys yet")).to_be_visible()
    token = create(page, "Web shop")
    assert is_accepted(server, token)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == token
    page.get_by_role("link", name="I have stored it").click()
    row = page.get_by_role("row", name="Web shop")
    expect(row).to_contain_text(f"tfm_k_{token[6:14]}…")
    expect(row).to_contain_text("send")
    expect(row).to_contain_text("1 accepted, 0 refused")
    assert_gone(page, token)


def test_a_reload_shows_the_list(server: ConsoleServer, visit: Visit, account: str) -> None:
    """Reloading the page that shows a key shows the list, and creates nothing."""
    page = visit()
    token = create(page)
    page.reload()
    expect(page.get_by_role("heading", name="API Keys", exact=True)).to_be_visible()
    assert_gone(page, token)
    assert len(keys_of(server, account)) == 1


def go(page: Page, way: str) -> None:
    """Go "back" or "forward". Where only sending a form again would lead, the browser goes not."""
    try:
        page.go_back(wait_until="commit") if way == "back" else page.go_forward(wait_until="commit")
    except Error as error:
        if "ERR_CACHE_MISS" not in str(error):
            raise


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_back_and_forward_never_show_a_key_again(
    server: ConsoleServer, visit: Visit, account: str, *, javascript: bool
) -> None:
    """Wherever the history leads, nothing shows the key, and nothing more is created."""
    page = visit(javascript=javascript)
    token = create(page)
    page.get_by_role("link", name="I have stored it").click()
    expect(page.get_by_role("row", name="CI")).to_be_visible()
    for way in ["back"] * 3 + ["forward"] * 3:
        go(page, way)
        expect(page.locator("html")).not_to_contain_text(token[14:])
    assert len(keys_of(server, account)) == 1


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_leaving_by_back_and_returning_shows_no_key(visit: Visit, *, javascript: bool) -> None:
    """Back from the key to the form and forward again: the key is not there any more."""
    page = visit(javascript=javascript)
    token = create(page)
    for way in ("back", "forward"):
        go(page, way)
        expect(page.locator("html")).not_to_contain_text(token[14:])


def test_a_form_sent_again_creates_nothing(
    server: ConsoleServer, visit: Visit, account: str
) -> None:
    """Without script a reload sends the form again: it says so, and shows and creates no key."""
    page = visit(javascript=False)
    token = create(page)
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("the key “CI” was created")
    assert token[14:] not in page.content()
    assert len(keys_of(server, account)) == 1


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_key_is_rotated(
    server: ConsoleServer, visit: Visit, account: str, *, javascript: bool
) -> None:
    """The new token works, the old one too for as long as was chosen, and the list says so."""
    (created,) = seed(server, account, "CI")
    page = visit(javascript=javascript)
    page.goto(LIST)
    page.get_by_role("link", name="Rotate CI").click()
    page.get_by_label("The old key works for another").select_option("3 days")
    page.get_by_role("button", name="Rotate key").click()
    token = shown_token(page)
    assert is_accepted(server, token)
    assert is_accepted(server, created.token)
    page.get_by_role("link", name="I have stored it").click()
    expect(page.get_by_text("Replaced", exact=True)).to_be_visible()
    new, old = keys_of(server, account)
    assert old.id == created.key.id
    assert old.expires_at is not None
    assert abs(old.expires_at - new.created_at - timedelta(days=3)) < timedelta(minutes=1)


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_a_key_is_deleted(
    server: ConsoleServer, visit: Visit, account: str, *, javascript: bool
) -> None:
    """The question names the key; then it is refused, its row is gone, and the page says so."""
    created, _ = seed(server, account, "CI", "Other")
    page = visit(javascript=javascript)
    page.goto(LIST)
    page.get_by_role("link", name="Delete CI").click()
    expect(page.get_by_role("heading", name="Delete CI?")).to_be_visible()
    expect(page.get_by_text(created.key.key_prefix)).to_be_visible()
    assert is_accepted(server, created.token)
    page.get_by_role("button", name="Delete key").click()
    expect(page.get_by_text("Every server refuses it.")).to_be_visible()
    expect(page.get_by_role("row", name="Other")).to_be_visible()
    expect(page.get_by_role("row", name="CI")).to_have_count(0)
    assert not is_accepted(server, created.token)


def test_the_page_says_that_it_waits(server: ConsoleServer, visit: Visit, account: str) -> None:
    """While revoking waits for a silent process the page says so, and then that it is done."""
    seed(server, account, "CI")
    page = visit()
    page.goto(LIST)
    page.get_by_role("link", name="Delete CI").click()
    expect(page.get_by_role("heading", name="Delete CI?")).to_be_visible()
    with silent_process(server):
        # At once, in the page: Playwright's own ways wait for the answer.
        press = "document.querySelector('main button').click()"
        busy = page.evaluate(f"{press}, document.querySelector('[role=status]').innerText")
        assert busy == "Deleting… waiting until every server refuses the key."
    expect(page.get_by_text("Every server refuses it.")).to_be_visible()


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
def test_what_is_not_confirmed_stays_in_the_list(
    server: ConsoleServer, visit: Visit, account: str, *, javascript: bool
) -> None:
    """A key that some process may still accept is shown as being revoked, until asking says no."""
    seed(server, account, "CI")
    page = visit(javascript=javascript)
    page.goto(LIST)
    page.get_by_role("link", name="Delete CI").click()
    with silent_process(server, link="away"):
        page.get_by_role("button", name="Delete key").click()
        expect(page.get_by_text("It stays in the list until that is sure.")).to_be_visible()
        expect(page.get_by_text("Being revoked")).to_be_visible()
        if javascript:  # which axe is
            assert findings(page) == []
        page.goto(LIST)
        expect(page.get_by_text("Being revoked")).to_be_visible()
    page.get_by_role("button", name="Ask again").click()
    expect(page.get_by_text("Every server refuses it.")).to_be_visible()
    expect(page.get_by_text("Being revoked")).to_have_count(0)


def tab_to(page: Page, text: str) -> None:
    """Press Tab until what has the focus says *text*, and see that the focus can be seen."""
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.ariaLabel || document.activeElement.textContent ||"
            " document.activeElement.name, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name.strip() == text:
            assert outline != "none"
            return
    raise AssertionError(f"{text!r} cannot be reached with Tab")


def test_keys_are_changed_by_keyboard(server: ConsoleServer, visit: Visit, account: str) -> None:
    """A key is created, stored, rotated and deleted with Tab, Space and Enter alone."""
    page = visit()
    page.goto(LIST)
    tab_to(page, "Create API key")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Name")).to_be_focused()
    page.keyboard.type("By hand")
    tab_to(page, "scope")  # send, which is chosen
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    tab_to(page, "Create API key")
    page.keyboard.press("Enter")
    shown_token(page)
    tab_to(page, "I have stored it")
    page.keyboard.press("Enter")
    expect(page.get_by_role("row", name="By hand")).to_be_visible()
    (key,) = keys_of(server, account)
    assert key.scopes == {"send", "emails:read"}
    tab_to(page, "Rotate By hand")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Rotate By hand?")).to_be_visible()
    tab_to(page, "Rotate key")
    page.keyboard.press("Enter")
    shown_token(page)
    tab_to(page, "I have stored it")
    page.keyboard.press("Enter")
    expect(page.get_by_role("row", name="Replaced")).to_be_visible()
    tab_to(page, "Delete By hand")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Cancel")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".notice.good")).to_be_focused()
    (left,) = keys_of(server, account)
    assert left.id == key.id


def test_keys_are_found_by_keyboard(server: ConsoleServer, visit: Visit, account: str) -> None:
    """The list is sorted and searched, and a key's use looked at, with Tab and Enter alone."""
    keys = seed(server, account, *(f"Key {letter}" for letter in "BIAHCGDFE"))
    page = visit()
    page.goto(LIST)
    tab_to(page, "Name")
    page.keyboard.press("Enter")
    names = page.locator("tbody th .name")
    expect(names).to_have_text([f"Key {letter}" for letter in "ABCDEFGHI"])
    tab_to(page, "q")
    page.keyboard.type(keys[1].key.key_prefix)
    page.keyboard.press("Enter")
    expect(names).to_have_text(["Key I"])
    tab_to(page, "Key I")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="no requests in 24 hours")).to_be_visible()
    tab_to(page, "30 days")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="no requests in 30 days")).to_be_visible()
    tab_to(page, "As a table")
    page.keyboard.press("Enter")
    expect(page.get_by_text("No requests in this time.")).to_be_visible()
    tab_to(page, "Back to API Keys")
    page.keyboard.press("Enter")
    expect(names).to_have_count(9)


def test_axe_finds_nothing(server: ConsoleServer, visit: Visit, account: str) -> None:
    """On every page, light, dark and narrow, axe finds nothing, and nothing sticks out sideways."""
    page = visit()
    page.goto(LIST)
    found = {"empty": findings(page)}
    server.work(lambda guard: fill(guard, account))
    seed(server, account, "x" * 100, RIGHT_TO_LEFT, HOSTILE)
    page.goto(LIST)
    found["list"] = findings(page)
    page.get_by_role("link", name="Web shop", exact=True).click()
    page.get_by_role("link", name="7 days", exact=True).click()
    page.get_by_text("As a table").click()
    found["key"] = findings(page)
    page.get_by_role("link", name="Rotate").click()
    found["rotate"] = findings(page)
    page.get_by_role("link", name="Cancel").click()
    page.get_by_role("link", name=f"Delete {RIGHT_TO_LEFT}").click()
    found["delete"] = findings(page)
    page.get_by_role("button", name="Delete key").click()
    expect(page.locator(".notice.good")).to_be_focused()
    found["deleted"] = findings(page)
    page.goto(f"{LIST}new")
    found["form"] = findings(page)
    page.get_by_label("Name").fill("\u202e")
    page.get_by_role("button", name="Create API key").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_label("Name")).to_be_focused()
    found["fault"] = findings(page)
    page.get_by_label("Name").fill("Good")
    page.get_by_role("button", name="Create API key").click()
    shown_token(page)
    found["created"] = findings(page)
    page.goto(f"{LIST}nothing")
    found["nothing"] = findings(page)
    page.context.clear_cookies()
    page.goto(LIST)
    found["signed out"] = findings(page)
    assert [*itertools.chain(*found.values())] == []
    assert len(found) == 11


def test_who_may_not_manage_only_sees(server: ConsoleServer, visit: Visit, account: str) -> None:
    """A member sees keys and their use, and nothing with which to change them."""
    seed(server, account, "CI")
    page = visit(role="member")
    page.goto(LIST)
    expect(page.get_by_text("You can see these keys.")).to_be_visible()
    page.get_by_role("link", name="CI", exact=True).click()
    expect(page.get_by_role("img", name="no requests in 24 hours")).to_be_visible()
    for name in ("Create API key", "Rotate", "Delete"):
        expect(page.get_by_role("link", name=name)).to_have_count(0)
    page.goto(f"{LIST}new")
    expect(page.get_by_role("alert")).to_contain_text("Ask an owner or an admin.")


def test_names_are_only_ever_text(server: ConsoleServer, visit: Visit, account: str) -> None:
    """A name that is markup, or is written the other way, or is long, is shown as it is."""
    seed(server, account, HOSTILE, RIGHT_TO_LEFT, "x" * 100)
    page = visit()
    page.goto(LIST)
    for name in (HOSTILE, RIGHT_TO_LEFT, "x" * 100):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        assert page.title() == f"{name} · Settings"
        page.get_by_role("link", name="API Keys", exact=True).click()


def test_many_keys_are_searched_and_sorted(
    server: ConsoleServer, visit: Visit, account: str
) -> None:
    """With many keys there is a search, by name or prefix alone, and the columns sort."""
    keys = seed(server, account, *(f"Key {letter}" for letter in "DBKACJEIHGF"))
    page = visit()
    page.goto(LIST)
    page.get_by_role("link", name="Name").click()
    names = page.locator("tbody th .name")
    expect(names).to_have_text([f"Key {letter}" for letter in "ABCDEFGHIJK"])
    expect(page.get_by_role("columnheader", name="Name")).to_have_attribute(
        "aria-sort", "ascending"
    )
    search = page.get_by_label("Search by name or prefix")
    search.fill(keys[0].token)
    expect(search).to_have_value(f"tfm_k_{keys[0].key.key_prefix}")  # no key in an address
    page.get_by_role("button", name="Search").click()
    expect(names).to_have_text(["Key D"])
    search.fill("nothing like this")
    page.keyboard.press("Enter")
    expect(page.get_by_text("No key has “nothing like this”")).to_be_visible()
    page.get_by_role("link", name="Show all").click()
    expect(names).to_have_count(11)


def test_at_the_limit_it_says_what_to_do(server: ConsoleServer, visit: Visit, account: str) -> None:
    """With no room in the plan there is no way to the form, but one to larger plans."""
    seed(server, account, "CI", "Shop")
    server.work(lambda guard: guard.accounts.set_plan(account, "free"))
    page = visit()
    page.goto(LIST)
    expect(page.get_by_text("2 of 2 keys of the plan “free” used")).to_be_visible()
    expect(page.get_by_role("link", name="See the plans")).to_have_attribute("href", "/plans")
    expect(page.get_by_role("link", name="Create API key")).to_have_count(0)
    page.goto(f"{LIST}new")
    expect(page.get_by_role("button")).to_have_count(0)
    assert findings(page) == []


def test_a_day_is_asked_for_only_when_chosen(
    server: ConsoleServer, visit: Visit, account: str
) -> None:
    """The field for the last day appears with its choice; the key works until that day's end."""
    page = visit()
    page.goto(f"{LIST}new")
    page.get_by_label("Name").fill("CI")
    expect(page.get_by_label("Last day")).to_be_hidden()
    page.get_by_label("Expiry").select_option("On a date")
    page.get_by_label("Last day").fill("2099-12-31")
    page.get_by_role("button", name="Create API key").click()
    shown_token(page)
    (key,) = keys_of(server, account)
    assert str(key.expires_at) == "2100-01-01 00:00:00+00:00"
