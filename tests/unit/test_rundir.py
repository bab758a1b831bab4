"""Laws of a run's folder: one job at a time, a dead one gives way; begin, go on or refuse, naming what changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp import checkpoint, rundir
from mpidp.config import FIXED, Config, fields_of
from mpidp.errors import CheckpointError, UsageError
from mpidp.rundir import RunLock, find_checkpoint, refuse_changes, set_aside
from mpidp.state import Entry

ALONE = MPI.COMM_SELF


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def held(run: Path, **holder: Any) -> Path:
    run.mkdir(exist_ok=True)
    (run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": ""} | holder))
    return run


def test_a_lock_names_its_holder_and_goes(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "deep" / "run")
    holder = json.loads((tmp_path / "deep/run/lock").read_text())
    assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    lock.release()
    assert not (tmp_path / "deep/run/lock").exists()
    lock.release()  # twice does no harm
    RunLock(tmp_path / "deep" / "run").release()


def test_a_live_holder_is_refused(tmp_path: Path) -> None:
    run = held(tmp_path / "run")
    before = (run / "lock").read_bytes()
    with pytest.raises(UsageError, match=f"process {os.getpid()}.*--run.dir"):
        RunLock(run, patience_seconds=0.0)
    assert (run / "lock").read_bytes() == before


def test_a_dead_holder_gives_way(tmp_path: Path) -> None:
    run = held(tmp_path / "run", pid=dead_pid())
    RunLock(run)
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


def test_another_hosts_holder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="elsewhere.*remove the file"):
        RunLock(held(tmp_path / "run", host="elsewhere", pid=dead_pid()), patience_seconds=0.0)


@pytest.mark.parametrize("content", ["", '{"host": "x', "[]", '{"pid": 4}', "null", '{"host": "x", "pid": "me"}', "\x00\x00"])
def test_a_lock_cut_short_gives_way(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    RunLock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run")


def test_two_that_find_a_dead_holder_do_not_both_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One looks at the dead holder while another comes, looks and takes."""
    run, pid = tmp_path / "run", dead_pid()
    held(run, pid=pid)
    alive, tried, winners = rundir._alive, [], []

    def take(who: str) -> None:
        tried.append(who)
        with suppress(UsageError):
            RunLock(run, patience_seconds=0.0)
            winners.append(who)

    def slow_look(number: int) -> bool:
        if number == pid and len(tried) == 1:
            take("the quicker")
        return alive(number)

    monkeypatch.setattr(rundir, "_alive", slow_look)
    take("the slower")
    assert len(tried) == 2 and len(winners) == 1


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    """mpirun may come back a moment before its ranks are gone."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    run = held(tmp_path / "run", pid=child.pid)
    RunLock(run, patience_seconds=20.0)
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    child.wait()


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, {"model/w": Entry(torch.arange(4.0))}, {"end": None}, ALONE, keep=5)


def spoil(path: Path) -> None:
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_resume_goes_on_from_the_newest_valid(tmp_path: Path, resume: str) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    reader, notes = find_checkpoint(tmp_path, resume, ALONE)
    assert reader is not None and reader.meta["step"] == 6 and notes == []
    spoil(tmp_path / "checkpoints/step_00000006")
    reader, notes = find_checkpoint(tmp_path, resume, ALONE)
    assert reader is not None and reader.meta["step"] == 4
    assert len(notes) == 1 and "passed over" in notes[0] and "step_00000006" in notes[0]
    for step in (2, 4):
        spoil(tmp_path / f"checkpoints/step_{step:08d}")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is valid.*step_00000006.*resume=never"):
        find_checkpoint(tmp_path, resume, ALONE)


def test_resume_of_a_run_that_never_saved(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert find_checkpoint(tmp_path, "auto", ALONE) == (None, [])
    with pytest.raises(CheckpointError, match="resume=must"):
        find_checkpoint(tmp_path, "must", ALONE)


def test_never_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in ("metrics.jsonl", "config.toml"):
        (tmp_path / name).write_text(name)
    (tmp_path / "lock").write_text("")
    spoil(tmp_path / "checkpoints/step_00000002")  # not even a valid one is needed
    reader, notes = find_checkpoint(tmp_path, "never", ALONE)
    assert reader is None and "previous_1" in notes[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "previous_1"]
    moved = ["checkpoints", "config.toml", "latest", "metrics.jsonl"]
    assert sorted(p.name for p in (tmp_path / "previous_1").iterdir()) == moved
    assert find_checkpoint(tmp_path, "never", ALONE) == (None, [])
    (tmp_path / "metrics.jsonl").write_text("")
    assert set_aside(tmp_path) == tmp_path / "previous_2"


FIXED_KEYS = {
    "data.order", "model.kind", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.model_dim",
    "model.hidden_dim", "model.seq_len", "model.dropout", "model.tie_embeddings", "model.rope_theta", "train.global_batch",
    "train.micro_batch", "train.lanes", "train.seed", "optim.name", "strategy.name",
}


def other(value: Any, about: dataclasses.Field[Any]) -> Any:
    """Some other value of the same type."""
    if about.metadata["choices"]:
        return next((choice for choice in about.metadata["choices"] if choice != value), "other")
    return not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1


def test_what_may_not_change_is_pinned() -> None:
    assert {key for key, about, _ in fields_of() if about.metadata["resume"] == FIXED} == FIXED_KEYS


@pytest.mark.parametrize("key", [key for key, _, _ in fields_of()])
def test_a_change_is_refused_by_name_or_taken(key: str) -> None:
    config = Config()
    saved = {name: other(value, about) if name == key else value for name, about, value in fields_of(config)}
    if key in FIXED_KEYS:
        with pytest.raises(UsageError, match=rf"{re.escape(key)} was .*, is .*run\.dir.*resume=never") as caught:
            refuse_changes(saved, config)
        assert not any(name in str(caught.value) for name in FIXED_KEYS - {key})
    else:
        refuse_changes(saved, config)


def test_a_checkpoint_of_an_older_version_lacks_new_keys() -> None:
    refuse_changes({}, Config())
