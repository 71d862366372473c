"""Become another program that ends when the process that started it ends.

Run as a script: ``launch.py PARENT_PID SIGNAL UID GID PROGRAM ARGUMENT...``. It is a program of its
own because ``preexec_fn`` is unsafe, and from Python 3.12 on a warning, in a process with threads.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the user, ask the kernel for the signal, then become the program."""
    parent, death_signal, uid, gid = (int(argument) for argument in sys.argv[1:5])
    program = sys.argv[5:]
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # Only now: a change of user clears the setting, running the program keeps it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have ended before the line above; nobody would tell us any more.
    if os.getppid() == parent:
        os.execv(program[0], program)


if __name__ == "__main__":
    main()
