"""Laws of the strategies whose ranks do not wait for each other at every step.

They equal known methods in special cases (staleness 0, plain SGD averaged at every step); at each meeting there is one common
model; a resumed run equals an uninterrupted one; traffic is as documented; non-finite values reach no rank's parameters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import mpidp.train
from mpidp.errors import MpidpError
from mpidp.parallel.engine import Engine
from mpidp.strategies.delayed import Delayed
from mpidp.strategies.local import Local
from mpidp.strategies.server import Server
from tests.tiny import FailedElsewhere, Ran, at, corpus, everywhere, masked_corpus, read_metrics, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.2, "beta1": 0.0, "clip": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
PLAIN = {"name": "local", "outer_lr": 1.0, "outer_momentum": 0.0}  # averages parameters
METHODS: dict[str, dict[str, Any]] = {
    "delayed": {"strategy": {"name": "delayed", "meet_every": 2}},
    "delayed by 3, compensated": {"strategy": {"name": "delayed", "staleness": 3, "compensation": 0.5, "meet_every": 4}},
    "delayed, top 10%": {"strategy": {"name": "delayed", "meet_every": 2}, "comm": {"compress": "topk", "ratio": 0.1}},
    "DiLoCo in 4 bits": {"strategy": {"name": "local", "sync_every": 4}, "comm": {"compress": "int4"}},
    "overlapped, PowerSGD": {
        "strategy": {"name": "local", "sync_every": 2, "meet_every": 6, "overlap": True, "outer_momentum": 0.5},
        "comm": {"compress": "powersgd"},
    },
    "DiLoCo": {"strategy": {"name": "local", "sync_every": 4}},
    "local SGD": {"strategy": {**PLAIN, "sync_every": 2}},
    "overlapped": {"strategy": {"name": "local", "sync_every": 2, "meet_every": 6, "overlap": True, "outer_momentum": 0.5}},
    "in fragments": {
        "strategy": {"name": "local", "sync_every": 4, "meet_every": 8, "fragments": 2}, "comm": {"bucket_mb": 0.01},
    },
    "overlapped fragments": {
        "strategy": {
            "name": "local", "sync_every": 2, "meet_every": 6, "fragments": 2, "overlap": True, "outer_momentum": 0.5,
        },
        "comm": {"bucket_mb": 0.01},
    },
    **{group: {"strategy": {"name": "local", "group": group, "meet_every": 6}} for group in
       ("node", "rotating", "pairs", "exponential")},
}


def with_train(sections: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {**sections, "train": {"save_every": 6, "eval_every": 6, **train}}


def close_to(run: Ran, other: Ran, tolerance: float = 2e-5) -> None:
    assert run.end["val_loss"] == pytest.approx(other.end["val_loss"], rel=tolerance)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_staleness_0_is_synchronous(shared_folder: Path, shared_tmp: Path, n: int) -> None:
    data = corpus(shared_folder)
    late = train_at(n, tiny(data, shared_tmp / "late", strategy={"name": "delayed", "staleness": 0, "meet_every": 1}))
    plain = train_at(n, tiny(data, shared_tmp / "plain", comm={"reducer": "allreduce"}))
    assert late.sha256 == plain.sha256
    assert [line["step"] for line in late.learned] == [line["step"] for line in plain.learned]
    assert late.losses == plain.losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_averaging_sgd_every_step_is_synchronous(shared_folder: Path, shared_tmp: Path, n: int, masked: bool) -> None:
    """Ranks have different numbers of lanes (3 ranks for 8 lanes) or targets (masks): the mean is over tokens, not over ranks'
    means."""
    data = (masked_corpus if masked else corpus)(shared_folder)
    local = train_at(n, tiny(data, shared_tmp / "local", optim=SGD, strategy={**PLAIN, "sync_every": 1}))
    plain = train_at(n, tiny(data, shared_tmp / "plain", optim=SGD))
    close_to(local, plain)
    assert local.losses == pytest.approx(plain.losses, rel=1e-5)


def test_a_group_of_all_is_full_aggregation(shared_folder: Path, shared_tmp: Path) -> None:
    """On ranks with equal numbers of tokens, whose parameters then have equal weights."""
    data = corpus(shared_folder)
    for n, group in ((2, "pairs"), (2, "exponential"), (2, "rotating"), (4, "node"), (4, "rotating")):
        strategy = {"name": "local", "group": group, "sync_every": 1, "meet_every": 6, "group_size": n}
        part = train_at(n, tiny(data, shared_tmp / f"{group}{n}", strategy=strategy))
        full = train_at(n, tiny(data, shared_tmp / f"full{group}{n}", strategy={**PLAIN, "sync_every": 1, "meet_every": 6}))
        close_to(part, full)


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_ends_with_one_model(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", train={"steps": 24, "eval_every": 0}))
    for n in sizes(2, 3, 4) if "PowerSGD" in name else sizes(1, 2, 3, 4):
        config = tiny(data, shared_tmp / f"at{n}", **with_train(METHODS[name], steps=24))
        ends = at(n, lambda comm, config=config: mpidp.train.run(config, comm))
        assert len({end["weights_sha256"] for end in ends}) == 1, f"{n} ranks"
        evaluated = [line for line in read_metrics(config.run.dir) if "val_loss" in line and "event" not in line]
        meet = config.strategy.meet_every or config.strategy.sync_every
        every = -(-6 // meet) * meet  # evaluations wait for a meeting
        assert [line["step"] for line in evaluated] == list(range(every, 25, every)), name
        assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"] < 5.5
        assert ends[0]["tokens"] == whole.end["tokens"], "every token of every rank is counted once"


class Crash(RuntimeError):
    """Simulates a power failure."""


@contextmanager
def crash_in(step: int) -> Iterator[None]:
    """Every rank crashes before its step-th update."""
    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        for kind in (Delayed, Local, Server):
            calls = [0]

            def counted(self: Any, *words: Any, real: Any = kind.step, calls: list[int] = calls) -> Any:
                calls[0] += 1
                if calls[0] == step:
                    raise Crash
                return real(self, *words)

            inside.setattr(kind, "step", counted)
        yield


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_run(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """It crashes some steps after a checkpoint, at which some methods have sums in flight or state on each rank."""
    data, n = corpus(shared_folder), 3
    sections = with_train(METHODS[name], steps=24, lanes=8)
    whole = train_at(n, tiny(data, shared_tmp / "whole", **sections))
    config = tiny(data, shared_tmp / "run", **sections)
    with crash_in(20), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(n, config)
    run = train_at(n, config)
    assert run.events("resume")[0]["step"] in (12, 16, 18)
    assert run.sha256 == whole.sha256 and run.learned == whole.learned


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on_at_another_number_of_ranks(
    shared_folder: Path, shared_tmp: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The run is different, because these methods depend on the number of ranks, but it starts from the common model."""
    data = corpus(shared_folder)
    config = tiny(data, shared_tmp / "run", **with_train(METHODS[name], steps=24))
    with crash_in(20), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(4, config)
    before = [line["val_loss"] for line in read_metrics(config.run.dir) if "val_loss" in line]
    run = train_at(2, config)
    assert run.events("resume") and run.end["step"] == 24 and run.end["val_loss"] < before[0]
    said = "the bits from here on may differ from an uninterrupted run: ranks 4 -> 2"
    everywhere(MPI.COMM_WORLD.rank > 0 or said in capsys.readouterr().out, "the run says that the number of ranks changes it")


