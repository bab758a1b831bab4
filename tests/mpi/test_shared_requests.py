"""Law: what a program on rank 0 asks is answered in order, equally on any number of ranks; an error on any rank reaches all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.errors import DataError, MpidpError
from mpidp.inference.loading import load_encoder, load_model, open_source
from mpidp.inference.sampling import Sampling
from mpidp.inference.scoring import row_losses
from mpidp.inference.shared_requests import SharedRequests, TextRequest
from mpidp.parallel.grid import make_grid
from tests.tiny import at, corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
TEXTS = ["the rank of a", "x", "in order", "so that no on", "adds its", "who was there", "done"]
ROWS = [(list(text.encode()), 1 + len(text) // 3) for text in TEXTS if len(text) > 1]
ASKED = [TextRequest(list(text.encode()), 3 + i, (" ",) * (i % 2), Sampling(0.7 * (i % 3), 10)) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def run(shared_folder: Path) -> Path:
    train_at(1, tiny(corpus(shared_folder), shared_folder / "run", train={"steps": 6}))
    return shared_folder / "run"


def opened(comm: MPI.Intracomm, run: Path, together: int, tp: int = 1, pp: int = 1) -> SharedRequests:
    grid = make_grid(comm, tp, pp)
    reader = open_source(run, comm)
    loaded = load_model(reader, grid, "cpu", 1)
    return SharedRequests(loaded, load_encoder(loaded, reader, None), together)


def asked(requests: SharedRequests) -> Callable[[], Any]:
    return lambda: (requests.scores(ROWS), requests.generated(ASKED), requests.scores([]))


def served(run: Path, n: int, together: int = 2, **mesh: int) -> list[Any]:
    def work(comm: MPI.Intracomm) -> Any:
        requests = opened(comm, run, together, **mesh)
        return requests.serve(asked(requests))
    return at(n, work)


def test_answers_are_the_same_on_any_number_of_ranks(run: Path) -> None:
    first, *_ = served(run, 1)
    scores, texts, empty = first
    assert len(scores) == len(ROWS) and len(texts) == len(ASKED) and not empty
    for n in sizes(2, 3, 4, 8):
        assert served(run, n) == [first, *[None] * (n - 1)]
    assert served(run, 1, together=5)[0][1] == texts


def test_scores_are_losses_and_greedy_tokens_are_those_that_are_generated(run: Path) -> None:
    def work(comm: MPI.Intracomm) -> Any:
        requests = opened(comm, run, 2)
        return requests.serve(lambda: _greedy(requests)), [row_losses(requests.loaded, [row])[0] for row in ROWS]

    (greedy, scores), losses = at(1, work)[0]
    assert greedy == [True, False]
    assert [score for score, _ in scores] == pytest.approx([-loss for loss in losses], rel=1e-5)


def _greedy(requests: SharedRequests) -> tuple[list[bool], Any]:
    prompt = list(b"the r")
    new = requests.generated([TextRequest(prompt, 4)])[0]
    other = [*new[:-1], (new[-1] + 1) % 256]
    found = requests.scores([(prompt + new, len(new)), (prompt + other, len(other))])
    return [greedy for _, greedy in found], requests.scores(ROWS)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}])
def test_a_model_on_several_ranks_gives_the_same_answers(run: Path, mesh: dict[str, int]) -> None:
    for n in sizes(2, 4):
        wanted, found = served(run, 1)[0], served(run, n, **mesh)[0]
        assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in wanted[0]], abs=1e-4)
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in wanted[0]]
        assert found[1] == wanted[1]


def test_an_error_on_any_rank_is_raised_on_all(run: Path) -> None:
    def rank_fails(comm: MPI.Intracomm, rank: int) -> Any:
        requests = opened(comm, run, 1)
        if comm.rank == rank:
            requests._score = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
        with pytest.raises(MpidpError, match="ZeroDivisionError") as found:
            requests.serve(asked(requests))
        return found.value.everywhere

    def work_fails(comm: MPI.Intracomm) -> Any:
        requests = opened(comm, run, 1)

        def work() -> None:
            requests.scores(ROWS)
            raise DataError("the task is wrong")

        with pytest.raises(DataError, match="the task is wrong") as found:
            requests.serve(work)
        return found.value.everywhere

    for n in sizes(1, 3):
        for rank in range(n):
            assert all(at(n, lambda comm, fails=rank: rank_fails(comm, fails)))
        assert all(at(n, work_fails))
