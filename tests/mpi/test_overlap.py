"""Law: comm.overlap=auto chooses the permitted mode that was measured to be fastest, and the same mode on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mpi4py import MPI

from mpidp.comm.waiting import how_to_wait
from mpidp.reducers import overlap
from mpidp.reducers.base import Reducer
from tests.tiny import WORLD, at, corpus, job_at, pretended, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi(min_size=2)


def reducer_at(comm: MPI.Intracomm, folder: Path) -> Reducer:
    found: Reducer = job_at(comm, tiny(corpus(folder), folder / "run", comm={"overlap": "none"})).strategy.reducer  # type: ignore[attr-defined]
    return found


def fastest(best: str) -> Callable[..., dict[str, float]]:
    """Replace the measurement by a function that finds this mode the fastest, if the mode is permitted."""
    return lambda reducer, comm, ways: {way: 1.0 if way == best else 2.0 for way in ways}


def choose(folder: Path, best: str, static: bool = True, cores: int = 2) -> list[tuple[str, bool, bool]]:
    """Return for each rank, if `best` is fastest: (message, is it in use?, does a thread run?).
    cores: to how many a rank is bound."""

    def one(comm: MPI.Intracomm) -> tuple[str, bool, bool]:
        reducer = reducer_at(comm, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap, "measure", fastest(best))
            patch.setattr(overlap.os, "sched_getaffinity", lambda _: set(range(cores)))
            words = overlap.choose(reducer, "auto", comm, static)
        found = words, reducer.wait is (overlap.OVERLAP_WAITS[best] or reducer.group.wait), reducer.worker is not None
        overlap.use(reducer, "none")
        return found

    return at(WORLD.size, one)


@pytest.mark.parametrize("best", list(overlap.OVERLAP_WAITS))
def test_between_nodes_the_fastest_is_taken(shared_folder: Path, best: str) -> None:
    corpus(shared_folder)
    with pretended(2), small_blocks():
        for words, in_use, threaded in choose(shared_folder, best):
            assert words.startswith(f"{best} (measured, ") and all(way in words for way in overlap.OVERLAP_WAITS)
            assert in_use and threaded == (best != "none")


def test_ranks_that_are_bound_to_one_core_do_not_poll(shared_folder: Path) -> None:
    """Intel MPI and Open MPI bind a rank to one core by default."""
    corpus(shared_folder)
    with pretended(2), small_blocks():
        found = choose(shared_folder, "poll", cores=1)
    assert all(words.startswith("none (measured, ") and "poll" not in words and not threaded for words, _, threaded in found)


def test_on_one_node_or_with_stealing_nothing_is_overlapped(shared_folder: Path) -> None:
    corpus(shared_folder)
    with small_blocks():
        with pretended(1):
            assert all((words, threaded) == ("none", False) for words, _, threaded in choose(shared_folder, "thread"))
        with pretended(2):
            found = choose(shared_folder, "thread", static=False)
            assert all((words, threaded) == ("none", False) for words, _, threaded in found)


def test_the_measurement_is_one_for_all_and_leaves_no_thread(shared_folder: Path) -> None:
    def one(comm: MPI.Intracomm) -> dict[str, float]:
        reducer = reducer_at(comm, shared_folder)
        seconds = overlap.measure(reducer, comm)
        assert reducer.wait is reducer.group.wait and reducer.worker is None
        return seconds

    corpus(shared_folder)
    with pretended(2), small_blocks():
        found = at(WORLD.size, one)
    assert all(set(seconds) == set(overlap.OVERLAP_WAITS) and min(seconds.values()) > 0 for seconds in found)
    assert all(seconds == found[0] for seconds in found)  # the slowest rank's seconds, so that all choose alike


@pytest.mark.parametrize("cores", [1, 64])  # the ranks of a node share cores, or have one each
@pytest.mark.parametrize("kind", ["allreduce", "naive", "tree"])
def test_what_was_measured_changes_no_bit(shared_folder: Path, shared_tmp: Path, kind: str, cores: int) -> None:
    """Open MPI adds in another order in blocking calls than in non-blocking calls. Ranks on nodes of unequal size must make the
    same calls."""
    data, found = corpus(shared_folder), {}
    with pytest.MonkeyPatch.context() as patch, pretended(2):
        patch.setattr("mpidp.comm.group.how_to_wait", lambda ranks, _: how_to_wait(ranks, cores))
        for best in overlap.OVERLAP_WAITS:
            patch.setattr(overlap, "measure", fastest(best))
            comm = {"reducer": kind, "bucket_mb": 0.01}
            config = tiny(data, shared_tmp / best, comm=comm, model={"model_dim": 64}, train={"steps": 2})
            found[best] = train_at(WORLD.size, config).learned
    assert found["thread"] == found["none"] and found["poll"] == found["none"]
