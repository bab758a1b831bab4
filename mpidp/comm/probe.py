"""Tests whether the MPI library accepts CUDA pointers. MPI libraries' own statements about this are unreliable. The test runs
in a child process, because a library that does not accept CUDA pointers causes a segmentation fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from mpi4py import MPI

from mpidp.runtime.environment import LAUNCHER_PREFIXES

_CHILD = """
import torch
from mpi4py import MPI
from mpidp.comm.buffers import buf
comm = MPI.COMM_SELF
for n in (3, 1 << 20):
    x = torch.arange(n, dtype=torch.float32, device="cuda"); y = torch.zeros_like(x); z = torch.zeros_like(x)
    torch.cuda.synchronize()
    comm.Sendrecv(buf(x), 0, 0, buf(y), 0, 0)
    comm.Allreduce(buf(x), buf(z))
    torch.cuda.synchronize()
    assert torch.equal(x, y) and torch.equal(x, z)
print("device buffers work")
"""


def device_buffers_work(timeout_seconds: float = 60.0) -> bool:
    """Return whether MPI can send, receive and reduce small and large device buffers correctly. The test runs in a child
    process. Independent."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return False
    try:
        output, _ = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
    for file in Path("/dev/shm").glob(f"mpich_shm_{child.pid:x}_*"):  # MPICH does not remove these files if the process crashes
        file.unlink(missing_ok=True)
    return child.returncode == 0 and b"device buffers work" in output


def gradient_path(wanted: str, device: torch.device, comm: MPI.Intracomm) -> str:
    """Return how gradients are exchanged. "host": the tensors are on the CPU. "staged": MPI reads pinned host memory. "device":
    MPI reads device memory. "nccl": NCCL is used instead of MPI.

    `wanted`: "staged", "device", "nccl" or "auto". For CPU tensors the result is always "host". For CUDA tensors it is `wanted`,
    but "auto" becomes "device" if the probe succeeds on every node, else "staged". Collective over comm.
    """
    if device.type == "cpu":
        return "host"
    if wanted != "auto":
        return wanted
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    works = node.bcast(device_buffers_work() if node.rank == 0 else None, root=0)
    node.Free()
    return "device" if comm.allreduce(works, op=MPI.LAND) else "staged"
