"""Facts about a guard in a child process, and in several event loops, in turn or at once."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.http.support import bearer, call, http_scope
from tests.support.guards import create, new_guard, prepare
from tests.support.servers import ROOT
from tfm_guard import APIKeyMiddleware
from tfm_guard.errors import GuardError

# A connection that was left to another process, or to a loop that has ended, is never closed here.
PROGRAM = str(Path(sys.executable).with_name("tfm-guard"))
WARNINGS = ("error", "ignore::ResourceWarning", "ignore:This process:DeprecationWarning")

FORKING = """
import asyncio, json, os, sys, traceback
from sqlalchemy import select
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.store import schema
from tfm_guard.testing import CHEAP_HASHING

def register():
    return {row.name.rpartition(":")[2] for row in execute(sys.argv[1], select(schema.workers))}

async def in_child(guard, token):
    found = await asyncio.gather(*(guard.verify(token) for _ in range(5)))
    created = await guard.keys.create(account_id="child", name="CI")
    pids = register()
    await guard.verify(created.token)
    await guard.close()
    return {
        "keys": sorted({key.name for key in found}),
        "registered": pids == {str(os.getpid()), str(os.getppid())},
        "left": register() == {str(os.getppid())},
    }

def fork(guard, token):
    pid = os.fork()
    if pid == 0:
        try:
            print(json.dumps(asyncio.run(in_child(guard, token))), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

async def main(url):
    guard = Guard.from_urls(database=url, **CHEAP_HASHING)
    async with guard:
        created = await guard.keys.create(account_id="acme", name="CI")
        await guard.verify(created.token)
        child = fork(guard, created.token)
        # Both use their connections at the same time.
        for _ in range(50):
            await guard.keys.list("acme")
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        later = await guard.keys.create(account_id="acme", name="later")
        done = await guard.keys.revoke("acme", created.key.id)
        print(json.dumps({
            "status": status,
            "later": (await guard.verify(later.token)).name,
            "listed": [key.name for key in await guard.keys.list("acme")],
            "how": done.how,
            "workers": done.workers,
        }))

asyncio.run(main(sys.argv[1]))
"""

IN_TURN = """
import asyncio, json, sys
from tfm_guard import Guard
from tfm_guard.testing import CHEAP_HASHING

guard = Guard.from_urls(database=sys.argv[1], **CHEAP_HASHING)

async def make():
    async with guard:
        return await guard.keys.create(account_id="acme", name="CI")

async def verify():
    return (await guard.verify(token)).name

async def list_names():
    async with guard:
        return [key.name for key in await guard.keys.list("acme")]

token = asyncio.run(make()).token
names = [asyncio.run(list_names())]
asyncio.run(guard.open())  # and never closed in that loop
names += [asyncio.run(verify()) for _ in range(3)], asyncio.run(list_names())
print(json.dumps(names))
"""


async def run(script: str, url: str, *, quiet: bool = True) -> list[Any]:
    """Run *script* in a process of its own and return the lines that it printed, read as JSON.

    Unless it is not *quiet*, it must say nothing else.
    """
    command = [sys.executable]
    for warning in WARNINGS:
        command += ["-W", warning]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, "-c", script, url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not quiet or done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_a_forked_child_is_a_process_of_its_own(database_url: str) -> None:
    """A child verifies, stands in the register by itself, and leaves its parent's connections."""
    child, parent = await run(FORKING, database_url)
    assert child == {"keys": ["CI"], "registered": True, "left": True}
    assert parent == {
        "status": 0,
        "later": "later",
        "listed": ["later"],
        "how": "acknowledged",
        "workers": 1,
    }


async def test_one_event_loop_after_the_other(database_url: str) -> None:
    """A guard works in each loop in turn, also where it was not closed in the last."""
    # The drivers complain of work that a loop's end has cut off.
    printed = await run(IN_TURN, database_url, quiet=False)
    assert printed == [[["CI"], ["CI", "CI", "CI"], ["CI"]]]


async def test_two_event_loops_at_once(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A second loop is told to have its own guard, its requests get 503, and the first goes on."""
    await prepare(database_url, lease=0)  # so that memory answers nobody
    caplog.set_level(logging.ERROR)
    async with new_guard(database_url) as guard:
        created = await create(guard)

        async def app(scope: Any, _receive: Any, _send: Any) -> None:
            raise AssertionError(scope)

        guarded = APIKeyMiddleware(app, guard=guard)
        scope = http_scope(headers=bearer(created.token))
        answer = await asyncio.to_thread(lambda: asyncio.run(call(guarded, scope)))
        assert (answer.status, answer.code) == (503, "unavailable")
        (record,) = caplog.records
        assert "A guard serves one event loop; make one guard for each" in record.getMessage()
        with pytest.raises(GuardError, match="one event loop"):
            await asyncio.to_thread(lambda: asyncio.run(guard.open()))
        assert (await guard.verify(created.token)).key_id == created.key.id


def names_in_another_process(url: str) -> list[str]:
    """Return the names of acme's keys as a command sees them, which opens the database and ends."""
    command = [PROGRAM, "keys", "list", "--account", "acme", "--json"]
    env = {**os.environ, "TFM_GUARD_DATABASE_URL": url}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return sorted(key["name"] for key in json.loads(done.stdout))


async def test_two_guards_on_one_file_and_another_process(sqlite_url: str) -> None:
    """Opening a second guard takes no lock from the first: who leaves removes no journal in use."""
    async with new_guard(sqlite_url) as guard:
        await create(guard, name="first")
        async with new_guard(sqlite_url) as other:
            await create(other, name="second")
            assert await asyncio.to_thread(names_in_another_process, sqlite_url) == [
                "first",
                "second",
            ]
            await create(guard, name="third")
            assert await asyncio.to_thread(names_in_another_process, sqlite_url) == [
                "first",
                "second",
                "third",
            ]
