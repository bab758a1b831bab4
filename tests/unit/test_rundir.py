"""Laws of a run's folder: one job at a time, locks of dead jobs are taken over; start, resume, or reject with the changed
settings."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.resume import find_checkpoint, reject_changed_settings, set_aside
from mpidp.config.schema import Config, fields_of
from mpidp.config.settings import FIXED
from mpidp.errors import CheckpointError, UsageError
from mpidp.faults import run_lock
from mpidp.faults.run_lock import RunLock
from mpidp.model.options import DEFAULTS as OPTIONS
from tests import saves

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
    lock.release()  # releasing twice is harmless
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


@pytest.mark.parametrize("content", ["", '{"host": "x', "[]", '{"pid": 4}', "null", '{"host": "x", "pid": "me"}', "\x00\x00"])
def test_a_lock_cut_short_gives_way(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    RunLock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run")


def test_a_lock_that_cannot_be_taken_over_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full. The lock of the earlier holder, on another machine, is not removed, and no other file is left."""
    run = held(tmp_path / "run", host="elsewhere")
    before = (run / "lock").read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UsageError, match="cannot be written to .*No space left.*--run.dir"):
        RunLock(run, watch_seconds=0.2)
    assert (run / "lock").read_bytes() == before and [path.name for path in run.iterdir()] == ["lock"]
    (run / "lock").unlink()
    with pytest.raises(UsageError, match="cannot be written to"):
        RunLock(run)
    assert not list(run.iterdir())


def test_two_that_find_a_dead_holder_do_not_both_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job examines a dead holder while another one takes the lock over."""
    run, pid = tmp_path / "run", dead_pid()
    held(run, pid=pid)
    alive, tried, winners = run_lock._alive, [], []

    def take(who: str) -> None:
        tried.append(who)
        with suppress(UsageError):
            RunLock(run, patience_seconds=0.0)
            winners.append(who)

    def slow_look(holder: dict[str, Any]) -> bool:
        if holder.get("pid") == pid and len(tried) == 1:
            take("the quicker")
        return alive(holder)

    monkeypatch.setattr(run_lock, "_alive", slow_look)
    take("the slower")
    assert len(tried) == 2 and len(winners) == 1


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    """mpirun may return shortly before its ranks have exited."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    run = held(tmp_path / "run", pid=child.pid)
    RunLock(run, patience_seconds=20.0)
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    child.wait()


# --- holders on other machines, unknown to this kernel


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a holder update its counter ten times a second."""
    monkeypatch.setattr(run_lock, "COUNT_SECONDS", 0.1)


ELSEWHERE = """
import socket, sys, time
from pathlib import Path
from mpidp.faults import run_lock
socket.gethostname = lambda: "elsewhere"
run_lock.COUNT_SECONDS = 0.1
lock = run_lock.RunLock(Path(sys.argv[1]))
print("held", flush=True)
while not lock.lost:
    time.sleep(0.02)
assert not lock.held()
lock.release()
print("lost", flush=True)
"""


@contextmanager
def elsewhere(run: Path, **slurm: str) -> Iterator[subprocess.Popen[str]]:
    """A job on another host that holds the lock."""
    command = [sys.executable, "-c", ELSEWHERE, str(run)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | slurm)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.read()


def test_a_holder_counts(tmp_path: Path, quick: None) -> None:
    lock = RunLock(tmp_path)
    while json.loads((tmp_path / "lock").read_text())["count"] < 3:
        time.sleep(0.02)
    assert lock.held()
    lock.release()


def test_a_job_of_another_host_that_lives_is_refused(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as child:
        with pytest.raises(UsageError, match=rf"lock: in use by a job on elsewhere \(pid {child.pid}\).*remove the file"):
            RunLock(tmp_path, watch_seconds=600.0)
        assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_a_job_of_another_host_that_is_gone_gives_way(tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(held(tmp_path / "run", host="elsewhere", job="7"), watch_seconds=0.5)
    assert lock.held() and json.loads((tmp_path / "run/lock").read_text())["pid"] == os.getpid()
    words = f"a job on elsewhere (pid {os.getpid()}, job 7)"
    out = capfd.readouterr().out
    assert f"held by {words}. Checking for 0.5 s whether that job still runs" in out
    assert f"taken over from {words}, which no longer runs" in out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    lock.release()


def test_a_machine_that_was_started_anew_is_another(tmp_path: Path, quick: None) -> None:
    """After a reboot its pids belong to other processes."""
    RunLock(held(tmp_path / "run", boot="before"), watch_seconds=0.2).release()


def test_a_holder_that_was_asleep_and_taken_for_dead_gives_up(tmp_path: Path, quick: None) -> None:
    with elsewhere(tmp_path) as child:
        os.kill(child.pid, signal.SIGSTOP)
        lock = RunLock(tmp_path, watch_seconds=0.5)
        os.kill(child.pid, signal.SIGCONT)
        assert said(child) == "lost\n" and child.wait(20) == 0
        assert lock.held()  # the other's release did not affect it
        lock.release()


def slurm(monkeypatch: pytest.MonkeyPatch, job: str, restart: str) -> dict[str, str]:
    variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def test_a_requeued_job_takes_over_from_its_old_copy(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If only slurmd failed, the old copy still runs."""
    variables = slurm(monkeypatch, "7", "1")
    with elsewhere(tmp_path, **variables | {"SLURM_RESTART_COUNT": "0"}) as child:
        lock = RunLock(tmp_path, watch_seconds=600.0)
        assert said(child) == "lost\n" and child.wait(20) == 0
        assert lock.held()
        lock.release()


