"""Damaged checkpoints, a full disk, kills while writing, and two jobs in one folder.

| fault | expected | checked |
|---|---|---|
| the newest checkpoint damaged: missing, truncated, empty, a flipped bit | 0 from the one before, reason printed | output, hash |
| all checkpoints damaged | 4, each reason, how to continue | code of both mpiruns, output |
| no checkpoint with run.resume=must; evaluate and generate without a run | 4 | code, output |
| unfinished folders of killed writers | ignored, later removed | hash, listing |
| killed before each rename, mkdir, unlink, fsync of a save, files torn | the same command resumes, same bits | hash, lines |
| no space for the last save | 1, the file named, no traceback; earlier checkpoint intact, no partial one | output, hash |
| run.dir held by a live process, here or on another host | 2, the holder | code, output, lock unchanged |
| run.dir held by a dead process, a zombie, a process that is just ending, or a truncated lock | taken over | hash, no lock left |
| two simultaneous commands in one run.dir | one trains, the other exits with 2 | both codes, hash |
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.commands import ENTER, SAVED, TINY, Forks, Shell, end_record, expect, faulty, steps_logged


def goes_on(place: Path, forks: Forks, whole_hash: str, from_step: int | None) -> str:
    """Assert that the plain command ends with the uninterrupted run's weights and each step logged once. Return its output."""
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    expect(ended, 0)
    if from_step is not None:
        assert f"resuming from run/checkpoints/step_{from_step:08d}" in ended.out, ended
    assert end_record(place / "run")["weights_sha256"] == whole_hash, ended
    assert steps_logged(place / "run") == [1, 2, 3, 4, 5, 6]
    assert not (place / "run" / "lock").exists()
    return ended.out


# --- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


