"""The public names: what users' programs rely on."""

import pytest

import tfm_guard

NAMES = ["APIKeyMiddleware", "Guard", "Person", "VerifiedKey", "requires"]


def test_the_public_names_are_these() -> None:
    """The package offers five names, no more, and each is there."""
    assert sorted(tfm_guard.__all__) == NAMES
    for name in NAMES:
        assert getattr(tfm_guard, name).__name__ == name
        assert name in dir(tfm_guard)


def test_a_name_that_is_none_is_an_error() -> None:
    """A misspelt name raises, as in any module, and says where it was looked for."""
    with pytest.raises(AttributeError, match="'tfm_guard' has no attribute 'guards'"):
        _ = tfm_guard.guards  # type: ignore[attr-defined]


def test_a_guard_offers_what_is_built() -> None:
    """The guard's public names are those of this release; nothing is announced and missing."""
    offered = {name for name in vars(tfm_guard.Guard) if not name.startswith("_")}
    assert offered == {
        "from_urls",
        "from_environment",
        "keys",
        "accounts",
        "audit",
        "signs",
        "imports",
        "verify",
        "explain",
        "ready",
        "holds",
        "watch",
        "open",
        "close",
        "lifespan",
        "upgrade_schema",
        "management_app",
        "console",
    }
