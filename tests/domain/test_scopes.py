"""Facts about scopes."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.errors import ConfigurationError, InvalidInput
from tfm_guard.scopes import BUILT_IN_SCOPES, DEFAULT_SCOPES, ScopeRegistry

# RFC 6749 section 3.3.
SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


def test_the_built_in_scopes() -> None:
    """The nine documented scopes exist, and a new key can send unless told otherwise."""
    assert set(BUILT_IN_SCOPES) == {
        "send",
        "emails:read",
        "domains:read",
        "domains:write",
        "webhooks:read",
        "webhooks:write",
        "api-keys:read",
        "api-keys:write",
        "audit:read",
    }
    assert DEFAULT_SCOPES == ("send",)


@given(st.lists(st.sampled_from(sorted(BUILT_IN_SCOPES))))
def test_a_grant_is_what_was_asked_for(requested: list[str]) -> None:
    """Known scopes are granted as they are, once each; none implies another."""
    assert ScopeRegistry().grant(requested) == set(requested)


@given(st.lists(st.sampled_from(sorted(BUILT_IN_SCOPES)), max_size=5), st.text())
def test_an_unknown_scope_is_named_by_its_position(known: list[str], unknown: str) -> None:
    """One unknown scope refuses the whole grant and says where it stands."""
    if unknown in BUILT_IN_SCOPES:
        unknown += "x"
    with pytest.raises(InvalidInput, match="Unknown scope") as caught:
        ScopeRegistry().grant([*known, unknown, "send"])
    assert caught.value.field == ("scopes", len(known))
    assert caught.value.kind == "unknown_scope"


def test_a_string_is_no_list_of_scopes() -> None:
    """A bare string is refused rather than read letter by letter."""
    with pytest.raises(InvalidInput) as caught:
        ScopeRegistry().grant("send")
    assert (caught.value.field, caught.value.kind) == (("scopes",), "list_type")


def test_a_host_adds_its_own_scopes() -> None:
    """A registered scope can be granted, and shows in the repr; others stay unknown."""
    registry = ScopeRegistry({"invoices:read": "Read invoices"})
    assert registry.grant(["invoices:read", "send"]) == {"invoices:read", "send"}
    assert "invoices:read" in repr(registry)
    with pytest.raises(InvalidInput):
        registry.grant(["invoices:write"])


@given(st.text())
def test_what_can_be_registered_can_be_sent(scope: str) -> None:
    """Whatever is accepted as a scope is one in RFC 6749 too, without blanks; the rest is named."""
    if SCOPE_TOKEN.fullmatch(scope):
        with contextlib.suppress(ConfigurationError):
            assert ScopeRegistry({scope: "…"}).grant([scope]) == {scope}
        return
    with pytest.raises(ConfigurationError) as caught:
        ScopeRegistry({scope: "…"})
    (fault,) = caught.value.faults
    assert repr(scope) in fault


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,30}(:[a-z0-9][a-z0-9._-]{0,30})?", fullmatch=True))
def test_the_scope_grammar(scope: str) -> None:
    """Lowercase letters, digits and . _ - make a scope, with at most one colon between."""
    assert ScopeRegistry({scope: "…"}).grant([scope]) == {scope}


def test_every_faulty_scope_is_reported() -> None:
    """All faulty names are told in one error."""
    with pytest.raises(ConfigurationError) as caught:
        ScopeRegistry({"Read": "", "a b": "", "fine": "", "a:b:c": ""})
    assert [fault.split()[1] for fault in caught.value.faults] == ["'Read'", "'a", "'a:b:c'"]


def test_what_came_in_place_of_a_scope_is_shown() -> None:
    """The message quotes the unknown scope, shortened if it is long."""
    with pytest.raises(InvalidInput, match=r"^Unknown scope 'sned'\. Known: send, "):
        ScopeRegistry().grant(["sned"])
    with pytest.raises(InvalidInput, match=r"^Unknown scope 'x{64}…'\. Known: send, "):
        ScopeRegistry().grant(["x" * 1000])
