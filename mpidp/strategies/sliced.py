"""Synchronous training with a sharded optimizer state (mesh.shard=1; ZeRO-1, Rajbhandari 2020). Each rank stores the optimizer
state of one slice of the parameters, and updates this slice. Then all updated slices are gathered into every copy of the
parameters. There is one copy per rank, or one copy per node.

The weights equal those of mesh.shard=0 bit for bit. If all ranks are on one node and share a copy, the optimizer state is stored
only once even without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.checkpoint.boxes import boxes_of_run
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import load_boxes
from mpidp.comm.slices import ALIGN, slice_bounds
from mpidp.comm.transport import allgather_ranges
from mpidp.strategies.synchronous import Synchronous


class Sliced(Synchronous):
    """Implements mesh.shard=1. Each rank updates one slice. If the ranks of a node share a copy, their shared memory holds the
    optimizer state of all their slices."""

    survives_failures = False  # a slice is lost with the rank that holds it

    def optimizer_share(self) -> dict[str, Any] | None:
        """Return keyword arguments for the class `Optimizer`. The arguments state which slice (index range) of the parameters
        this rank updates, and for which slices this rank's memory holds the optimizer state. Independent."""
        rank, size, members = self.compute_comm.rank, self.compute_comm.size, self.group.members[self.group.index]
        self._bounds = self.bounds(size, ALIGN)
        return {"share": (rank, size), "bounds": self._bounds, "holds": members if self.one_copy else range(rank, rank + 1)}

    def _publish(self) -> None:
        """Gather all slices into every copy. If the ranks of a node share a copy, the elements of the node's slices are
        divided into ranges, one for each rail (one rank of each node). The ranks of a rail exchange their ranges."""
        transport = self.reducer.transport
        with transport.timed():
            self.group.fence()
            if self.one_copy and self.group.owns:
                self._exchange(self.group.rail, self._of_nodes())
            elif not self.one_copy:
                bounds = self._bounds
                self._exchange(self.compute_comm, [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)])
            self.group.fence()

    def _of_nodes(self) -> list[range]:
        """Return, for each node, the range of elements that the node sends in this rank's rail."""
        bounds, rail, found = self._bounds, self.group.node.rank, []
        for members in self.group.members:
            start, stop = bounds[members.start], bounds[members.stop]
            cuts = slice_bounds(stop - start, self.group.num_rails)
            found.append(range(start + cuts[rail], start + cuts[rail + 1]))
        return found

    def _exchange(self, comm: MPI.Intracomm, parts: list[range]) -> None:
        """Gather the parameters in place. `parts`: for each rank of comm, the range that the rank sends. Collective over comm."""
        allgather_ranges(self.reducer.transport, comm, self.group.wait, self.flat, parts)

    def flats(self) -> dict[str, Tensor]:
        """Return {"": the flat parameters}. The optimizer state is not replicated."""
        return {"": self.flat}

    def state_dict(self) -> dict[str, Entry]:
        """Return the optimizer state of this rank's slice. A state tensor has the shape of its parameter, and an entry holds
        one rectangular block (box) of this tensor. If a parameter is outside the slice, the box is empty. Independent."""
        assert self.optimizer is not None
        optimizer, found = self.optimizer, {}
        for i, flat in enumerate(optimizer.moments().values()):
            for offset, what, p in self.buffer.layout.placed():
                if i == len(optimizer.rule.states(what)):
                    continue
                key = optimizer.rule.states(what)[i]
                low, high = max(offset, optimizer.mine.start), min(offset + p.numel(), optimizer.mine.stop)
                rest = flat[max(0, low - optimizer.held.start) :]
                boxes = boxes_of_run(tuple(p.shape), low - offset, high - offset)
                for number, (at, shape) in enumerate(boxes or [((0,) * p.dim(), (0, *p.shape[1:]))]):
                    box, rest = rest[: torch.Size(shape).numel()].view(shape), rest[torch.Size(shape).numel() :]
                    found[f"{what}/{key}#{number}"] = Entry(box, "sharded", at, tuple(p.shape))
        for _, what, _ in self.buffer.layout.placed():
            if "exp_avg" in optimizer.rule.states(what):
                found[f"{what}/step"] = Entry(torch.tensor(float(optimizer.updates)))
        return found | {f"reducer/{name}": entry for name, entry in self.reducer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the entries that state_dict() returns. Raises ValueError for any other entry. Independent."""
        assert self.optimizer is not None
        self.reducer.load_state_dict({
            name.removeprefix("reducer/"): value for name, value in state.items() if name.startswith("reducer/")
        })
        mine = self.state_dict()
        load_boxes({name: value for name, value in state.items() if not name.startswith("reducer/")}, mine, self.optimizer)
