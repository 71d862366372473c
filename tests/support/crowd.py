"""Several processes that do the same thing at the same moment."""

import contextlib
import subprocess
import sys
from collections.abc import Sequence

from tests.support.servers import ROOT

# Put before each program: `wait_for_start()` returns in all processes at about the same time.
PREAMBLE = """
import asyncio, json, os, sys

def wait_for_start():
    print("ready", flush=True)
    sys.stdin.readline()

"""


def run_crowd(program: str, arguments: Sequence[Sequence[str]]) -> list[str]:
    """Run *program* once for each list of *arguments*, all at once, and return what each printed.

    Each must call `wait_for_start()` once, and end without an error.
    """
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "error", "-c", PREAMBLE + program, *own],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for own in arguments
        ]
        for process in crowd:
            # Should the test end early, none is left.
            stack.callback(process.kill)
        greetings = [process.stdout.readline() for process in crowd if process.stdout]
        for process in crowd:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60) for process in crowd]
    assert [
        (process.returncode, errors) for process, (_, errors) in zip(crowd, outputs, strict=True)
    ] == [(0, "")] * len(crowd)
    assert set(greetings) == {"ready\n"}
    return [printed for printed, _ in outputs]
