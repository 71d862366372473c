"""Facts about settings."""

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.errors import ConfigurationError
from tfm_guard.settings import Settings, read_database_url

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
            "TFM_GUARD_REDIS_URL": "redis://cache/1",
            "TFM_GUARD_REDIS_POOL_SIZE": "8",
            "TFM_GUARD_LOCAL_CACHE_SIZE": "50",
            "TFM_GUARD_USAGE_FLUSH_SECONDS": "9",
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
        redis_url="redis://cache/1",
        redis_pool_size=8,
        local_cache_size=50,
        usage_flush_seconds=9,
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
    "TFM_GUARD_DATABASE_URL": "mysql://acme@localhost/keys",
    "TFM_GUARD_DATABASE_POOL_SIZE": "0",
    "TFM_GUARD_REDIS_URL": "",
    "TFM_GUARD_REDIS_POOL_SIZE": "0",
    "TFM_GUARD_LOCAL_CACHE_SIZE": "",
    "TFM_GUARD_USAGE_FLUSH_SECONDS": "61",
    "TFM_GUARD_REALM": 'a"b',
    "TFM_GUARD_SECRETS": "too-short",
    "TFM_GUARD_SCOPES": '{"no scope": ""}',
    "TFM_GUARD_PLANS": '{"pro": 1}',
    "TFM_GUARD_ACCEPT_UNTAGGED_TOKENS": "perhaps",
    "TFM_GUARD_ARGON2_TIME_COST": "x",
    "TFM_GUARD_ARGON2_MEMORY_KIB": "7",
    "TFM_GUARD_ARGON2_PARALLELISM": "17",
    "TFM_GUARD_COLOUR": "red",
}


@given(st.sets(st.sampled_from(sorted(FAULTY))), st.booleans())
def test_every_fault_is_reported_at_once(wrong: set[str], named: bool) -> None:  # noqa: FBT001
    """Whatever is wrong together, each fault is told once, with its variable's name."""
    environ = {name: FAULTY[name] for name in wrong}
    if named:
        environ.setdefault("TFM_GUARD_DATABASE_URL", URL)
    else:
        environ.pop("TFM_GUARD_DATABASE_URL", None)
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


def test_no_hash_is_made_that_could_not_be_verified() -> None:
    """Work beyond what is done for one hash is refused: each such key would be refused later."""
    most: dict[str, Any] = {"database_url": URL, "argon2_memory_kib": 131_072}
    assert Settings.load({}, **most, argon2_time_cost=4).argon2_time_cost == 4
    (fault,) = faults(**most, argon2_time_cost=5)
    assert fault.startswith("TFM_GUARD_ARGON2_TIME_COST: 5 passes over 131072 KiB are more work")


def test_a_misspelt_setting_is_refused() -> None:
    """An argument that is no setting is an error that lists those there are."""
    (fault,) = faults(database_url=URL, plan={"free": 1})
    assert fault.startswith("'plan' is no setting; there are: database_url, ")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("DATABASE_POOL_SIZE", "abc", "expected a whole number from 1 to 200, got 'abc'"),
        ("DATABASE_POOL_SIZE", "", "expected a whole number from 1 to 200, got ''"),
        ("DATABASE_POOL_SIZE", "201", "expected a whole number from 1 to 200, got '201'"),
        ("ACCEPT_UNTAGGED_TOKENS", "yes please", "expected true or false, got 'yes please'"),
        (
            "PLANS",
            '{"free": 1, "pro": -1}',
            "the plan 'pro': expected a whole number from 0, got -1",
        ),
        ("PLANS", '{"free": "x"}', "the plan 'free': expected a whole number from 0, got 'x'"),
        (
            "PLANS",
            "free=2",
            'expected a JSON object of plan and limit, like {"free": 2, "pro": 15}',
        ),
        ("SCOPES", '{"a": 1}', "the scope 'a': expected its description, got 1"),
        ("REALM", "", "it is empty; give it a name, or unset it"),
        ("SECRETS", "", "it is set, and empty; name at least one secret, or unset it"),
        ("SECRETS", " , ", "it is set, and empty; name at least one secret, or unset it"),
        ("REDIS_URL", "cache:6379", "expected redis://HOST:PORT/0 or rediss://HOST:PORT/0"),
    ],
)
def test_faults_are_told_in_words(name: str, text: str, words: str) -> None:
    """A message says what was expected, and what came unless it could be secret."""
    variables = {"TFM_GUARD_DATABASE_URL": URL, f"TFM_GUARD_{name}": text}
    assert faults(variables) == (f"TFM_GUARD_{name}: {words}",)


