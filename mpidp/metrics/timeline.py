"""Some steps of all ranks as spans: RUN/timeline.json, for ui.perfetto.dev or chrome://tracing.

Nothing is installed where it is not asked for. Where it is, spans are taken in the steps FIRST to LAST alone: a span costs about
a microsecond. Clocks of machines are compared by barriers, before the first step and after the last, and moved onto rank 0's.
On a GPU a span is the host's time: what the device does meanwhile is in the kernels of torch.profiler.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.runtime.files import write_file
from mpidp.runtime.observers import StepObserver

if TYPE_CHECKING:
    from mpi4py import MPI

ROUNDS = 5  # of barriers
PHASES = ("step", "data", "compute", "comm_wait", "stall", "update", "evaluate", "checkpoint")
SUB_PHASES = ("reduce", "apply", "publish")  # of an update
NAMES = {"comm_wait": "wait"}  # how a phase is called in the trace, where it is called otherwise
Span = tuple[str, float, float, int, dict[str, Any]]  # name, begin and end by time.perf_counter(), thread, more


@dataclass
class RankTimeline:
    """What a rank hands to rank 0."""

    host: str
    spans: list[Span]
    threads: list[str]
    moments: list[float] = field(default_factory=list)  # by this rank's clock, when the clocks were compared
    behind: list[float] = field(default_factory=list)  # then, of rank 0's clock, seconds


class Timeline(StepObserver):
    """Of one rank; without steps it does nothing."""

    def __init__(
        self, steps: tuple[int, int] = (0, 0), run_dir: Path | None = None, host: str = "", kernels: bool = False
    ) -> None:
        """steps: first and last, both included; (0, 0): none. Independent."""
        self.first, self.last = steps
        self._run_dir, self._kernels = run_dir, kernels
        self._profiler: Any = None
        self._told, self._on, self._idents = RankTimeline(host, [], []), False, dict[int, int]()
        self._open: tuple[str, float] | None = None  # the sub-phase of the update that goes on, and when it began

    def open(self, comm: MPI.Intracomm, step: int) -> None:
        """Compare clocks before the first of the steps; step: updates made so far. Collective over comm."""
        if not self.last or step >= self.last:
            self.last = 0
            return
        self._rank = comm.rank
        self._compare(comm)

    def enter(self, step: int, phase: str) -> None:
        """A sub-phase of an update lasts until the next begins, the last until the update ends. Independent."""
        if self.last and phase in SUB_PHASES:
            self._close_sub_phase()
            self._open = phase, time.perf_counter()

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[None] | None:
        """What is done inside, if the step is one of those. Independent."""
        if not self.last or name == "micro_batch":
            return None
        return self._span(step, name, about)

    @contextmanager
    def _span(self, step: int, name: str, about: dict[str, Any]) -> Iterator[None]:
        if name == "step":
            self._begin_step(step)
        about = about | ({"step": step} if name in PHASES else {})
        began = time.perf_counter()
        try:
            yield
        finally:
            if name == "update":
                self._close_sub_phase()
            if self._on:
                self._told.spans.append((NAMES.get(name, name), began, time.perf_counter(), self._thread(), about))

    def _begin_step(self, step: int) -> None:
        """A batch begins: of one of the steps?"""
        self._on = self.first <= step <= self.last
        if self._on and self._kernels and self._profiler is None:
            from torch.profiler import profile

            self._profiler = profile()
            self._profiler.__enter__()

    def _close_sub_phase(self) -> None:
        if self._open is not None and self._on:
            name, began = self._open
            self._told.spans.append((name, began, time.perf_counter(), self._thread(), {}))
        self._open = None

    def write_if_complete(self, comm: MPI.Intracomm, step: int) -> None:
        """After a step at which all ranks met: write the file once the last is behind. Collective over comm."""
        if not self.last or step < self.last:
            return
        self._on, self.last = False, 0
        if self._profiler is not None and self._run_dir is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._run_dir / f"timeline_kernels_rank{self._rank}.json"))
        self._compare(comm)
        everyone = comm.gather(self._told)
        if everyone is None or self._run_dir is None:
            return
        try:
            write_file(self._run_dir / "timeline.json", json.dumps(trace(everyone)).encode())
        except OSError as error:  # a full disk does not stop the training
            print(f"warning: {self._run_dir / 'timeline.json'}: {error}", file=sys.stderr, flush=True)

    def _compare(self, comm: MPI.Intracomm) -> None:
        """Clocks, by the moments at which ranks leave barriers; those of one machine are one clock. Collective over comm."""
        moments = []
        for _ in range(ROUNDS):
            comm.Barrier()
            moments.append(time.perf_counter())
        rows = comm.allgather((self._told.host, moments))
        host, first = rows[0]
        behind = [b - a for name, row in rows if name == self._told.host for a, b in zip(row, first, strict=True)]
        self._told.moments.append(moments[-1])
        self._told.behind.append(0.0 if host == self._told.host else statistics.median(behind))

    def _thread(self) -> int:
        ident = threading.get_ident()
        if ident not in self._idents:
            self._idents[ident] = len(self._idents)
            self._told.threads.append(threading.current_thread().name)
        return self._idents[ident]


def trace(everyone: Sequence[RankTimeline]) -> dict[str, Any]:
    """Chrome's trace format, microseconds since the first span: a process a rank, a row a thread. Pure."""
    events: list[dict[str, Any]] = []
    for rank, told in enumerate(everyone):
        about = {"ph": "M", "pid": rank}
        events += [about | {"name": "process_name", "args": {"name": f"rank {rank} ({told.host})"}},
                   about | {"name": "process_sort_index", "args": {"sort_index": rank}}]
        events += [about | {"name": "thread_name", "tid": tid, "args": {"name": name}} for tid, name in enumerate(told.threads)]
    moved = [[(rank, name, _moved(a, told), _moved(b, told), tid, more) for name, a, b, tid, more in told.spans]
             for rank, told in enumerate(everyone)]
    spans = sorted((span for rows in moved for span in rows), key=lambda span: (span[2], -span[3]))
    start = spans[0][2] if spans else 0.0
    for rank, name, began, ended, tid, more in spans:
        ts = round(1e6 * (began - start), 3)
        events.append({"ph": "X", "name": name, "pid": rank, "tid": tid, "ts": ts,
                       "dur": max(0.0, round(1e6 * (ended - start) - ts, 3)), "args": more})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _moved(moment: float, told: RankTimeline) -> float:
    """Onto rank 0's clock, which drifts evenly between two comparisons."""
    (a, b), (behind, later) = told.moments, told.behind
    return moment + behind + (later - behind) * (moment - a) / (b - a if b > a else 1.0)
