"""Laws of the quorum: with all ranks it equals `synchronous`; each contribution is summed once, however late; a late rank delays
no other and is at most `staleness` rounds late; the same arrivals give the same run; non-finite gradients are skipped on all
ranks."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import mpidp.strategies.quorum
import mpidp.train
from mpidp.config.schema import Config
from mpidp.errors import MpidpError, UsageError
from mpidp.faults.audit import checksum
from mpidp.strategies.quorum import Quorum, Round
from tests.methods.test_rhythms import spoiled
from tests.tiny import FailedElsewhere, Ran, at, corpus, masked_corpus, read_metrics, sizes, tiny, train_at

pytestmark = pytest.mark.mpi

def long_corpus(folder: Path) -> Path:
    """A corpus longer than the run, so that no batch has empty lanes."""
    return corpus(folder, 12000)


def quorum(data: Path, run: Path, q: float = 0.5, /, comm: dict[str, Any] | None = None, **strategy: Any) -> Config:
    train = {"steps": 12, "save_every": 4, "eval_every": 4}
    return tiny(data, run, strategy={"quorum": q, "meet_every": 4, **strategy}, train=train, comm=comm or {})


@contextmanager
def patched(**methods: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, method in methods.items():
            patch.setattr(Quorum, name, method)
        yield


@contextmanager
def late(rank: int, until: float = math.inf) -> Iterator[None]:
    """In every step up to `until` that is not a meeting, delay this rank as long as possible: it continues only when as many
    rounds were summed without it as its staleness allows. This depends on events, not on the clock. An empty round would wait for
    it."""
    real = Quorum.micro_batch

    @contextmanager
    def waits(self: Quorum, v: int, last: bool, *chunk: int) -> Iterator[None]:
        with real(self, v, last, *chunk):
            yield
        step = self._steps + 1
        meeting = next(one for one in itertools.count(step) if self.synchronizes_at(one))
        if last and self.compute_comm.rank == rank and step <= until:
            while self._summed.qsize() < min(self.options.staleness, meeting - step):
                time.sleep(0.001)
            time.sleep(0.02)  # time in which others could go too far

    with patched(micro_batch=waits):
        yield


def arrivals_of(run: Ran) -> list[list[list[int]]]:
    return [line["arrivals"] for line in run.learned if "arrivals" in line]


def lateness(rounds: list[list[int]], rank: int) -> list[int]:
    """Return by how many rounds each contribution of the rank is late."""
    found = [i for i, joined in enumerate(rounds) for one in joined if one == rank]
    return [i - batch for batch, i in enumerate(found)]


class Crash(RuntimeError):
    """Simulates a power failure."""


@contextmanager
def crash_in(step: int) -> Iterator[None]:
    """Every rank crashes before its step-th update, with its thread."""
    calls, real = [0], Quorum.step

    def counted(self: Quorum, *words: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            self._closing = True
            raise Crash
        return real(self, *words)

    with patched(step=counted):
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reducer", ["allreduce", "naive"])
def test_with_everybody_in_it_is_synchronous(shared_folder: Path, shared_tmp: Path, reducer: str, masked: bool) -> None:
    """Also if ranks have different numbers of lanes or targets: the mean is over tokens."""
    data, comm = (masked_corpus if masked else corpus)(shared_folder), {"reducer": reducer}
    for n in sizes(1, 2, 3):
        plain = quorum(data, shared_tmp / f"plain{n}", comm=comm).with_values(strategy={"quorum": 1.0}, comm={"overlap": "poll"})
        plain = train_at(n, plain)  # with the same MPI call
        full = train_at(n, quorum(data, shared_tmp / f"full{n}", 0.9999, comm=comm))
        assert full.sha256 == plain.sha256 and full.end["tokens"] == plain.end["tokens"], f"{n} ranks"
        (arrivals, behind), = {(str(line["arrivals"]), line["late_lanes"]) for line in full.learned if "arrivals" in line}
        assert arrivals == str([list(range(n))] * 4) and behind == 0


@pytest.mark.parametrize(("n", "slow", "staleness"), [(2, 1, 1), (2, 0, 2), (3, 1, 3), (4, 0, 1), (4, 3, 2)])
def test_nothing_is_dropped_and_nobody_waits(shared_folder: Path, shared_tmp: Path, n: int, slow: int, staleness: int) -> None:
    """The sum over rounds equals the sum of the contributions; replicas at the same step hold the same bits; the other ranks
    continue without the late rank up to the bound."""
    if n > MPI.COMM_WORLD.size:
        pytest.skip("too few ranks")
    config = quorum(long_corpus(shared_folder), shared_tmp / "run", staleness=staleness, meet_every=6)
    given, summed, weights = torch.zeros(0), torch.zeros(0), list[int]()
    step, apply = Quorum.step, Quorum._apply

    def gives(self: Quorum, lr: float, tokens: int, *limit: float) -> Any:
        nonlocal given
        weights.append(checksum(self.flat))
        mine = torch.cat([self.buffer.flat[self._slot].double(), torch.tensor([float(tokens)])])
        given = given + mine if len(given) else mine
        return step(self, lr, tokens, *limit)

    def sums(self: Quorum, lr: float, found: Round, limit: float) -> Any:
        nonlocal summed
        what = torch.cat([self.buffer.flat[found.slot].double(), torch.tensor([found.tokens])])
        summed = summed + what if len(summed) else what
        return apply(self, lr, found, limit)

    def run(comm: MPI.Intracomm) -> tuple[Any, Any, list[int], str]:
        end = mpidp.train.run(config, comm)
        assert end is not None
        return given.numpy(), summed.numpy(), weights, end["weights_sha256"]

    with patched(step=gives, _apply=sums), late(slow):
        ranks = at(n, run)
    whole = sum(one for one, *_ in ranks)
    assert whole[-1] == ranks[0][1][-1] > 0, "target tokens"
    assert abs(whole - ranks[0][1]).max() < 1e-5 * abs(whole[:-1]).max()
    assert len({tuple(each) for _, _, each, _ in ranks}) == 1 and len({sha for *_, sha in ranks}) == 1
    orders = [line["arrivals"] for line in read_metrics(config.run.dir) if "arrivals" in line]
    assert len(orders) == 2
    for rounds in orders:
        assert sorted(itertools.chain(*rounds)) == sorted(6 * list(range(n))), "each contribution once"
        behind = {rank: lateness(rounds, rank) for rank in range(n)}
        assert all(0 <= one <= staleness for each in behind.values() for one in each)
        assert behind[slow] == [min(staleness, 5 - batch) for batch in range(6)]
    if n == 2 and staleness == 1:
        assert orders == 2 * [[[0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1, 1]]]


def test_the_same_arrivals_are_the_same_run(shared_folder: Path, shared_tmp: Path) -> None:
    """The log of a resumed run is replayed by a run that is itself resumed. In the replay no rank, or another rank, is slow."""
    data, n = long_corpus(shared_folder), min(3, MPI.COMM_WORLD.size)
    config = quorum(data, shared_tmp / "first")
    with late(1, until=6), crash_in(7), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(n, config)
    with late(1):
        first = train_at(n, config)
    assert first.events("resume")[0]["step"] == 4 and [] not in arrivals_of(first)
    assert all(1 not in rounds[0] for rounds in arrivals_of(first)), "nobody was late"
    again = quorum(data, shared_tmp / "again").with_values(strategy={"replay": str(shared_tmp / "first/metrics.jsonl")})
    with crash_in(11), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(n, again)
    run = train_at(n, again)
    assert run.events("resume")[0]["step"] == 8
    assert run.sha256 == first.sha256 and run.learned == first.learned
    other = train_at(n, quorum(data, shared_tmp / "other", 0.9999))
    assert other.sha256 != first.sha256


@pytest.mark.parametrize("batches", [range(3, 6), range(5, 6)], ids=str)
def test_what_is_not_finite_is_skipped_by_all(shared_folder: Path, shared_tmp: Path, batches: range) -> None:
    """Also at a meeting (batch 3), and in a replay."""
    data, n = long_corpus(shared_folder), min(3, MPI.COMM_WORLD.size)
    config = quorum(data, shared_tmp / "first")
    with spoiled(1, batches), late(1):
        ends = at(n, lambda comm: mpidp.train.run(config, comm))
    assert len({end["weights_sha256"] for end in ends}) == 1
    assert ends[0]["skipped"] == len(batches) and ends[0]["step"] == 12 and math.isfinite(ends[0]["val_loss"])
    assert ends[0]["tokens"] == 12 * 16 * 16, "the tokens of all updates"
    again = quorum(data, shared_tmp / "again").with_values(strategy={"replay": str(shared_tmp / "first/metrics.jsonl")})
    with spoiled(1, batches):
        assert train_at(n, again).sha256 == ends[0]["weights_sha256"]


def test_all_end_at_the_same_batch_with_something_in_flight(shared_folder: Path, shared_tmp: Path) -> None:
    """Contributions in flight do not affect later runs."""
    data, n = long_corpus(shared_folder), min(3, MPI.COMM_WORLD.size)
    config, before = quorum(data, shared_tmp / "bad").with_values(train={"max_skipped": 2}), threading.active_count()
    with spoiled(0, range(9)), late(1), pytest.raises(MpidpError, match="2 batches in a row, up to batch 1"):
        train_at(n, config)
    assert threading.active_count() == before
    assert train_at(n, quorum(data, shared_tmp / "good")).end["step"] == 12


@pytest.mark.parametrize("compress", ["none", "topk", "int8"])
def test_it_learns_and_ends_with_one_model(shared_folder: Path, shared_tmp: Path, compress: str) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", train={"steps": 24, "eval_every": 0}))
    for n in sizes(1, 2, 3, 4) if compress == "none" else sizes(3):
        config = quorum(data, shared_tmp / f"at{n}", comm={"compress": compress}).with_values(train={"steps": 24})
        ends = at(n, lambda comm, config=config: mpidp.train.run(config, comm))
        assert len({end["weights_sha256"] for end in ends}) == 1, f"{n} ranks"
        losses = [line["val_loss"] for line in read_metrics(config.run.dir) if "val_loss" in line and "event" not in line]
        assert len(losses) == 6 and losses[-1] < losses[0] < 5.5
        assert ends[0]["tokens"] == whole.end["tokens"], "every token of every rank is counted once"


def test_an_order_of_another_run_is_refused(shared_folder: Path, shared_tmp: Path) -> None:
    data, n = long_corpus(shared_folder), min(3, MPI.COMM_WORLD.size)
    plain = train_at(n, quorum(data, shared_tmp / "plain", 0.9999))
    assert plain.end["step"] == 12
    log = str(shared_tmp / "plain/metrics.jsonl")

    def refused(ranks: int, **strategy: Any) -> str:
        config = quorum(data, shared_tmp / "again").with_values(strategy={"replay": log, **strategy})
        with pytest.raises(UsageError) as caught:
            train_at(ranks, config)
        return str(caught.value)

    assert "had more ranks than this run" in refused(n - 1)
    assert "did not synchronize at step 3" in refused(n, meet_every=3)
    assert "cannot be read" in refused(n, replay="none.jsonl")


def test_it_needs_threads_that_may_call_mpi(shared_folder: Path, shared_tmp: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpidp.strategies.quorum.MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
        with pytest.raises(UsageError, match="MPI_THREAD_MULTIPLE"):
            train_at(2, quorum(long_corpus(shared_folder), shared_tmp / "run"))
