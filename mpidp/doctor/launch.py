"""Checks that the launcher and the MPI library fit together. If they fit, a launch of N processes is one job of N ranks. Pure,
except mpirun_here()."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from mpidp.doctor.facts import MachineFacts
from mpidp.doctor.findings import CheckResult, where

LAUNCHERS_OWN = ("PMI", "PMIX", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL", "MPIEXEC")
INTEL, OPEN_MPI = "Intel MPI", "Open MPI"
SRUN = {
    "MPICH": "srun --mpi=pmi2", OPEN_MPI: "srun --mpi=pmix", INTEL: "I_MPI_PMI_LIBRARY=/path/of/libpmi2.so srun --mpi=pmi2",
}
MPIRUN = {INTEL: "the mpiexec.hydra of Intel MPI"}  # the command that starts ranks, if it is not mpirun
LEVELS = ("single", "funneled", "serialized", "multiple")


def launcher_of(environ: Mapping[str, str]) -> str:
    """Return the launcher that started this process. "Open MPI", "Intel MPI" and "MPICH" are the mpirun of the library with this
    name. "srun" is Slurm's launcher. Return "" if there is no launcher. Pure."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return OPEN_MPI
    if "MPI_LOCALNRANKS" in environ:
        return INTEL if "I_MPI_HYDRA_UUID" in environ else "MPICH"
    return "srun" if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else ""


