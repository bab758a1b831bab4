"""Some steps of all ranks as spans: RUN/timeline.json, for ui.perfetto.dev or chrome://tracing.

Nothing is installed where it is not asked for. Where it is, spans are taken in the steps FIRST to LAST alone: a span costs about
a microsecond. Clocks of machines are compared by barriers, before the first step and after the last, and moved onto rank 0's.
On a GPU a span is the host's time: what the device does meanwhile is in the kernels of torch.profiler.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpidp.metrics.clock import Clock
from mpidp.runtime.files import write_file
from mpidp.runtime.log import log

if TYPE_CHECKING:
    from mpi4py import MPI

ROUNDS = 5  # of barriers
Span = tuple[str, float, float, int, dict[str, Any]]  # name, begin and end by time.perf_counter(), thread, more


@dataclass
class RankTimeline:
    """What a rank hands to rank 0."""

    host: str
    spans: list[Span]
    threads: list[str]
    moments: list[float] = field(default_factory=list)  # by this rank's clock, when the clocks were compared
    behind: list[float] = field(default_factory=list)  # then, of rank 0's clock, seconds


class Timeline:
    """Of one rank; without steps it does nothing."""

    def __init__(
        self, steps: tuple[int, int] = (0, 0), run_dir: Path | None = None, host: str = "", kernels: bool = False
    ) -> None:
        """steps: first and last, both included; (0, 0): none. Independent."""
        self.first, self.last = steps
        self._run_dir, self._kernels = run_dir, kernels
        self._profiler: Any = None
        self._told, self._on, self._idents = RankTimeline(host, [], []), False, dict[int, int]()

    def attach(self, job: Any, comm: MPI.Intracomm) -> None:
        """Watch this job's parts from here on. Collective over comm."""
        if not self.last or job.position.step >= self.last:
            self.last = 0
            return
        self._rank, self._step = comm.rank, lambda: job.position.step + 1
        self._compare(comm)
        job.clock = TimelineClock(self)
        job.engine.watched(self.around)
        reducer = job.strategy.reducer
        reducer.finish = self.around("reduction", reducer.finish)
        name = "sum" if hasattr(reducer, "sum") else "reduce"  # which is in the other
        setattr(reducer, name, self._bucket(getattr(reducer, name)))
        job.strategy.enter = self._sub_phases(job.strategy.enter)

    @contextmanager
    def span(self, name: str, **more: Any) -> Iterator[None]:
        """What is done inside, if the step is one of those. Independent."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._on:
                self._told.spans.append((name, began, time.perf_counter(), self._thread(), more))

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, as a span."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return work(*args, **kwargs)

        return watched

    def begin_step(self) -> None:
        """A batch begins: of one of the steps? Independent."""
        self._on = self.first <= self._step() <= self.last
        if self._on and self._kernels and self._profiler is None:
            from torch.profiler import profile

            self._profiler = profile()
            self._profiler.__enter__()

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
            log.warning("warning: %s: %s", self._run_dir / "timeline.json", error)

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

    def _bucket(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            with self.span(f"bucket {args[-1].index}", bytes=4 * (args[-1].stop - args[-1].start)):
                return work(*args)

        return watched

    def _sub_phases(self, enter: Callable[[str], None]) -> Callable[[str], None]:
        """Of an update: each lasts until the next begins, the last until the update ends."""

        def watched(phase: str) -> None:
            enter(phase)
            self.close_sub_phase()
            self._open = phase, time.perf_counter()

        return watched

    _open: tuple[str, float] | None = None

    def close_sub_phase(self) -> None:
        """Of the update that ends. Independent."""
        if self._open is not None and self._on:
            name, began = self._open
            self._told.spans.append((name, began, time.perf_counter(), self._thread(), {}))
        self._open = None


class TimelineClock(Clock):
    """A clock whose phases are spans too."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    @contextmanager
    def timed(self, phase: str) -> Iterator[Callable[[], float]]:
        """As a Clock's."""
        if phase == "step":
            self._timeline.begin_step()
        with self._timeline.span(SPAN_NAMES.get(phase, phase), step=self._timeline._step()):
            try:
                with super().timed(phase) as seconds:
                    yield seconds
            finally:
                if phase == "update":
                    self._timeline.close_sub_phase()


SPAN_NAMES = {"comm_wait": "wait"}  # for others: how a phase is called in the trace


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