TENSORS, MANIFEST = "rank_00000.safetensors", "manifest.json"
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no manifest": (MANIFEST, Path.unlink, "manifest.json: cannot be read"),
    "manifest cut": (MANIFEST, cut, "manifest.json: "),
    "manifest altered": (MANIFEST, flip, "manifest.json: "),
    "manifest of no bytes": (MANIFEST, lambda p: p.write_bytes(b""), "manifest.json: cannot be read"),
    "manifest not text": (MANIFEST, lambda p: p.write_bytes(b"\xff\xfe\n}"), "manifest.json: cannot be read"),
    "manifest a list": (MANIFEST, lambda p: p.write_bytes(b"[1]\n}"), "manifest.json: cannot be read"),
    "no tensors": (TENSORS, Path.unlink, "rank_00000.safetensors: cannot be read"),
    "tensors cut": (TENSORS, cut, "but the manifest states"),
    "tensors with a flipped bit": (TENSORS, flip, "wrong crc32, the file is corrupted"),
    "tensors of no bytes": (TENSORS, lambda p: p.write_bytes(b""), "0 bytes, but"),
    "tensors a folder": (TENSORS, lambda p: (p.unlink(), p.mkdir()), "rank_00000.safetensors: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_checkpoint_is_damaged(place: Path, half_run: Path, forks: Forks, whole_hash: str, name: str) -> None:
    file, damage, reason = DAMAGES[name]
    damage(half_run / "checkpoints" / "step_00000004" / file)
    said = goes_on(place, forks, whole_hash, from_step=2)
    assert "skipped an invalid checkpoint: run/checkpoints/step_00000004" in said and reason in said, said


@pytest.mark.parametrize("module", ["mpidp.evaluate", "mpidp.generate"])
def test_a_damaged_checkpoint_is_passed_over_aloud(place: Path, half_run: Path, forks: Forks, module: str) -> None:
    flip(half_run / "checkpoints" / "step_00000004" / TENSORS)
    ended = forks.run(place, module, "run")
    assert ended.code == 0, ended
    assert "step_00000004/rank_00000.safetensors: wrong crc32" in ended.err, ended


def test_no_checkpoint_is_valid(place: Path, half_run: Path, forks: Forks) -> None:
    flip(half_run / "checkpoints" / "step_00000004" / TENSORS)
    cut(half_run / "checkpoints" / "step_00000002" / MANIFEST)
    words = ("no checkpoint in run/checkpoints is valid", "step_00000004/rank_00000.safetensors: wrong crc32",
             "step_00000002/manifest.json", "--run.resume=never")
    expect(forks.run(place, "mpidp.train", "tiny.toml"), 4, *words)
    expect(forks.run(place, "mpidp.evaluate", "run"), 4, *words)
    expect(forks.run(place, "mpidp.generate", "run"), 4, *words)
    assert not (half_run / "lock").exists()


def test_no_checkpoint_is_valid_under_mpirun(either: Shell, killed: Path) -> None:
    shutil.copytree(killed, either.folder / "run")
    for step in (2, 4):
        flip(either.folder / "run" / "checkpoints" / f"step_{step:08d}" / TENSORS)
    expect(either.train(ranks=2), 4, "no checkpoint in run/checkpoints is valid", "--run.resume=never")


def test_must_resume_and_cannot(either: Shell) -> None:
    expect(either.train("--run.resume=must", ranks=2), 4, "run.resume=must, but run/checkpoints contains no checkpoint")


def test_runs_that_are_not_there(place: Path, forks: Forks) -> None:
    (place / "bare").mkdir()
    for module in ("mpidp.evaluate", "mpidp.generate"):
        expect(forks.run(place, module, "absent"), 4, "absent: no such folder")
        expect(forks.run(place, module, "tiny.toml"), 4, "tiny.toml: no such folder")
        expect(forks.run(place, module, "bare"), 4, "bare contains no checkpoint. Train first, with --run.dir=bare")


def test_one_checkpoint_by_its_own_name(place: Path, half_run: Path, forks: Forks) -> None:
    expect(forks.run(place, "mpidp.evaluate", "run/checkpoints/step_00000002"), 0)
    flip(half_run / "checkpoints" / "step_00000002" / TENSORS)
    ended = forks.run(place, "mpidp.evaluate", "run/checkpoints/step_00000002")
    expect(ended, 4, "step_00000002/rank_00000.safetensors: wrong crc32")


def test_what_killed_writers_left_is_ignored(place: Path, half_run: Path, forks: Forks, whole_hash: str) -> None:
    folder = half_run / "checkpoints"
    shutil.copytree(folder / "step_00000004", folder / ".writing_step_00000006")
    shutil.copytree(folder / "step_00000004", folder / ".old_step_00000008")
    (folder / "step_x").mkdir()
    (half_run / "latest").write_text("step_99999999")
    (half_run / ".latest.tmp").write_text("x")
    goes_on(place, forks, whole_hash, from_step=4)
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert not left, left


# --- killed while writing

# Counts the calls of the saving thread that change the disk, and exits before call number LAST. A file that is about to be
# synced is first truncated to half, as after a power failure.
KILL = """
import os, threading
calls = 0
def before(name, plain):
    def call(*args, **named):
        global calls
        calls += threading.current_thread().name == "mpidp-save"
        if calls == LAST and threading.current_thread().name == "mpidp-save":
            if name == "fsync" and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
            os._exit(77)
        return plain(*args, **named)
    return call
for name in ("rename", "replace", "mkdir", "fsync", "rmdir", "unlink"):
    setattr(os, name, before(name, getattr(os, name)))
"""


def test_killed_at_each_write_of_a_checkpoint(tmp_path: Path, prepared: Path, forks: Forks) -> None:
    """Start from step 2 and get killed in the save of step 4, which also removes the checkpoint of step 2 (run.keep=1)."""
    shutil.copytree(prepared / "shards", tmp_path / "shards")
    (tmp_path / "tiny.toml").write_text(TINY + "keep = 1\n")
    expect(forks.run(tmp_path, "mpidp.train", "tiny.toml", "--run.dir=whole"), 0)
    whole_hash = str(end_record(tmp_path / "whole")["weights_sha256"])
    ended = forks.run(tmp_path, "mpidp.train", "tiny.toml", "--run.dir=begun",
                      inject=faulty(SAVED + "os._exit(9)", batches=[2]))
    assert ended.code == 9
    begun_from = []
    for last in range(1, 60):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "begun", tmp_path / "run")
        (tmp_path / "run" / "config.toml").unlink()
        ended = forks.run(tmp_path, "mpidp.train", "tiny.toml", "--train.steps=6",
                          inject=KILL.replace("LAST", str(last)) + faulty(SAVED + "os._exit(78)", batches=[4]))
        if ended.code == 78:  # the whole save was completed
            break
        assert ended.code == 77, ended
        said = goes_on(tmp_path, forks, whole_hash, from_step=None)
        begun_from.append(int(said.split("resuming from run/checkpoints/step_")[1][:8]))
    assert 12 < last < 59, "the calls of a save were not counted"
    assert begun_from == sorted(begun_from) and set(begun_from) == {2, 4}, begun_from


# --- no space left


@pytest.mark.parametrize("limit", [100_000, 6000])
def test_no_space_left_while_saving(place: Path, half_run: Path, forks: Forks, whole_hash: str, limit: int) -> None:
    """100,000 bytes: the tensors do not fit; 6000: only a few lines fit."""
    inject = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    ended = forks.run(place, "mpidp.train", "tiny.toml", inject=inject)
    expect(ended, 1, "File too large", "rank_00000.safetensors" if limit > 10_000 else "")
    names = {path.name for path in (half_run / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert names == {"step_00000002", "step_00000004"}, names
    goes_on(place, forks, whole_hash, from_step=4)


# --- locks


def test_the_lock_of_a_live_process(place: Path, half_run: Path, forks: Forks) -> None:
    lock = half_run / "lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": ""}))
    before = lock.read_bytes()
    expect(forks.run(place, "mpidp.train", "tiny.toml"), 2, f"run/lock: in use by process {os.getpid()}", "--run.dir=DIR")
    assert lock.read_bytes() == before


