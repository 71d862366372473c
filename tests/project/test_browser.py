"""Facts about the browser that other tests stand on: found, or installed, or named."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.browser import find_chromium
from tests.support.servers import ServerFailed

# Says what it was asked for, and makes what it installs.
APT_GET = """\
#!/bin/sh
for last; do :; done
echo "$last" >> "{folder}/asked"
[ "$last" = chromium ] || exit 0
printf '#!/bin/sh\\n' > "{folder}/chromium"
chmod +x "{folder}/chromium"
"""
BROKEN = """\
#!/bin/sh
echo "E: Unable to locate package $6"
exit 100
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have root on a machine with nothing but what is in an empty folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def put(folder: Path, name: str, program: str) -> None:
    """Put a program into *folder*; it finds the usual ones."""
    path = folder / name
    path.write_text(program.replace("\n", "\nPATH=/usr/bin:/bin\n", 1).format(folder=folder))
    path.chmod(0o755)


def test_root_installs_a_browser_once(folder: Path) -> None:
    """Of several that look for it at the same time, one installs it, and all find it."""
    put(folder, "apt-get", APT_GET)
    with ThreadPoolExecutor(4) as executor:
        found = set(executor.map(lambda _: find_chromium(), range(4)))
    assert found == {str(folder / "chromium")}
    assert (folder / "asked").read_text().split() == ["update", "chromium"]


@pytest.mark.parametrize("name", ["chromium-browser", "google-chrome"])
def test_a_browser_that_is_there_is_taken(folder: Path, name: str) -> None:
    """Under each of its names it is found, and nothing is installed."""
    put(folder, "apt-get", APT_GET)
    put(folder, name, "#!/bin/sh\n")
    assert find_chromium() == str(folder / name)
    assert not (folder / "asked").exists()


def test_what_to_install_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be installed, the failure names the command, and what that said."""
    command = "apt-get install --no-install-recommends chromium"
    with pytest.raises(ServerFailed, match=command):
        find_chromium()
    put(folder, "apt-get", BROKEN)
    with pytest.raises(ServerFailed, match=f"(?s){command}.*Unable to locate package"):
        find_chromium()
    put(folder, "apt-get", APT_GET)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ServerFailed, match=command):
        find_chromium()
    assert not (folder / "asked").exists()
