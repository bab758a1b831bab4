"""Processes that multiprocessing starts within a rank, e.g. workers of a DataLoader, are not ranks: they do not start MPI."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from tests.faults.commands import Shell

PROGRAM = """
import multiprocessing, sys
import torch
import mpidp.library, mpidp.c10d
from torch import distributed
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self): return 16
    def __getitem__(self, index): return index

def try_mpi(_):
    from mpidp.runtime.world import start_mpi
    try: return start_mpi().size
    except mpidp.library.UsageError as error: return str(error)[:37]

if __name__ == "__main__":
    method = sys.argv[1]
    distributed.init_process_group("mpi4py", init_method="mpi://")
    loader = DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context=method)
    total = torch.tensor(sum(int(batch.sum()) for batch in loader))
    distributed.all_reduce(total)
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.map(try_mpi, [0])[0] if method != "fork" else ""
    print(f"{method} {int(total)} {found}", flush=True)
    distributed.destroy_process_group()
"""
PRELOADED = """
import multiprocessing
import mpidp.library

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["mpidp.library"])
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.map(abs, [-3]), flush=True)
"""


@pytest.fixture
def short() -> Iterator[str]:
    """A temporary folder with a short name: multiprocessing makes sockets in it, whose paths have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_rank_do_not_start_mpi(either: Shell, short: str, method: str) -> None:
    (either.folder / "program.py").write_text(PROGRAM)
    ended = either.run("program.py", method, ranks=2, TMPDIR=short)
    said = "" if method == "fork" else "MPI is not initialized in this process"[:37]
    assert ended.code == 0 and ended.out.splitlines() == [f"{method} 240 {said}"] * 2, ended


def test_a_forkserver_that_imports_mpidp_before_the_program(either: Shell, short: str) -> None:
    (either.folder / "program.py").write_text(PRELOADED)
    ended = either.run("program.py", ranks=2, TMPDIR=short)
    assert ended.code == 0 and ended.out.split() == ["[3]", "[3]"], ended


def test_without_a_launcher_a_worker_may_use_mpi(either: Shell, short: str) -> None:
    (either.folder / "program.py").write_text(PROGRAM)
    ended = either.run("program.py", "spawn", TMPDIR=short)
    assert ended.code == 0 and ended.out.splitlines() == ["spawn 120 1"], ended
