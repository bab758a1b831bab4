"""Laws of jobs/lib.sh: each MPI is started by the launcher, and with the binding, that it understands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = {  # what `mpirun --version` prints -> the launch line for four cores per rank
    "Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929": "mpiexec.hydra -n 2 true PIN=4:compact",
    "HYDRA build details:\n    Version: 5.0.2": "mpirun -bind-to core:4 -map-by core:4 -n 2 true PIN=",
    "mpirun (Open MPI) 5.0.11": "mpirun --bind-to core --map-by slot:PE=4 -n 2 true PIN=",
}


@pytest.mark.parametrize("version", LAUNCHES)
def test_the_launch_line_of_each_mpi(tmp_path: Path, version: str) -> None:
    for name in ("mpirun", "mpiexec.hydra"):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && printf "%s\\n" "{version}" && exit\necho "{name} $* PIN=$I_MPI_PIN_DOMAIN"\n'
        )
        script.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f". {ROOT}/jobs/lib.sh; bound_mpirun -n 2 true"], capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "4", "RUN": str(tmp_path)}, cwd=ROOT,
    )
    assert done.stdout.strip() == LAUNCHES[version], done
