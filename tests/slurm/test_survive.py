"""Jobs that receive signals, run out of time or lose nodes: each ends with the weights of an undisturbed run.

| fault | expected | checked |
|---|---|---|
| USR1 to the batch script, both mpiruns, srun | checkpoint, 75, requeued, resumes | Restarts=1, hash, each step once |
| the same where requeue is forbidden | a follow-up job | its number in the output, hash |
| time limit: by Slurm's signal; by the run's own knowledge of its end time | the same | same |
| a file STOP | the same | same, the file removed |
| a node crashes | requeued on other nodes | same |
| only its slurmd dies: the old copy of the requeued job keeps running | one resumes, the other exits | same, no process left |
| a node crashes under resilient.sbatch | restarted in the same allocation | Restarts=0, hash |
| the network cable is pulled | requeued on other nodes | same |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.commands import launchers
from tests.slurm.cluster import (
    MPICH,
    OPENMPI,
    PATIENCE,
    Job,
    ask,
    check_whole,
    furnish,
    mpi_of,
    need,
    processes_of,
    script,
    submit,
)

pytestmark = pytest.mark.timeout(3 * PATIENCE)
SLOWLY = {"MPIDP_FAULT": "delay:0:1,seconds=0.7"}  # delays each micro-batch of rank 0, so that faults can happen between steps


def begin(folder: Path, template: str, *words: str, options: tuple[str, ...] = (), **extra: str) -> Job:
    """Start a slow run; return just after its checkpoint of step 2."""
    job = submit(folder, template, *words, options=options, **SLOWLY | extra)
    job.until_step(2)
    return job


def check_went_on(job: Job, whole_hash: str, *said: str, restarts: tuple[int, ...] = (1,)) -> None:
    job.wait()
    assert job.restarts in restarts, job
    assert all(words in job.said for words in ("resuming from run/checkpoints/step_", *said)), job
    check_whole(job, whole_hash)


def signalled(folder: Path, template: str, **extra: str) -> Job:
    job = begin(folder, template, **extra)
    job.signal()
    return job


def stop_file(folder: Path) -> Job:
    job = begin(folder, "multi_node_mpirun.sbatch", **MPICH)
    (folder / "run" / "STOP").touch()
    return job


def time_limit(folder: Path) -> Job:
    """Slurm checks time limits every half minute; two long steps leave time for this."""
    job = begin(folder, "single_node.sbatch", "--run.stop_early_seconds=0", options=("--signal=B:USR1@100",),
                MPIDP_FAULT="delay:0:3,seconds=9,until=4")
    ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    return job


def end_time(folder: Path) -> Job:
    """The run knows when its job ends, and stops a tenth of the time before; no signal is sent."""
    job = submit(folder, "single_node.sbatch", options=("--signal=B:USR1@0",), MPIDP_FAULT="delay:0:1,seconds=1.8")
    job.until("running", lambda: job.facts()["JobState"] == "RUNNING")
    ask("scontrol", "update", f"JobId={job.number}", "EndTime=now+20")
    return job


ASKED: dict[str, tuple[dict[str, str], str, Callable[[Path], Job]]] = {  # environment, reason for the stop, the action
    "limit": (MPICH, "SIGUSR1", time_limit),
    "end time": (MPICH, "the job's time limit", end_time),
    "chain": (MPICH, "SIGUSR1", partial(signalled, template="single_node.sbatch", NEXT="chain", **MPICH)),
    "one node": (MPICH, "SIGUSR1", partial(signalled, template="single_node.sbatch", **MPICH)),
    "STOP": (MPICH, "file run/STOP", stop_file),
    "mpirun": (OPENMPI, "SIGUSR1", partial(signalled, template="multi_node_mpirun.sbatch", **OPENMPI)),
    "pmi2": (MPICH, "SIGUSR1", partial(signalled, template="multi_node_srun.sbatch", **MPICH)),
    "pmix": (OPENMPI, "SIGUSR1", partial(signalled, template="multi_node_srun.sbatch", MPI="pmix", **OPENMPI)),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[str, Job]:
    """Submit all jobs one after the other: while one waits to be restarted, the next one runs."""
    jobs = {}
    for name, (environment, _, begun) in ASKED.items():
        if mpi_of(environment) in launchers():
            jobs[name] = begun(furnish(tmp_path_factory.mktemp("asked"), prepared))
    return jobs


@pytest.mark.parametrize("name", ASKED)
def test_asked_to_stop(asked: dict[str, Job], whole_hash: str, name: str) -> None:
    environment, reason, _ = ASKED[name]
    need(environment)
    job = asked[name]
    if name == "chain":
        assert job.wait("FAILED").facts()["ExitCode"] == "75:0", job
        job = Job(re.findall(r"^Submitted batch job (\d+)$", job.said, re.MULTILINE)[0], job.folder)
        job.wait()
        check_whole(job, whole_hash)
    else:
        again = (1, 2, 3) if name in ("limit", "end time") else (1,)  # the next start has the same short limit
        check_went_on(job, whole_hash, f"stopped on request ({reason}) at step", restarts=again)
    assert not (job.folder / "run" / "STOP").exists()


def give_up(node: int) -> None:
    """Report as an operator what slurmctld detects by itself after SlurmdTimeout."""
    ask("scontrol", "update", f"NodeName=node{node}", "State=DOWN", "Reason=crashed")


def nodes_of(job: Job) -> list[int]:
    return [int(name[4:]) for name in ask("scontrol", "show", "hostnames", job.facts()["NodeList"]).split()]


@pytest.mark.parametrize("how", ["node-down", "net-down"])
@pytest.mark.usefixtures("mended")
def test_node_is_lost(folder: Path, whole_hash: str, how: str) -> None:
    """The node crashes, or its cable is pulled. It is not the node of the batch script, which would be the simpler case.
    slurmctld detects the crash by itself; the other fault is reported to it."""
    job = begin(folder, "multi_node_srun.sbatch")
    first, lost = nodes_of(job)
    script(how, lost)
    if how == "net-down":
        give_up(lost)
    job.until("requeued", lambda: job.restarts > 0)
    check_went_on(job, whole_hash)
    assert lost not in nodes_of(job), job


@pytest.mark.usefixtures("mended")
def test_old_copy_runs_on(folder: Path, whole_hash: str) -> None:
    """slurmctld requeues the job of a node whose slurmd is dead while its processes live. There must never be two writers."""
    job = begin(folder, "single_node.sbatch", MPIDP_FAULT="delay:0:3,seconds=2.5,until=5")
    assert processes_of(1, "mpidp.train")
    script("slurmd-down", 1)
    give_up(1)
    job.until("requeued", lambda: job.restarts > 0)
    check_went_on(job, whole_hash, "another copy of this job has taken over")
    assert not processes_of(1, "mpidp.train")


@pytest.mark.usefixtures("mended")
def test_node_crashes_and_the_allocation_goes_on(folder: Path, whole_hash: str) -> None:
    need(OPENMPI)
    job = begin(folder, "resilient.sbatch", options=("--nodes=3",), **OPENMPI)
    script("node-down", 2)
    check_went_on(job, whole_hash, restarts=(0,))
    assert "start 1 of 5, on node1:2,node2:2" in job.said and "start 2 of 5, on node1:2,node3:2" in job.said, job


def test_rank_dies_and_the_others_go_on(folder: Path, whole_hash: str) -> None:
    need(OPENMPI)
    job = submit(folder, "resilient.sbatch", options=("--nodes=3",), MPIDP_FAULT="kill:3:4", **OPENMPI).wait()
    check_whole(job, whole_hash)
    assert job.restarts == 0, job
