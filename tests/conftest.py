"""Settings for all tests: the level selects tests, torch uses one thread, and a test that fails on one rank fails on all ranks.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from mpi4py import MPI

from mpidp.model.shape import TransformerShape, num_parameters
from tests import levels

WORLD = MPI.COMM_WORLD
HARNESS = WORLD.Dup()  # separates the harness's own collectives from those of the tests
PATIENCE_SECONDS = 30.0  # a rank that failed waits this long for the others before it ends the job


REPORTS = os.environ.pop("MPIDP_TEST_REPORTS", "")  # a folder; removed, so that no pytest that a test starts writes there


def pytest_configure(config: pytest.Config) -> None:
    # On a busy machine, the preparation of inputs may take longer than Hypothesis allows. This says nothing about the code.
    hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
    hypothesis.settings.load_profile("busy")
    config.addinivalue_line("markers", "quick: in `make test`, although it starts whole commands (tests/levels.py)")
    config.addinivalue_line("markers", "check: not in `make test`, but in `make check` (tests/levels.py)")
    config.addinivalue_line("markers", "long: only in `make long` (tests/levels.py)")


def names_of_marks(item: pytest.Item) -> set[str]:
    """The names of a test's markers, and whole_command for a test that starts commands as a user does, which takes seconds."""
    names = {mark.name for mark in item.iter_markers()}
    if item.nodeid.startswith("tests/faults/") and isinstance(item, pytest.Function):
        arguments = set(inspect.signature(item.function).parameters)
        if "forks" not in arguments or arguments & {"shell", "either"}:
            names.add("whole_command")
    return names


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Reject mpi markers that pytest-mpi would ignore, and deselect the tests that are not of this level."""
    for item in items:
        for mark in item.iter_markers("mpi"):
            if mark.args or set(mark.kwargs) - {"min_size"}:
                raise pytest.UsageError(f"{item.nodeid}: mpi marker with {mark.args} {mark.kwargs}: it takes min_size= alone")
    if len(items) == 1 or all("::" in str(argument) for argument in config.args):
        return  # named by the user
    chosen = levels.LEVELS[levels.level()]
    tiers = levels.tiers([item.nodeid for item in items], [names_of_marks(item) for item in items])
    left_out = [item for item, tier in zip(items, tiers, strict=True) if tier not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item, tier in zip(items, tiers, strict=True) if tier in chosen]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write this session's results for tests/run.py. Rank 0 and xdist's controller only: the others have no complete view."""
    if REPORTS and WORLD.rank == 0:
        reports = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
        reasons = [report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                   for report in reports["skipped"]]
        found = {
            "passed": len(reports["passed"]), "failed": [r.nodeid for r in reports["failed"] + reports["error"]],
            "skipped": reasons,
        }
        Path(REPORTS, f"{os.getpid()}.json").write_text(json.dumps(found))


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
