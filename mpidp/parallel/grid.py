"""The mesh of ranks. It has dp replicas, each replica has pp stages, and each stage has tp ranks. Ranks are numbered node by
node. Rank r belongs to replica r // (pp * tp) and to stage (r // tp) % pp. The index of rank r in its stage is r % tp. The ranks
of a stage therefore have consecutive numbers. They are on one node if tp divides the number of ranks per node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import buf
from mpidp.comm.slices import norm_of_squares
from mpidp.comm.waiting import Wait, how_to_wait
from mpidp.errors import UsageError
from mpidp.runtime.topology import Topology, make_topology
from mpidp.runtime.ulfm import revocable


@dataclass(frozen=True)
class Grid:
    """The communicators of this rank in the mesh."""

    world: MPI.Intracomm  # all ranks, node by node
    everyone: Topology  # the placement of all ranks
    replicas: Topology  # the ranks with the same part of the model, one per replica
    model: MPI.Intracomm  # the ranks of this replica, stage by stage
    pp: MPI.Intracomm  # the ranks of this replica with the same tensor-parallel index, one per stage
    tp: MPI.Intracomm  # the ranks of this stage
    wait: Wait  # how to wait for requests on these communicators

    @property
    def parts(self) -> int:
        """The number of parts of the model, pp * tp."""
        return int(self.model.size)

    @property
    def label(self) -> str:
        """The name of this rank's part of the model. It occurs in the names of checkpoint entries that each part of the model
        stores separately."""
        return f"part_{self.pp.rank}of{self.pp.size}_{self.tp.rank}of{self.tp.size}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return (replica, stage, index in the stage) of rank `rank` of world. Pure."""
        return rank // self.model.size, rank // self.tp.size % self.pp.size, rank % self.tp.size

    def norm(self, squares: list[Tensor], twice: float = 0.0) -> float:
        """Return the L2 norm of a gradient over the whole model. squares: one float64 tensor (blocks,) for each chunk (group of
        consecutive layers) of this rank, with the sum of squares of each norm block (4,096 elements). twice: the sum of squares
        of those gradients in `squares` that another rank of the replica also counts. It is subtracted from the total. If tp is 1
        and no embeddings are tied, the bits of the norm do not depend on pp. Collective over model."""
        if self.model.size == 1:
            return norm_of_squares(torch.cat(squares[::-1]))
        row = torch.cat([torch.tensor([-twice], dtype=torch.float64), *squares])
        sizes = np.zeros((self.model.size, len(squares) + 1), dtype=np.int64)
        sizes[self.model.rank] = [1, *(s.numel() for s in squares)]
        self.wait(self.model.Iallreduce(MPI.IN_PLACE, sizes))
        counts = sizes.sum(1)
        everything = torch.empty(int(counts.sum()), dtype=torch.float64)
        places = np.cumsum([0, *counts[:-1]]).tolist()
        self.wait(self.model.Iallgatherv(buf(row), [buf(everything)[0], (counts.tolist(), places), MPI.DOUBLE]))
        parts = [piece.split(size.tolist()) for piece, size in zip(everything.split(counts.tolist()), sizes, strict=True)]
        order = [stage * self.tp.size + i for stage in reversed(range(self.pp.size)) for i in range(self.tp.size)]
        in_order = [parts[place][1 + chunk] for chunk in reversed(range(len(squares))) for place in order]
        return norm_of_squares(torch.cat([*in_order, *(part[0] for part in parts)]))


def whole(mesh: Topology) -> Grid:
    """Return a Grid in which every rank has the whole model. mesh: the Topology of all ranks. Independent."""
    alone = MPI.COMM_SELF
    return Grid(mesh.dp, mesh, mesh, alone, alone, alone, how_to_wait(mesh.local_size, mesh.cores))


def make_grid(world: MPI.Intracomm, tp: int = 1, pp: int = 1, dp: int = 0) -> Grid:
    """Return the mesh of dp x pp x tp ranks. dp=0 means world.size / (pp * tp). Raises UsageError unless the number of ranks is
    dp * pp * tp, or with dp=0 a multiple of pp * tp. Collective over world."""
    everyone = make_topology(world)
    ordered, parts = everyone.dp, tp * pp
    if ordered.size % parts or (dp and dp * parts != ordered.size):
        wanted = f"mesh.tp={tp} x mesh.pp={pp}" + (f" x mesh.dp={dp}" if dp else "")
        near = sorted({max(parts, ordered.size // parts * parts), -(-ordered.size // parts) * parts}) if not dp else [dp * parts]
        raise UsageError.on_every_rank(
            f"{wanted} does not fit the {ordered.size} rank{'s' * (ordered.size > 1)} of this job. Start "
            f"{' or '.join(map(str, near))} ranks, or change mesh.*"
        )
    return whole(everyone) if parts == 1 else divide(everyone, tp, pp)


def divide(everyone: Topology, tp: int, pp: int, before: Topology | None = None) -> Grid:
    """Return the mesh of dp x pp x tp ranks, made of the ranks of everyone.dp in their order. before: Grid.replicas before ranks
    failed, or None if no rank failed. Collective over everyone.dp."""
    ordered, parts = everyone.dp, tp * pp
    rank = ordered.rank
    replica, part = divmod(rank, parts)
    stage, number = divmod(part, tp)

    def split(color: int) -> MPI.Intracomm:
        return revocable(cast(MPI.Intracomm, ordered.Split(color, rank)))

    model, column, row = split(replica), split(replica * tp + number), split(replica * pp + stage)
    mesh = make_topology(split(part), before, keep_order=True)  # all parts need the same order of replicas
    # Ranks with other parts of the model use the other cores of the node.
    mesh = replace(mesh, cores=max(1, everyone.cores * mesh.local_size // everyone.local_size))
    return Grid(ordered, everyone, mesh, model, column, row, how_to_wait(everyone.local_size, everyone.cores))
