"""A day of an operator, at the command line and over HTTP: every command and call, in use.

    TFM_GUARD_DATABASE_URL=postgresql://user:password@host/name python examples/operators_day.py

Without the variable the day takes place in an SQLite file, which is gone in the evening. In any
other database it needs the accounts "harbour" and "quarry" to be free, and erases them at the end.
"""

import contextlib
import hashlib
import http.client
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

PROGRAM: Final = Path(sys.executable).with_name("tfm-guard")
MOST_SHOWN: Final = 600  # characters of an answer


def main() -> None:
    """Live through the day."""
    with database():
        morning()
        with served() as address:
            noon(address)
            afternoon(address)
        evening()


def morning() -> None:
    """Look after the installation, and take over customers with the keys they have."""
    say("Morning. The tables are made, and looked at.")
    run("db upgrade")
    run("db check")
    run("db times")
    run("doctor")

    say("Quarry comes from elsewhere, with keys whose hashes are known. One line has a mistake.")
    old = f"tfm_k_{secrets.token_hex(16)}"
    known = hashlib.sha256(old.encode()).hexdigest()
    rows = [
        {"prefix": old[6:14], "hash": known, "name": "Old shop"},
        {"prefix": "nonsense", "hash": known, "name": "Newsletter"},
    ]
    lines = [json.dumps({**row, "account": "quarry", "scopes": ["send"]}) for row in rows]
    run("keys import --dry-run -", stdin="\n".join(lines), ends_with=1)
    run("keys import -", stdin=lines[0])
    os.environ["TFM_GUARD_ACCEPT_UNTAGGED_TOKENS"] = "true"  # or such old keys are not accepted
    run("keys verify", stdin=old)
    run("accounts set-plan quarry starter")


def noon(address: str) -> None:
    """Give a customer keys; let their programs manage the rest over HTTP."""
    say("Harbour signs up, and gets a key that manages the others.")
    manager = run(
        "keys create --account harbour --name Manager --scope send --scope emails:read "
        "--scope api-keys:read --scope api-keys:write --scope audit:read"
    ).strip()
    run("accounts set-plan harbour pro")

    say("Their programmer reads what there is to call.")
    call(address, "GET", "/v1/openapi.json", manager)

    say("Their program makes a key for its shop, and looks at what there is.")
    shop = call(address, "POST", "/v1/api-keys/", manager, {
        "name": "Shop", "permissions": ["send", "emails:read"],
    })  # fmt: skip
    call(address, "GET", "/v1/api-keys/", manager)

    say("The shop only sends: the key loses what it does not need, and gets a better name.")
    path = f"/v1/api-keys/{shop['id']}"
    call(address, "PATCH", path, manager, {"name": "Shop, checkout", "permissions": ["send"]})

    say("The key is a year old, so another takes its place. The old one works for an hour more.")
    rotated = call(address, "POST", f"{path}/rotate", manager, {"grace_seconds": 3600})
    call(address, "GET", f"/v1/api-keys/{shop['id']}/usage?range=24h", manager)
    say("The shop has changed to the new one already.")
    call(address, "DELETE", path, manager)

    say("A key that somebody finds on their screen ends itself.")
    call(address, "POST", "/v1/api-keys/self/revoke", rotated["key"])
    call(address, "GET", "/v1/audit-log?range=24h&limit=3", manager)


def afternoon(address: str) -> None:
    """Deal with what goes wrong."""
    say("A key for the batch job, for a week; its prefix is how it is named from now on.")
    batch = run("keys create --account harbour --name Batch --expires-in 7d").strip()
    prefix = batch[6:14]
    run(f"keys show {prefix} --account harbour")
    run(f"keys rotate {prefix} --account harbour --grace 2h")
    run("keys list --account harbour")
    run(f"keys revoke {prefix} --account harbour")
    run("keys verify", stdin=batch, ends_with=1)

    say("Somebody has published two tokens. One of them is none of ours.")
    leaked = run("keys create --account harbour --name Laptop").strip()
    made_up = f"tfm_k_{secrets.token_hex(24)}"
    run("keys revoke --leaked", stdin=f"{leaked}\n{made_up}\n", ends_with=1)

    say("Harbour sends what it should not. All its keys are refused, until that is cleared up.")
    watcher = run("keys create --account harbour --name Watcher --scope api-keys:read").strip()
    run("accounts suspend harbour")
    call(address, "GET", "/v1/api-keys/", watcher, answers=401)
    run("accounts resume harbour")
    call(address, "GET", "/v1/api-keys/", watcher)

    say("Does revoking keep its word? One key is made, asked for, deleted, and asked for again.")
    manager = run("keys create --account quarry --name Prover --scope api-keys:write").strip()
    run(f"prove {address} --connections 4 --seconds 1", stdin=manager)


def evening() -> None:
    """Tidy up."""
    say("Evening. What is needed no more is removed; both customers move away.")
    run("db prune")
    run("accounts list")
    run("accounts erase harbour --yes")
    run("accounts erase quarry --yes")
    run("db check")
    say("Good night.")


def say(text: str) -> None:
    """Print what happens next."""
    print(f"\n# {text}", flush=True)


def run(arguments: str, *, stdin: str = "", ends_with: int = 0) -> str:
    """Run `tfm-guard` with these *arguments* and return what it printed on stdout."""
    print(f"\n$ tfm-guard {arguments}", flush=True)
    done = started(arguments.split(), stdin)
    # A token is shown by its prefix alone: this may be logged.
    print(hidden(done.stdout), end="", flush=True)
    if done.returncode != ends_with:
        raise SystemExit(f"tfm-guard {arguments} ended with {done.returncode}, not {ends_with}")
    return done.stdout


def started(arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
    """Start the program and wait for its end."""
    command: list[str | Path] = [PROGRAM, *arguments]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603  # its own program


def call(
    address: str,
    method: str,
    path: str,
    token: str,
    body: dict[str, Any] | None = None,
    *,
    answers: int | None = None,
) -> Any:
    """Send a request with *token* and return the JSON that came; *answers* is its status."""
    print(f"\n> {method} {path} {json.dumps(body) if body else ''}", flush=True)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        text = answer.read().decode()
    shown = hidden(text)
    print(f"< {answer.status} {shown[:MOST_SHOWN]}{'…' * (len(shown) > MOST_SHOWN)}", flush=True)
    is_success = HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES
    good = is_success if answers is None else answer.status == answers
    if not good:
        raise SystemExit(f"{method} {path} was answered with {answer.status}")
    return json.loads(text) if text else None


def hidden(text: str) -> str:
    """Return *text* with all tokens cut to their prefixes."""
    head, *parts = text.split("tfm_k_")
    shown = [part[:8] + "…" + part[8:].lstrip("0123456789abcdef") for part in parts]
    return "tfm_k_".join([head, *shown])


@contextlib.contextmanager
def database() -> Iterator[None]:
    """Use the database that the environment names, else one of our own."""
    if "TFM_GUARD_DATABASE_URL" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TFM_GUARD_DATABASE_URL"] = f"sqlite:///{folder}/keys.db"
        yield


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Serve the management API meanwhile, and return its address."""
    print("\n$ tfm-guard serve --port 0 &", flush=True)
    command: list[str | Path] = [PROGRAM, "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:  # noqa: S603  # its own program
        assert server.stderr is not None  # noqa: S101  # it is a pipe
        try:
            yield next(word for line in server.stderr for word in line.split() if "http://" in word)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
