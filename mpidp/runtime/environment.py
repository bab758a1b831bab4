"""Reads the launcher's environment variables, and sets the variables that must be set before MPI or torch is imported.

The variables are set when this file is imported. No other file of mpidp sets environment variables when it is imported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

BEGAN = time.time()  # when this process started, approximately; seconds since 1970
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # variables that determine how OpenMP threads wait
# prefixes of the variables that a launcher sets for a process that is a rank
LAUNCHER_PREFIXES = ("PMI", "PMIX", "OMPI_", "PRTE_", "HYDRA", "SLURM_", "MPI_LOCAL")
SPIN_COUNT = "1000"  # libgomp's own default if there are more threads than cores
JOIN_SECONDS = 60  # time limit for a replacement rank to join the job


def ask_for_reproducible_blas() -> None:
    """Make the results of MKL's float32 products on Intel CPUs independent of the number of threads (strict conditional numerical
    reproducibility). Otherwise results could depend on the number of ranks, because a rank has more threads if there are fewer
    ranks. Call this before torch is imported. Independent."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "GenuineIntel" in cpu:
        os.environ.setdefault("MKL_CBWR", "AVX512,STRICT" if " avx512f" in cpu else "AVX2,STRICT")


def limit_openmp_spinning() -> None:
    """Let waiting OpenMP threads spin only briefly and then sleep. Change nothing if the user has set OMP_WAIT_POLICY or
    GOMP_SPINCOUNT. This affects libgomp, the OpenMP library of torch's wheels. Without this limit, a step took 20 times as long
    while other processes used the same cores (docs/results/2026-11-29-openmp.md). Call this before torch is imported.
    Independent."""
    if not WAITING & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


ask_for_reproducible_blas()
limit_openmp_spinning()
os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # ucx supports no shared-memory windows, and prints long warnings


def launcher_rank() -> int:
    """Return this process's rank from the launcher's environment variables, or 0 if there is no launcher. This works before MPI
    starts. Independent."""
    for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_size() -> int:
    """Return the number of ranks that the launcher started, or 0 if the environment variables do not state this number.
    Independent.

    The variables of Open MPI and Hydra take precedence over Slurm's, because `mpirun -n 1` may run inside a larger Slurm step.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdigit() else 0


def launched() -> bool:
    """Return True if a launcher started this process, or its parent process, as a rank of a job. Independent."""
    return launched_size() > 0 or any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "PALS_RANKID"))


def launched_with_ulfm() -> bool:
    """Return True if other ranks can continue when a rank fails (`mpirun --with-ft ulfm` of Open MPI). Independent."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true")  # noqa: SIM112


if launched_with_ulfm():  # on two nodes, the components han and adapt returned wrong sums after a failure, without an error
    os.environ.setdefault("OMPI_MCA_coll", "^han,adapt")


def is_replacement_rank() -> bool:
    """Return True if this process replaces a failed rank (faults/respawn.py). If so, also set an alarm that kills this process
    after JOIN_SECONDS. When the process has joined the job, it must cancel the alarm. Independent."""
    if launched_with_ulfm() and "OMPI_PARENT_PORT" in os.environ:
        signal.alarm(JOIN_SECONDS)
        return True
    return False


def numbers(found: Sequence[int]) -> str:
    """Format the integers `found` as ranges. For example, 0, 1, 2, 3 and 8 give "0-3,8". Pure."""
    ranges: list[list[int]] = []
    for one in sorted(set(found)):
        if ranges and one == ranges[-1][1] + 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)