def test_bytes_are_those_of_the_averages(shared_folder: Path, shared_tmp: Path) -> None:
    """Every sync_every steps the bytes of a synchronous step, and none between; pairs send one model per step."""
    data, n = corpus(shared_folder), 2

    def sent(folder: str, **strategy: Any) -> list[int]:
        comm = {"reducer": "allreduce", "overlap": "none", "bucket_mb": 0.01}
        config = tiny(data, shared_tmp / folder, comm=comm, strategy=strategy, train={"steps": 12})
        return [line["comm_bytes"] for line in _raw(config, n) if "train_loss" in line]

    (whole,) = set(sent("plain"))
    assert whole > 0
    assert sent("local", **PLAIN, sync_every=4) == [0, 0, 0, whole] * 3
    assert set(sent("pairs", name="local", group="pairs", meet_every=12)) == {whole}
    assert sum(sent("fragments", name="local", sync_every=4, meet_every=12, fragments=2)[:10]) < 3 * whole


def test_a_run_of_fewer_steps_than_sync_every_averages_at_its_end(shared_folder: Path, shared_tmp: Path) -> None:
    """The default of sync_every is 50. Such a run can resume with more steps."""
    data = corpus(shared_folder)
    short = train_at(2, tiny(data, shared_tmp / "short", strategy={"name": "local"}))
    once = train_at(2, tiny(data, shared_tmp / "once", strategy={"name": "local", "sync_every": 6}))
    assert short.sha256 == once.sha256
    longer = train_at(2, tiny(data, shared_tmp / "short", strategy={"name": "local"}, train={"steps": 60, "eval_every": 0}))
    assert longer.events("resume")[0]["step"] == 6 and longer.end["step"] == 60


def test_the_cost_of_the_slowest_rank_is_per_step(shared_folder: Path, shared_tmp: Path) -> None:
    """Reports compare it with the time that one step waits."""
    config = tiny(corpus(shared_folder), shared_tmp / "run", strategy={"name": "local", "sync_every": 3})
    for line in [line for line in _raw(config, 2) if "rank_compute_seconds" in line]:
        one, other = line["rank_compute_seconds"]
        assert line["slowest_cost_seconds"] == pytest.approx(abs(one - other) / 2, abs=2e-6)
        assert line["slowest_rank"] == int(other > one) or one == other


def test_the_speed_at_a_meeting_is_that_of_all_steps_since_the_last(shared_folder: Path, shared_tmp: Path) -> None:
    config = tiny(corpus(shared_folder), shared_tmp / "run", strategy={"name": "local", "sync_every": 3})
    lines = [line for line in _raw(config, 2) if "train_loss" in line]
    for first in (0, 3):
        seconds = sum(line["step_seconds"] for line in lines[first : first + 3])
        tokens = lines[first + 2]["tokens"] - (lines[first - 1]["tokens"] if first else 0)
        assert lines[first + 2]["tokens_per_second"] == pytest.approx(tokens / seconds)


