"""Laws of copies in object storage: all files of a run are copied, and old checkpoints are deleted, but never the newest one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.mirror import Mirror
from mpidp.checkpoint.mirrored import MirrorFolder
from tests import saves


@pytest.fixture
def folder(tmp_path: Path) -> MirrorFolder:
    return MirrorFolder(f"file://{tmp_path}/mirror")


def save(run: Path, step: int) -> Path:
    return saves.save(run, step, {"w": Entry(torch.ones(3))}, {}, MPI.COMM_SELF, keep=9)


def test_every_file_of_the_run_is_copied(tmp_path: Path, folder: MirrorFolder) -> None:
    names = ["config.toml", "tokenizer.json", "metrics.jsonl", "hf/tokenizer_config.json"]
    names.append("hf/additional_chat_templates/rag.jinja")
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    mirror = Mirror(tmp_path / "run", folder, keep=2)
    mirror.add(save(tmp_path / "run", 4))
    assert mirror.finish(30.0) and folder.steps() == [4]
    assert [(tmp_path / "mirror" / name).read_text() for name in names] == names


def test_a_checkpoint_that_the_mirror_has_is_not_copied_again(tmp_path: Path, folder: MirrorFolder) -> None:
    for step, always in ((4, True), (4, False), (6, False), (6, True)):
        path = save(tmp_path / "run", step)
        manifest = tmp_path / f"mirror/checkpoints/step_{step:08d}/manifest.json"
        before = manifest.stat().st_mtime_ns if manifest.exists() else 0
        mirror = Mirror(tmp_path / "run", folder, keep=9)
        (mirror.add if always else mirror.resumed_from)(path)
        assert mirror.finish(30.0)
        assert (manifest.stat().st_mtime_ns == before) == (step == 4 and not always)


@pytest.mark.parametrize(("step", "keep", "left"), [
    (8, 2, [6, 8]), (8, 1, [8]), (4, 2, [2, 4, 6, 8]), (4, 1, [4, 6, 8]), (2, 1, [2, 4, 6, 8]),
])
def test_only_the_newest_up_to_a_step_are_kept(
    tmp_path: Path, folder: MirrorFolder, step: int, keep: int, left: list[int]
) -> None:
    """Later checkpoints are older copies: the run has resumed from an earlier checkpoint, because they are invalid."""
    for one in (1, 2, 4, 5, 6, 8):
        place = tmp_path / f"mirror/checkpoints/step_{one:08d}"
        place.mkdir(parents=True)
        (place / "rank_00000.safetensors").write_text("x")
        if one not in (1, 5):  # incomplete
            (place / "manifest.json").write_text("x")
    folder.prune(step, keep)
    assert folder.steps() == sorted(left, reverse=True)
    incomplete = [name for name in folder.names() if "step_00000001" in name or "step_00000005" in name]
    assert bool(incomplete) == (step < 5) and not any("step_00000001" in name for name in incomplete)