def test_the_lock_of_a_zombie(place: Path, half_run: Path, forks: Forks, whole_hash: str) -> None:
    """The holder is dead, but its parent has not reaped it: mpirun's parent may be a container's first process, which never does.
    """
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        (half_run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "job": ""}))
        goes_on(place, forks, whole_hash, from_step=4)
    finally:
        os.waitpid(pid, 0)


def test_the_lock_of_a_dying_process(place: Path, half_run: Path, forks: Forks, whole_hash: str) -> None:
    dying = subprocess.Popen(["sleep", "1.5"])
    (half_run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": dying.pid, "job": ""}))
    threading.Thread(target=dying.wait, daemon=True).start()
    goes_on(place, forks, whole_hash, from_step=4)


def test_the_lock_of_another_host(place: Path, half_run: Path, forks: Forks, whole_hash: str) -> None:
    """Its holder is gone, so its counter stands still."""
    (half_run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": "7"}))
    said = goes_on(place, forks, whole_hash, from_step=4)
    assert "lock: the lock is held by a job on elsewhere (pid 1, job 7). Checking for 10 s whether that job still runs" in said
    assert "run/lock: the lock is taken over from a job on elsewhere (pid 1, job 7), which no longer runs" in said


def test_the_lock_of_another_host_where_the_job_lives(place: Path, half_run: Path, forks: Forks) -> None:
    done = threading.Event()

    def live() -> None:
        for count in range(10_000):
            holder = {"host": "elsewhere", "pid": 1, "job": "7", "token": "x", "count": count}
            (half_run / "new").write_text(json.dumps(holder))
            os.replace(half_run / "new", half_run / "lock")
            if done.wait(0.2):
                return

    thread = threading.Thread(target=live)
    thread.start()
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    done.set()
    thread.join()
    expect(ended, 2, "run/lock: in use by a job on elsewhere (pid 1, job 7). If that job no longer runs, remove the file")
    assert (half_run / "lock").exists()


@pytest.mark.parametrize("content", [b"", b'{"host": "', b"null", b'{"pid": "x", "host": "y"}', b"\xff"], ids=str)
def test_a_lock_that_was_cut_short(place: Path, half_run: Path, forks: Forks, whole_hash: str, content: bytes) -> None:
    (half_run / "lock").write_bytes(content)
    goes_on(place, forks, whole_hash, from_step=4)


def test_a_run_dir_in_use_under_mpirun(either: Shell) -> None:
    (either.folder / "run").mkdir()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": ""}
    (either.folder / "run" / "lock").write_text(json.dumps(holder))
    expect(either.train(ranks=2), 2, f"run/lock: in use by process {os.getpid()}")


def test_two_commands_at_once(shell: Shell, whole_hash: str) -> None:
    slowly = faulty("time.sleep(1.2)", batches=range(6)) + ENTER
    started = [shell.start("-c", slowly, "tiny.toml") for _ in range(2)]
    ended = sorted((one.wait() for one in started), key=lambda e: e.code)
    expect(ended[0], 0)
    expect(ended[1], 2, "run/lock: ", "--run.dir=DIR")
    assert end_record(shell.folder / "run")["weights_sha256"] == whole_hash
    assert steps_logged(shell.folder / "run") == [1, 2, 3, 4, 5, 6]


# The first of two commands is delayed between creating its lock file and writing its name into it.
HELD_UP = """
import os, time
def held_up(plain):
    def write(handle, content, *at):
        if b'"host"' in content:
            open("held_up", "w").close()
            time.sleep(6)
        return plain(handle, content, *at)
    return write
os.write, os.pwrite = held_up(os.write), held_up(os.pwrite)
import mpidp.runtime.command, mpidp.train
"""


def test_two_commands_at_once_at_the_worst_moment(shell: Shell, forks: Forks) -> None:
    first = shell.start("-c", HELD_UP + ENTER, "tiny.toml")
    first.until_exists(shell.folder / "held_up")
    second = forks.run(shell.folder, "mpidp.train", "tiny.toml")
    assert sorted([first.wait().code, second.code]) == [0, 2], second


def test_a_longer_run_keeps_its_warm_up(place: Path, forks: Forks) -> None:
    """Otherwise the learning rate would start its warm-up again. The user can still set another number of steps."""
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=20"), 0)
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=60")
    expect(ended, 0)
    assert "train.steps 20 -> 60: the learning rate at step 21 is 0.00234, after 2.28e-05 at step 20" in ended.out
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "train_loss" in line]
    assert rates[1] == rates[2] == max(rates) and rates[20:] == sorted(rates[20:], reverse=True)
    assert "warmup_steps = 2\n" in (place / "run/config.toml").read_text()
    ended = forks.run(place, "mpidp.train", "tiny.toml", "--train.steps=62", "--optim.warmup_steps=6")
    expect(ended, 0)
    assert "train.steps 60 -> 62, optim.warmup_steps 2 -> 6: the learning rate at step 61 is " in ended.out
