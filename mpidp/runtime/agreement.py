"""Checks that all ranks hold the same facts."""

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
    """What every rank must have the same of. Independent."""
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
    """What every rank's parameters must have in common. Independent."""
    told = {f"parameter {i}": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(named)}
    return {"parameters": str(len(named)), **told}


def check_agreement(comm: MPI.Intracomm, facts: dict[str, str]) -> None:
    """UsageError on every rank, naming what differs and where, unless all ranks hold the same facts. Collective over comm."""
    everyone = comm.allgather(facts)
    different = [
        f"{name}: rank 0 has {everyone[0].get(name)}, rank {rank} has {theirs.get(name)}"
        for name in everyone[0]
        for rank, theirs in enumerate(everyone)
        if theirs.get(name) != everyone[0].get(name)
    ]
    if different:
        raise UsageError.on_every_rank(
            "the ranks do not agree, so they would not train one model: "
            + "; ".join(different[:5])
            + ". Give all nodes the same environment, configuration and data (a shared folder, or the same copy)"
        )
