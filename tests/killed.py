"""
Runs a module or script, and kills it in the middle of a file, as a SIGKILL from outside may do at its moment.

    python tests/killed.py NUMBER MODULE_OR_FILE ARGUMENTS

The `NUMBER`-th file that is synced to the disk is cut to its half, and nothing else is done any more.
"""

import os
import runpy
import signal
import sys


def kill_in_file(number: int) -> None:
    """Replaces `os.fsync`."""
    fsync, calls = os.fsync, []

    def cut_and_kill(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = cut_and_kill


if __name__ == "__main__":
    kill_in_file(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
