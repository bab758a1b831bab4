"""What runs beside training: the energy meter."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from mpidp.metrics.energy import Meter, common_counters, open_meter


def watch_energy(wanted: bool, host: str, device: torch.device, world: MPI.Intracomm) -> tuple[Meter, dict[str, Any]]:
    """(this rank's meter, what the `start` line says: devices, what is measured on all machines, why not more). The first rank of
    a machine reads, also where nodes are pretended. Collective over world."""
    cuda = device.type == "cuda"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if cuda else ""
    machine = host.partition("#")[0]
    rows = world.allgather((machine, str(device) if cuda else host, uuid))
    reads = [row[0] for row in rows].index(machine) == world.rank
    meter, said = open_meter(wanted, reads, sorted({row[2] for row in rows if row[0] == machine and row[2]}))
    measured, why = common_counters(world.allgather(said))
    return meter, {"devices": len({row[:2] for row in rows}), "energy_of": measured, "energy_not": why}
