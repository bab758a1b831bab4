"""Laws of respawning: it is accepted only where it can work, and limited at one step."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.config.schema import Config
from mpidp.errors import Damaged, DataError
from mpidp.faults import respawn
from mpidp.runtime import command
from mpidp.runtime.environment import is_replacement_rank
from mpidp.training import attempts, recovery
from mpidp.training.state import Position, RunState


@pytest.mark.parametrize(
    ("tolerant", "machines", "words", "why"),
    [
        (False, 1, [b"mpirun\0--prtemca\0state_base_recoverable\0001"], "a failed rank ends the job"),
        (True, 2, [b"mpirun\0--prtemca\0state_base_recoverable\0001"], "on 2 machines"),
        (True, 1, [b"bash", b"mpirun\0--with-ft\0ulfm"], "exit with an error code"),
        (True, 1, [b"bash", b"mpirun\0--prtemca\0state_base_recoverable\0001"], ""),
    ],
)
def test_why_not(monkeypatch: pytest.MonkeyPatch, tolerant: bool, machines: int, words: list[bytes], why: str) -> None:
    monkeypatch.setattr(respawn, "launched_with_ulfm", lambda: tolerant)
    monkeypatch.setattr(respawn, "_ancestor_texts", lambda: words)
    assert why in respawn.obstacle_to_respawn(machines) and bool(why) == bool(respawn.obstacle_to_respawn(machines))


def test_a_newcomer_is_one_by_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.signal, "alarm", lambda seconds: None)
    for enabled, port, is_one in [("1", "1.0:5", True), ("0", "1.0:5", False), ("1", None, False)]:
        monkeypatch.setenv("OMPI_MCA_mpi_ft_enable", enabled)
        monkeypatch.delenv("OMPI_PARENT_PORT", raising=False)
        if port:
            monkeypatch.setenv("OMPI_PARENT_PORT", port)
        assert is_replacement_rank() is is_one


def job(size: int, step: int, said: list[str]) -> Any:
    return SimpleNamespace(
        comm=SimpleNamespace(size=size), position=SimpleNamespace(step=step),
        services=SimpleNamespace(progress=SimpleNamespace(print=said.append)),
    )


def test_three_attempts_at_a_step() -> None:
    said: list[str] = []
    crew = recovery.Crew(None, frozenset(), full=4, number=4, respawn=True, data="")
    assert not recovery.must_grow(crew, 4, job(4, 1, said))
    for step in (1, 1, 1, 2, 2, 2):
        assert recovery.must_grow(crew, 3, job(3, step, said)), step
    assert not said
    assert not recovery.must_grow(crew, 3, job(3, 2, said)) and not recovery.must_grow(crew, 3, job(3, 3, said))
    assert said == ["new ranks failed 3 times at step 2: continuing with 3 ranks"]
    assert not recovery.must_grow(recovery.Crew(None, frozenset(), full=4, number=4, respawn=False, data=""), 3, job(3, 1, said))


def test_three_attempts_without_a_state() -> None:
    crew = recovery.Crew(None, frozenset(), full=4, number=4, respawn=True, data="")
    assert [recovery.must_grow(crew, 1, None) for _ in range(4)] == [True, True, True, False]


@dataclass
class Plan:
    training: Any
    automatic: frozenset[str] = frozenset()


def test_new_ranks_do_not_join_on_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "make_plan", lambda config, grid: Plan(SimpleNamespace(index_sha256="now")))
    grid: Any = SimpleNamespace(world=SimpleNamespace(allgather=lambda value: [value, False]))
    config = SimpleNamespace(data=SimpleNamespace(path="shards/mine"))
    assert recovery._planned(None, grid, recovery.Crew(config, frozenset("a"), 4, 4, True, "now")).automatic == {"a"}
    with pytest.raises(DataError, match="shards/mine was replaced during the run, so no new rank can join"):
        recovery._planned(None, grid, recovery.Crew(config, frozenset(), 4, 4, True, "before"))


def restarted(ranks: attempts.RunAttempts, step: int, skipped: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Any]]:
    """Return the batch with which a rank continues from a checkpoint, and the batches of the events that it records."""
    job: Any = SimpleNamespace(
        position=Position(step=step, skipped=skipped), state=RunState(), strategy=SimpleNamespace(survives_failures=True)
    )
    plan: Any = SimpleNamespace(config=Config(), world=MPI.COMM_SELF, run_dir=Path("run"), has_ended=lambda reader: None)
    plan.adopt = lambda reader, notes: plan
    monkeypatch.setattr(attempts, "find_checkpoint", lambda *given: (SimpleNamespace(meta={"step": step}), []))
    monkeypatch.setattr(attempts, "restore", lambda *given: None)
    monkeypatch.setattr(ranks, "_build", lambda plan: job)
    assert ranks._from_disk(plan) is None and job.state.skipped_from == (step if job.position.batch > step + skipped else -1)
    return job.position.batch, [event["batch"] for event in ranks._events if "batch" in event]


def test_all_ranks_skip_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run returns to step 40, to skip the batches up to 50. Another rank joins before this state is restored. Later returns
    to the same checkpoint also skip these batches, but returns to newer checkpoints do not."""
    monkeypatch.setattr(recovery, "abandon", lambda job, stop: None)
    monkeypatch.setattr(attempts, "faults_from_environment", lambda *given, **more: None)
    config = Config().with_values(run={"dir": str(tmp_path)})
    crew = recovery.Crew(config, frozenset(), 4, 4, True, "")
    old = attempts.RunAttempts(config, None, MPI.COMM_SELF, crew)
    old.go_back(Damaged.at_batch("bad batches", 51))
    newcomer = attempts.RunAttempts(config, None, MPI.COMM_SELF, pickle.loads(pickle.dumps(old.crew)))
    assert restarted(old, 40, 0, monkeypatch) == restarted(newcomer, 40, 0, monkeypatch) == (51, [50])
    old.go_back(Damaged.on_every_rank("a flipped bit"))
    assert restarted(old, 40, 0, monkeypatch) == (51, [50]) and restarted(old, 45, 11, monkeypatch) == (56, [])
