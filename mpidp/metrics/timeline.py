"""Records what all ranks do in some steps, and writes RUN/timeline.json for ui.perfetto.dev or chrome://tracing.

metrics.timeline=FIRST:LAST selects the steps. In these steps, spans (intervals with a name) are recorded. Recording a span takes
about a microsecond. The clocks of the machines are compared before the first and after the last selected step, and times are
converted to rank 0's clock. With a GPU, spans show the time on the host. metrics.kernels also records the GPU's kernels.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.runtime.files import write_file
from mpidp.runtime.log import log
from mpidp.runtime.observers import StepObserver

if TYPE_CHECKING:
    from mpi4py import MPI

ROUNDS = 5  # number of barriers per clock comparison
PHASES = ("step", "data", "compute", "comm_wait", "stall", "update", "evaluate", "checkpoint")
SUB_PHASES = ("reduce", "apply", "publish")  # phases within an update
NAMES = {"comm_wait": "wait"}  # phases whose spans have another name in the trace
Span = tuple[str, float, float, int, dict[str, Any]]  # (name, begin, end, thread, arguments); times are from time.perf_counter()


@dataclass
class RankTimeline:
    """The spans of one rank, which it sends to rank 0."""

    host: str
    spans: list[Span]
    threads: list[str]
    moments: list[float] = field(default_factory=list)  # times of the clock comparisons, by this rank's clock
    behind: list[float] = field(default_factory=list)  # at these times, rank 0's clock minus this rank's clock, in seconds


class Timeline(StepObserver):
    """Records the spans of one rank in the selected steps."""

    def __init__(
        self, steps: tuple[int, int] = (0, 0), run_dir: Path | None = None, host: str = "", kernels: bool = False
    ) -> None:
        """steps: (first selected step, last selected step), or (0, 0) if no step is selected. Independent."""
        self.first, self.last = steps
        self._run_dir, self._kernels = run_dir, kernels
        self._profiler: Any = None
        self._recorded, self._on, self._idents = RankTimeline(host, [], []), False, dict[int, int]()
        self._open: tuple[str, float] | None = None  # the current sub-phase of an update, and when it began

    def open(self, comm: MPI.Intracomm, step: int) -> None:
        """Compare clocks. Call this before the first selected step. step: number of updates so far. Collective over comm."""
        if not self.last or step >= self.last:
            self.last = 0
            return
        self._rank = comm.rank
        self._compare(comm)

    def enter(self, step: int, phase: str) -> None:
        """Begin the phase `phase` within an update. It ends when the next phase begins or the update ends. Independent."""
        if self.last and phase in SUB_PHASES:
            self._close_sub_phase()
            self._open = phase, time.perf_counter()

    def span(self, step: int, name: str, about: dict[str, Any]) -> AbstractContextManager[None] | None:
        """Return a context manager. If `step` is selected, the time inside the context is recorded as a span with the name
        `name` and the arguments `about`. Return None instead if the run has no selected steps, or if the timeline never
        records spans with this name. Independent."""
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
                self._recorded.spans.append((NAMES.get(name, name), began, time.perf_counter(), self._thread(), about))

    def _begin_step(self, step: int) -> None:
        """Start recording if `step` is selected. Otherwise stop recording."""
        self._on = self.first <= step <= self.last
        if self._on and self._kernels and self._profiler is None:
            from torch.profiler import profile

            self._profiler = profile()
            self._profiler.__enter__()

    def _close_sub_phase(self) -> None:
        if self._open is not None and self._on:
            name, began = self._open
            self._recorded.spans.append((name, began, time.perf_counter(), self._thread(), {}))
        self._open = None

    def write_if_complete(self, comm: MPI.Intracomm, step: int) -> None:
        """Write timeline.json if the last selected step is complete. Call this only at a step at which all ranks synchronize.
        Collective over comm."""
        if not self.last or step < self.last:
            return
        self._on, self.last = False, 0
        if self._profiler is not None and self._run_dir is not None:
            self._profiler.__exit__(None, None, None)
            self._profiler.export_chrome_trace(str(self._run_dir / f"timeline_kernels_rank{self._rank}.json"))
        self._compare(comm)
        everyone = comm.gather(self._recorded)
        if everyone is None or self._run_dir is None:
            return
        try:
            write_file(self._run_dir / "timeline.json", json.dumps(trace(everyone)).encode())
        except OSError as error:  # a full disk must not stop training
            log.warning("warning: %s: %s", self._run_dir / "timeline.json", error)

    def _compare(self, comm: MPI.Intracomm) -> None:
        """Compare the ranks' clocks. All ranks are assumed to leave a barrier at the same time. Ranks of one machine share a
        clock. Collective over comm."""
        moments = []
        for _ in range(ROUNDS):
            comm.Barrier()
            moments.append(time.perf_counter())
        rows = comm.allgather((self._recorded.host, moments))
        host, first = rows[0]
        behind = [b - a for name, row in rows if name == self._recorded.host for a, b in zip(row, first, strict=True)]
        self._recorded.moments.append(moments[-1])
        self._recorded.behind.append(0.0 if host == self._recorded.host else statistics.median(behind))

    def _thread(self) -> int:
        ident = threading.get_ident()
        if ident not in self._idents:
            self._idents[ident] = len(self._idents)
            self._recorded.threads.append(threading.current_thread().name)
        return self._idents[ident]


def trace(everyone: Sequence[RankTimeline]) -> dict[str, Any]:
    """Return the trace in Chrome's format. Each rank is a process, and each thread has a row. Times are in microseconds since
    the start of the first span. Pure."""
    events: list[dict[str, Any]] = []
    for rank, part in enumerate(everyone):
        about = {"ph": "M", "pid": rank}
        events += [about | {"name": "process_name", "args": {"name": f"rank {rank} ({part.host})"}},
                   about | {"name": "process_sort_index", "args": {"sort_index": rank}}]
        events += [about | {"name": "thread_name", "tid": tid, "args": {"name": name}} for tid, name in enumerate(part.threads)]
    moved = [[(rank, name, _to_rank_0(a, part), _to_rank_0(b, part), tid, more) for name, a, b, tid, more in part.spans]
             for rank, part in enumerate(everyone)]
    spans = sorted((span for rows in moved for span in rows), key=lambda span: (span[2], -span[3]))
    start = spans[0][2] if spans else 0.0
    for rank, name, began, ended, tid, more in spans:
        ts = round(1e6 * (began - start), 3)
        events.append({"ph": "X", "name": name, "pid": rank, "tid": tid, "ts": ts,
                       "dur": max(0.0, round(1e6 * (ended - start) - ts, 3)), "args": more})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _to_rank_0(moment: float, part: RankTimeline) -> float:
    """Return the time `moment` by rank 0's clock. The difference of the two clocks is interpolated linearly between the two
    comparisons."""
    (a, b), (behind, later) = part.moments, part.behind
    return moment + behind + (later - behind) * (moment - a) / (b - a if b > a else 1.0)
