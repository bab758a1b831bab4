"""`[mpirun -np N] python -m mpidp.doctor [--gpu] [--network] [--data DIR] [--run DIR] [--clean] [--script FILE] [--json]`

Check the launch, the machines and the folders before training, and report how to correct problems. Start this command as you
start the job, with the same launcher and options. It writes its measurements to cluster.json in the folder given by --run.
Without --run, it writes them to the current folder. docs/doctor.md explains the table.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mpidp.doctor import facts, hardware, launch, memory, network, sessions, storage
from mpidp.doctor.findings import VERDICTS, CheckResult, failed_check, run_check, table, worst
from mpidp.doctor.job_script import check_job_script
from mpidp.errors import HANG_EXIT_CODE, MpidpError
from mpidp.runtime.command import PAUSE_SECONDS, Parser, run_entry
from mpidp.runtime.environment import launched_size, launcher_rank
from mpidp.runtime.files import write_file
from mpidp.runtime.log import log
from mpidp.runtime.options import add_data, add_json, program

if TYPE_CHECKING:
    from mpi4py import MPI

READ_SECONDS = 2.0
WRONG = VERDICTS[-1]
T = TypeVar("T")


def main() -> None:
    """Run all checks, print the table, write cluster.json and set the exit code. Collective over COMM_WORLD."""
    parser = Parser(
        prog=program("mpidp.doctor"), usage="[mpirun -np N] %(prog)s [options]", description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", action="store_true", help="require GPUs, and test whether MPI accepts device pointers")
    parser.add_argument("--network", action="store_true", help="measure the network with larger messages, for a longer time")
    add_data(parser, "to check: whether every node has it, and how fast it is read", kind=Path)
    parser.add_argument("--run", type=Path, metavar="DIR", help="check a run.dir: is it writable, do locks work, is there space?")
    parser.add_argument("--clean", action="store_true", help="remove the shared memory and session folders that your jobs left")
    parser.add_argument("--script", type=Path, metavar="FILE", help="check the #SBATCH lines of this job script")
    add_json(parser)
    parser.add_argument("--deadline", type=float, default=120.0, metavar="SECONDS", help="time limit of each check (%(default)g)")
    options = parser.parse_args()
    deadline = Deadline(options.deadline)
    environ, launched = dict(os.environ), launched_size()
    reject_tiny_memory(environ, options)
    world = start(launch.launcher_of(environ), deadline)
    if world is None or (world.size == 1 and launcher_rank() > 0):
        return  # this process is one of N jobs of one rank, of which only the first reports
    found, cluster = examine(world, options, environ, launched, deadline)
    last: CheckResult | None = None
    if world.rank == 0:
        last = worst(found)
        if all(one.verdict != WRONG for one in found if one.what == "launch"):
            found += run_check("cluster.json", _write, (options.run or Path()) / "cluster.json", cluster, world.size)
        show(found, cluster, options.json)
    last = world.bcast(last, root=0)
    if last is not None and last.verdict == WRONG:
        raise MpidpError.on_every_rank(one_line(last))


def show(found: list[CheckResult], cluster: dict[str, Any], as_json: bool) -> None:
    """Print the results as a table, or as JSON if `as_json` is True. Independent."""
    print(json.dumps({"findings": [asdict(one) for one in found], "cluster": cluster}) if as_json else table(found), flush=True)


def one_line(result: CheckResult) -> str:
    """Format a result as one line. Pure."""
    return f"{result.what}: {result.words.splitlines()[0]}" + (f" -> {result.fix}" if result.fix else "")


def exit_before_mpi(message: str) -> NoReturn:
    """Print a message and exit with code 1. Call this function only before MPI starts. Independent."""
    log.error("mpidp: rank %d on %s: %s", launcher_rank(), socket.gethostname(), message)
    sys.exit(1)


class Deadline:
    """If a check takes longer than `seconds`, prints the name of the check and ends the job with exit code 6. Independent."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.check, self.since = seconds, "start of MPI", time.monotonic()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def enter(self, check: str) -> None:
        """Record that a check begins, and start its time limit. `check`: the name of the check."""
        self.check, self.since = check, time.monotonic()

    def _watch(self) -> None:
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
        words = f"{self.check!r}, which takes longer than {self.seconds:g} s (--deadline). Stacks follow, then the job ends"
        log.error("mpidp: rank %d hangs in the check %s with exit code %d", launcher_rank(), words, HANG_EXIT_CODE)
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(PAUSE_SECONDS)  # all ranks reach the deadline together; wait until each has printed its stacks
        os._exit(HANG_EXIT_CODE)