def test_an_unknown_variable_is_a_fault() -> None:
    """A misspelt variable is told, with those there are; the tests' own are left alone."""
    environ = {"TFM_GUARD_TEST_REDIS": "path", "TFM_GUARD_REDIS": "redis://cache"}
    (fault,) = faults(environ, database_url=URL)
    assert fault.startswith("TFM_GUARD_REDIS: there is no such setting; there are: ")
    assert "TFM_GUARD_REDIS_URL" in fault
    assert "redis://cache" not in fault


# With something that stands in no message, which could otherwise hold the rest by chance.
SECRETIVE = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=12).map(
    "~{}".format
)
BROKEN = st.tuples(SECRETIVE, SECRETIVE).map("@".join)


@given(SECRETIVE, st.text("0123456789abcdef", min_size=32, max_size=64))
def test_no_secret_is_shown(password: str, secret: str) -> None:
    """Neither the repr nor a message about other faults holds the password or a secret."""
    url = f"postgresql://guard:{quote(password, safe='')}@db/keys"
    settings = Settings.load({}, database_url=url, secrets=(secret,))
    shown = repr(settings)
    environ = {"TFM_GUARD_DATABASE_URL": f"{url}@", "TFM_GUARD_SECRETS": f"{secret} {password[:8]}"}
    environ["TFM_GUARD_REDIS_URL"] = f"redis://:{password}@@cache"
    shown += "".join(faults({**environ, "TFM_GUARD_REALM": ""}))
    assert "postgresql" in shown
    assert password not in shown
    assert secret not in shown


@given(BROKEN)
def test_no_part_of_a_password_that_was_not_escaped_is_shown(password: str) -> None:
    """A URL that an @ in its password breaks apart is refused without a piece of either."""
    with pytest.raises(ConfigurationError) as caught:
        read_database_url(f"postgresql://guard:{password}@127.0.0.1/keys")
    message = str(caught.value)
    assert "%40" in message
    assert not any(piece in message for piece in re.split("[@:/?#]", password) if len(piece) > 5)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "it is no URL"),
        ("keys.db", "it is no URL"),
        ("://", "no other kind of database"),
        ("sqlite://keys.db", "three slashes"),
        ("sqlite:///keys.db?mode=ro", "no options after ?"),
        ("sqlite:///", "a database in memory"),
        ("postgres://a:b@h/d", "write postgresql:// in place of postgres://"),
        ("postgresql+asyncpg://a:b@h/d", "the driver is chosen here"),
        ("sqlite+aiosqlite:///keys.db", "the driver is chosen here"),
        ("postgresql://a:b@c@h/d", "%40"),
        ("postgresql://a:b@h:0/d", "the port is a number from 1 to 65535"),
        ("postgresql://a:b@h:99999/d", "the port is a number from 1 to 65535"),
        ("postgresql://a:b@h:port/d", "it cannot be read"),
    ],
)
def test_a_database_url_that_cannot_work(url: str, words: str) -> None:
    """Each mistake in the URL is told by what to write, under the variable's name."""
    (fault,) = faults(database_url=url)
    assert fault.startswith("TFM_GUARD_DATABASE_URL: ")
    assert words in fault


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://guard:p%40ss%2Fw%3Ao%23rd@db.example.com:5432/keys?sslmode=require",
        "postgresql://guard@[::1]/keys",
        "postgresql://guard@one,two/keys",
        "postgresql:///keys?host=/run/postgresql",
        "sqlite:////var/lib/keys.db",
        "sqlite:///a%3Fb.db",
    ],
)
def test_a_database_url_that_works(url: str) -> None:
    """Escaped passwords, addresses, several hosts, sockets and paths are taken."""
    assert Settings.load({}, database_url=url).database_url == url


@pytest.mark.parametrize("url", ["", "hunter2-is-no-url", "://", "sqlite:///[x", "http://[::1"])
def test_any_url_has_a_repr(url: str) -> None:
    """Settings whose URL is none can still be shown, without it."""
    assert "hunter2" not in repr(Settings(database_url=url))


def test_settings_cannot_change() -> None:
    """Settings stay what they were when they were checked."""
    settings = Settings.load({}, database_url=URL)
    with pytest.raises(AttributeError):
        settings.realm = "another"  # type: ignore[misc]
