"""Laws of stop requests: their time and source, and that an unanswered query delays nothing."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest

from mpidp.faults.stop import TAKEN_OVER, StopRequest, job_end, stop_time


def test_a_job_stops_before_its_time_is_over() -> None:
    assert stop_time(10_000.0, 0.0, 120.0) == 9880.0
    assert stop_time(600.0, 0.0, 120.0) == 540.0  # at most a tenth of the remaining time
    assert stop_time(9_990.0, 9_980.0, 120.0) == 9_989.0
    assert stop_time(None, 0.0, 120.0) == stop_time(10_000.0, 0.0, 0.0) == math.inf
    assert stop_time(50.0, 50.0, 120.0) == stop_time(50.0, 1000.0, 120.0) == math.inf  # it belongs to another job


def squeue(folder: Path, script: str) -> dict[str, str]:
    """An environment with an squeue that runs this script."""
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm_says_when_a_job_ends(tmp_path: Path) -> None:
    assert job_end({}) is None
    assert job_end({"SLURM_JOB_END_TIME": "1700000000"}) is None  # without a job
    assert job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    said = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1.7e9))
    environment = squeue(tmp_path, f'[ "$*" = "-h -j 7 -o %e" ] && echo {said}')
    assert job_end(environment) == 1.7e9
    assert job_end(environment | {"SLURM_JOB_END_TIME": "soon"}) == 1.7e9


@pytest.mark.parametrize(
    "script", ["echo N/A", "echo", "echo 2026-13-44", "echo 2026-01-01T00:00:00; exit 1", "sleep 60", "exit 0"]
)
def test_no_answer_is_no_end(tmp_path: Path, script: str) -> None:
    assert job_end(squeue(tmp_path, script), timeout_seconds=1.0) is None
    assert job_end({"SLURM_JOB_ID": "7", "PATH": str(tmp_path / "absent")}) is None


def test_what_asks_for_a_stop(tmp_path: Path) -> None:
    lost = False
    stop = StopRequest(tmp_path / "STOP", math.inf, lambda: lost)
    assert not stop.requested()
    (tmp_path / "STOP").touch()
    assert stop.requested() and stop.reason == f"file {tmp_path / 'STOP'}"
    stop.close()
    assert not (tmp_path / "STOP").exists()

    stop = StopRequest(None, time.time())
    assert stop.requested() and stop.reason == "the job's time limit"
    stop.close()

    stop = StopRequest(tmp_path / "STOP", time.time() + 1000)
    assert not stop.requested()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested() and stop.reason == "SIGUSR1"
    stop.close()

    (tmp_path / "STOP").touch()
    stop = StopRequest(tmp_path / "STOP", 0.0, lambda: True)
    assert stop.requested() and stop.reason == TAKEN_OVER
    stop.close()
    assert (tmp_path / "STOP").exists()  # the file is meant for the other copy
