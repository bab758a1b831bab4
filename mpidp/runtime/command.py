"""The common parts of all commands: parsing the command line, starting MPI, and ending a job after an error."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from mpidp import __version__
from mpidp.errors import MpidpError, UsageError
from mpidp.runtime.environment import launched_size, launched_with_ulfm, launcher_rank
from mpidp.runtime.files import expand_home
from mpidp.runtime.log import log, set_level
from mpidp.runtime.missing_mpi import missing_mpi

if TYPE_CHECKING:
    from mpi4py import MPI


PAUSE_SECONDS = 0.3  # a pause in which mpirun forwards the last output before the job ends
LEAVE_SECONDS = 5.0  # how long a rank waits for the others at the end of a job, if ranks may have failed
T = TypeVar("T")


PATHS = {"DIR", "FILE", "PATH", "RUN", "RUN2", "SHARDS", "PREFIX"}  # metavars of options whose values are paths


def _expanded(value: Any, name: str) -> Any:
    """Expand ~ in a str, in a Path, or in each item of a list. `name`: the name of the option, for error messages."""
    if isinstance(value, list):
        return [_expanded(one, name) for one in value]
    return type(value)(expand_home(str(value), name)) if isinstance(value, (str, Path)) else value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError if the command line is wrong. Under mpirun, only rank 0 prints help.
    Independent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Take the arguments of ArgumentParser. Independent."""
        super().__init__(*arguments, **options)
        self.add_argument("--version", action="version", version=f"mpidp {__version__}", help="show the version, and exit")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and expand ~ in every value that is a path (see PATHS). Raises UsageError if a path cannot be
        expanded. Independent."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.dest in found and PATHS & set(re.split(r"\W", str(action.metavar))):
                name = action.option_strings[0] if action.option_strings else str(action.metavar)
                setattr(found, action.dest, _expanded(getattr(found, action.dest), name))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Raise UsageError. `message`: argparse's description of the error."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help or the version. Under mpirun, only rank 0 prints."""
        if launcher_rank() == 0:
            super()._print_message(message, file)


def begin(read_command_line: Callable[[], T]) -> tuple[T, MPI.Intracomm]:
    """Read the command line and start MPI. Return what `read_command_line` returns, and COMM_WORLD.

    Raises UsageError if the command line is not valid. With one rank, MPI is not started before this error. With several ranks,
    all ranks exit, and only rank 0 prints the error. Collective over COMM_WORLD.
    """
    options: T | None = None
    wrong: UsageError | None = None
    try:
        options = read_command_line()
    except UsageError as error:
        if launched_size() < 2:
            raise
        wrong = error
    from mpidp.runtime.world import raise_together, start_mpi

    world = start_mpi()
    with raise_together(world):
        if wrong is not None:
            raise wrong
    return cast(T, options), world


_survivors: Any = None  # the communicator of the surviving ranks after a failure


def continue_in(world: MPI.Intracomm) -> None:
    """Use `world`, the communicator of the surviving ranks, in place of COMM_WORLD from now on. Independent."""
    global _survivors
    _survivors = world


def _started_world() -> Any:
    """Return the communicator of all ranks if MPI runs in this process, else None. Never start MPI."""
    module = sys.modules.get("mpi4py.MPI")
    return (_survivors or module.COMM_WORLD) if module and module.Is_initialized() and not module.Is_finalized() else None