def reject_tiny_memory(environ: Mapping[str, str], options: argparse.Namespace) -> None:
    """Check the free space of /dev/shm before MPI starts. If MPI may crash at its start, print a warning. If MPI cannot start,
    report the shared memory that ended jobs left in /dev/shm, and exit. Independent."""
    host, (place, ranks) = socket.gethostname(), launch.on_this_node(environ)
    room = memory.check_shm({host: facts.shared_memory()}, ranks)
    if room.verdict != WRONG:
        if room.verdict != "ok" and not place and ranks > 1:  # MPI may crash when it starts, so give the reason now
            log.warning("mpidp: %s", one_line(room))
        return
    if place:
        time.sleep(3 * PAUSE_SECONDS)  # the first rank of the node prints before the launcher notices an exit
        sys.exit(1)
    segments = memory.find(host)
    show([*memory.check_segments(segments, memory.clean(segments) if options.clean else []), room], {}, options.json)
    exit_before_mpi(one_line(room))


def start(launcher: str, deadline: Deadline) -> MPI.Intracomm | None:
    """Start MPI and return COMM_WORLD. If the MPI library does not fit the launcher, starting MPI could end the process. In that
    case, only the first process of the launcher starts MPI, as a job of one rank. All other processes return None. Collective
    over COMM_WORLD."""
    warnings.filterwarnings("ignore", "suspicious MPI", RuntimeWarning)  # the table reports it in more detail
    import mpi4py

    mpi4py.rc(initialize=False, finalize=True)
    from mpi4py import MPI

    if launch.incompatible(MPI.get_vendor()[0], launcher):
        if launcher_rank() > 0:
            return None
        for name in [name for name in os.environ if name.startswith(launch.LAUNCHERS_OWN)]:
            del os.environ[name]
    deadline.enter("start of MPI")
    MPI.Init_thread(getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}"))
    return MPI.COMM_WORLD


class Checkup:
    """Collects the results of checks on rank 0, in order. If a check raises an exception, its result is a warning."""

    def __init__(self, world: MPI.Intracomm, deadline: Deadline) -> None:
        self.world, self.deadline = world, deadline
        self.found: list[CheckResult] = []

    def check(self, what: str, check: Callable[..., CheckResult | list[CheckResult]], *given: Any) -> None:
        """Run the check `check` with the arguments `given` on rank 0, and add its results. `what`: the name of the check.
        Independent."""
        self.deadline.enter(what)
        if self.world.rank == 0:
            self.found += run_check(what, check, *given)

    def measure(self, what: str, measure: Callable[[], T | CheckResult]) -> list[T]:
        """Call `measure` on every rank, and return the answers in rank order. `measure` must not communicate. If it has no
        answer, it must return a CheckResult. The list that is returned contains no CheckResult. The first CheckResult is added to
        the table. Collective over world."""
        self.deadline.enter(what)
        try:
            own = measure()
        except Exception as error:
            own = failed_check(what, error)
        answers = self.world.allgather(own)
        self.found += [one for one in answers if isinstance(one, CheckResult)][:1]
        return [one for one in answers if not isinstance(one, CheckResult)]


