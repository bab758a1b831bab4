"""The parameters of units. A unit is a group of parameters that are exchanged together, such as those of a Transformer block.
With mesh.shard=2, every rank stores all parameters. With mesh.shard=3, parameters are gathered when they are needed.

With mesh.shard=3, a rank stores one slice of each Transformer block. gather() allocates memory for the whole block, and receives
the other slices. The memory is freed when another block is gathered, or when the parameters change. Parameters outside of blocks
are always whole. The parameters stay views of one torch storage, which gather() fills again. So tensors that autograd has saved
are valid again after gather().
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpidp.checkpoint.entry import Entry
from mpidp.comm.transport import allgather_ranges
from mpidp.reducers.units import Channel, Member, Unit


@dataclass(frozen=True)
class ShardedParameter:
    """The type of the attribute `shards` of a parameter whose elements are divided among the ranks
    (checkpoint/local_parameters.py)."""

    unit: Unit
    member: Member
    owned: Tensor  # this rank's slice of the unit
    channel: Channel

    def entries(self, name: str) -> dict[str, Entry]:
        """Return the entries for a checkpoint with this rank's rectangular blocks of the parameter. `name`: the name of the
        parameter. Independent."""
        rank = self.channel.comm.rank
        return self.unit.entries_of_run(self.member, self.unit.owned(self.member, self.owned, rank), rank, name)

    def whole(self) -> Tensor:
        """Return the whole parameter. Collective over channel.comm."""
        return self.unit.whole(self.member, self.owned, self.channel)


class UnitParameters:
    """The parameters of all units (groups of parameters that are exchanged together). This rank owns a slice of each unit."""

    @torch.no_grad()
    def __init__(self, units: Sequence[Unit], divided: Collection[str], channel: Channel, device: torch.device) -> None:
        """Move the parameters into the memory of their units. `divided`: the names of the units of which a rank stores only its
        slice. Units with the same name are gathered together. Independent."""
        self._channel = channel
        self._divided: dict[str, list[Unit]] = {}
        self.whole: list[Tensor] = []  # the elements of each unit; without memory while a divided unit is not gathered
        self.owned: list[Tensor] = []  # this rank's slice of each unit
        self._gathered = ""
        for unit in units:
            whole = torch.zeros(unit.length, device=device)
            for member in unit.members:
                view = whole[member.offset : member.range.stop].view_as(member.parameter)
                view.copy_(member.parameter)
                member.parameter.data = view
            part = unit.parts[channel.comm.rank]
            owned = whole[part.start : part.stop]
            self.whole.append(whole)
            self.owned.append(owned.clone() if unit.name in divided else owned)
            if unit.name in divided:
                self._divided.setdefault(unit.name, []).append(unit)
                for member in unit.members:
                    member.parameter.shards = ShardedParameter(unit, member, self.owned[-1], channel)  # type: ignore[attr-defined]
                whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def gather(self, name: str) -> None:
        """Make the parameters of the divided units named `name` whole, and free the units that were gathered before. Do nothing
        if the parameters are whole. Collective over channel.comm: all ranks must pass the same names in the same order."""
        if name not in self._divided or name == self._gathered:
            return
        self.free()
        for unit in self._divided[name]:
            whole, part = self.whole[unit.index], unit.parts[self._channel.comm.rank]
            whole.untyped_storage().resize_(whole.numel() * whole.element_size())
            whole[part.start : part.stop].copy_(self.owned[unit.index])
            self._receive(unit)
        self._gathered = name

    def free(self) -> None:
        """Free the memory of the gathered units. Independent."""
        for unit in self._divided.get(self._gathered, ()):
            self.whole[unit.index].untyped_storage().resize_(0)
        self._gathered = ""

    def publish(self, units: Sequence[Unit]) -> None:
        """Free the gathered units. Gather the updated slices of the units that every rank stores as a whole. Collective over
        channel.comm."""
        self.free()
        for unit in units:
            if unit.name not in self._divided:
                self._receive(unit)

    def _receive(self, unit: Unit) -> None:
        channel = self._channel
        with channel.transport.timed():
            allgather_ranges(channel.transport, channel.comm, channel.wait, self.whole[unit.index], list(unit.parts))
