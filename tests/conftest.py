"""Settings for all tests: unknown markers are errors, torch uses one thread, and a failure on one rank fails the test on all."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp.model.shape import TransformerShape, num_parameters

WORLD = MPI.COMM_WORLD
HARNESS = WORLD.Dup()  # separates the harness's own collectives from those of the tests
PATIENCE_SECONDS = 30.0  # a rank that failed waits this long for the others before it ends the job


LONG = os.environ.get("MPIDP_LONG", "") == "1"
SAMPLED = (  # tables with many similar rows, or one row for each MPI
    "tests/methods/", "tests/mpi/test_nccl.py", "tests/laws/test_elastic.py", "tests/laws/test_skipped.py",
    *(f"tests/hybrid/test_{name}.py" for name in ("meshes", "interleave", "whole_replicas")),
    *(f"tests/faults/test_{name}.py" for name in (
        "c10d", "crashes", "disks", "doctor", "hangs", "recovery", "respawn", "stopping", "table", "usage",
    )),
)
EVERY = int(os.environ.get("MPIDP_EVERY", "4"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Reject unknown keywords, and sample long tables.

    pytest-mpi ignores unknown keywords: @pytest.mark.mpi(min_sizes=2) would run at one rank. Of long tables every fourth row is
    run (MPIDP_EVERY), of short ones at least one; MPIDP_LONG=1 (`make long`) runs all rows.
    """
    for item in items:
        for mark in item.iter_markers("mpi"):
            if mark.args or set(mark.kwargs) - {"min_size"}:
                raise pytest.UsageError(f"{item.nodeid}: mpi marker with {mark.args} {mark.kwargs}: it takes min_size= alone")
    if LONG or len(items) == 1:
        return
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.nodeid.startswith(SAMPLED):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {
        item for test, rows in tables.items() for i, item in enumerate(rows) if (i + sum(map(ord, test))) % min(EVERY, len(rows))
    }
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Run an mpi test so that it ends on all ranks together. If it fails on some ranks, it fails on all and reports where."""
    if WORLD.size == 1 or pyfuncitem.get_closest_marker("mpi") is None:
        return (yield)
    error: BaseException | None = None
    returned = None
    try:
        returned = yield
    except BaseException as raised:  # pytest's outcomes are not Exceptions
        error = raised
    failed = error is not None and not isinstance(error, pytest.skip.Exception)
    _meet(pyfuncitem, error if failed else None)
    said = HARNESS.allgather((pyfuncitem.nodeid, f"{type(error).__name__}: {error}" if failed else ""))
    if {name for name, _ in said} != {pyfuncitem.nodeid}:
        _abort(pyfuncitem, AssertionError(f"the ranks are at different tests: {[name for name, _ in said]}"))
    if error is not None:
        raise error
    bad = [(rank, words) for rank, (_, words) in enumerate(said) if words]
    if bad:
        pytest.fail(f"failed on ranks {[rank for rank, _ in bad]}; rank {bad[0][0]}: {bad[0][1]}", pytrace=False)
    return returned


def _meet(item: pytest.Function, error: BaseException | None) -> None:
    """Wait at a sleeping barrier. A failed rank aborts if the other ranks do not arrive: they wait for it inside the test."""
    began, request = time.monotonic(), HARNESS.Ibarrier()
    while not request.Test():
        time.sleep(0.002)
        if error is not None and time.monotonic() - began > PATIENCE_SECONDS:
            _abort(item, error)


def _abort(item: pytest.Function, error: BaseException) -> None:
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    print(f"{item.nodeid} failed on rank {WORLD.rank}, other ranks hang in it:", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    WORLD.Abort(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Use one thread: bits may depend on the number of threads, and the cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def warm() -> None:
    """Use a meta tensor once on all ranks at the same time. torch's first use of one imports modules for a second."""
    if WORLD.size > 1:
        num_parameters(TransformerShape(8, 1, 1, 1, 2, 8, 8))


@pytest.fixture
def shared_tmp(tmp_path: Path) -> Path:
    """One folder for all ranks (tmp_path differs between ranks). Collective over WORLD."""
    return Path(WORLD.bcast(str(tmp_path)))


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all ranks and all tests of a file, for corpora. Collective over WORLD."""
    return Path(WORLD.bcast(str(tmp_path_factory.mktemp("shared"))))
