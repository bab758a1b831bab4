"""Laws of the lines at the start of a run."""

from __future__ import annotations

import pytest

from mpidp.training.run_summary import ranks_line


@pytest.mark.parametrize(("rows", "tip"), [
    ([("here", "0,1", "cpu", 2, 8, 100)], "2 threads per rank; mpirun -np 2 is usually faster, with one thread per rank ("),
    ([("here", "0", "cpu", 1, 8, 100)], "1 thread per rank ("),
    ([("here", "0,1", "cpu", 2, 1, 100)], "2 threads per rank ("),  # one lane cannot be divided among ranks
    ([("here", "0,1", "cuda:0 GPU", 2, 8, 100)], "2 threads per rank ("),
    ([("here", "0,1", "cpu", 2, 8, 100), ("here", "2,3", "cpu", 2, 8, 100)], "2 threads per rank ("),
])
def test_a_run_on_one_rank_names_the_faster_launch(rows: list[tuple[str, str, str, int, int, int]], tip: str) -> None:
    assert ranks_line(rows).startswith(f"ranks: {len(rows)} on here, {tip}")
