"""What every command shares: errors become one message and one exit code, and a rank that fails ends the job."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from mpidp.errors import MpidpError, UsageError
from mpidp.runtime.environment import launched_size, launched_with_ulfm, launcher_rank

if TYPE_CHECKING:
    from mpi4py import MPI


PAUSE_SECONDS = 0.3  # for mpirun to pass on the last words before it is told to end
LEAVE_SECONDS = 5.0  # that a rank waits for the others at the end of a job that may have lost some
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, and which speaks once under mpirun. Independent."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line."""
        raise UsageError(f"{message} ({self.prog} --help says more)")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """On the launcher's rank 0 alone."""
        if launcher_rank() == 0:
            super().print_help(file)


def begin(read_command_line: Callable[[], T]) -> tuple[T, MPI.Intracomm]:
    """What the command line says, then MPI's world. A wrong word is found before MPI starts; under a launcher MPI then serves
    to say it once, and to end ranks that read another line. Collective over COMM_WORLD."""
    said: T | None = None
    wrong: UsageError | None = None
    try:
        said = read_command_line()
    except UsageError as error:
        if launched_size() < 2:
            raise
        wrong = error
    from mpidp.runtime.world import raise_together, start_mpi

    world = start_mpi()
    with raise_together(world):
        if wrong is not None:
            raise wrong
    return cast(T, said), world


_left: Any = None  # the world of those who are left when others have died


def go_on_in(world: MPI.Intracomm) -> None:
    """Ranks have died: this is the world from here on. Independent."""
    global _left
    _left = world


def _started_world() -> Any:
    """The world when MPI runs in this process, else None; never starts MPI."""
    module = sys.modules.get("mpi4py.MPI")
    return (_left or module.COMM_WORLD) if module and module.Is_initialized() and not module.Is_finalized() else None


def _end(code: int, everywhere: bool, others_go_on: bool = False) -> NoReturn:
    """Leave: in step when every rank leaves with this code, else by MPI_Abort, which ends the others too; or by a death that the
    others see, where they can go on."""
    sys.stdout.flush()
    sys.stderr.flush()
    world = _started_world()
    if world is not None and (world.size > 1 or _left):
        if not everywhere and world.size > 1:
            time.sleep(PAUSE_SECONDS)
            if others_go_on and launched_with_ulfm():
                _die(world, code)
            world.Abort(code)
        if launched_with_ulfm():
            _leave(world, code)
        if code:  # Open MPI kills slower ranks as soon as the first leaves with an error: leave together, rank 0 first
            world.Barrier()
            time.sleep(PAUSE_SECONDS if world.rank else 0)
    sys.exit(code)


def _die(world: Any, code: int) -> NoReturn:
    """By SIGKILL, since Open MPI sees no other end as a failure. But where all fail alike the last one ends with the code:
    mpirun's own would be 0."""
    time.sleep(0 if world.rank else 2 * PAUSE_SECONDS)
    for _ in range(10):
        with suppress(Exception):  # the failures themselves: only in a call does MPI hear of them
            world.Iprobe()
    if world.Get_failed().size + 1 < world.size:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(code)


def _leave(world: Any, code: int) -> NoReturn:
    """After a failure MPI's own end may hang: those who are left meet, if they can, and are gone."""
    with suppress(Exception):  # somebody died just now
        request, began = world.Ibarrier(), time.monotonic()
        while not request.Test() and time.monotonic() - began < LEAVE_SECONDS:
            time.sleep(0.001)
    time.sleep(PAUSE_SECONDS if code and world.rank else 0)
    os._exit(code)


def _fate(world: Any, others_go_on: bool = True) -> str:
    go_on = others_go_on and launched_with_ulfm() and world is not None and world.size > 1
    return "leaves the job to the others" if go_on else "ends the job"


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit with its code (the table is in errors.py). Collective over COMM_WORLD."""
    try:
        main()
        sys.stdout.flush()
    except MpidpError as error:
        world = _started_world()
        everywhere = error.everywhere or world is None or world.size == 1
        rank = launcher_rank() if world is None or world.size == 1 else world.rank
        if rank == 0 or not everywhere:
            place = "" if everywhere else f"rank {rank}: "
            print(f"mpidp: {place}{error}", file=sys.stderr)
        _end(error.exit_code, everywhere)
    except SystemExit as leave:
        world = _started_world()
        if world is None or (world.size == 1 and not _left):
            sys.exit(leave.code)
        code = leave.code if isinstance(leave.code, int) and leave.code else 1
        print(f"mpidp: rank {world.rank} left by sys.exit({leave.code!r}) and {_fate(world)}", file=sys.stderr)
        _end(code, everywhere=False, others_go_on=True)
    except BaseException as error:
        world = _started_world()
        if isinstance(error, BrokenPipeError) and (world is None or world.size == 1):  # as of `| head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _end(1, everywhere=True)
        rank = launcher_rank() if world is None else world.rank
        alone = world is None or not isinstance(error, sys.modules["mpi4py.MPI"].Exception)  # else others meet it, too
        print(f"mpidp: rank {rank} failed and {_fate(world, alone)}:\n{traceback.format_exc()}", file=sys.stderr)
        _end(1, everywhere=False, others_go_on=alone)
    _end(0, everywhere=True)
