"""Law: if the gradient of one lane is not finite, or much larger than usual, all ranks skip the batch. After too many skipped
batches in a row, the run equals a run in which all batches since the last checkpoint were skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpidp.train
from mpidp.checkpoint.manifest import committed
from mpidp.data.loader import Batch, MicroBatch
from mpidp.errors import MpidpError, Stopped
from mpidp.parallel.engine import Computed, Engine
from mpidp.strategies.synchronous import Synchronous
from tests.tiny import WORLD, FailedElsewhere, Ran, at, corpus, masked_corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi


@contextmanager
def spoilt(bad: Callable[[int, int], bool], factor: float) -> Iterator[None]:
    """Multiply the gradient of micro-batch v of batch b by factor if bad(b, v), on the rank that computes it. If the factor is
    not finite, multiply the loss, too."""
    real_run, real_loss, number = Engine.run, Engine.loss_sum, -1

    def run(self: Engine, schedule: Any, batch: Batch, strategy: Any) -> Computed:
        nonlocal number
        number = batch.batch
        return real_run(self, schedule, batch, strategy)

    def loss_sum(self: Engine, mb: MicroBatch, key: torch.Tensor | None) -> torch.Tensor:
        loss = real_loss(self, mb, key)
        if self.model.training and bad(number, mb.v):
            return (loss - loss.detach()) * factor + loss.detach()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", run)
        patch.setattr(Engine, "loss_sum", loss_sum)
        yield


BAD = {(2, 5), (3, 0), (5, 7)}
SECTIONS: dict[str, Any] = {"model": {"dropout": 0.1}, "train": {"steps": 8, "save_every": 2, "max_skipped": 3}}


@pytest.mark.parametrize("factor", [math.nan, math.inf, 3e38])
def test_the_batch_is_skipped_on_all_ranks_alike(shared_folder: Path, shared_tmp: Path, factor: float) -> None:
    data = corpus(shared_folder)
    with spoilt(lambda batch, v: (batch, v) in BAD, factor):
        runs = [train_at(n, tiny(data, shared_tmp / str(n), **SECTIONS)) for n in sizes(1, 2, 4, 8)]
    alone = runs[0]
    for run in runs[1:]:
        assert (run.sha256, run.lines) == (alone.sha256, alone.lines)
    assert [(line["step"], line["batch"], line["grad_norm"]) for line in alone.events("skipped")] == [
        (2, 2, None), (2, 3, None), (3, 5, None),
    ]
    assert alone.end["skipped"] == 3 and alone.end["step"] == 8 == len(alone.losses)
    assert [line["skipped"] for line in alone.lines if "train_loss" in line] == [0, 0, 2, 3, 3, 3, 3, 3]
    untouched = train_at(1, tiny(data, shared_tmp / "untouched", **SECTIONS))
    assert untouched.losses[:2] == alone.losses[:2] and untouched.losses[2] != alone.losses[2]
    assert all(math.isfinite(loss) for loss in alone.losses)


def test_the_next_batch_is_learned_from_as_if_the_bad_one_had_not_been(shared_folder: Path, shared_tmp: Path) -> None:
    """Two runs that skip the same batch because of different micro-batches are equal."""
    data, hashes = corpus(shared_folder), set()
    for v in (0, 4, 7):
        with spoilt(lambda batch, u, v=v: (batch, u) == (1, v), math.nan):
            hashes.add(train_at(sizes(1, 2, 3)[-1], tiny(data, shared_tmp / str(v), train={"steps": 3})).sha256)
    assert len(hashes) == 1


class FixedMeter:
    """Measures 1 J in every reading."""

    def pop_joules(self, now: bool = False) -> float:
        return 1.0

    def close(self) -> None:
        pass


def test_the_energy_of_skipped_batches_is_recorded(shared_folder: Path, shared_tmp: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, spoilt(lambda batch, v: (batch, v) in BAD, math.nan):
        patch.setattr("mpidp.training.services.open_meter", lambda *_: (FixedMeter(), {"cpu": "RAPL"}))
        train_at(1, tiny(corpus(shared_folder), shared_tmp / "run", **SECTIONS))
    lines = [json.loads(line) for line in (shared_tmp / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("energy_joules", 0.0) for line in lines) == 8 + 3 + 1, "8 updates, 3 skipped batches, and the end"


@pytest.mark.parametrize(
    ("save_every", "last", "words"),
    [(2, 12, "has made no new checkpoint since"), (0, 9, "has no checkpoint to return to")],
)
def test_too_many_in_a_row_end_the_run_on_all_ranks(
    shared_folder: Path, shared_tmp: Path, save_every: int, last: int, words: str
) -> None:
    """The run ends if there is no checkpoint to return to, or only the checkpoint to which the run has already returned."""
    data = corpus(shared_folder)
    sections = SECTIONS | {"train": SECTIONS["train"] | {"save_every": save_every}}

    def run(comm: MPI.Intracomm) -> tuple[int, bool, str]:
        with pytest.raises(MpidpError) as caught:
            mpidp.train.run(tiny(data, shared_tmp / str(comm.size), **sections), comm)
        assert type(caught.value) is MpidpError
        return caught.value.exit_code, caught.value.everywhere, str(caught.value)

    with spoilt(lambda batch, v: v == 3 and batch not in (0, 1, 4, 5), math.nan):  # 2 in a row are tolerated, 7 to 9 are not
        for n in sizes(1, 2, 4):
            said = at(n, run)
            assert said == [(1, True, said[0][2])] * n
            assert f"3 batches in a row, up to batch {last}, made no" in said[0][2] and words in said[0][2]
    for n in sizes(1, 2, 4):
        kept = [path.name for path in committed(shared_tmp / str(n) / "checkpoints")]
        assert kept == (["step_00000004", "step_00000002"] if save_every else [])  # progress is kept


ROWS = {5: 8, 13: 15}  # first and last of the batches with non-finite gradients; three in a row are too many
LONG = SECTIONS | {"train": SECTIONS["train"] | {"steps": 12, "save_every": 3}}


def in_rows(batch: int, v: int) -> bool:
    return v == 0 and any(first <= batch <= last for first, last in ROWS.items())


def rolled_back(run: Ran) -> list[tuple[int, int]]:
    return [(event["step"], event["batch"]) for event in run.events("rolled_back")]


def test_the_run_goes_back_and_passes_over_what_was_bad(shared_folder: Path, shared_tmp: Path) -> None:
    """Step 3 is saved, batches 3 and 4 are trained on, and batches 5 to 7 are bad. The run returns to step 3 and continues with
    batch 8, which is also bad. Step 6 is saved, batch 12 is trained on, and batches 13 to 15 are bad. The run returns to step
    6."""
    data = corpus(shared_folder)
    with spoilt(in_rows, math.nan):
        runs = [train_at(n, tiny(data, shared_tmp / str(n), **LONG)) for n in sizes(1, 2, 4, 8)]
    for run in runs:
        assert (run.sha256, run.lines) == (runs[0].sha256, runs[0].lines)
    assert rolled_back(runs[0]) == [(3, 7), (6, 15)] and runs[0].end["skipped"] == 6 + 4
    assert [line["step"] for line in runs[0].learned if "train_loss" in line] == list(range(1, 13))
    with spoilt(lambda batch, v: batch in (*range(3, 9), *range(12, 16)), math.nan):
        plain = train_at(1, tiny(data, shared_tmp / "plain", **LONG | {"train": LONG["train"] | {"max_skipped": 20}}))
    assert (plain.sha256, plain.learned) == (runs[0].sha256, runs[0].learned)


@pytest.mark.parametrize("call", [8, 9, 10, 13, 16, 17, 20])
def test_a_crash_before_or_after_the_run_went_back(shared_folder: Path, shared_tmp: Path, call: int) -> None:
    """call: the call of Strategy.step in which the run crashes. The run returns to a checkpoint after the 8th and after the 16th
    call."""
    data = corpus(shared_folder)
    with spoilt(in_rows, math.nan):
        whole = train_at(1, tiny(data, shared_tmp / "whole", **LONG))
        patch = crash_in_step(call)
        with pytest.raises(FailedElsewhere, match="power"):
            train_at(sizes(1, 2, 3)[-1], tiny(data, shared_tmp / "run", **LONG))
        patch.undo()
        run = train_at(sizes(1, 2, 4)[-1], tiny(data, shared_tmp / "run", **LONG))
    assert run.sha256 == whole.sha256 and run.learned == whole.learned and rolled_back(run) == rolled_back(whole)


def test_a_request_to_stop_is_kept_after_a_return(shared_folder: Path, shared_tmp: Path) -> None:
    """The run gets the request in the batch after which it returns to its checkpoint."""
    data, n = corpus(shared_folder), sizes(1, 2, 3)[-1]
    config = tiny(data, shared_tmp / "run", **LONG)

    def stops(batch: int, v: int) -> bool:
        if (batch, v) == (7, 0):
            (Path(config.run.dir) / "STOP").touch()
        return in_rows(batch, v)

    with spoilt(stops, math.nan), pytest.raises(Stopped, match="STOP.*at step 3"):
        train_at(n, config)
    with spoilt(in_rows, math.nan):
        run, whole = train_at(n, config), train_at(n, tiny(data, shared_tmp / "whole", **LONG))
    assert run.sha256 == whole.sha256


def test_a_return_if_no_checkpoint_could_be_written(shared_folder: Path, shared_tmp: Path) -> None:
    """The run returns to its initial weights once, and skips the same batches. It does not begin again and again."""
    begun = 0

    def again(batch: int, v: int) -> bool:
        nonlocal begun
        begun += (batch, v) == (0, 0)
        assert begun < 2, "the run has begun again with batch 0"
        return in_rows(batch, v)

    with pytest.MonkeyPatch.context() as patch, spoilt(again, math.nan):
        patch.setattr("mpidp.checkpoint.writer.write_pieces", lambda path, *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(MpidpError, match="a checkpoint could not be written"):
            train_at(1, tiny(corpus(shared_folder), shared_tmp / "run", **LONG))


# Finite norms that are far from the usual ---------------------------------------------------------------------------------

SPIKES: dict[str, Any] = {"train": {"steps": 30, "save_every": 22, "spike": 8.0, "eval_every": 0}}
LOUD = {(10, 2), (24, 5), (26, 0), (27, 1)}  # the first one comes before the usual norm is known


def test_a_gradient_far_larger_than_usual_is_skipped(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    with spoilt(lambda batch, v: (batch, v) in LOUD, 1e3):
        runs = [train_at(n, tiny(data, shared_tmp / str(n), **SPIKES)) for n in sizes(1, 2, 4)]
        patch = crash_in_step(27)  # the 22nd step is saved, batch 24 is skipped
        with pytest.raises(FailedElsewhere, match="power"):
            train_at(sizes(1, 2, 3)[-1], tiny(data, shared_tmp / "crashed", **SPIKES))
        patch.undo()
        crashed = train_at(1, tiny(data, shared_tmp / "crashed", **SPIKES))
        off = train_at(1, tiny(data, shared_tmp / "off", train=SPIKES["train"] | {"spike": 0.0}))
    alone = runs[0]
    for run in runs[1:]:
        assert (run.sha256, run.lines) == (alone.sha256, alone.lines)
    assert (crashed.sha256, crashed.learned, crashed.events("skipped")) == (alone.sha256, alone.learned, alone.events("skipped"))
    assert [event["batch"] for event in alone.events("skipped")] == [24, 26, 27] and not off.events("skipped")
    assert all(event["grad_norm"] > 8 * line["grad_norm"] for event in alone.events("skipped") for line in alone.learned[20:30])
    with spoilt(lambda batch, v: (batch, v) in LOUD, 1e3), spoilt(lambda batch, v: batch in (24, 26, 27), math.nan):
        plain = train_at(1, tiny(data, shared_tmp / "plain", train=SPIKES["train"] | {"spike": 0.0}))
    assert (plain.sha256, plain.learned) == (alone.sha256, alone.learned)


def crash_in_step(number: int) -> pytest.MonkeyPatch:
    patch, calls, real = pytest.MonkeyPatch(), 0, Synchronous.step

    def step(self: Synchronous, *of: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise RuntimeError("the power went")
        return real(self, *of)

    patch.setattr(Synchronous, "step", step)
    return patch


def resumed(data: Path, folder: Path, crash_at: int) -> tuple[list[Any], list[Any]]:
    """Return the lines of an uninterrupted run, and of a run that crashed in its crash_at-th call of step, without its resume
    event."""
    with spoilt(lambda batch, v: (batch, v) in BAD, math.nan):
        whole = train_at(1, tiny(data, folder / "whole", **SECTIONS))
        patch = crash_in_step(crash_at)
        with pytest.raises(FailedElsewhere, match="power"):
            train_at(sizes(1, 2, 3)[-1], tiny(data, folder / "run", **SECTIONS))
        patch.undo()
        run = train_at(sizes(1, 2, 4)[-1], tiny(data, folder / "run", **SECTIONS))
    assert run.sha256 == whole.sha256 and run.learned == whole.learned and len(run.events("resume")) == 1
    return whole.lines, [line for line in run.lines if line.get("event") != "resume"]


def test_skipped_batches_stay_skipped_after_a_restart(shared_folder: Path, shared_tmp: Path) -> None:
    whole, run = resumed(corpus(shared_folder), shared_tmp, crash_at=9)  # from step 4, before batch 7
    assert [line for line in run if line.get("event") != "skipped"] == [line for line in whole if line.get("event") != "skipped"]


def test_batches_skipped_again_after_a_restart_are_logged_once(shared_folder: Path, shared_tmp: Path) -> None:
    whole, run = resumed(corpus(shared_folder), shared_tmp, crash_at=5)  # step 2 is saved, batches 2 and 3 are skipped
    assert run == whole


def first_batch_has_none(places: np.ndarray) -> np.ndarray:
    """A loss mask without targets in the first global batch in sequential order."""
    return places > 16 * 16


def test_a_batch_without_any_target_is_passed_over(shared_folder: Path, shared_tmp: Path) -> None:
    data = masked_corpus(shared_folder, keep=first_batch_has_none)
    sections: dict[str, Any] = {"data": {"order": "sequential"}, "train": {"steps": 3, "eval_tokens": 0}}
    runs = [train_at(n, tiny(data, shared_tmp / str(n), **sections)) for n in sizes(1, 2)]
    assert all(run.lines == runs[0].lines and run.end["step"] == 3 for run in runs)
    assert WORLD.size == 1 or len(runs) == 2
