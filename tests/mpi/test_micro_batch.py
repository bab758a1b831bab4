"""Laws of train.micro_batch=auto: all ranks choose the same value, which is recorded, and resumed runs do not measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpidp.config.command_line import from_args, read_run_config
from mpidp.config.schema import Config
from mpidp.errors import UsageError
from mpidp.parallel.grid import make_grid
from mpidp.training import micro_batch
from mpidp.training.run_plan import plan
from tests.tiny import WORLD, at, corpus, tiny, train_at


def test_candidates_divide_the_batch_and_leave_work_for_all_ranks() -> None:
    assert micro_batch.candidates(16, 1) == [1, 2, 4, 8, 16]
    assert micro_batch.candidates(12, 2) == [1, 2, 3, 6]
    assert micro_batch.candidates(48, 3) == [1, 2, 3, 6, 12]
    assert micro_batch.candidates(7, 7) == [1] and micro_batch.candidates(7, 1) == [1, 7]


def test_the_smallest_of_nearly_equal_candidates_is_chosen() -> None:
    assert micro_batch.chosen({1: 50.0, 2: 98.0, 4: 100.0, 8: 99.0}) == 2
    assert micro_batch.chosen({1: 50.0, 2: 90.0, 4: 100.0}) == 4


def test_auto_is_a_spelling_of_zero() -> None:
    assert from_args(["--train.micro_batch=auto"]).train.micro_batch == 0
    with pytest.raises(UsageError, match="must be an integer or auto"):
        from_args(["--train.micro_batch=best"])
    with pytest.raises(UsageError, match="must be an integer$"):
        from_args(["--train.seed=auto"])


@pytest.mark.mpi
def test_the_slowest_rank_and_the_memory_decide(shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that differ between ranks, all ranks have the same throughputs. Candidates that do not fit are not measured."""
    config = tiny(corpus(shared_folder), shared_tmp / "run", train={"global_batch": 32})
    trial, tried = plan(config, make_grid(WORLD)), list[int]()

    def seconds(self: micro_batch.Measurement, size: int) -> float:
        tried.append(size)
        return size * (1.0 + (WORLD.rank == size % WORLD.size)) / (1 if size < 4 else 2)

    monkeypatch.setattr(micro_batch.Measurement, "seconds", seconds)
    rates = micro_batch.measured(trial)
    assert rates == {1: 8.0, 2: 8.0, 4: 16.0, 8: 16.0, 16: 16.0, 32: 16.0} if WORLD.size == 1 else rates[4] == 16.0
    assert len(set(map(str, WORLD.allgather(rates)))) == 1
    monkeypatch.setattr(micro_batch.Measurement, "fits", lambda self, size: size < 4 or WORLD.rank > 0)
    tried.clear()
    assert list(micro_batch.measured(trial)) == [1, 2] == tried
    assert micro_batch.chosen(micro_batch.measured(trial, lanes=32)) == 1


@pytest.mark.mpi
def test_what_was_chosen_is_recorded_and_used_again(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run, its continuation on other ranks, and a run with the recorded value are one training."""
    data, first = corpus(shared_folder), shared_tmp / "auto"
    ranks, constant = min(2, WORLD.size), {"schedule": "constant"}
    begun = train_at(ranks, tiny(data, first, train={"micro_batch": 0, "steps": 4}, optim=constant))
    found = int(WORLD.bcast(read_run_config(first / "config.toml")["train.micro_batch"]))
    assert 16 % found == 0 and found <= 16 // ranks and begun.events("start")[0]["fingerprint"]["micro_batch"] == found
    monkeypatch.setattr(micro_batch, "measured", lambda *_: pytest.fail("measured again"))
    train = {"micro_batch": 0, "steps": 6, "save_every": 0}
    resumed = train_at(1, tiny(data, first, train=train, optim=constant))
    given = train_at(ranks, tiny(data, shared_tmp / "given", train=train | {"micro_batch": found}, optim=constant))
    assert resumed.sha256 == given.sha256


@pytest.mark.mpi
def test_a_run_on_a_new_machine_uses_the_value_on_its_mirror(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, size: int, steps: int) -> Config:
        run = {"dir": str(shared_tmp / name), "mirror": f"file://{shared_tmp}/mirror", "hang_seconds": 0.0}
        return tiny(corpus(shared_folder), shared_tmp / name, train={"micro_batch": size, "steps": steps}, run=run)

    train_at(1, config("first", 4, 2))
    monkeypatch.setattr(micro_batch, "measured", lambda *_: pytest.fail("measured again"))
    assert train_at(min(2, WORLD.size), config("second", 0, 4)).events("resume")
    assert WORLD.bcast(read_run_config(shared_tmp / "second/config.toml")["train.micro_batch"]) == 4


@pytest.mark.mpi
def test_real_measurements_end(shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "SECONDS", 0.01)
    config = tiny(corpus(shared_folder), shared_tmp / "run", train={"loss": "chunked"}, data={"documents": "apart"},
                  model={"dropout": 0.1})
    rates = at(1, lambda comm: micro_batch.measured(plan(config, make_grid(comm))))[0]
    assert 1 in rates and all(16 % size == 0 and rate > 0 for size, rate in rates.items())
