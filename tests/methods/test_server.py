"""Laws of the parameter server: in mode sync it equals `root` on as many workers, for any number of servers; with one worker it
equals one process; servers compute no gradients, workers keep no optimizer state, and nothing non-finite is applied."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import mpidp.train
from mpidp.errors import UsageError
from mpidp.strategies.server import Server
from tests.methods.test_rhythms import crash_in, spoiled
from tests.tiny import FailedElsewhere, Ran, at, corpus, job_at, masked_corpus, read_metrics, sizes, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi


def serving(data: Path, run: Path, mode: str, servers: int = 1, /, **train: Any) -> Any:
    strategy = {"name": "server", "mode": mode, "servers": servers, "meet_every": 3}
    return tiny(data, run, strategy=strategy, train={"save_every": 6, "eval_every": 6, **train})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_in_step_it_is_root(shared_folder: Path, shared_tmp: Path, workers: int, masked: bool) -> None:
    data = (masked_corpus if masked else corpus)(shared_folder)
    with small_blocks():
        root = train_at(workers, tiny(data, shared_tmp / "root", comm={"reducer": "root"}, train={"steps": 9}))
        for servers in (1, 2, 3):
            if workers + servers <= MPI.COMM_WORLD.size:
                run = train_at(workers + servers, serving(data, shared_tmp / str(servers), "sync", servers, steps=9))
                assert run.sha256 == root.sha256, f"{servers} servers"
                assert run.end["tokens"] == root.end["tokens"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_one_worker_and_one_server_are_one_process(shared_folder: Path, shared_tmp: Path, mode: str, masked: bool) -> None:
    """A loss mask does not lower the learning rate."""
    data = (masked_corpus if masked else corpus)(shared_folder)
    alone = train_at(1, tiny(data, shared_tmp / "alone", comm={"reducer": "allreduce"}))
    assert train_at(2, serving(data, shared_tmp / "two", mode)).sha256 == alone.sha256


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_it_learns_and_ends_with_one_model(shared_folder: Path, shared_tmp: Path, mode: str) -> None:
    data = corpus(shared_folder)
    for n in sizes(3, 4):
        config = serving(data, shared_tmp / f"at{n}", mode, n - 2, steps=24)
        ends = at(n, lambda comm, config=config: mpidp.train.run(config, comm))
        assert len({end["weights_sha256"] for end in ends}) == 1
        losses = [line["val_loss"] for line in read_metrics(config.run.dir) if "val_loss" in line and "event" not in line]
        assert len(losses) == 4 and losses[-1] < losses[0] < 5.5


def test_who_holds_what(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)

    def look(comm: MPI.Intracomm) -> tuple[bool, int, int]:
        job = job_at(comm, serving(data, shared_tmp, "sync"))
        lanes = len(job.balance.ranges[comm.rank])
        return job.strategy.optimizer is not None, lanes, len(job.strategy.state_dict())

    *workers, server = at(3, look)
    assert [w[0] for w in workers] == [False, False] and server[0]
    assert [w[1] for w in workers] == [4, 4] and server[1] == 0
    assert [w[2] for w in workers] == [1, 1] and server[2] > 2


def _finished(run: Ran) -> None:
    assert run.end["step"] == 24 and math.isfinite(run.end["val_loss"])


def test_in_step_it_goes_on_with_other_servers(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    with small_blocks():
        whole = train_at(3, serving(data, shared_tmp / "whole", "sync", 1, steps=24))
        config = serving(data, shared_tmp / "run", "sync", 2, steps=24)
        with crash_in(20), pytest.raises(FailedElsewhere, match="Crash"):
            train_at(4, config)
        run = train_at(3, serving(data, shared_tmp / "run", "sync", 1, steps=24))
    assert run.events("resume")[0]["step"] == 18
    assert run.sha256 == whole.sha256 and run.end["tokens"] == whole.end["tokens"]


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_it_goes_on(shared_folder: Path, shared_tmp: Path, mode: str) -> None:
    """The order of arrivals differs each time, so the run is different, but it starts from the common model."""
    data = corpus(shared_folder)
    with crash_in(20), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(4, serving(data, shared_tmp / "run", mode, 2, steps=24))
    run = train_at(3, serving(data, shared_tmp / "run", mode, 1, steps=24))
    _finished(run)
    assert run.events("resume")[0]["step"] == 18


@pytest.mark.parametrize("mode", ["sync", "async", "ssp"])
def test_what_is_not_finite_is_not_applied(shared_folder: Path, shared_tmp: Path, mode: str) -> None:
    config = serving(corpus(shared_folder), shared_tmp / "run", mode, 1, steps=24, max_skipped=9)
    with spoiled(1, range(3, 6)):
        run = train_at(3, config)
    _finished(run)
    assert run.end["skipped"] == (3 if mode == "sync" else 0)


@pytest.mark.parametrize("staleness", [0, 2])
def test_nobody_is_further_ahead_than_the_bound(shared_folder: Path, shared_tmp: Path, staleness: int) -> None:
    strategy = {"name": "server", "mode": "ssp", "staleness": staleness, "meet_every": 24, "servers": 1}
    config = tiny(corpus(shared_folder), shared_tmp / "run", strategy=strategy, train={"steps": 24, "save_every": 0})
    ahead: list[int] = []
    real = Server._answer

    def answer(self: Server, worker: int, stats: Any, parameters: bool) -> None:
        if parameters:  # otherwise it is the last batch, followed by a meeting
            ahead.append(self._clocks[worker] - min(self._clocks))
        real(self, worker, stats, parameters)

    def run(comm: MPI.Intracomm) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Server, "_answer", answer)
            mpidp.train.run(config, comm)
        return ahead

    found = at(4, run)[3]
    assert len(found) == 3 * 23 and max(found) <= staleness


@pytest.mark.parametrize("mode", ["async", "ssp"])
@pytest.mark.parametrize("servers", [1, 2])
def test_the_same_order_of_arrivals_is_the_same_run(shared_folder: Path, shared_tmp: Path, mode: str, servers: int) -> None:
    """Also for a resumed run, whose order is in the same file."""
    data, n = corpus(shared_folder), 2 + servers
    config = serving(data, shared_tmp / "first", mode, servers, steps=12)
    with crash_in(8), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(n, config)
    first = train_at(n, config)
    again = serving(data, shared_tmp / "again", mode, servers, steps=12)
    again = again.with_values(strategy={"replay": str(shared_tmp / "first/metrics.jsonl")})
    run = train_at(n, again)
    assert run.sha256 == first.sha256 and run.learned == first.learned
    orders = [line["arrivals"] for line in run.learned if "arrivals" in line]
    assert len(orders) == 4 and all(sorted(one) == [0, 0, 0, 1, 1, 1] for order in orders for one in order)


def test_an_order_of_other_workers_is_refused(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    train_at(3, serving(data, shared_tmp / "first", "async", 1))
    again = serving(data, shared_tmp / "again", "async", 1)
    for log, said in (("first/metrics.jsonl", "that run had 2 workers and 1 servers"), ("none.jsonl", "cannot be read")):
        with pytest.raises(UsageError, match=said):
            train_at(4, again.with_values(strategy={"replay": str(shared_tmp / log)}))


def test_more_servers_than_ranks(shared_folder: Path, shared_tmp: Path) -> None:
    with pytest.raises(UsageError, match="strategy.servers=2, but the job has 2 ranks, so no rank remains to compute gradients"):
        train_at(2, serving(corpus(shared_folder), shared_tmp / "run", "async", 2))