def on_this_node(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (local rank, number of ranks on this node). Both are read from the launcher's environment variables. Without these
    variables, return (0, 1). Pure."""
    local_ranks = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    counts = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    place, count = (next((environ[name] for name in names if name in environ), "") for names in (local_ranks, counts))
    of_nodes: list[int] = []  # Slurm lists all nodes: 4(x2),3 means 4, 4 and 3 ranks
    for part in (count or "1").split(","):
        ranks, _, times = part.partition("(x")
        of_nodes += [int(ranks)] * int(times.rstrip(")") or 1)
    return int(place or 0), of_nodes[min(int(environ.get("SLURM_NODEID") or 0), len(of_nodes) - 1)]


def incompatible(kind: str, launcher: str) -> bool:
    """Return True if `launcher` cannot start one job with an MPI library of this `kind`. Pure."""
    return (launcher == OPEN_MPI) != (kind == OPEN_MPI) and launcher in (OPEN_MPI, INTEL, "MPICH")


def mpirun_here() -> tuple[str, str]:
    """Return (path, kind) of the mpirun on the PATH, or ("", "") if there is none. `kind`: "MPICH", "Open MPI", "Intel MPI" or
    "other". Independent."""
    if not (path := shutil.which("mpirun")):
        return "", ""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS_OWN)}
    version = subprocess.run([path, "--version"], env=environ, capture_output=True, text=True, timeout=20, check=False).stdout
    names = {"Intel(R) MPI": INTEL, "HYDRA": "MPICH", "Open MPI": OPEN_MPI}
    return path, next((name for words, name in names.items() if words in version), "other")


def check_launch(size: int, launched: int, library: str, launcher: str, mpirun: tuple[str, str]) -> CheckResult:
    """Check that the processes form one job of several ranks, and not several jobs of one rank.

    `size`: the number of ranks of this job. `launched`: the number of processes that the launcher started, or 0 if it is
    unknown. `library`: name and version of the MPI library. `launcher`: the result of launcher_of(). `mpirun`: the result of
    mpirun_here(). Pure."""
    kind = library.rpartition(" ")[0]
    starter = {"srun": "srun", "": "a launcher"}.get(launcher, f"the mpirun of {launcher}")
    if size == 1 and (launched > 1 or incompatible(kind, launcher)):
        words = f"{starter} started {launched} ranks, but each is alone (rank 0 of 1): launcher and MPI library {library} do not "
        srun = SRUN.get(kind, "srun --mpi=... (srun --mpi=list)")
        here = f" (the mpirun on the PATH is {mpirun[1]}'s, {mpirun[0]})" if mpirun[0] else ""
        fix = f"use {MPIRUN.get(kind, f'the mpirun of {kind}')}{here}, or `{srun} -n {launched} python -m mpidp.doctor`"
        if (kind == OPEN_MPI) != (launcher == OPEN_MPI) and launcher:
            abi = "openmpi" if launcher == OPEN_MPI else "mpich"
            fix += f". If {launcher} is installed, too, MPI4PY_MPIABI={abi} makes mpi4py load it"
        return CheckResult("launch", "wrong", f"{words}fit together. Training exits with an error after such a launch", fix)
    if size > 1:
        words = f"{size} ranks, started by {starter}; MPI library {library}"
        if launcher != INTEL:
            return CheckResult("launch", "ok", words)
        return CheckResult("launch", "ok", words, "for jobs, use mpiexec.hydra: Intel's mpirun passes no signals to the ranks")
    words = f"one rank, {f'started by {starter}' if launcher else 'no launcher'}; MPI library {library}"
    if not mpirun[0]:
        return CheckResult("launch", "note", f"{words}; no mpirun on the PATH", "load or install an MPI module, or try srun")
    if mpirun[1] not in (kind, "other"):
        fix = (f"put the mpirun of {kind} first on the PATH: the mpirun that is first now starts N jobs of one rank, not one "
               "job of N ranks")
        return CheckResult("launch", "warning", f"{words}; but the mpirun on the PATH is {mpirun[1]}'s ({mpirun[0]})", fix)
    return CheckResult("launch", "ok", f"{words}, matching mpirun {mpirun[0]}")


def check_slurm(size: int, environ: Mapping[str, str]) -> CheckResult:
    """Compare the number of ranks, `size`, with the number of tasks that were requested from Slurm. Pure."""
    if "SLURM_JOB_ID" not in environ:
        return CheckResult("Slurm", "skipped", "not in a Slurm job")
    tasks, cores = int(environ.get("SLURM_NTASKS") or 0), environ.get("SLURM_CPUS_PER_TASK")
    words = f"job {environ['SLURM_JOB_ID']}: {tasks or 'unknown number of'} tasks requested, {size} ranks running"
    words += f", {cores} cores per task" if cores else ""
    if tasks > size == 1:
        return CheckResult("Slurm", "note", words, "start this command with the launch line of the job: srun or mpirun")
    if 0 < tasks < size:
        return CheckResult("Slurm", "warning", words, "ranks share cores: request as many tasks as ranks (--ntasks)")
    if tasks > size:
        return CheckResult(
            "Slurm", "note", words, "some requested tasks are unused: request fewer tasks (--ntasks), or start more ranks (-n)"
        )
    return CheckResult("Slurm", "ok", words)


def check_thread_level(level: int) -> CheckResult:
    """Check that `level`, the thread level of MPI, is MPI_THREAD_MULTIPLE. At lower levels, gradients cannot be reduced during
    the backward pass. Pure."""
    words = f"MPI_THREAD_{LEVELS[level].upper()}"
    if LEVELS[level] == "multiple":
        return CheckResult("MPI threads", "ok", words)
    fix = "unset MPI4PY_RC_THREAD_LEVEL, or use an MPI with thread support"
    return CheckResult("MPI threads", "note", f"{words}: gradients cannot be reduced during the backward pass, but everything "
                                              "else works", fix)


def check_ulfm(library: str, environ: Mapping[str, str]) -> CheckResult:
    """Check whether ULFM is enabled. With ULFM, the remaining ranks continue after a rank fails. Pure."""
    if environ.get("OMPI_MCA_mpi_ft_enable") not in ("1", "true"):
        words = "the job ends when a rank fails; the same command then resumes from the last checkpoint"
        fix = "to continue without failed ranks, use Open MPI 5 and mpirun --with-ft ulfm --mca coll ^han,adapt"
        return CheckResult("dead ranks", "note", words, fix)
    excluded = environ.get("OMPI_MCA_coll", "")
    if not excluded.startswith("^") or "han" not in excluded:
        words = "ULFM and coll/han are both enabled; coll/han can return wrong sums after a failure"
        return CheckResult("dead ranks", "wrong", words, "add --mca coll ^han,adapt to mpirun")
    return CheckResult("dead ranks", "ok", "ULFM is enabled: the remaining ranks continue within the job")


def check_versions(facts: Sequence[MachineFacts]) -> list[CheckResult]:
    """Check that libraries can be imported, and that they have the same versions on all ranks. Pure."""
    found, first = [], facts[0]
    fix = "give every node the same environment: a shared folder, or a copy (jobs/stage_env.sh)"
    for name, why in {name: why for one in facts for name, why in one.broken.items()}.items():
        place = where([(one.rank, one.host) for one in facts if name in one.broken])
        found.append(CheckResult("versions", "wrong", f"{name} does not work for {place}: {why}", fix))
    for name, version in first.versions.items():
        others = [(one.rank, one.host) for one in facts if one.versions.get(name, version) != version]
        if others:
            theirs = facts[others[0][0]].versions[name]
            words = f"{name}: {where([(0, first.host)])} has {version}, {where(others)} {theirs}"
            found.append(CheckResult("versions", "wrong", words, fix))
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items() if name != "MPI")
    return found or [CheckResult("versions", "ok", versions + (" on every rank" if len(facts) > 1 else ""))]