def _raw(config: Any, n: int) -> list[dict[str, Any]]:
    def run(comm: MPI.Intracomm) -> list[dict[str, Any]]:
        mpidp.train.run(config, comm)
        comm.Barrier()
        return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]

    return list(at(n, run)[0])


@contextmanager
def spoiled(rank: int, batches: Container[int]) -> Iterator[None]:
    """Make this rank's losses in these batches non-finite."""
    real = Engine._forward

    def learn(self: Engine, mb: Any, batch: int, chunk: int) -> Any:
        if MPI.COMM_WORLD.rank == rank and batch in batches:
            plain = self.loss_sum
            self.loss_sum = lambda *what: plain(*what) * math.nan  # type: ignore[method-assign]
            try:
                return real(self, mb, batch, chunk)
            finally:
                del self.loss_sum
        return real(self, mb, batch, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_forward", learn)
        yield


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_reaches_nobody(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """The tokens of all updates are counted, also if a skipped batch (batch 11 of `delayed`) would have ended at a meeting. The
    skipped batches are named, also the last one, which `delayed` skips after the last step."""
    data = corpus(shared_folder, 12000)  # longer than the run, so that all batches have the same number of tokens
    config = tiny(data, shared_tmp / "run", **with_train(METHODS[name], steps=24, max_skipped=9))
    with spoiled(1, {3, 4, 5, 11, 27}):
        run = train_at(3, config)
    assert math.isfinite(run.end["val_loss"])
    skipped = [3, 4, 5, 11, 27] if name.startswith("delayed") else []
    assert [event["batch"] for event in run.events("skipped")] == skipped and run.end["skipped"] == len(skipped)
    assert run.end["tokens"] == (23 if skipped else 24) * 16 * 16


def test_a_batch_in_flight_at_a_checkpoint_is_skipped_again_and_logged_once(shared_folder: Path, shared_tmp: Path) -> None:
    """The run crashes after batch 5 was skipped. It resumes from step 6, at which the gradient of batch 5 was in flight."""
    data = corpus(shared_folder)
    with spoiled(0, {5}):
        whole, config = (tiny(data, shared_tmp / name, **with_train(METHODS["delayed"], steps=12)) for name in ("whole", "run"))
        with crash_in(8), pytest.raises(FailedElsewhere, match="Crash"):
            train_at(2, config)
        run, uninterrupted = train_at(2, config), train_at(2, whole)
    assert run.events("resume")[0]["step"] == 6 and run.sha256 == uninterrupted.sha256
    assert [event["batch"] for event in run.events("skipped")] == [5] and run.learned == uninterrupted.learned


DELAYED: dict[str, Any] = {"optim": {"schedule": "constant"}, "strategy": {"name": "delayed", "meet_every": 2, "staleness": 2}}


def test_the_last_evaluation_follows_the_last_update(shared_folder: Path, shared_tmp: Path) -> None:
    """Also if an evaluation is due at the last step."""
    data = corpus(shared_folder)
    ends = [train_at(2, tiny(data, shared_tmp / str(every), **DELAYED, train={"eval_every": every})).end for every in (0, 2)]
    assert ends[0] == ends[1]


def test_a_run_that_ends_early_evaluates_the_weights_that_it_saves(shared_folder: Path, shared_tmp: Path) -> None:
    """The gradients in flight are applied after the evaluation at which the run ends. The run is then evaluated again."""
    data = corpus(shared_folder)
    early = train_at(2, tiny(data, shared_tmp / "early", **DELAYED, train={"eval_every": 2, "target_loss": 100.0}))
    planned = train_at(2, tiny(data, shared_tmp / "planned", **DELAYED, train={"eval_every": 0, "steps": 2}))
    assert (early.end["reason"], early.end["step"]) == ("target_loss", 2)
    assert early.sha256 == planned.sha256 and early.end["val_loss"] == planned.end["val_loss"]


def test_a_run_that_resumes_at_its_last_step_applies_what_is_in_flight(shared_folder: Path, shared_tmp: Path) -> None:
    data, train = corpus(shared_folder), {"save_every": 4, "eval_every": 4}
    short = train_at(2, tiny(data, shared_tmp / "short", **DELAYED, train=train | {"steps": 4}))
    with crash_in(6), pytest.raises(FailedElsewhere, match="Crash"):
        train_at(2, tiny(data, shared_tmp / "run", **DELAYED, train=train | {"steps": 8}))
    run = train_at(2, tiny(data, shared_tmp / "run", **DELAYED, train=train | {"steps": 4}))
    assert run.events("resume")[0]["step"] == 4
    assert run.sha256 == short.sha256


def test_when_nobody_learns_it_is_said(shared_folder: Path, shared_tmp: Path) -> None:
    config = tiny(corpus(shared_folder), shared_tmp / "run", strategy={"name": "local", "sync_every": 2})
    with spoiled(0, range(9)), pytest.raises(MpidpError, match="no rank has made an update for"):
        train_at(1, config)
