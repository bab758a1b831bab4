"""Stop requests and kills: the same command resumes the run, and ends with the weights of an uninterrupted run.

| fault | expected | checked |
|---|---|---|
| a file RUN/STOP | 75, a checkpoint of that step, the file removed | mpirun's code, output, hash of the resumed run |
| SIGUSR1 to mpirun, both MPIs | 75, the same | same |
| SIGINT and SIGTERM to mpirun, MPICH; to a single process | 75, the same | same |
| SIGUSR1 to one rank | 75, all ranks exit | same |
| SIGTERM to Open MPI's mpirun, which gives ranks 0.24 s | not 0; resumes from the newest checkpoint | code, hash |
| the job's time limit, both MPIs | 75, the same, stop_early_seconds before it | same |
| a requeued job starts while its old copy runs | the old copy: 1, no further checkpoint; the new one resumes | codes, hash |
| SIGKILL to mpirun and all of its ranks, at three random moments | resumes each time | hash, each step logged once |
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.commands import (
    ENTER,
    SLOWLY,
    Ended,
    Forks,
    Shell,
    Started,
    end_record,
    expect,
    family,
    faulty,
    kill_all,
    steps_logged,
    still_there,
)


def begin(shell: Shell, ranks: int = 2) -> Started:
    """Start a run of 0.4 seconds per step; return just after its checkpoint of step 2."""
    started = shell.start("-c", SLOWLY, "tiny.toml", ranks=ranks)
    started.until_exists(shell.folder / "run" / "checkpoints" / "step_00000002")
    return started


def check_stopped(shell: Shell, ended: Ended, reason: str) -> int:
    """Assert that it printed once why it stopped, after a checkpoint. Return the step."""
    expect(ended, 75, f"stopped on request ({reason}) at step ", "checkpoint written; the same command resumes from here")
    run = shell.folder / "run"
    step = steps_logged(run)[-1]
    assert step < 6, "it was not stopped in time"
    assert f"at step {step}," in ended.err
    assert (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
    assert not (run / "lock").exists() and not (run / "STOP").exists()
    return step


def check_goes_on(run: Path, ended: Ended, step: int, whole_hash: str) -> None:
    expect(ended, 0)
    assert f"step_{step:08d}" in ended.out and "resuming from" in ended.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "resume"] == [step]
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    assert end_record(run)["weights_sha256"] == whole_hash


@pytest.mark.quick
def test_a_file_named_stop(either: Shell, forks: Forks, whole_hash: str) -> None:
    started = begin(either)
    (either.folder / "run" / "STOP").touch()
    step = check_stopped(either, started.wait(), "file run/STOP")
    check_goes_on(either.folder / "run", forks.run(either.folder, "mpidp.train", "tiny.toml"), step, whole_hash)


def test_sigusr1_to_mpirun(either: Shell, whole_hash: str) -> None:
    started = begin(either)
    started.process.send_signal(signal.SIGUSR1)
    step = check_stopped(either, started.wait(), "SIGUSR1")
    check_goes_on(either.folder / "run", either.train(ranks=2), step, whole_hash)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_sigint_and_sigterm_to_mpich_s_mpirun(place: Path, forks: Forks, whole_hash: str, number: signal.Signals) -> None:
    shell = Shell(place, "mpich")
    started = begin(shell)
    started.process.send_signal(number)
    step = check_stopped(shell, started.wait(), number.name)
    check_goes_on(place / "run", forks.run(place, "mpidp.train", "tiny.toml"), step, whole_hash)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_sigint_and_sigterm_to_a_process_alone(shell: Shell, forks: Forks, whole_hash: str, number: signal.Signals) -> None:
    started = begin(shell, ranks=0)
    started.process.send_signal(number)
    step = check_stopped(shell, started.wait(), number.name)
    check_goes_on(shell.folder / "run", forks.run(shell.folder, "mpidp.train", "tiny.toml"), step, whole_hash)


def test_sigusr1_to_one_rank(place: Path, forks: Forks, whole_hash: str) -> None:
    shell = Shell(place, "mpich")
    started = begin(shell)
    os.kill(started.ranks()[1], signal.SIGUSR1)
    step = check_stopped(shell, started.wait(), "SIGUSR1")
    check_goes_on(place / "run", forks.run(place, "mpidp.train", "tiny.toml"), step, whole_hash)


def test_the_job_s_time_limit(either: Shell, whole_hash: str) -> None:
    """Slurm reports an end time 6 s in the future."""
    (either.folder / "squeue").write_text("#!/bin/sh\ndate -d '+6 seconds' +%Y-%m-%dT%H:%M:%S\n")
    (either.folder / "squeue").chmod(0o755)
    slurm = "import os\nos.environ |= {'SLURM_JOB_ID': '7', 'PATH': os.getcwd() + ':' + os.environ['PATH']}\n"
    slowly = faulty("time.sleep(2)", ranks=range(99), batches=range(99)) + ENTER
    ended = either.run("-c", slurm + slowly, "tiny.toml", ranks=2)
    assert "the job's time ends at " in ended.out and "the run writes a checkpoint and stops (exit code 75)" in ended.out, ended
    step = check_stopped(either, ended, "the job's time limit")
    check_goes_on(either.folder / "run", either.train(ranks=2), step, whole_hash)


def test_the_old_copy_of_a_requeued_job(place: Path, forks: Forks, whole_hash: str) -> None:
    """The node's slurmd died, so the job was requeued while the node's processes live."""
    shell = Shell(place)
    waits = faulty("while not os.path.exists('go'): time.sleep(0.05)", batches=[2]) + ENTER
    old = shell.start("-c", waits, "tiny.toml", SLURM_JOB_ID="7")
    old.until_exists(place / "run" / "checkpoints" / "step_00000002")
    expect(forks.run(place, "mpidp.train", "tiny.toml", SLURM_JOB_ID="8"), 2, f"in use by process {old.process.pid} on this host")
    ended = forks.run(place, "mpidp.train", "tiny.toml", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    expect(ended, 0)
    (place / "go").touch()
    expect(old.wait(), 1, "another copy of this job has taken over run: this copy stops at step ", "and writes nothing more")
    assert end_record(place / "run")["weights_sha256"] == whole_hash
    assert steps_logged(place / "run") == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (place / "run" / "checkpoints").iterdir())[-1] == "step_00000006"
    assert not (place / "run" / "lock").exists() and not (place / "run" / "tries.json").exists()


@pytest.mark.check
def test_sigterm_to_open_mpi_s_mpirun(place: Path, forks: Forks, whole_hash: str) -> None:
    shell = Shell(place, "openmpi")
    started = begin(shell)
    members = family(started.process.pid)
    started.process.send_signal(signal.SIGTERM)
    assert started.wait().code != 0
    still_there(members)
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    expect(ended, 0)
    assert end_record(place / "run")["weights_sha256"] == whole_hash
    assert steps_logged(place / "run") == [1, 2, 3, 4, 5, 6]


def learns(metrics: Path, start: int) -> bool:
    """Has the job's start number `start` made a step?"""
    jobs = metrics.read_text().split('"event": "start"') if metrics.exists() else []
    return len(jobs) == start + 1 and '"train_loss"' in jobs[-1]


def test_killed_three_times_at_random_moments(shell: Shell, forks: Forks, whole_hash: str) -> None:
    moments = random.Random(17)
    metrics = shell.folder / "run" / "metrics.jsonl"
    for number in (1, 2, 3):
        started = shell.start("-c", SLOWLY, "tiny.toml", ranks=2)
        while not learns(metrics, number):
            assert started.process.poll() is None, started.so_far()
            assert time.monotonic() - started.began < 60
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.5))
        kill_all(started.process.pid)
        started.process.wait()
    ended = forks.run(shell.folder, "mpidp.train", "tiny.toml", "--run.tries=4")
    expect(ended, 0)
    assert end_record(shell.folder / "run")["weights_sha256"] == whole_hash
    assert steps_logged(shell.folder / "run") == [1, 2, 3, 4, 5, 6]
