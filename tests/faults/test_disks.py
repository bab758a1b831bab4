"""Disks that fail, fill up or disappear during training.

| fault | expected | checked |
|---|---|---|
| a disk that is full for a while (a small tmpfs) | 0; warnings; later checkpoints are written | hash, lines, listing |
| a disk that stays full | warnings, and 1 if the last checkpoint cannot be written; the same command resumes | output, hash |
| run.dir renamed during training | 0; later checkpoints are written to the old path | hash, listing |
| a job on two nodes killed while the second node still writes | resumes from the checkpoint before | hash, listing |
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.commands import ENTER, SAVED, Forks, Shell, end_record, expect, faulty, steps_logged


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def events(run: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("event") == name]


@pytest.fixture
def small_disk(either: Shell) -> Iterator[Path]:
    """either.folder/run on its own disk, on which a file leaves too little space for a checkpoint (180 kB)."""
    run = either.folder / "run"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", run]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"SKIPPED FOR LACK OF the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        (run / "filler").write_bytes(bytes(650_000))
        yield run
    finally:
        subprocess.run(["umount", "-l", run], check=True)


@pytest.mark.quick
def test_a_disk_that_is_full_for_a_while(either: Shell, small_disk: Path, whole_hash: str) -> None:
    """The disk is full until step 5; run.keep=1, so that two checkpoints fit afterwards. Step 4's save may be retried just then
    and succeed."""
    make_room = faulty("os.remove('run/filler')", batches=[4])
    ended = either.run("-c", make_room + ENTER, "tiny.toml", "--run.keep=1", ranks=2)
    assert ended.code == 0, ended
    warnings = [line for line in ended.err.splitlines() if "warning: rank 0: the checkpoint of step" in line]
    assert warnings and all("No space left on device" in line for line in warnings), ended
    assert end_record(small_disk)["weights_sha256"] == whole_hash, ended
    assert steps_logged(small_disk) == [1, 2, 3, 4, 5, 6]
    assert events(small_disk, "save_failed")[0] == 2 and events(small_disk, "saved")[-1] == 6, ended
    assert 2 not in events(small_disk, "saved"), ended
    assert checkpoints(small_disk) == ["step_00000006"], ended


def test_a_disk_that_stays_full(place: Path, forks: Forks, whole_hash: str) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    ended = forks.run(place, "mpidp.train", "tiny.toml", inject=full)
    expect(ended, 1, "a checkpoint could not be written in run", "File too large", "rank_00000.safetensors")
    assert ended.err.count("warning: rank 0: the checkpoint of step") == 2, ended
    assert checkpoints(place / "run") == [] and steps_logged(place / "run") == [1, 2, 3, 4, 5, 6], ended
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    expect(ended, 0)
    assert end_record(place / "run")["weights_sha256"] == whole_hash


def test_a_run_dir_that_vanishes(either: Shell, whole_hash: str) -> None:
    """It is renamed in step 4, after step 2 was saved."""
    vanish = faulty(SAVED + "os.rename('run', 'gone')", batches=[3])
    ended = either.run("-c", vanish + ENTER, "tiny.toml", ranks=2)
    assert ended.code == 0, ended
    assert checkpoints(either.folder / "gone") == ["step_00000002"] and checkpoints(either.folder / "run")[-1] == "step_00000006"
    assert end_record(either.folder / "gone")["weights_sha256"] == whole_hash
    ended = either.train(ranks=2)
    assert ended.code == 0 and "has ended at step 6" in ended.out and whole_hash in ended.out, ended


def test_killed_while_another_node_writes(either: Shell, whole_hash: str) -> None:
    """Rank 0 has written its half of step 4, rank 1 never does. The checkpoint is ignored and removed."""
    killed = """
import os, time, mpidp.checkpoint.saver, mpidp.checkpoint.writer
to_disk = mpidp.checkpoint.writer.write_pieces
def write(path, *content):
    if "step_00000004" in str(path) and path.name == "rank_00001.safetensors":
        while not path.with_name("rank_00000.safetensors").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os._exit(9)
    return to_disk(path, *content)
mpidp.checkpoint.writer.write_pieces = write
mpidp.checkpoint.saver.YOUNG_SECONDS = 60.0
"""
    # the other rank waits for it in step 6
    ended = either.run("-c", killed + faulty("time.sleep(30)", ranks=[0], batches=[5]) + ENTER, "tiny.toml", ranks=2,
                       MPIDP_PRETEND_NODES="2")
    assert ended.code != 0, ended
    left = checkpoints(either.folder / "run")
    assert left[1:] == ["step_00000002"] and left[0].startswith(".writing_step_00000004_"), left
    files = sorted(os.listdir(either.folder / "run" / "checkpoints" / "step_00000002"))
    assert files == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    ended = either.train(ranks=2)
    assert ended.code == 0 and "resuming from run/checkpoints/step_00000002" in ended.out, ended
    assert end_record(either.folder / "run")["weights_sha256"] == whole_hash
    assert checkpoints(either.folder / "run") == ["step_00000002", "step_00000004", "step_00000006"]
