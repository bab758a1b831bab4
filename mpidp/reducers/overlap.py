"""Reduces buckets (gradients of consecutive parameters) in a thread while backward computes the next buckets. Measures whether
this overlap is faster.

The thread makes MPI calls all the time, because non-blocking collectives make little progress outside MPI calls. In mode
`thread`, the thread blocks in MPI. In mode `poll`, the thread polls and sleeps, so that backward can use the core. On one node
overlap has no benefit, because sums are limited by memory bandwidth and backward needs the same cores. Between nodes the benefit
depends on the network, the MPI library and spare cores, so choose() measures it.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from mpi4py import MPI

from mpidp.comm.waiting import Wait, doze, spin
from mpidp.reducers.base import Reducer
from mpidp.reducers.buckets import Bucket

OVERLAP_WAITS: dict[str, Wait | None] = {
    "none": None, "thread": spin, "poll": partial(doze, yields=0, first_seconds=5e-5, longest_seconds=5e-5)
}
PROBE_BYTES = 16 << 20  # the measurement reduces the buckets in the first PROBE_BYTES of the buffer
PROBE_ROUNDS = 3


class ReduceThread:
    """A thread that calls work(bucket) for every submitted bucket of a step. The order of the calls is the same on every rank."""

    def __init__(self, buckets: list[Bucket], work: Callable[[Bucket], None]) -> None:
        self._buckets, self._work = buckets, work
        self._submitted: set[int] = set()
        self._done = 0  # number of buckets of this step that have been reduced
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mpidp-reduce", daemon=True)
        self._thread.start()

    def submit(self, bucket: Bucket) -> None:
        """Queue a bucket whose gradients are complete on this rank. Independent."""
        with self._changed:
            self._submitted.add(bucket.index)
            self._changed.notify_all()

    def missing(self) -> list[Bucket]:
        """Return the buckets that were not submitted in this step. Independent."""
        return [bucket for bucket in self._buckets if bucket.index not in self._submitted]

    def wait(self) -> None:
        """Wait until all buckets of the step are reduced. Raises the exception that work() raised, if any. Collective over the
        ranks that reduce."""
        with self._changed:
            self._changed.wait_for(lambda: self._done == len(self._buckets) or self._error is not None)
            if self._error is not None:
                raise self._error
            self._done = 0
            self._submitted.clear()

    def close(self) -> None:
        """Stop the thread. Independent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._done in self._submitted)
                    if self._closed:
                        return
                    bucket = self._buckets[self._done]
                self._work(bucket)
                with self._changed:
                    self._done += 1
                    self._changed.notify_all()
        except BaseException as error:  # wait() raises the error in the calling thread; here it would be lost
            with self._changed:
                self._error = error
                self._changed.notify_all()


def use(reducer: Reducer, mode: str) -> None:
    """Make `reducer` use the overlap mode `mode` from now on. Call use() between steps. Independent."""
    wait = OVERLAP_WAITS[mode]
    reducer.set_overlap(mode, wait, None if wait is None else ReduceThread(reducer.buffer.buckets, reducer.reduce_observed))


def choose(reducer: Reducer, wanted: str, comm: MPI.Intracomm, static: bool) -> str:
    """Use the overlap mode `wanted`. If `wanted` is "auto", measure the time of computation and reduction in each mode, and use
    the fastest mode. On one node, and where overlap is not possible, "auto" means no overlap. Return a description of the choice.
    static: whether the lanes (sequences of micro-batches) of each rank are fixed before each step. Collective over comm."""
    if wanted != "auto":
        use(reducer, wanted)
        return wanted
    alone, in_thread = len(reducer.group.members) == 1, reducer.transport.in_thread
    if alone or not in_thread or not static or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return "none"
    # Between nodes, `poll` can hang if several ranks are bound to the same core. The cause is unknown, so `poll` is not used
    # there.
    cores = comm.allreduce(len(os.sched_getaffinity(0)), op=MPI.MIN)
    # Also exclude `poll` if its MPI call differs from that of the other modes. The sum could then have different bits, but bits
    # must not depend on a measurement.
    poll = cores > 1 and (reducer.own_order or not reducer.group.all_spin)
    seconds = measure(reducer, comm, {mode: wait for mode, wait in OVERLAP_WAITS.items() if mode != "poll" or poll})
    reducer.transport.pop_counts()  # the measurement does not count as communication of a step
    best = min(seconds, key=seconds.__getitem__)
    use(reducer, best)
    compared = ", ".join(f"{mode} {one / seconds['none']:.2f}" for mode, one in seconds.items())
    return f"{best} (measured, relative time of computation and reduction: {compared})"


def measure(reducer: Reducer, comm: MPI.Intracomm, modes: Mapping[str, Wait | None] = OVERLAP_WAITS) -> dict[str, float]:
    """Return {overlap mode: seconds that the slowest rank needs for computation and reduction}. The computation is
    simulated: for every bucket, each rank multiplies matrices for as long as the reduction of a bucket takes. The gradients are
    overwritten, and the reducer is reset. Collective over comm."""
    buckets = [b for b in reducer.buffer.buckets if b.stop * 4 <= PROBE_BYTES] or reducer.buffer.buckets[:1]
    square = torch.randn(256, 256)

    def compute(seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            torch.mm(square, square)

    def slowest(work: Callable[[], None]) -> float:
        comm.Barrier()
        began = time.perf_counter()
        work()
        return comm.allreduce(time.perf_counter() - began, op=MPI.MAX)

    def reduce_all() -> None:
        for bucket in buckets:
            reducer.reduce(bucket)

    def plain(each: float) -> None:
        compute(each * len(buckets))
        reduce_all()

    def overlapped(each: float) -> None:
        worker = ReduceThread(buckets, reducer.reduce)
        for bucket in buckets:
            compute(each)
            worker.submit(bucket)
        worker.wait()
        worker.close()

    slowest(reduce_all)  # warm up: open connections, touch memory
    each = min(slowest(reduce_all) for _ in range(2)) / len(buckets)
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(PROBE_ROUNDS):
        for mode, wait in modes.items():
            reducer.set_wait(wait)
            found[mode].append(slowest(partial(plain if wait is None else overlapped, each)))
    reducer.set_wait(None)
    reducer.load_state_dict({})  # reset the state, which the sums of the measurement have changed
    return {mode: statistics.median(times) for mode, times in found.items()}
