"""The package stands on floors: each module imports only what lies below it."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import tfm_guard
import tfm_guard.errors

PACKAGE = Path(tfm_guard.errors.__file__).parent
TOP = 6

# Each module or package right under tfm_guard. `testing` is for others' tests: nothing imports it.
FLOORS = {
    "errors": 0,
    "token": 0,
    "scopes": 0,
    "bearer": 0,
    "records": 0,
    "text": 0,
    "counters": 0,
    "coalescer": 0,
    "deadlines": 0,
    "unusual": 0,
    "settings": 1,
    "clock": 1,
    "outages": 2,
    "hashing": 2,
    "store": 2,
    "local_cache": 2,
    "redis_access": 2,
    "shared_cache": 2,
    "freshness": 3,
    "reader": 3,
    "verifier": 3,
    "link": 3,
    "confirmation": 3,
    "live": 3,
    "usage": 3,
    "keys": 3,
    "accounts": 3,
    "audit": 3,
    "signs": 3,
    "imports": 3,
    "guard": 4,
    "http": 5,
    "cli": 5,
    "__init__": TOP,
    "__main__": TOP,
    "testing": TOP + 1,
}
PACKAGES = {"store", "http", "cli"}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the parts of tfm_guard that are imported when the code of *node* is loaded.

    What a function imports when it is called may come from above: `Guard.management_app` makes an
    app of the HTTP floor, which stands on the guard. Nothing of it is needed to load the guard.
    Neither is what only a type checker reads.
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.ImportFrom(level=level) if level:
                yield "a relative import"
            case ast.ImportFrom(module="tfm_guard", names=names):
                # The version is a constant; all other names bring the whole package with them.
                wanted = {name.name for name in names} - {"__version__"}
                yield from (name if name in FLOORS else "__init__" for name in sorted(wanted))
            case ast.ImportFrom(module=str(module)):
                yield from part_of(module)
            case ast.Import(names=names):
                for name in names:
                    yield from part_of(name.name)
        yield from imported(child)


def part_of(module: str) -> Iterator[str]:
    """Yield which part of tfm_guard *module* belongs to, if any."""
    package, _, rest = module.partition(".")
    if package == "tfm_guard":
        yield rest.partition(".")[0] or "__init__"


def violations(sources: Mapping[str, str]) -> list[str]:
    """Return every import in *sources* (path below the package to code) that does not go down.

    On one floor, modules right under tfm_guard may import each other, and so may a package's own.
    """
    found = []
    for path, code in sources.items():
        part = path.partition("/")[0].removesuffix(".py")
        for target in imported(ast.parse(code)):
            beside = FLOORS.get(target) == FLOORS.get(part) and not {part, target} & PACKAGES
            within = part == target and part in PACKAGES
            below = part in FLOORS and FLOORS.get(target, TOP) < FLOORS[part]
            if not (beside or within or below):
                found.append(f"{path} imports {target}")
    return found


def sources_of_the_package() -> dict[str, str]:
    """Return the code of every module, by its path."""
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")
    }


def test_every_module_imports_only_from_below() -> None:
    """No module is loaded with one of a higher floor, or with a package beside it."""
    sources = sources_of_the_package()
    assert len(sources) > 20
    assert violations(sources) == []


def test_every_module_has_its_floor() -> None:
    """Whatever lies in the package stands on one of the floors above, and each floor exists."""
    parts = {path.partition("/")[0].removesuffix(".py") for path in sources_of_the_package()}
    assert parts - set(FLOORS) == set()
    assert set(FLOORS) - parts <= {"__main__"}
    assert {part for part in FLOORS if (PACKAGE / part).is_dir()} == PACKAGES


def test_nothing_imports_testing() -> None:
    """What is made for tests is nowhere used, not even inside a function."""
    assert not [
        path for path, code in sources_of_the_package().items() if "tfm_guard.testing" in code
    ]
    assert not [
        path
        for path, code in sources_of_the_package().items()
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom)
        and node.module == "tfm_guard"
        and "testing" in [name.name for name in node.names]
    ]


@pytest.mark.parametrize(
    ("path", "code", "target"),
    [
        ("errors.py", "import tfm_guard.settings", "settings"),
        ("errors.py", "from tfm_guard.settings import Settings", "settings"),
        ("errors.py", "from tfm_guard import guard", "guard"),
        ("errors.py", "from tfm_guard import Guard", "__init__"),
        ("errors.py", "import tfm_guard", "__init__"),
        ("errors.py", "from . import guard", "a relative import"),
        ("verifier.py", "class A:\n    if 1:\n        import tfm_guard.http.requires", "http"),
        ("store/schema.py", "from tfm_guard.hashing import Hashing", "hashing"),
        ("hashing.py", "from tfm_guard.store import Store", "store"),
        ("cli/keys.py", "from tfm_guard.http.middleware import APIKeyMiddleware", "http"),
        ("guard.py", "from tfm_guard.nowhere import x", "nowhere"),
        ("nowhere.py", "from tfm_guard.errors import GuardError", "errors"),
        ("guard.py", "from tfm_guard.testing import ManualClock", "testing"),
    ],
)
def test_the_checker_sees_a_violation(path: str, code: str, target: str) -> None:
    """An import from above is found however it is written."""
    assert violations({path: code}) == [f"{path} imports {target}"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("keys.py", "from tfm_guard.accounts import AccountManager"),
        ("keys.py", "from tfm_guard.store.transaction import Transaction"),
        ("store/upgrade.py", "from tfm_guard.store.database import Database"),
        ("guard.py", "def app():\n    from tfm_guard.http.management import ManagementApp"),
        ("cli/keys.py", "if TYPE_CHECKING:\n    from tfm_guard import Guard"),
        ("errors.py", "import tfm_guards, os.path"),
        ("cli/__init__.py", "from tfm_guard import __version__"),
    ],
)
def test_the_checker_lets_the_rest_pass(path: str, code: str) -> None:
    """Imports from below, from beside and within a package are fine; so is one when called."""
    assert violations({path: code}) == []
