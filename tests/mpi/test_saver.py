"""Laws of saving during training: a checkpoint has exactly the state of its step, and is either complete or not written. All
ranks agree on this."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint import saver as saver_module
from mpidp.checkpoint import writer
from mpidp.checkpoint.boxes import write_pieces
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import committed, newest_valid, read_manifest
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.saver import Saver
from mpidp.errors import MpidpError
from tests.saves import no_thread_is_left, saver_of
from tests.tiny import WORLD, Ran, at, corpus, pretended, read_metrics, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
FULL = OSError(28, "No space left on device")


def entries(comm: MPI.Intracomm, step: int) -> dict[str, Entry]:
    """Return entries of every layout, and one that only the last rank has."""
    values = torch.arange(9000.0).view(900, 10) + step
    found = {"model/w": Entry(values), "model/count": Entry(torch.tensor([step]))}
    found["strategy/step"] = Entry(torch.tensor(float(step)))
    if comm.rank == comm.size - 1:
        found["strategy/own"] = Entry(values[:7].clone(), "sharded")
    return found


def holds(run: Path, step: int) -> bool:
    """Return whether the checkpoint of this step exists and has the saved values."""
    path = run / "checkpoints" / f"step_{step:08d}"
    if not path.exists():
        return False
    reader = Reader(path)
    wanted = torch.arange(9000.0).view(900, 10) + step
    assert newest_valid(run, MPI.COMM_SELF)[0] is not None
    assert torch.equal(reader["model/w"], wanted) and torch.equal(reader["strategy/own"], wanted[:7])
    assert reader["model/count"].tolist() == [step] and reader["strategy/step"].item() == step and reader.meta["step"] == step
    return True


def agreed(saver: Saver) -> np.ndarray:
    """Return what the ranks agree on in a step. Collective over saver.comm."""
    flags = saver.flags()
    saver.comm.Allreduce(MPI.IN_PLACE, flags)
    return flags


def until(saver: Saver, holds_now: Callable[[np.ndarray], bool], what: str) -> np.ndarray:
    """Repeat until the ranks agree on this, and return it. Collective over saver.comm."""
    end = time.monotonic() + 60
    while not holds_now(flags := agreed(saver)):
        time.sleep(0.005)
        assert not saver.comm.allreduce(time.monotonic() > end, op=MPI.LOR), f"never came: {what}"
    return flags


def fails(flags: np.ndarray) -> bool:
    return bool(flags[2]) and not flags[1]


@contextmanager
def writing(change: Callable[..., Any], *ranks: int) -> Iterator[None]:
    """Call change(path) before write_pieces() on these ranks."""

    def changed(path: Path, *content: Any) -> tuple[int, int]:
        change(path)
        return write_pieces(path, *content)

    with pytest.MonkeyPatch.context() as patch:
        if WORLD.rank in ranks:
            patch.setattr(writer, "write_pieces", changed)
        yield


def full(path: Path) -> None:
    raise FULL


# --- a complete run


def events(ran: Ran, name: str) -> list[int]:
    return [line["step"] for line in ran.events(name)]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("copies", ["auto", "rank"])
def test_what_is_saved_is_the_state_of_its_step(shared_folder: Path, shared_tmp: Path, nodes: int, copies: str) -> None:
    """The state is copied slowly while the next step is computed. The checkpoints are compared with checkpoints for which
    training stopped."""
    settings: dict[str, Any] = {"train": {"steps": 6, "save_every": 2}, "comm": {"copies": copies}}
    data, plain, begin = corpus(shared_folder), np.copyto, Saver.begin

    def slowly(to: np.ndarray, source: np.ndarray) -> None:
        time.sleep(0.002)
        plain(to, source)

    def standing_still(self: Saver, *arguments: Any) -> None:
        begin(self, *arguments)
        self.wait_for_save(must=True)

    for n in sizes(1, 2, 3, 4):
        with pretended(nodes if n % nodes == 0 else 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Saver, "begin", standing_still)
                still = train_at(n, tiny(data, shared_tmp / f"still{n}", **settings))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writer.np, "copyto", slowly)
                patch.setattr(saver_module, "YOUNG_SECONDS", 60.0)
                moving = train_at(n, tiny(data, shared_tmp / f"moving{n}", **settings))
        assert moving.learned == still.learned and moving.sha256 == still.sha256
        assert events(moving, "saved") == events(still, "saved") == [2, 4, 6]
        for step in (2, 4, 6):
            one, other = (Reader(shared_tmp / f"{name}{n}/checkpoints/step_{step:08d}") for name in ("still", "moving"))
            assert sorted(one) == sorted(other) and one.meta["position"] == other.meta["position"]
            assert len(one.meta["files"]) == len(other.meta["files"]) == (nodes if n % nodes == 0 else 1)
            for name in one:
                assert torch.equal(one[name], other[name]), (n, step, name)


@pytest.mark.mpi(min_size=2)
def test_a_slow_disk_costs_checkpoints_alone(shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of the second node needs three steps for its first save. All ranks skip the same saves, and the run ends after
    the last save."""
    monkeypatch.setattr(saver_module, "YOUNG_SECONDS", 0.0)
    data, n, file = corpus(shared_folder), WORLD.size // 2 * 2, shared_tmp / "run/metrics.jsonl"
    whole = train_at(n, tiny(data, shared_tmp / "whole"))

    def slowly(path: Path) -> None:
        while '{"step": 4,' not in file.read_text():
            time.sleep(0.01)

    with pretended(2), writing(slowly, n // 2):
        ran = train_at(n, tiny(data, shared_tmp / "run", train={"save_every": 1}))
    assert ran.sha256 == whole.sha256 and ran.learned == whole.learned
    saved, skipped = events(ran, "saved"), events(ran, "save_skipped")
    assert saved[0] == 1 and saved[-1] == 6 and skipped[:3] == [2, 3, 4], (saved, skipped)
    assert sorted({*saved, *skipped}) == [1, 2, 3, 4, 5, 6] and not events(ran, "save_failed")
    assert [p.name for p in committed(shared_tmp / "run/checkpoints")] == [f"step_{step:08d}" for step in reversed(saved)]


def test_no_room_for_a_while_costs_checkpoints_and_no_step(shared_folder: Path, shared_tmp: Path) -> None:
    """The writer of the first node finds no space for the checkpoints of steps 1 and 2. Later checkpoints are written."""
    data = corpus(shared_folder)
    whole = train_at(WORLD.size, tiny(data, shared_tmp / "whole"))
    nodes = 2 if WORLD.size % 2 == 0 else 1

    def no_room(path: Path) -> None:
        if path.parent.name[: len(".writing_step_00000000")] <= ".writing_step_00000002":
            raise FULL

    with pretended(nodes), writing(no_room, 0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver_module, "YOUNG_SECONDS", 60.0)
        ran = train_at(WORLD.size, tiny(data, shared_tmp / "run", train={"save_every": 1}, run={"keep": 9}))
    assert ran.sha256 == whole.sha256 and ran.learned == whole.learned
    assert events(ran, "save_failed") == [1, 2] and events(ran, "saved") == [3, 4, 5, 6]
    folder = shared_tmp / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{step:08d}" for step in (3, 4, 5, 6)]


# --- the parts


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_file_a_node_and_what_only_one_rank_holds(shared_tmp: Path, nodes: int) -> None:
    for n in sizes(*((1, 2, 3, 4) if nodes == 1 else (2, 4))):
        run = shared_tmp / str(n)

        def save(comm: MPI.Intracomm, run: Path = run) -> None:
            saver = saver_of(comm, run, nodes=nodes)
            saver.begin(5, entries(comm, 5), {})
            saver.wait_for_copy()
            saver.wait_for_save(must=True)

        at(n, save)
        assert holds(run, 5)
        writers = sorted({node * (n // nodes) for node in range(nodes)} | {n - 1})
        path = run / "checkpoints/step_00000005"
        assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *(f"rank_{r:05d}.safetensors" for r in writers)]
        rows = [record["pieces"].get("model/w", [[0, 0], [0, 10]]) for record in read_manifest(path)["files"]]
        assert max(stop - start for (start, stop), _ in rows) <= -(-900 // nodes) + 1


def test_what_changes_after_the_fence_is_not_in_it(shared_tmp: Path) -> None:
    """The checkpoint is written much later than the state changes, so it must have been copied before."""

    def save(comm: MPI.Intracomm) -> None:
        saver, state = saver_of(comm, shared_tmp), entries(comm, 3)
        with writing(lambda path: time.sleep(0.2), *range(9)):
            saver.begin(3, state, {})
            saver.wait_for_copy()
            for entry in state.values():
                entry.tensor.fill_(-1)
            saver.wait_for_save(must=True)

    at(WORLD.size, save)
    assert holds(shared_tmp, 3)


def test_a_save_that_fails_gives_way_to_the_next(shared_tmp: Path) -> None:
    def save(comm: MPI.Intracomm) -> None:
        saver = saver_of(comm, shared_tmp)
        with writing(full, comm.size - 1):
            saver.begin(1, entries(comm, 1), {})
            saver.wait_for_copy()
            flags = until(saver, fails, "a failure")
            assert saver.step == 1 and not saver.due(1, flags)
            assert saver.due(2, flags) and saver.step == -1
        saver.begin(2, entries(comm, 2), {})
        saver.wait_for_save(must=True)
        told = [(event["event"], event["step"]) for event in saver.pop_events()]
        assert told == ([("save_failed", 1), ("saved", 2)] if comm.rank == 0 else [])

    at(WORLD.size, save)
    assert holds(shared_tmp, 2) and not holds(shared_tmp, 1)
    assert [p.name for p in (shared_tmp / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_save_is_tried_again_until_there_is_room(shared_tmp: Path) -> None:
    """The same save is retried, without another save in between. The pauses grow, starting with one second."""
    tried: list[Path] = []

    def at_first(path: Path) -> None:
        tried.append(path)
        if len(tried) < 2:
            raise FULL

    def save(comm: MPI.Intracomm) -> None:
        saver = saver_of(comm, shared_tmp)
        with writing(at_first, comm.size - 1):
            saver.begin(1, entries(comm, 1), {})
            saver.wait_for_copy()
            until(saver, lambda flags: not flags.any(), "the end of it")

    at(WORLD.size, save)
    assert holds(shared_tmp, 1)


def test_a_folder_that_vanishes(shared_tmp: Path) -> None:
    """The files of the other ranks are lost. The save fails, and the next save creates the folder again."""

    def save(comm: MPI.Intracomm) -> None:
        saver, gone = saver_of(comm, shared_tmp / "run"), threading.Event()
        with writing(lambda path: gone.wait(60), 0):
            saver.begin(1, entries(comm, 1), {})
            saver.wait_for_copy()
            until(saver, lambda flags: flags.tolist() == [0, 1, 0, 0], "rank 0 alone still writes")
            if comm.rank == 0:
                shutil.rmtree(shared_tmp / "run")
                gone.set()
            assert saver.due(2, until(saver, fails, "a failure"))
        saver.begin(2, entries(comm, 2), {})
        saver.wait_for_save(must=True)

    at(WORLD.size, save)
    assert holds(shared_tmp / "run", 2)
    assert not list((shared_tmp / "run/checkpoints").glob(".*"))


def test_who_does_not_hold_the_run_commits_nothing(shared_tmp: Path) -> None:
    def save(comm: MPI.Intracomm) -> None:
        saver = saver_of(comm, shared_tmp, may_commit=lambda: False)
        saver.begin(1, entries(comm, 1), {}, wait=True)
        with pytest.raises(MpidpError, match="no longer holds the lock of this run") as caught:
            saver.wait_for_save(must=True)
        assert caught.value.everywhere

    at(WORLD.size, save)
    assert not list((shared_tmp / "checkpoints").iterdir())


def test_a_saver_that_is_closed_leaves_no_half_and_another_can_begin(shared_tmp: Path) -> None:
    """This is the situation after a rank has failed. Each rank closes its saver at any point. The remaining ranks then save the
    same step."""

    def save(comm: MPI.Intracomm) -> None:
        first = saver_of(comm, shared_tmp)
        with writing(lambda path: time.sleep(0.3 * comm.rank), *range(9)):
            first.begin(1, entries(comm, 1), {})
            time.sleep(0.15)
            first.close()
        again = saver_of(comm, shared_tmp)
        again.begin(1, entries(comm, 1), {})
        again.wait_for_copy()
        again.wait_for_save(must=True)
        no_thread_is_left()

    at(WORLD.size, save)
    assert holds(shared_tmp, 1)


@pytest.mark.parametrize("wait", [False, True])
def test_after_close_nobody_reads_the_state(shared_tmp: Path, wait: bool) -> None:
    """Shared windows are freed after close(), so later reads would fail."""

    def save(comm: MPI.Intracomm) -> None:
        read: list[float] = []
        plain, in_blocks = writer._bytes_of, writer.Save._in_blocks

        def told(*arguments: Any) -> Any:
            time.sleep(0.02)
            read.append(time.monotonic())
            return plain(*arguments)

        def told_too(self: writer.Save, blocks: list[memoryview]) -> Iterator[memoryview]:
            for block in in_blocks(self, blocks):
                time.sleep(0.02)
                if wait:
                    read.append(time.monotonic())
                yield block

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "_bytes_of", told)
            patch.setattr(writer.Save, "_in_blocks", told_too)
            saver = saver_of(comm, shared_tmp)
            saver.begin(1, entries(comm, 1), {}, wait)
            time.sleep(0.03)
            saver.close()
            closed = time.monotonic()
            no_thread_is_left()
        assert all(moment < closed for moment in read)

    at(WORLD.size, save)
    assert read_metrics(shared_tmp) == []
