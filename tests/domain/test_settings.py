"""Facts about settings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.errors import ConfigurationError
from tfm_guard.settings import Settings

SECRET = "0123456789abcdef0123456789abcdef"
URL = "sqlite:///keys.db"


def faults(environ: dict[str, str] | None = None, **arguments: Any) -> tuple[str, ...]:
    """Return everything that is wrong with these settings."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(environ or {}, **arguments)
    return caught.value.faults


def test_the_defaults() -> None:
    """Only the database has to be named; the rest is the documented plans and OWASP's argon2id."""
    settings = Settings.load({}, database_url=URL)
    assert settings.plans == {"free": 2, "starter": 5, "pro": 15, "business": 50}
    assert settings.secrets == ()
    assert settings.realm == "api"
    assert not settings.accept_untagged_tokens
    assert settings.argon2_memory_kib == 19 * 1024
    assert (settings.argon2_time_cost, settings.argon2_parallelism) == (2, 1)


def test_every_setting_has_a_variable() -> None:
    """Each setting is read from TFM_GUARD_ and its name, lists and mappings in a plain notation."""
    settings = Settings.load(
        {
            "TFM_GUARD_DATABASE_URL": URL,
            "TFM_GUARD_DATABASE_POOL_SIZE": "7",
            "TFM_GUARD_REALM": "mail api",
            "TFM_GUARD_SECRETS": f"{SECRET}, {SECRET[::-1]}",
            "TFM_GUARD_SCOPES": '{"invoices:read": "Read invoices"}',
            "TFM_GUARD_PLANS": '{"free": 1}',
            "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS": "true",
            "TFM_GUARD_ARGON2_TIME_COST": "1",
            "TFM_GUARD_ARGON2_MEMORY_KIB": "64",
            "TFM_GUARD_ARGON2_PARALLELISM": "4",
        }
    )
    assert settings == Settings(
        database_url=URL,
        database_pool_size=7,
        realm="mail api",
        secrets=(SECRET, SECRET[::-1]),
        scopes={"invoices:read": "Read invoices"},
        plans={"free": 1},
        accept_untagged_tokens=True,
        argon2_time_cost=1,
        argon2_memory_kib=64,
        argon2_parallelism=4,
    )


def test_an_argument_wins_over_its_variable() -> None:
    """A variable counts only where the program says nothing."""
    environ = {"TFM_GUARD_DATABASE_URL": "postgresql://elsewhere/db", "TFM_GUARD_REALM": "given"}
    settings = Settings.load(environ, database_url=URL)
    assert (settings.database_url, settings.realm) == (URL, "given")


def test_a_faulty_variable_that_is_overridden_is_not_read() -> None:
    """What is not used is not complained about."""
    environ = {"TFM_GUARD_ARGON2_TIME_COST": "many"}
    assert Settings.load(environ, database_url=URL, argon2_time_cost=3).argon2_time_cost == 3


# Each setting with a value that it cannot have.
FAULTY = {
    "TFM_GUARD_DATABASE_POOL_SIZE": "0",
    "TFM_GUARD_REALM": 'a"b',
    "TFM_GUARD_SECRETS": "too-short",
    "TFM_GUARD_SCOPES": "[]",
    "TFM_GUARD_PLANS": '{"pro": 1}',
    "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS": "perhaps",
    "TFM_GUARD_ARGON2_TIME_COST": "x",
    "TFM_GUARD_ARGON2_MEMORY_KIB": "7",
    "TFM_GUARD_ARGON2_PARALLELISM": "17",
}


@given(st.sets(st.sampled_from(sorted(FAULTY))), st.booleans())
def test_every_fault_is_reported_at_once(wrong: set[str], named: bool) -> None:  # noqa: FBT001
    """Whatever is wrong together, each fault is told once, with its variable's name."""
    environ = {name: FAULTY[name] for name in wrong}
    if named:
        environ["TFM_GUARD_DATABASE_URL"] = URL
    else:
        wrong = wrong | {"TFM_GUARD_DATABASE_URL"}
    if not wrong:
        Settings.load(environ)
        return
    assert sorted(fault.split()[0].rstrip(":") for fault in faults(environ)) == sorted(wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", 7),
        ("database_pool_size", 201),
        ("database_pool_size", "7"),
        ("realm", ""),
        ("realm", "a\\b"),
        ("realm", "é"),
        ("realm", "a\nb"),
        ("secrets", ["x" * 31]),
        ("secrets", [SECRET, ""]),
        ("plans", {"free": -1}),
        ("plans", {}),
        ("argon2_parallelism", 0),
        ("argon2_time_cost", 11),
        ("argon2_memory_kib", 1_048_577),
    ],
)
def test_faulty_arguments_are_named_by_their_variable(name: str, value: object) -> None:
    """A setting given in the program is checked like a variable, and reported by its name."""
    arguments: dict[str, Any] = {"database_url": URL, name: value}
    (fault,) = faults(**arguments)
    assert fault.startswith(f"TFM_GUARD_{name.upper()}: ")


def test_lanes_need_their_memory() -> None:
    """argon2 wants 8 KiB for each lane; too little is refused before any hash is made."""
    (fault,) = faults(database_url=URL, argon2_memory_kib=31, argon2_parallelism=4)
    assert fault == "TFM_GUARD_ARGON2_MEMORY_KIB: 4 lanes need at least 32 KiB"


def test_a_misspelt_setting_is_refused() -> None:
    """An argument that is no setting is an error that lists those there are."""
    (fault,) = faults(database_url=URL, plan={"free": 1})
    assert fault.startswith("'plan' is no setting; there are: database_url, ")


SECRETIVE = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=12)


@given(SECRETIVE, st.text("0123456789abcdef", min_size=32, max_size=64))
def test_no_secret_is_shown(password: str, secret: str) -> None:
    """Neither the repr nor a message about other faults holds the password or a secret."""
    url = f"postgresql://guard:{password}@[db/keys"
    shown = repr(Settings.load({}, database_url=url, secrets=(secret,)))
    environ = {"TFM_GUARD_DATABASE_URL": url, "TFM_GUARD_SECRETS": f"{secret} {password[:8]}"}
    shown += "".join(faults({**environ, "TFM_GUARD_REALM": ""}))
    assert "postgresql" in shown
    assert password not in shown
    assert secret not in shown


@pytest.mark.parametrize("url", ["", "hunter2-is-no-url", "://", "sqlite:///[x", "http://[::1"])
def test_any_url_has_a_repr(url: str) -> None:
    """Settings whose URL is none can still be shown, without it."""
    assert "hunter2" not in repr(Settings.load({}, database_url=url))


def test_settings_cannot_change() -> None:
    """Settings stay what they were when they were checked."""
    settings = Settings.load({}, database_url=URL)
    with pytest.raises(AttributeError):
        settings.realm = "another"  # type: ignore[misc]