@pytest.mark.parametrize(("job", "restart"), [("7", "2"), ("7", "3"), ("8", "1"), ("", "")])
def test_nobody_else_takes_over_from_a_live_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str
) -> None:
    """Neither the same start of the job, nor an older copy, nor other jobs."""
    variables = slurm(monkeypatch, "7", "3")
    with elsewhere(tmp_path, **variables):
        slurm(monkeypatch, job, restart)
        with pytest.raises(UsageError, match="in use by a job on elsewhere .*job 7"):
            RunLock(tmp_path, watch_seconds=600.0)


def test_a_survivor_takes_its_job_s_lock_at_once(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, "7", "1")
    lock = RunLock(held(tmp_path / "run", host="elsewhere", pid=dead_pid(), job="7", restart=1), watch_seconds=600.0, ours=True)
    assert lock.held() and json.loads((tmp_path / "run/lock").read_text())["pid"] == os.getpid()
    lock.release()
    with elsewhere(tmp_path, SLURM_JOB_ID="8"), pytest.raises(UsageError, match="in use"):
        RunLock(tmp_path, ours=True)
    with elsewhere(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2"), pytest.raises(UsageError, match="in use"):
        RunLock(tmp_path, ours=True)


def test_a_pid_that_was_given_to_another_process_holds_nothing(tmp_path: Path) -> None:
    run = held(tmp_path / "run", started=1)
    RunLock(run, patience_seconds=0.0).release()
    with pytest.raises(UsageError, match=f"process {os.getpid()}"):
        RunLock(held(run, started=run_lock.process_state(os.getpid())[1]), patience_seconds=0.0)


def test_a_folder_that_vanished_is_nobody_else_s(tmp_path: Path, quick: None) -> None:
    lock = RunLock(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    time.sleep(0.3)
    assert lock.held() and not (tmp_path / "run").exists()
    lock.release()


def test_who_removed_the_file_and_began_has_it(tmp_path: Path, quick: None) -> None:
    first = RunLock(tmp_path)
    (tmp_path / "lock").unlink()
    second = RunLock(tmp_path)
    assert not first.held() and first.lost and second.held()
    first.release()
    assert second.held() and (tmp_path / "lock").exists()
    second.release()
    assert not (tmp_path / "lock").exists()


def save(run: Path, step: int) -> Path:
    return saves.save(run, step, {"model/w": Entry(torch.arange(4.0))}, {"end": None}, ALONE, keep=5)


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
    assert len(notes) == 1 and "skipped" in notes[0] and "step_00000006" in notes[0]
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
    files = ("metrics.jsonl", "config.toml", "tries.json", "tokenizer.json", "special_tokens.json", "init.json", "hf")
    for name in files:
        (tmp_path / name).write_text(name)
    (tmp_path / "lock").write_text("")
    spoil(tmp_path / "checkpoints/step_00000002")  # a damaged checkpoint is enough
    reader, notes = find_checkpoint(tmp_path, "never", ALONE)
    assert reader is None and "previous_1" in notes[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "previous_1"]
    moved = sorted(["checkpoints", "latest", *files])
    assert sorted(p.name for p in (tmp_path / "previous_1").iterdir()) == moved
    assert find_checkpoint(tmp_path, "never", ALONE) == (None, [])
    (tmp_path / "metrics.jsonl").write_text("")
    assert set_aside(tmp_path) == tmp_path / "previous_2"


FIXED_KEYS = {
    "data.order", "model.kind", "model.options", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.model_dim",
    "model.hidden_dim", "model.seq_len", "model.dropout", "model.tie_embeddings", "model.rope_theta",
    "model.rope_scaling", "model.norm_eps", "model.head_dim", "model.vocab_size", "train.init_from", "train.global_batch",
    "data.documents", "model.zero_init", "model.lora_rank", "model.lora_alpha", "model.lora_targets", "optim.freeze",
    "train.micro_batch", "train.lanes", "train.seed", "train.loss", "optim.name", "strategy.name", "strategy.quorum",
    "strategy.sync_every", "strategy.meet_every", "strategy.staleness", "strategy.compensation", "strategy.group",
    "strategy.group_size", "strategy.overlap", "strategy.mode", "strategy.fragments", "model.slices",
    *(f"model.{name}" for name in OPTIONS),
}


def other(value: Any, about: dataclasses.Field[Any]) -> Any:
    """Return a different value of the same type."""
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
        with pytest.raises(UsageError, match=rf"{re.escape(key)} was .* and is now .*run\.dir.*resume=never") as caught:
            reject_changed_settings(saved, config)
        assert not any(f"{name} was" in str(caught.value) for name in FIXED_KEYS - {key})
    else:
        reject_changed_settings(saved, config)


def test_a_checkpoint_of_an_older_version_lacks_new_keys() -> None:
    reject_changed_settings({}, Config())
