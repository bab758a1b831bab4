"""Law: a run that was stopped, crashed or damaged, and was resumed on other numbers of ranks, has the same bits and log lines as
an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import mpidp.train
from mpidp.checkpoint.manifest import committed
from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config
from mpidp.errors import MpidpError, Stopped, UsageError
from mpidp.metrics.jsonl import MetricsFile
from mpidp.strategies.synchronous import Synchronous
from mpidp.training import run_record
from tests.registries import OPTIMIZERS
from tests.tiny import WORLD, FailedElsewhere, Ran, at, corpus, everywhere, read_metrics, tiny, train_at

pytestmark = pytest.mark.mpi
SECTIONS: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "train": {"steps": 10, "save_every": 2, "eval_every": 3, "eval_tokens": 0},
}


def ranks(n: int) -> int:
    """Return n, or the number of available ranks."""
    return min(n, WORLD.size)


def during_step(step: int, do: Callable[[Synchronous], None]) -> pytest.MonkeyPatch:
    """Patch that calls do(strategy) on every rank before the update of the step-th step from now."""
    patch, calls, real = pytest.MonkeyPatch(), 0, Synchronous.step

    def counted(self: Synchronous, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            do(self)
        return real(self, *arguments)

    patch.setattr(Synchronous, "step", counted)
    return patch


class Crash(RuntimeError):
    """Raised to simulate a power failure."""


def crash(strategy: Synchronous) -> None:
    raise Crash


def crashed_in(step: int, n: int, config: Config) -> None:
    """Train on n ranks and crash in the step-th step of this attempt."""
    patch = during_step(step, crash)
    try:
        with pytest.raises(FailedElsewhere, match="Crash"):
            train_at(n, config)
    finally:
        patch.undo()


def stopped_after(step: int, n: int, config: Config) -> None:
    """Train on n ranks until `step`. A file STOP, which is written after the line of the step before, stops the run."""
    stop = Path(config.run.dir) / "STOP"

    class Watched(MetricsFile):
        def write(self, record: Any) -> None:
            super().write(record)
            if record["step"] == step - 1 and "train_loss" in record:
                stop.touch()

    def run(comm: MPI.Intracomm) -> tuple[int, bool, str]:
        with pytest.raises(Stopped) as caught:
            mpidp.train.run(config, comm)
        return caught.value.exit_code, caught.value.everywhere, str(caught.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_record, "MetricsFile", Watched)
        said = at(n, run)
    assert said == [(75, True, said[0][2])] * n  # alike on every rank
    assert f"at step {step}" in said[0][2] and "STOP" in said[0][2]
    everywhere(not stop.exists(), "the file is taken away, it was obeyed")


def equal(run: Ran, whole: Ran, resumed_at: list[int]) -> None:
    assert [line["step"] for line in run.events("resume")] == resumed_at
    assert run.learned == whole.learned
    assert run.end == whole.end and run.events("end") == [run.end]
    assert run.lines == [line for line in run.lines if line.get("event") in (None, "resume", "end", "skipped")]


def equal_checkpoints(one: str, other: str) -> None:
    """Assert that the newest checkpoints of two runs have equal bits: parameters, optimizer, position."""
    ours, theirs = (Reader(committed(Path(run) / "checkpoints")[0]) for run in (one, other))
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert (ours.meta["position"], ours.meta["end"]) == (theirs.meta["position"], theirs.meta["end"])


def test_stopped_and_crashed_and_gone_on_at_other_numbers_of_ranks(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    whole = train_at(ranks(2), tiny(data, shared_tmp / "whole", **SECTIONS))
    config = tiny(data, shared_tmp / "run", **SECTIONS)
    stopped_after(3, ranks(4), config)
    crashed_in(5, ranks(3), config)  # in step 8: step 7 is logged, the newest checkpoint is step 6
    assert max(line["step"] for line in read_metrics(config.run.dir)) == 7
    if WORLD.rank == 0:
        with open(shared_tmp / "run/metrics.jsonl", "a") as file:
            file.write('{"step": 7, "train_lo')  # an incomplete line
    WORLD.Barrier()
    stopped_after(9, 1, config)
    run = train_at(ranks(8), config)
    equal(run, whole, resumed_at=[3, 6, 9])
    equal_checkpoints(config.run.dir, str(shared_tmp / "whole"))
    steps = [line["step"] for line in run.lines if "train_loss" in line]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])  # the default, in all other tests
def test_every_optimizers_state_goes_along(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    data = corpus(shared_folder)
    sections = {**SECTIONS, "optim": {"name": name}, "train": {**SECTIONS["train"], "steps": 6}}
    whole = train_at(1, tiny(data, shared_tmp / "whole", **sections))
    config = tiny(data, shared_tmp / "run", **sections)
    crashed_in(4, ranks(3), config)
    equal(train_at(ranks(2), config), whole, resumed_at=[2])


@pytest.mark.parametrize("kind", ["allreduce", "naive", "root"])
def test_other_reducers_go_on_at_the_same_number_of_ranks(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data = corpus(shared_folder)
    sections = {**SECTIONS, "comm": {"reducer": kind}, "train": {**SECTIONS["train"], "steps": 6}}
    whole = train_at(ranks(3), tiny(data, shared_tmp / "whole", **sections))
    config = tiny(data, shared_tmp / "run", **sections)
    crashed_in(6, ranks(3), config)
    equal(train_at(ranks(3), config), whole, resumed_at=[4])


def test_a_damaged_checkpoint_is_passed_over(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", **SECTIONS))
    config = tiny(data, shared_tmp / "run", **SECTIONS)
    crashed_in(8, ranks(4), config)
    if WORLD.rank == 0:
        file = shared_tmp / "run/checkpoints/step_00000006/rank_00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    WORLD.Barrier()
    equal(train_at(ranks(2), config), whole, resumed_at=[4])


def test_patience_is_remembered(shared_folder: Path, shared_tmp: Path) -> None:
    """With a learning rate of 0 no evaluation is better than the first."""
    data = corpus(shared_folder)
    sections = {"optim": {"lr": 0.0}, "train": {"steps": 20, "eval_every": 1, "patience": 4}}
    whole = train_at(ranks(2), tiny(data, shared_tmp / "whole", **sections))
    assert (whole.end["step"], whole.end["reason"]) == (5, "patience")
    config = tiny(data, shared_tmp / "run", **sections)
    stopped_after(3, ranks(3), config)
    equal(train_at(1, config), whole, resumed_at=[3])


def test_a_target_is_reached_after_a_restart_too(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    free = train_at(1, tiny(data, shared_tmp / "free", train={"steps": 8, "eval_every": 1}))
    target = [line["val_loss"] for line in free.lines if "val_loss" in line][4]
    sections = {"train": {"steps": 8, "eval_every": 1, "target_loss": target}}
    whole = train_at(1, tiny(data, shared_tmp / "whole", **sections))
    assert (whole.end["step"], whole.end["reason"], whole.end["val_loss"]) == (5, "target_loss", target)
    config = tiny(data, shared_tmp / "run", **sections)
    stopped_after(2, ranks(3), config)
    equal(train_at(ranks(2), config), whole, resumed_at=[2])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_any_rank_stops_all(shared_folder: Path, shared_tmp: Path, number: signal.Signals) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", **SECTIONS))
    config = tiny(data, shared_tmp / "run", **SECTIONS)
    before = [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]

    def hit(strategy: Synchronous) -> None:
        if strategy.compute_comm.rank == strategy.compute_comm.size - 1:
            os.kill(os.getpid(), number)

    patch = during_step(4, hit)
    try:
        with pytest.raises(Stopped, match=f"{number.name}.*at step 5"):
            train_at(ranks(3), config)
    finally:
        patch.undo()
    after = [signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    everywhere(before == after, "the signals are given back")
    equal(train_at(ranks(4), config), whole, resumed_at=[5])


def test_stopped_before_the_first_line(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", **SECTIONS))
    config = tiny(data, shared_tmp / "run", **SECTIONS)
    if WORLD.rank == 0:
        (shared_tmp / "run").mkdir()
        (shared_tmp / "run/STOP").touch()
    WORLD.Barrier()
    with pytest.raises(Stopped, match="at step 1"):
        train_at(ranks(2), config)
    equal(train_at(ranks(3), config), whole, resumed_at=[1])


def test_crashed_before_the_first_checkpoint_begins_anew(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    whole = train_at(1, tiny(data, shared_tmp / "whole", **SECTIONS))
    config = tiny(data, shared_tmp / "run", **SECTIONS)
    crashed_in(2, ranks(2), config)
    run = train_at(ranks(3), config)
    equal(run, whole, resumed_at=[])
    assert run.lines == whole.lines


def test_an_ended_run_has_nothing_left_to_do_until_it_is_given_more(shared_folder: Path, shared_tmp: Path) -> None:
    """With a constant learning rate, training N steps and then M more equals training N + M steps at once."""
    data = corpus(shared_folder)

    def config(name: str, steps: int) -> Config:
        sections = {"optim": {"schedule": "constant", "warmup_steps": 2}, "model": {"dropout": 0.1}}
        return tiny(data, shared_tmp / name, train={"steps": steps, "save_every": 2}, **sections)

    first = train_at(ranks(3), config("run", 6))
    content = (shared_tmp / "run/metrics.jsonl").read_bytes()
    again = train_at(ranks(2), config("run", 6))
    assert again.end == first.end and (shared_tmp / "run/metrics.jsonl").read_bytes() == content
    whole = train_at(1, config("whole", 9))
    equal(train_at(ranks(4), config("run", 9)), whole, resumed_at=[6])


def test_what_must_not_change_is_refused_on_all_ranks(shared_folder: Path, shared_tmp: Path) -> None:
    data, run = corpus(shared_folder), shared_tmp / "run"
    first = train_at(ranks(2), tiny(data, run))
    content = (run / "metrics.jsonl").read_bytes()
    for sections, named in [
        ({"train": {"seed": 5}}, "train.seed was 1337 and is now 5"), ({"train": {"micro_batch": 4}}, "train.micro_batch was 2"),
        ({"model": {"num_layers": 3}}, "model.num_layers was 2 and is now 3"), ({"optim": {"name": "sgd"}}, "optim.name"),
    ]:
        with pytest.raises(UsageError, match=named):
            train_at(ranks(2), tiny(data, run, **sections))
    with pytest.raises(UsageError, match="is not the data"):
        train_at(ranks(2), tiny(corpus(shared_folder, tokens=1500), run))
    everywhere((run / "metrics.jsonl").read_bytes() == content, "what was recorded is left alone")  # before any rank continues
    anew = train_at(ranks(3), tiny(data, run, run={"resume": "never"}))
    assert anew.lines == first.lines and (run / "previous_1/metrics.jsonl").read_bytes() == content


def test_must_needs_a_checkpoint(shared_folder: Path, shared_tmp: Path) -> None:
    with pytest.raises(MpidpError, match="resume=must") as caught:
        train_at(ranks(2), tiny(corpus(shared_folder), shared_tmp / "run", run={"resume": "must"}))
    assert caught.value.exit_code == 4


def test_two_jobs_do_not_share_a_folder(shared_folder: Path, shared_tmp: Path) -> None:
    config = tiny(corpus(shared_folder), shared_tmp / "run")
    if WORLD.rank == 0:
        (shared_tmp / "run").mkdir()
        (shared_tmp / "run/lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    WORLD.Barrier()
    with pytest.raises(UsageError, match="in use by process "):
        train_at(ranks(3), config)
    everywhere((shared_tmp / "run/lock").exists(), "the other's lock is left alone")
