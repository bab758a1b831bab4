"""Fixtures: an mpi4py process group and a gloo process group, shared by the tests of a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

import mpidp.c10d  # noqa: F401

WORLD = MPI.COMM_WORLD
Both = Callable[[Callable[[Any], Any]], None]


@pytest.fixture(scope="module")
def groups() -> Iterator[tuple[Any, Any]]:
    """(mpi4py group, gloo group) over all ranks. Collective over WORLD."""
    dist.init_process_group("mpi4py", init_method="mpi://", timeout=timedelta(seconds=60))
    yield dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    dist.destroy_process_group()


def flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [t for part in found for t in flat(part)]


@pytest.fixture
def both(groups: tuple[Any, Any]) -> Both:
    """Run a function with each group and compare the results, up to rounding of their dtype."""

    def compare(work: Callable[[Any], Any]) -> None:
        found = []
        for group in groups:
            torch.manual_seed(7 + WORLD.rank)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(flat(work(group)))
        ours, theirs = found
        assert len(ours) == len(theirs)
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype == its.dtype and mine.shape == its.shape
            if mine.is_sparse:
                mine, its = mine.to_dense(), its.to_dense()
            loose = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(mine.dtype, 1e-5)
            torch.testing.assert_close(mine, its, rtol=loose, atol=loose)

    return compare
