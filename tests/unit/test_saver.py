"""Laws of when to save, and of the files that a save leaves on the disk at any moment."""

from __future__ import annotations

import itertools
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from safetensors.torch import load_file, save_file

from mpidp.checkpoint import manifest, writer
from mpidp.checkpoint import saver as saver_module
from mpidp.checkpoint.boxes import DTYPES, Piece, write_pieces
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import committed
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.saver import NODE_SECONDS, Saver, best_interval
from tests.saves import no_thread_is_left, saver_of

ALONE = MPI.COMM_SELF


@given(st.floats(1e-3, 1e3), st.integers(1, 10_000), st.integers(0, 100))
def test_the_interval_loses_least(cost: float, num_nodes: int, failures: int) -> None:
    """It minimises the time to save, cost / interval, plus the time to repeat, half an interval per failure."""
    mean = (NODE_SECONDS / num_nodes + 5e4) / (1 + failures)
    best = best_interval(cost, 0.0, num_nodes, failures, 5e4)

    def lost(interval: float) -> float:
        return cost / interval + interval / 2 / mean

    assert lost(best) <= min(lost(0.99 * best), lost(1.01 * best))
    assert math.isclose(best, math.sqrt(2 * cost * mean))


def test_a_slow_disk_is_given_time() -> None:
    assert best_interval(0.1, 1e4, 1, 0, 0.0) == 2e4


def test_the_clock_decides_where_every_is_automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later, sleep=time.sleep)
    monkeypatch.setattr(saver_module, "time", clock)
    saver = saver_of(ALONE, tmp_path, every=-1)
    assert not saver.due(5, saver.flags())
    later = saver_module.FIRST_SECONDS
    assert saver.due(6, saver.flags())
    saver.begin(6, {"w": Entry(torch.ones(3))}, {})
    saver.wait_for_save(must=True)
    [event] = saver.pop_events()
    interval = best_interval(event["cpu_seconds"] + event["stall_seconds"], event["seconds"], 1, 0, 0.0)
    later = interval - 2.0
    assert not saver.due(8, saver.flags())
    later = interval
    assert saver.due(9, saver.flags())


@pytest.mark.parametrize("every", [0, 3])
def test_the_step_decides_otherwise(tmp_path: Path, every: int) -> None:
    saver = saver_of(ALONE, tmp_path, every=every)
    assert [step for step in range(1, 10) if saver.due(step, np.zeros(4))] == ([3, 6, 9] if every else [])
    saver.step = 6  # resumed at this step
    assert not saver.due(6, np.zeros(4))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_the_files_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every dtype and shape, also with blocks of any length, can be read by the safetensors library."""
    tensors = {"a/b": torch.arange(24).view(2, 3, 4), "none": torch.zeros(0, 3), "ü": torch.ones(1)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    pieces = [Piece(name, tensor, (0,) * tensor.dim()) for name, tensor in tensors.items()]
    whole = b"".join(piece.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for piece in pieces)
    blocks = [memoryview(whole[at : at + 7]) for at in range(0, len(whole), 7)]
    size, _ = write_pieces(tmp_path / "ours", pieces, blocks)
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert size == (tmp_path / "ours").stat().st_size
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_save_that_is_waited_for_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the largest model that fits in memory needs no second copy."""
    taken: list[int] = []
    saver = saver_of(ALONE, tmp_path)
    take = saver._memory.allocate
    monkeypatch.setattr(saver._memory, "allocate", lambda size, pinned: taken.append(size) or take(size, pinned))
    for step, wait in itertools.product((1, 2), (False, True)):
        saver.begin(2 * step + wait, {"w": Entry(torch.ones(3))}, {}, wait)
        saver.wait_for_save(must=True)
        assert saver._save is not None and saver._save.thread.join(10) is None
    assert taken == [12, 12] and len(committed(tmp_path / "checkpoints")) == 3


def test_no_memory_for_a_copy_costs_the_checkpoint_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def none_left(size: int, pinned: bool) -> Any:
        raise RuntimeError("not enough memory")

    saver: Saver = saver_of(ALONE, tmp_path)
    saver._memory.allocate = none_left  # type: ignore[method-assign]
    saver.begin(1, {"w": Entry(torch.ones(3))}, {})
    saver.wait_for_copy()
    while not saver.flags()[2]:
        pass
    assert saver.due(2, saver.flags())
    assert [event["event"] for event in saver.pop_events()] == ["save_failed"]
    said = capsys.readouterr().err
    assert "the checkpoint of step 1 could not be written" in said and "the next checkpoint is written when it is due" in said
    saver.begin(2, {"w": Entry(torch.ones(3))}, {}, wait=True)
    saver.wait_for_save(must=True)
    assert [path.name for path in committed(tmp_path / "checkpoints")] == ["step_00000002"]


@pytest.mark.parametrize("wait", [False, True])
def test_a_checkpoint_that_is_committed_is_reported_and_no_other_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """The saver is closed, because a rank has failed, before or while its checkpoint is committed."""
    commits, closes = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Path:
        commits.set()
        time.sleep(0.3)
        return manifest.commit(*arguments)

    def may_commit() -> bool:
        return wait or closes.wait(30)

    monkeypatch.setattr(writer, "commit", slowly)
    saver = saver_of(ALONE, tmp_path, may_commit=may_commit)
    saver.begin(1, {"w": Entry(torch.ones(3))}, {}, wait)
    if wait:
        commits.wait(30)
    else:
        saver.wait_for_copy()
    saver.close()
    closes.set()
    told = [event["event"] for event in saver.pop_events()]
    assert saver.newest() == (1, -1)
    no_thread_is_left()
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert (told, names) == ((["saved"], ["step_00000001"]) if wait else ([], []))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIPPED FOR LACK OF a GPU")
@pytest.mark.parametrize("wait", [False, True])
def test_what_lies_on_a_gpu_is_copied_before_it_changes(tmp_path: Path, wait: bool) -> None:
    """Including values that the GPU is still computing when the save begins."""
    saver = saver_of(ALONE, tmp_path)
    for step in range(1, 6):
        state = torch.zeros(4 << 20, device="cuda")
        for _ in range(50):
            state += step
        columns = Entry(state.view(2, -1).T[:, :1], "sharded")
        entries = {"w": Entry(state), "columns": columns, "step": Entry(torch.ones(()))}
        saver.begin(step, entries, {}, wait)
        if wait:
            saver.wait_for_save(must=True)
        saver.wait_for_copy()
        state.fill_(-1)
        saver.wait_for_save(must=True)
        reader = Reader(tmp_path / f"checkpoints/step_{step:08d}")
        assert torch.equal(reader["w"], torch.full((4 << 20,), 50.0 * step)) and reader["step"].item() == 1
        assert torch.equal(reader["columns"], torch.full((2 << 20, 1), 50.0 * step))
