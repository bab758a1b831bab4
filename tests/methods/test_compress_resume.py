"""Law: compression residuals survive a crash: bit for bit on the same number of ranks, and without loss on another number or with
another code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.manifest import committed
from mpidp.checkpoint.reader import Reader
from mpidp.reducers.base import FlatReducer
from mpidp.reducers.buckets import Bucket
from mpidp.reducers.compression.compressed import Compressed
from tests.laws.test_resume import crashed_in, equal, equal_checkpoints, ranks
from tests.registries import COMPRESSIONS
from tests.tiny import WORLD, at, corpus, job_at, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
NAMES = COMPRESSIONS
SECTIONS: dict[str, Any] = {"model": {"dropout": 0.1}, "train": {"steps": 8, "save_every": 2, "eval_every": 0}}


def how(name: str, momentum: float = 0.0) -> dict[str, Any]:
    ratio = 0.1 if name in ("topk", "randomk") else 0.0
    return {"compress": name, "momentum": momentum, "ratio": ratio, "overlap": "none"}  # auto would sum zeros to measure


@pytest.mark.parametrize(("name", "momentum"), [(name, 0.0) for name in NAMES] + [("topk", 0.9), ("randomk", 0.9)])
def test_crashed_and_gone_on_at_the_same_number_of_ranks(
    shared_folder: Path, shared_tmp: Path, name: str, momentum: float
) -> None:
    data, sections = corpus(shared_folder), {**SECTIONS, "comm": how(name, momentum)}
    if name == "powersgd" and WORLD.size == 1:
        return
    whole = train_at(ranks(3), tiny(data, shared_tmp / "whole", **sections))
    config = tiny(data, shared_tmp / "run", **sections)
    crashed_in(6, ranks(3), config)
    equal(train_at(ranks(3), config), whole, resumed_at=[4])
    equal_checkpoints(config.run.dir, str(shared_tmp / "whole"))


class Ledger:
    """By round: what this rank contributed and what all ranks applied; and its current residual."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.given: dict[int, Tensor] = {}
        self.applied: dict[int, Tensor] = {}
        self.held: Tensor | None = None
        real_sum, real_end_round = Compressed.sum, Compressed.end_round

        def book(into: dict[int, Tensor], reducer: Compressed, flat: Tensor, bucket: Bucket) -> None:
            row = into.setdefault(reducer.rounds, torch.zeros(reducer.buffer.num_elements, dtype=torch.float64))
            row[bucket.start : bucket.stop] = flat[bucket.start : bucket.stop]

        def sum_(reducer: Compressed, flat: Tensor, bucket: Bucket) -> None:
            book(self.given, reducer, flat, bucket)
            real_sum(reducer, flat, bucket)
            book(self.applied, reducer, flat, bucket)

        def end_round(reducer: Compressed, applied: bool) -> None:
            real_end_round(reducer, applied)
            self.held = reducer.held["residual"].clone()

        patch.setattr(Compressed, "sum", sum_)
        patch.setattr(Compressed, "end_round", end_round)

    def back_to(self, number: int) -> None:
        """The run resumes after so many rounds; later rounds are discarded."""
        self.given = {i: row for i, row in self.given.items() if i < number}
        self.applied = {i: row for i, row in self.applied.items() if i < number}
        self.held = None

    def owed(self, rounds: int) -> tuple[float, float]:
        """Return (the largest value that is neither applied nor in any residual, the largest contribution). Collective over
        WORLD."""
        zero = torch.zeros(1, dtype=torch.float64)
        given = sum(WORLD.allgather(sum(self.given.values(), zero)), zero)
        held = sum((one.double() for one in WORLD.allgather(self.held) if one is not None), zero)
        applied = WORLD.allgather(self.applied)[0]
        assert sorted(applied) == list(range(rounds))
        largest = max(float(row.abs().max()) for row in [*self.given.values(), zero])
        return float((given - sum(applied.values(), zero) - held).abs().max()), max(WORLD.allgather(largest))


@pytest.mark.parametrize("name", NAMES)
def test_crashed_and_gone_on_at_another_number_of_ranks_or_under_another_code(
    shared_folder: Path, shared_tmp: Path, name: str
) -> None:
    """Over 8 steps on up to 4, 3 and 2 ranks, contributions equal applied values plus residuals, up to 2^-24 x 300 of the largest
    gradient: 8 steps with P + 8 roundings each of values up to 4 P times as large."""
    data = corpus(shared_folder)
    least = 2 if name == "powersgd" else 1
    if WORLD.size < least:
        return
    with pytest.MonkeyPatch.context() as patch:
        ledger = Ledger(patch)
        config = tiny(data, shared_tmp / "run", **SECTIONS, comm=how(name))
        crashed_in(4, ranks(4), config)  # steps 1 to 3 are made, step 2 is saved
        ledger.back_to(2)
        crashed_in(4, max(least, ranks(4) - 1), config)  # steps 3 to 5 are made, step 4 is saved
        ledger.back_to(4)
        other = NAMES[(NAMES.index(name) + 1) % (len(NAMES) - 1)]  # not powersgd, which is rejected at one rank
        run = train_at(ranks(2), tiny(data, shared_tmp / "run", **SECTIONS, comm=how(other)))
        assert [line["step"] for line in run.events("resume")] == [2, 4] and run.end["step"] == 8
        owed, largest = ledger.owed(8)
        assert owed <= 300 * 2.0**-24 * largest
        held = WORLD.allgather(ledger.held)
        assert sum(float(one.abs().max()) for one in held if one is not None) > 1000 * owed  # the residuals are not zero


@pytest.mark.parametrize("name", ["int4", "topk"])
def test_another_number_of_ranks_begins_with_the_sum_on_the_first(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    from mpidp.training.checkpoints import restore

    data = corpus(shared_folder)
    config = tiny(data, shared_tmp / "run", **SECTIONS, comm=how(name))
    train_at(ranks(3), config)
    newest = committed(Path(config.run.dir) / "checkpoints")[0]

    def held(comm: MPI.Intracomm) -> tuple[Tensor, int]:
        job = job_at(comm, tiny(data, shared_tmp / f"other{comm.size}", **SECTIONS, comm=how(name)))
        restore(job, Reader(newest))
        return job.strategy.reducer.held["residual"].clone(), job.strategy.reducer.rounds

    whole = Reader(newest)["strategy/reducer/residual"]
    assert whole.any()
    for n in sizes(1, 2, 3, 4):
        parts, rounds = zip(*at(n, held), strict=True)
        assert set(rounds) == {8}
        if n == ranks(3):
            assert torch.equal(sum(parts, torch.zeros_like(whole)), whole) and all(part.any() for part in parts)
        else:
            assert torch.equal(parts[0], whole) and not any(part.any() for part in parts[1:])


def test_compression_may_be_turned_on_and_off(shared_folder: Path, shared_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = corpus(shared_folder)
    run = shared_tmp / "run"
    crashed_in(4, ranks(2), tiny(data, run, **SECTIONS))
    crashed_in(4, ranks(2), tiny(data, run, **SECTIONS, comm=how("int8")))
    capfd.readouterr()
    end = train_at(ranks(2), tiny(data, run, **SECTIONS)).end
    said = capfd.readouterr().out
    assert end["step"] == 8 and (WORLD.rank or ("compress int8 -> none" in said and "is dropped" in said))


def test_the_base_holds_nothing() -> None:
    assert FlatReducer.state_dict(object.__new__(FlatReducer)) == {}
