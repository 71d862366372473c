"""The wheel: what users install holds all that the source tree does."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.servers import ROOT

PROGRAM = """
import asyncio, sys
from pathlib import Path

import tfm_guard
from tfm_guard import Guard
from tfm_guard.testing import CHEAP_HASHING

async def main():
    async with Guard.from_urls(database="sqlite:///keys.db", **CHEAP_HASHING) as guard:
        created = await guard.keys.create(account_id="acme", name="CI")
        print((await guard.verify(created.token)).account_id)

assert Path(tfm_guard.__file__).is_relative_to(sys.argv[1]), tfm_guard.__file__
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    """Build the wheel as pip does, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", str(ROOT)),
            *("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_whole_package(wheel: ZipFile) -> None:
    """Every file of the package is in it, migrations and py.typed too, the demo, the licence."""
    names = set(wheel.namelist())
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"tfm_guard/py.typed", "tfm_guard/store/migrations/env.py"} <= files <= names
    assert "tfm_guard/store/migrations/versions/0001_first_tables.py" in names
    demo = "tfm_guard/cli/mail_api.py"
    assert {name for name in names - files if ".dist-info/" not in name} == {demo}
    assert wheel.read(demo) == (ROOT / "examples/mail_api.py").read_bytes()
    (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_unpacked_wheel_works(wheel: ZipFile, tmp_path: Path) -> None:
    """A key can be created and verified with nothing of the source tree in reach."""
    wheel.extractall(tmp_path / "unpacked")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "unpacked")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "unpacked")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "acme\n", "")