def examine(
    world: MPI.Intracomm, options: argparse.Namespace, environ: Mapping[str, str], launched: int, deadline: Deadline
) -> tuple[list[CheckResult], dict[str, Any]]:
    """Run all checks. Return (results, contents of cluster.json). Only rank 0 has all results. `launched`: the number of ranks
    that the launcher started. Collective over world."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    library, launcher = f"{name} {'.'.join(map(str, version))}", launch.launcher_of(environ)
    checkup = Checkup(world, deadline)
    check, measure = checkup.check, checkup.measure
    deadline.enter("facts")
    everyone = world.allgather(facts.gather(world.rank, library))
    hosts = [one.host for one in everyone]
    host = hosts[world.rank]
    first = hosts.index(host) == world.rank  # whether this rank is the first of its node

    mpirun = measure("mpirun", lambda: launch.mpirun_here() if world.size == 1 else ("", ""))  # needed only with a single rank
    check("launch", lambda: launch.check_launch(world.size, launched, library, launcher, mpirun[0] if mpirun else ("", "")))
    check("Slurm", launch.check_slurm, world.size, environ)
    if options.script:
        check("job script", lambda: check_job_script(options.script.read_text(errors="replace"), str(options.script)))
    check("nodes", hardware.check_nodes, everyone)
    check("cores", hardware.check_cores, everyone, launcher)
    check("threads", hardware.check_threads, everyone)
    check("GPUs", hardware.check_gpus, everyone, options.gpu)
    works = measure("CUDA-aware MPI", lambda: hardware.probe() if options.gpu and first and everyone[world.rank].gpus else None)
    check("CUDA-aware MPI", hardware.check_probe, everyone, works)
    check("MPI threads", launch.check_thread_level, MPI.Query_thread())
    check("dead ranks", launch.check_ulfm, library, environ)
    check("versions", launch.check_versions, everyone)

    check("shared memory", memory.check_shm, {one.host: one.shm for one in everyone})
    segments = sum(measure("old segments", lambda: memory.find(host) if first else []), [])
    local = [one for one in segments if one.host == host]
    removed = sum(measure("old segments", lambda: memory.clean(local) if first and options.clean else []), [])
    check("old segments", memory.check_segments, segments, removed)
    old = sum(measure("old sessions", lambda: sessions.find(host) if first else []), [])
    local_old = [one for one in old if one.host == host]
    check("old sessions", sessions.check_sessions, old,
          sum(measure("old sessions", lambda: sessions.clean(local_old) if first and options.clean else []), []))

    deadline.enter("network")
    links = network.measure(world, hosts, options.network)
    check("network", network.check_links, links, library, environ)
    world.Barrier()
    check("clocks", network.check_clocks, world.allgather(time.time()), hosts)

    reads: list[storage.ReadTest] = []
    if options.data:
        reads = measure("data", lambda: storage.read(options.data, host, world.rank, world.size, READ_SECONDS))
        check("data", storage.check_read, reads, str(options.data))
    if options.run:
        handles = measure("run.dir", lambda: storage.make_locked_file(options.run) if world.rank == 0 else -1)
        try_locks = storage.lock_states_in_child if world.size == 1 else storage.lock_states
        if len(handles) == world.size:
            states = measure("locks", lambda: try_locks(options.run) if world.rank or world.size == 1 else {})
            if tested := [one for one in states if one]:
                check("locks", storage.check_locks, tested)
            check("room", storage.check_room, options.run)
            if world.rank == 0:
                (options.run / storage.PROBE).unlink()
                os.close(handles[0])
    cluster = {
        "format": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "mpi": library, "launcher": launcher or None,
        "ranks": world.size, **hardware.summary(everyone), **network.summary(links), "read_bytes_per_second": storage.speed(reads)
    }  # fmt: skip
    deadline.enter("the end")
    return checkup.found, cluster


def _write(path: Path, cluster: dict[str, Any], ranks: int) -> CheckResult:
    if ranks == 1:  # mpidp plan reads this file, and would assume that it describes the cluster
        fix = "start the doctor with the launch line of the job, for example mpirun -np 2 mpidp doctor"
        return CheckResult("cluster.json", "skipped", "not written: one rank cannot measure the network", fix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(cluster, indent=1) + "\n").encode())
    return CheckResult("cluster.json", "ok", str(path))


if __name__ == "__main__":
    run_entry(main)