def _end(code: int, everywhere: bool, others_continue: bool = False) -> NoReturn:
    """Exit with `code`. `everywhere`: whether all ranks exit with this code. If so, the ranks synchronize first. If not,
    MPI_Abort ends the other ranks, unless they can continue. `others_continue`: whether the other ranks can continue if the
    job was started with ULFM. They then detect that this rank has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    world = _started_world()
    if world is not None and (world.size > 1 or _survivors):
        if not everywhere and world.size > 1:
            time.sleep(PAUSE_SECONDS)
            if others_continue and launched_with_ulfm():
                _fail(world, code)
            world.Abort(code)
        if launched_with_ulfm():
            _leave(world, code)
        if code:  # Open MPI kills other ranks as soon as one exits with an error: exit together, rank 0 first
            world.Barrier()
            time.sleep(PAUSE_SECONDS if world.rank else 0)
    sys.exit(code)


def _fail(world: Any, code: int) -> NoReturn:
    """Kill this process with SIGKILL, the only exit that Open MPI detects as a failure. If all other ranks have failed, exit with
    `code` instead. Otherwise the exit code of mpirun would be 0."""
    time.sleep(0 if world.rank else 2 * PAUSE_SECONDS)
    for _ in range(10):
        with suppress(Exception):  # an exception means that a rank has failed; MPI detects failures only within a call
            world.Iprobe()
    if world.Get_failed().size + 1 < world.size:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(code)


def _leave(world: Any, code: int) -> NoReturn:
    """Exit without MPI_Finalize, because MPI_Finalize may hang after a failure. If possible, synchronize with the surviving ranks
    first."""
    with suppress(Exception):  # a rank may fail during the barrier
        request, began = world.Ibarrier(), time.monotonic()
        while not request.Test() and time.monotonic() - began < LEAVE_SECONDS:
            time.sleep(0.001)
    time.sleep(PAUSE_SECONDS if code and world.rank else 0)
    os._exit(code)


def _effect(world: Any, others_continue: bool = True) -> str:
    """Return the last words of an error message. These words say whether the exit of this rank ends the job. Pure."""
    if others_continue and launched_with_ulfm() and world is not None and world.size > 1:
        return "; the other ranks continue"
    return " and ends the job"


@contextmanager
def _mpi_needed() -> Iterator[None]:
    """Run the body of a `with` statement. Raises UsageError if mpi4py cannot load an MPI library in the body."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if (message := missing_mpi(error)) is None:
            raise
        if launcher_rank():  # rank 0 prints the message, unless an earlier exit of another rank ends rank 0
            time.sleep(3 * PAUSE_SECONDS)
        raise UsageError.on_every_rank(message) from None


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit with the command's code (errors.EXIT_CODES). An error is printed before the exit.
    Collective over COMM_WORLD."""
    try:
        set_level()
        if launched_size() < 2:  # with sys.exit, main removes its temporary files before the exit
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with _mpi_needed():
            main()
        sys.stdout.flush()
    except MpidpError as error:
        world = _started_world()
        everywhere = error.everywhere or world is None or world.size == 1
        rank = launcher_rank() if world is None or (world.size == 1 and not _survivors) else world.rank
        if rank == 0 or not everywhere:
            place = "" if everywhere else f"rank {rank}: "
            log.error("mpidp: %s%s", place, error)
        _end(error.exit_code, everywhere)
    except SystemExit as leave:
        world = _started_world()
        if world is None or (world.size == 1 and not _survivors):
            sys.exit(leave.code)
        code = leave.code if isinstance(leave.code, int) and leave.code else 1
        log.error("mpidp: rank %d called sys.exit(%r)%s", world.rank, leave.code, _effect(world))
        _end(code, everywhere=False, others_continue=True)
    except BaseException as error:
        world = _started_world()
        if isinstance(error, BrokenPipeError) and (world is None or world.size == 1):  # the reader of the pipe has exited
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _end(1, everywhere=True)
        if isinstance(error, KeyboardInterrupt) and (world is None or world.size == 1):  # Ctrl-C: the shell must see the signal
            log.error("mpidp: interrupted")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        rank = launcher_rank() if world is None else world.rank
        alone = world is None or not isinstance(error, sys.modules["mpi4py.MPI"].Exception)  # MPI's errors reach other ranks, too
        log.error("mpidp: rank %d failed%s:\n%s", rank, _effect(world, alone), traceback.format_exc())
        _end(1, everywhere=False, others_continue=alone)
    _end(0, everywhere=True)
