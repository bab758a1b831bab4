"""Checks that all ranks have the same software, configuration and parameters."""

from __future__ import annotations

import platform

import h5py
import mpi4py
import numpy as np
import torch
from mpi4py import MPI

import mpidp
from mpidp.errors import UsageError


def versions() -> dict[str, str]:
    """Return {name: version} of mpidp, Python, MPI and libraries. The versions must be equal on all ranks. Independent."""
    return {
        "mpidp": mpidp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "mpi4py": mpi4py.__version__,
        "MPI": MPI.Get_library_version().split("\n")[0].strip("\x00 "),
    }


def parameter_facts(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, str]:
    """Return facts for check_agreement(): the number of parameters, and the name, shape and dtype of each parameter. `named`: the
    parameters with their names. Independent."""
    facts = {f"parameter {i}": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(named)}
    return {"parameters": str(len(named)), **facts}


def check_agreement(comm: MPI.Intracomm, facts: dict[str, str]) -> None:
    """Raise UsageError on all ranks if the facts differ between ranks. The message names the differences. `facts`: this rank's
    {name: value}. Collective over comm."""
    everyone = comm.allgather(facts)
    different = [
        f"{name}: rank 0 has {everyone[0].get(name)}, rank {rank} has {theirs.get(name)}"
        for name in everyone[0]
        for rank, theirs in enumerate(everyone)
        if theirs.get(name) != everyone[0].get(name)
    ]
    if different:
        raise UsageError.on_every_rank(
            "the ranks differ and would not train the same model: "
            + "; ".join(different[:5])
            + ". All nodes need the same environment, configuration and data (a shared folder, or identical copies)"
        )
