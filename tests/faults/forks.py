"""A server process that has imported torch and mpidp. For each task (a line of JSON) it forks a child that runs one command.

The child initializes MPI itself, as `python -m MODULE` would. The answer is a line of JSON with exit code and output.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NoReturn

import mpi4py

mpi4py.rc.initialize = False  # MPI cannot be used in a fork of a process that has initialized it, so each child initializes it
mpi4py.rc.finalize = True

import torch._dynamo  # noqa: E402, F401  (torch's optimizers import it when they are first used: a second each time)
from mpi4py import MPI  # noqa: E402

import data_tools.prepare  # noqa: E402, F401
import mpidp.checkpoint.saver  # noqa: E402
import mpidp.inference.loading  # noqa: E402, F401
import mpidp.training.build  # noqa: E402, F401

mpidp.checkpoint.saver.YOUNG_SECONDS = 60.0  # so that no checkpoint of a toy run is left out


def serve() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        began = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                become(task, out.fileno(), err.fileno())
            code = wait(child, began + task["seconds"])
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
        answer = {"code": code, "out": said[0], "err": said[1], "seconds": time.monotonic() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def become(task: dict[str, Any], out: int, err: int) -> NoReturn:
    """Run the command. At the end do what the interpreter does, except for destroying all of torch's objects."""
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(task["folder"])
    os.environ.update(task["environment"])
    MPI.Init()
    exec(task["inject"], {"__name__": "injected"})
    sys.argv = [task["module"], *task["words"]]
    code = 0
    try:
        runpy.run_module(task["module"], run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if not MPI.Is_finalized():
        MPI.Finalize()
    os._exit(code)


def wait(child: int, deadline: float) -> int | None:
    """Return the exit code, or None if the child had to be killed."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
