"""Laws of checkpoints over ranks: any number of ranks can read a checkpoint that any number of ranks wrote. Damage that one rank
finds is reported on all ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint import writer
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import newest_valid, read_manifest
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import find_checkpoint
from mpidp.checkpoint.saver import Saver
from mpidp.errors import CheckpointError, MpidpError
from tests import saves
from tests.tiny import WORLD, at, sizes

pytestmark = pytest.mark.mpi
WIDTH = 12  # divisible by 1, 2, 3 and 4 ranks
SHAPES = {"w": (37, 3), "row": (1, 50), "gain": (5,), "scalar": (), "empty": (0, 2), "long": (400, 2)}


def value(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


def cut() -> torch.Tensor:
    return torch.arange(WIDTH * 4.0).view(4, WIDTH)


def entries(comm: MPI.Intracomm) -> dict[str, Entry]:
    """Return entries of every layout, as rank `rank` of `size` ranks holds them."""
    part = WIDTH // comm.size
    found = {name: Entry(value(name)) for name in SHAPES}
    found["count"] = Entry(torch.tensor([2**40 + 1]))
    columns = cut()[:, comm.rank * part : (comm.rank + 1) * part]
    found["columns"] = Entry(columns, "sharded", (0, comm.rank * part), (4, WIDTH))
    found["rows"] = Entry(columns.T.contiguous(), "sharded", (comm.rank * part, 0), (WIDTH, 4))
    if comm.rank == comm.size - 1:
        found["alone"] = Entry(value("w"), "sharded")
    found["residual"] = Entry(torch.full((3, 2), float(comm.rank + 1)), "additive")
    return found


def check(path: Path, writers: int) -> None:
    reader = Reader(path)
    for name in SHAPES:
        assert torch.equal(reader[name], value(name)) and reader[name].shape == SHAPES[name], name
    assert reader["count"].tolist() == [2**40 + 1]
    assert torch.equal(reader["columns"], cut()) and torch.equal(reader["rows"], cut().T)
    assert torch.equal(reader["alone"], value("w"))
    assert torch.equal(reader["residual"], torch.full((3, 2), writers * (writers + 1) / 2))  # the sum is conserved
    for size in (1, 2, 3, 4):
        parts = [reader.under("resid", rank, size)["ual"] for rank in range(size)]
        assert torch.equal(sum(parts, torch.zeros(3, 2)), reader["residual"])
        own = [float(rank + 1) for rank in range(size)] if size == writers else [writers * (writers + 1) / 2, 0.0, 0.0, 0.0]
        assert [float(part[0, 0]) for part in parts] == own[:size]  # each rank its own, or rank 0 all


def test_what_any_number_of_ranks_wrote_any_other_reads(shared_tmp: Path) -> None:
    for writers in sizes(1, 2, 3, 4):
        run = shared_tmp / str(writers)
        found = at(writers, lambda comm, run=run: saves.save(run, 7, entries(comm), {"a": 1}, comm, 3))
        assert set(found) == {run / "checkpoints/step_00000007"}
        for readers in sizes(1, 2, 3, 4):
            paths = at(readers, lambda comm, run=run: newest_valid(run, comm))
            assert paths == [(found[0], [])] * readers
            at(readers, lambda comm, path=found[0], writers=writers: check(path, writers))


def test_every_rank_writes_about_its_share_and_every_row_once(shared_tmp: Path) -> None:
    big = {f"w{i}": Entry(torch.full((100 + i, 7), float(i))) for i in range(5)}
    path = at(WORLD.size, lambda comm: saves.save(shared_tmp, 1, big, {}, comm, 3))[0]
    files = read_manifest(path)["files"]
    assert [record["file"] for record in files] == [f"rank_{r:05d}.safetensors" for r in range(WORLD.size)]
    sizes_of_files = [sum((stop - start) * 7 for (start, stop), _ in record["pieces"].values()) for record in files]
    assert sum(sizes_of_files) == sum(e.tensor.numel() for e in big.values())
    assert max(sizes_of_files) - min(sizes_of_files) <= 2 * 7
    for name, entry in big.items():
        ranges = sorted(tuple(record["pieces"][name][0]) for record in files if name in record["pieces"])
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == entry.tensor.shape[0]


def two_checkpoints(run: Path) -> None:
    for step in (1, 2):
        at(WORLD.size, lambda comm, step=step: saves.save(run, step, entries(comm), {"end": None}, comm, 3))


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "manifest"])
def test_damage_anywhere_is_known_to_all_ranks(shared_tmp: Path, damage: str) -> None:
    two_checkpoints(shared_tmp)
    newest = shared_tmp / "checkpoints/step_00000002"
    if WORLD.rank == 0:
        file = newest / ("manifest.json" if damage == "manifest" else f"rank_{WORLD.size - 1:05d}.safetensors")
        whole = file.read_bytes()
        if damage == "lose":
            file.unlink()
        elif damage == "flip":
            file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        else:
            file.write_bytes(whole[: len(whole) // 2])
    WORLD.Barrier()
    for n in sizes(1, 2, 3, 4):
        found = at(n, lambda comm: newest_valid(shared_tmp, comm))
        assert all(path == shared_tmp / "checkpoints/step_00000001" for path, _ in found)
        reasons = {tuple(reasons) for _, reasons in found}
        assert len(reasons) == 1 and len(next(iter(reasons))) == 1 and "step_00000002" in next(iter(reasons))[0]


def test_none_that_is_valid_is_the_same_error_everywhere(shared_tmp: Path) -> None:
    two_checkpoints(shared_tmp)
    if WORLD.rank == 0:
        for step in (1, 2):
            (shared_tmp / f"checkpoints/step_{step:08d}/rank_00000.safetensors").unlink()
    WORLD.Barrier()
    for resume in ("auto", "must"):
        with pytest.raises(CheckpointError, match="no checkpoint .* is valid") as caught:
            find_checkpoint(shared_tmp, resume, WORLD)
        assert set(WORLD.allgather((str(caught.value), caught.value.everywhere))) == {(str(caught.value), True)}


def test_resume_never_and_an_empty_folder(shared_tmp: Path) -> None:
    assert find_checkpoint(shared_tmp / "none", "auto", WORLD) == (None, [])
    with pytest.raises(CheckpointError, match="resume=must"):
        find_checkpoint(shared_tmp / "none", "must", WORLD)
    two_checkpoints(shared_tmp)
    reader, notes = find_checkpoint(shared_tmp, "never", WORLD)
    assert reader is None and all("previous_1" in note for note in WORLD.allgather(str(notes)) if note != "[]")
    assert not (shared_tmp / "checkpoints").exists()


@pytest.mark.parametrize("removed", ["before the folder is listed", "after the folder is listed"])
def test_a_rank_that_cannot_write_stops_all_and_nothing_is_committed(
    shared_tmp: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    two_checkpoints(shared_tmp)

    def full(path: Path, *content: object) -> tuple[int, int]:
        raise OSError("no space left on device")

    drop = Saver._drop

    def drop_late(saver: Saver) -> Exception | None:
        """Rank 0 still looks for the files of the other ranks when they have removed the folder."""
        time.sleep(0.3)
        return drop(saver)

    if WORLD.rank == WORLD.size - 1:
        monkeypatch.setattr(writer, "write_pieces", full)
    elif WORLD.rank == 0:
        monkeypatch.setattr(Saver, "_drop", drop_late)
        if removed.startswith("after"):
            names = [f"rank_{rank:05d}.json" for rank in range(WORLD.size)]
            monkeypatch.setattr(writer.os, "listdir", lambda folder: names)
    with pytest.raises(MpidpError, match="no space left"):
        saves.save(shared_tmp, 3, entries(WORLD), {}, WORLD, 3)
    monkeypatch.undo()
    assert newest_valid(shared_tmp, WORLD)[0] == shared_tmp / "checkpoints/step_00000002"
    assert saves.save(shared_tmp, 3, entries(WORLD), {}, WORLD, 3).name == "step_00000003"
    assert newest_valid(shared_tmp, WORLD)[0] == shared_tmp / "checkpoints/step_00000003"


def test_rank_0_may_commit_before_another_rank_has_returned(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 renames the folder once it sees the last record. The rank that wrote this record does not need the folder again."""
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        replace(source, target)
        if ".writing_" in str(target) and target.suffix == ".json":
            time.sleep(0.3)

    if WORLD.rank == WORLD.size - 1:
        monkeypatch.setattr(os, "replace", slow)
    assert saves.save(shared_tmp, 1, entries(WORLD), {}, WORLD, 3).name == "step_00000001"
    assert not list((shared_tmp / "checkpoints").glob(".writing_*"))
