"""What the launcher and the CPU say, before MPI or torch is imported; the only file that changes the environment at import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

BEGAN = time.time()  # about when this process did

JOIN_SECONDS = 60  # that a new process has to join a job


def ask_for_reproducible_blas() -> None:
    """On Intel CPUs, have MKL's float32 products give the same bits at any number of threads (strict conditional numerical
    reproducibility): a rank has more threads when there are fewer ranks. Must come before torch is imported. Independent.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "GenuineIntel" in cpu:
        os.environ.setdefault("MKL_CBWR", "AVX512,STRICT" if " avx512f" in cpu else "AVX2,STRICT")


ask_for_reproducible_blas()
os.environ.setdefault("OMPI_MCA_osc", "^ucx")  # Open MPI's windows in shared memory: ucx has none, and says so at length


def launcher_rank() -> int:
    """This process's rank by the launcher's environment, before MPI starts; 0 when alone. Independent."""
    for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_size() -> int:
    """How many ranks the launcher meant to start, by its environment; 0 when it does not say. Independent.

    Open MPI's and Hydra's own variables decide alone where they are set: `mpirun -n 1` inside a larger Slurm step is legal.
    """
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdigit() else 0


def launched_with_ulfm() -> bool:
    """Does the launcher let the job outlive its ranks? Open MPI's does under `mpirun --with-ft ulfm`. Independent."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true")  # noqa: SIM112


if launched_with_ulfm():  # after a failure these two have given wrong sums without a word, over two nodes
    os.environ.setdefault("OMPI_MCA_coll", "^han,adapt")


def is_replacement_rank() -> bool:
    """Was this process started in the place of a rank that died (comm/respawn.py)? Then it is gone in a minute, whatever it waits
    for, unless it has met the others by then. Independent."""
    if launched_with_ulfm() and "OMPI_PARENT_PORT" in os.environ:
        signal.alarm(JOIN_SECONDS)
        return True
    return False


def numbers(found: Sequence[int]) -> str:
    """Format integers as ranges: 0-3,8 for 0, 1, 2, 3, 8. Pure."""
    ranges: list[list[int]] = []
    for one in sorted(set(found)):
        if ranges and one == ranges[-1][1] + 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in ranges)
