"""Did launcher and MPI library make one job, of the size that was meant, and what can this MPI do? Pure but for `mpirun_here`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from mpidp.checkup.facts import Facts
from mpidp.checkup.findings import Finding, where

LAUNCHERS_OWN = ("PMI", "PMIX", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL", "MPIEXEC")
LEVELS = ("single", "funneled", "serialized", "multiple")


def launcher_of(environ: Mapping[str, str]) -> str:
    """Who started this process: the mpirun of Open MPI or MPICH, srun, or nobody (""). Pure."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "Open MPI"
    if "MPI_LOCALNRANKS" in environ:
        return "MPICH"
    return "srun" if "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else ""


def on_this_node(environ: Mapping[str, str]) -> tuple[int, int]:
    """(place among the ranks of this node, their number) as the launcher says; (0, 1) where it does not. Pure."""
    places = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    counts = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    place, count = (next((environ[name] for name in names if name in environ), "") for names in (places, counts))
    return int(place or 0), int((count or "1").partition("(")[0])  # Slurm writes 4(x2)


def strangers(kind: str, launcher: str) -> bool:
    """Can this launcher not have started this kind of library as one job? Pure."""
    return (launcher == "Open MPI") != (kind == "Open MPI") and launcher in ("Open MPI", "MPICH")


def mpirun_here() -> tuple[str, str]:
    """(path, MPICH, Open MPI, or other) of the mpirun on the PATH; ("", "") without one. Independent."""
    if not (path := shutil.which("mpirun")):
        return "", ""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS_OWN)}
    said = subprocess.run([path, "--version"], env=environ, capture_output=True, text=True, timeout=20, check=False).stdout
    return path, "MPICH" if "HYDRA" in said.upper() else "Open MPI" if "Open MPI" in said else "other"


def check_launch(size: int, launched: int, library: str, launcher: str, mpirun: tuple[str, str]) -> Finding:
    """One job of N, or N jobs of one? launched: ranks that the launcher meant, 0 when it does not say. Pure."""
    kind = library.rpartition(" ")[0]
    by = {"srun": "srun", "": "nobody"}.get(launcher, f"the mpirun of {launcher}")
    if size == 1 and (launched > 1 or strangers(kind, launcher)):
        words = f"{by} started {launched} ranks, and each is alone (rank 0 of 1): it and the MPI library ({library}) do not know "
        srun = {"MPICH": "srun --mpi=pmi2", "Open MPI": "srun --mpi=pmix"}.get(kind, "srun --mpi=... (srun --mpi=list)")
        here = f" (on the PATH is {mpirun[1]}'s, {mpirun[0]})" if mpirun[0] else ""
        fix = f"use the mpirun that belongs to {kind}{here}, or `{srun} -n {launched} python -m mpidp.doctor`"
        return Finding("launch", "wrong", f"{words}each other. Training refuses such a launch, or dies in it", fix)
    if size > 1:
        return Finding("launch", "ok", f"{size} ranks by {by if launcher else 'a launcher'}, MPI library {library}")
    words = f"one rank, started by {by}; MPI library {library}"
    if not mpirun[0]:
        return Finding("launch", "note", f"{words}; no mpirun is on the PATH", "load its module or wheel; srun may do as well")
    if mpirun[1] not in (kind, "other"):
        fix = f"put {kind}'s first on the PATH: with the other, N ranks become N jobs of one"
        return Finding("launch", "warning", f"{words}; but the mpirun on the PATH is {mpirun[1]}'s ({mpirun[0]})", fix)
    return Finding("launch", "ok", f"{words}, and {mpirun[0]} belongs to it")


def check_slurm(size: int, environ: Mapping[str, str]) -> Finding:
    """The job's size against what was asked of Slurm. Pure."""
    if "SLURM_JOB_ID" not in environ:
        return Finding("Slurm", "skipped", "not in a Slurm job")
    tasks, cores = int(environ.get("SLURM_NTASKS") or 0), environ.get("SLURM_CPUS_PER_TASK")
    words = f"job {environ['SLURM_JOB_ID']}: {tasks or 'unsaid'} tasks asked for, {size} ranks run"
    words += f", {cores} cores a task" if cores else ""
    if tasks > size == 1:
        return Finding("Slurm", "note", words, "put the job's own launch line before this command: srun or mpirun")
    if 0 < tasks < size:
        return Finding("Slurm", "warning", words, "ranks share cores: ask for as many tasks (--ntasks)")
    if tasks > size:
        return Finding("Slurm", "note", words, "some of what was asked for lies idle (--ntasks, or -n of the launcher)")
    return Finding("Slurm", "ok", words)


def check_thread_level(level: int) -> Finding:
    """MPI_THREAD_MULTIPLE lets a thread reduce while others compute. Pure."""
    words = f"MPI_THREAD_{LEVELS[level].upper()}"
    if LEVELS[level] == "multiple":
        return Finding("MPI threads", "ok", words)
    fix = "unset what lowers it (MPI4PY_RC_THREAD_LEVEL), or take an MPI built for threads; all else works"
    return Finding("MPI threads", "note", f"{words}: gradients cannot be reduced while others are computed", fix)


def check_ulfm(library: str, environ: Mapping[str, str]) -> Finding:
    """Can survivors go on when a rank dies? Pure."""
    if environ.get("OMPI_MCA_mpi_ft_enable") not in ("1", "true"):
        words = "the job ends when a rank dies; started again, it goes on from its last checkpoint"
        fix = "to go on without the dead: Open MPI 5 and mpirun --with-ft ulfm --mca coll ^han,adapt"
        return Finding("dead ranks", "note", words, fix)
    left_out = environ.get("OMPI_MCA_coll", "")
    if not left_out.startswith("^") or "han" not in left_out:
        words = "ULFM is on together with coll/han, which after a failure can return wrong sums"
        return Finding("dead ranks", "wrong", words, "add --mca coll ^han,adapt to mpirun")
    return Finding("dead ranks", "ok", "ULFM is on: survivors go on within the job")


def check_versions(facts: Sequence[Facts]) -> list[Finding]:
    """What every rank must have the same of; training refuses to start where it differs. Pure."""
    found, first = [], facts[0]
    fix = "give every node the same whole environment: one shared folder, or a copy (jobs/stage_env.sh)"
    for name, why in {name: why for one in facts for name, why in one.broken.items()}.items():
        place = where([(one.rank, one.host) for one in facts if name in one.broken])
        found.append(Finding("versions", "wrong", f"{name} does not work for {place}: {why}", fix))
    for name, version in first.versions.items():
        others = [(one.rank, one.host) for one in facts if one.versions.get(name, version) != version]
        if others:
            theirs = facts[others[0][0]].versions[name]
            words = f"{name}: {where([(0, first.host)])} has {version}, {where(others)} {theirs}"
            found.append(Finding("versions", "wrong", words, fix))
    said = ", ".join(f"{name} {version}" for name, version in first.versions.items() if name != "MPI")
    return found or [Finding("versions", "ok", said + (" on every rank" if len(facts) > 1 else ""))]
