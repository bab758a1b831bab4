"""Law: training on shards from a server gives the weights, the log and the resumed runs of training on the same shards on disk,
on any number of ranks, and while requests fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpidp.checkpoint.manifest import committed
from mpidp.errors import DataError
from tests.storage_server import Faults, no_faults, of_folder, serving
from tests.tiny import WORLD, Ran, corpus, everywhere, masked_corpus, polite_barrier, sizes, tiny, train_at

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of these tests are small, and should still have many blocks."""
    monkeypatch.setattr("mpidp.storage.ranges.BLOCK", 700)


@contextmanager
def served(folder: Path, faults: Faults = no_faults) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve a folder on rank 0. Yield its address, and a function that returns the number of requests. Collective over WORLD."""
    if WORLD.rank:
        yield WORLD.bcast(None), lambda: int(WORLD.bcast(None))
        polite_barrier(WORLD)
        return
    with serving(of_folder(folder), faults) as server:
        yield WORLD.bcast(server.address), lambda: int(WORLD.bcast(len(server.requests)))
        polite_barrier(WORLD)


def sometimes(number: int, method: str, path: str) -> str | None:
    """Every third request fails, each time in another way."""
    return ("503", "cut", "gone", "other")[number // 3 % 4] if number % 3 == 2 else None


def trained(n: int, path: str, folder: Path, name: str, **sections: dict[str, object]) -> Ran:
    data = {"path": path, "cache_dir": str(folder / "cache"), "retry_seconds": 30.0}
    return train_at(n, tiny(Path("unused"), folder / name, data=data, **sections))


def test_weights_are_those_of_shards_on_disk(mpi_tmp_path: Path) -> None:
    shards = corpus(mpi_tmp_path, 5000, shards=3)
    near = trained(1, str(shards), mpi_tmp_path, "near")
    with served(shards.parent) as (address, requests):
        for n in sizes(1, 2, 3):
            far = trained(n, f"{address}/{shards.name}", mpi_tmp_path, f"far_{n}")
            assert far.sha256 == near.sha256 and far.learned == near.learned
        assert requests() > 0
    with served(shards.parent, sometimes) as (address, _):
        far = trained(sizes(2)[0] if sizes(2) else 1, f"{address}/{shards.name}", mpi_tmp_path, "faults")
        assert far.sha256 == near.sha256 and far.learned == near.learned


@pytest.mark.check
def test_loss_masks_and_document_boundaries_are_those_on_disk(mpi_tmp_path: Path) -> None:
    shards = masked_corpus(mpi_tmp_path, 3000)
    sections = {"train": {"balance": "measured"}}
    near = train_at(1, tiny(shards, mpi_tmp_path / "near", data={"path": str(shards), "documents": "apart"}, **sections))
    with served(shards.parent, sometimes) as (address, _):
        data = {"path": f"{address}/{shards.name}", "documents": "apart", "cache_dir": str(mpi_tmp_path / "cache")}
        for n in sizes(1, 2):
            assert train_at(n, tiny(shards, mpi_tmp_path / f"far_{n}", data=data, **sections)).sha256 == near.sha256


@pytest.mark.check
def test_a_run_resumes_from_a_server_or_from_disk(mpi_tmp_path: Path) -> None:
    shards = corpus(mpi_tmp_path, 5000, shards=3)
    whole = trained(1, str(shards), mpi_tmp_path, "whole", train={"steps": 6, "save_every": 2})
    with served(shards.parent) as (address, _):
        far = f"{address}/{shards.name}"
        trained(min(2, WORLD.size), far, mpi_tmp_path, "run", train={"steps": 6, "save_every": 2})
        if WORLD.rank == 0:  # as after a crash behind step 4
            shutil.rmtree(committed(mpi_tmp_path / "run" / "checkpoints")[0])
        polite_barrier(WORLD)
        resumed = trained(min(3, WORLD.size), far, mpi_tmp_path, "run", train={"steps": 6, "save_every": 2})
        assert resumed.sha256 == whole.sha256 and resumed.learned == whole.learned
        if WORLD.rank == 0:
            shutil.rmtree(committed(mpi_tmp_path / "run" / "checkpoints")[0])
        polite_barrier(WORLD)
    near = trained(1, str(shards), mpi_tmp_path, "run", train={"steps": 6, "save_every": 2})
    assert near.sha256 == whole.sha256  # the same index, wherever it is


def test_all_ranks_raise_the_same_error(mpi_tmp_path: Path) -> None:
    shards = corpus(mpi_tmp_path, 5000, shards=3)
    with served(shards.parent, lambda number, method, path: "no tag") as (address, _):
        with pytest.raises(DataError, match="neither ETag nor Last-Modified") as caught:
            trained(WORLD.size, f"{address}/{shards.name}", mpi_tmp_path, "refused")
        everywhere(caught.value.everywhere, "the error is that of all ranks")
