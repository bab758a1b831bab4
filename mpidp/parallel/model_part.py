"""This rank's part of the model among the others' parts: how it is saved, loaded and counted once.

A checkpoint names global tensors, so what was trained on one mesh goes on on any other. What only those know that have the very
same part (a flat tensor of a strategy) is named after the part, and goes on where the model is cut in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import boxes_held, parameters_of, reshard_all, weights_sha256, whole
from mpidp.checkpoint.reader import Reader
from mpidp.comm.buffers import buf
from mpidp.comm.group import Group
from mpidp.comm.slices import NORM_BLOCK
from mpidp.comm.transport import pieces
from mpidp.errors import UsageError
from mpidp.model.part import Part, part_of
from mpidp.model.shape import Shape, shapes_of
from mpidp.parallel.grid import Grid
from mpidp.reducers.buckets import GradientBuffer


class BoxReader(Protocol):
    """Where parameters are read from."""

    def box(self, name: str, entry: Entry) -> Tensor:
        """What this entry holds of model/PARAMETER. Independent."""


class ModelPartition:
    """Independent, but for what says otherwise."""

    def __init__(self, grid: Grid, shape: Shape, sequence: bool = False, chunks: int = 1) -> None:
        """sequence: are positions shared out between branches? chunks: how often each stage comes."""
        self.grid, self.shape, self.sizes, self.sequence, self.chunks = grid, shape, shapes_of(shape), sequence, chunks
        self.part = self._part_of(grid.model.rank)

    def _part_of(self, rank: int) -> Part:
        stage, number = divmod(rank, self.grid.tp.size)
        return part_of(self.shape, stage, self.grid.pp.size, number, self.grid.tp.size, self.sequence, self.chunks)

    def counts(self, name: str) -> bool:
        """Is a parameter saved and counted here, and not by others that have it too? Pure."""
        part = self.part
        elsewhere = part.tied and name == "head.weight" and not part.has_embedding
        return not elsewhere and (part.index == 0 or part.is_cut(name))

    def _placed(self, name: str, entry: Entry) -> tuple[str, Entry]:
        """Of PARAMETER[/KEY] of this part: what the whole model calls it, and which box of the whole's tensor it is. What belongs
        to no parameter is called after this part."""
        what, slash, key = name.partition("/")
        whole = self.part.global_name(what)
        if whole not in self.sizes:
            return f"{self.grid.label}/{name}", entry
        box, size = self.part.box(whole, self.sizes[whole]), self.sizes[whole]
        here = tuple(s.stop - s.start for s in box)
        if here != tuple(entry.tensor.shape if entry.shape is None else entry.shape):  # the number of its updates
            return f"{whole}{slash}{key}", entry
        at = tuple(s.start + inside for s, inside in zip(box, entry.place, strict=True))
        return f"{whole}{slash}{key}", Entry(entry.tensor, entry.layout, at, size)

    def _saves(self, name: str, entry: Entry) -> bool:
        """Does this rank give it to a checkpoint? Else another one does, which has the same."""
        what = name.partition("/")[0]
        if self.part.global_name(what) not in self.sizes:
            return True
        return self.counts(what) and (self.part.index == 0 or entry.tensor.dim() > 0)

    def entries(self, model: nn.Module, strategy: Mapping[str, Entry]) -> dict[str, Entry]:
        """What a checkpoint is made of, as far as this rank has it."""
        found: dict[str, Entry] = {}
        for where, held in (("model", parameters_of(model)), ("strategy", strategy)):
            for name, entry in held.items():
                if self.grid.parts == 1:
                    found[f"{where}/{name}"] = entry
                elif self._saves(name, entry):
                    whole, placed = self._placed(name, entry)
                    found[f"{where}/{whole}"] = placed
        return found

    @torch.no_grad()
    def begin_alike(self, model: nn.Module) -> list[int]:
        """Give all replicas rank 0's parameters, while each rank has memory of its own: in what a node shares, all would write
        theirs. Returns the ranks that had others. Collective over grid.replicas.dp."""
        dp = self.grid.replicas.dp
        hashes = dp.allgather(weights_sha256(model))
        others = [rank for rank, one in enumerate(hashes) if one != hashes[0]]
        for p in model.parameters() if others else ():
            wire = p.cpu().contiguous().view(-1)
            for start, stop in pieces(0, wire.numel()):
                dp.Bcast(buf(wire[start:stop]), root=0)
            p.copy_(wire.view_as(p))
        return others

    @torch.no_grad()
    def load(self, reader: BoxReader, model: nn.Module) -> None:
        """The parameters of this part, from a checkpoint of any mesh, or from a folder."""
        for name, entry in parameters_of(model).items():
            whole, placed = (name, entry) if self.grid.parts == 1 else self._placed(name, entry)
            entry.tensor.copy_(reader.box(f"model/{whole}", placed))

    def strategy_state(self, reader: Reader, model: nn.Module, strategy: Mapping[str, Entry]) -> dict[str, Tensor]:
        """What the strategy's load_state_dict is given; strategy: what it has now. UsageError where it was written for parts that
        are cut in another way."""
        dp, of_whole = self.grid.replicas.dp, {self.part.global_name(name): name for name, _ in model.named_parameters()}
        boxes = boxes_held({name: entry for name, entry in strategy.items() if name.partition("/")[0] in of_whole.values()})
        if self.grid.parts == 1 and not any(name.startswith("strategy/part_") for name in reader):
            return reader.under("strategy/", dp.rank, dp.size, boxes)
        label, found = f"strategy/{self.grid.label}/", {}
        for name in reader:
            where, _, rest = name.partition("/")
            what, slash, key = rest.partition("/")
            if where != "strategy" or what in self.sizes and what not in of_whole:
                continue
            if name.startswith(label):
                found[name.removeprefix(label)] = reader.own(name, dp.rank, dp.size)
            elif what not in of_whole:
                if not what.startswith("part_") or not any(other.startswith(label) for other in reader):
                    self._refuse(reader)
            else:
                mine = f"{of_whole[what]}{slash}{key}"
                held = boxes.get(mine) or {mine: strategy[mine]}
                found |= {box: reader.box(name, self._placed(mine, entry)[1]) for box, entry in held.items()}
        return found

    def _refuse(self, reader: Reader) -> None:
        raise UsageError(
            f"{reader.path} has state that belongs to parts of a model cut in another way (of strategy.name other than "
            "synchronous, or of comm.compress): go on with the mesh.tp and mesh.pp that it was trained with"
        )

    def norm(self, buffer: GradientBuffer, squares: Tensor, flat: Tensor) -> float:
        """Of a flat gradient of this part over the whole model; squares: of its blocks. Collective over grid.model."""
        twice, layout = 0.0, buffer.layout
        if self.grid.parts > 1:
            for (_, name, _), view in zip(layout.placed(), layout.views(flat), strict=True):
                if not self.counts(name):
                    twice += float(torch.linalg.vector_norm(view.double()).square())
        return self.grid.norm([squares[start // NORM_BLOCK : stop // NORM_BLOCK] for start, stop in buffer.spans], twice)

    def tie(self, buffer: GradientBuffer, group: Group) -> None:
        """Where embedding and head are one tensor and lie in two stages, their gradients are added: both have the sum. Collective
        over grid.pp and group.node."""
        pp = self.grid.pp
        if not self.part.tied or pp.size == 1 or pp.rank not in (0, pp.size - 1):
            return
        layout, other = buffer.layout, pp.size - 1 - pp.rank
        name = "embedding.weight" if self.part.has_embedding else "head.weight"
        found = [v for (_, n, _), v in zip(layout.placed(), layout.views(buffer.total), strict=True) if n == name]
        if not found:  # it is frozen, in both
            return
        view = found[0]
        mine = view.view(-1).cpu()
        group.fence()  # all have read theirs before one of them writes
        theirs = torch.empty_like(mine)
        for start, stop in pieces(0, mine.numel()):
            pp.Sendrecv(buf(mine[start:stop]), other, recvbuf=buf(theirs[start:stop]), source=other)
        if group.node.rank == 0:
            view.view(-1).add_(theirs.to(view.device))
        group.fence()

    def sha256(self, model: nn.Module) -> str:
        """sha256 over the whole model's float32 parameters in name order, little-endian bytes. Collective over grid.world."""
        digest, grid = hashlib.sha256(), self.grid
        if grid.parts == 1:
            return weights_sha256(model)
        reshard_all(model)
        mine = {self.part.global_name(name): p for name, p in model.named_parameters()}
        holders = [self._part_of(rank) for rank in range(grid.parts)]
        gathers = grid.world.rank == 0  # from the ranks of the first replica
        for name, size in sorted(self.sizes.items()):
            held = whole(mine[name]).float().cpu().contiguous() if name in mine else torch.empty(0)
            gathered = torch.empty(size if gathers else 0)
            for rank, part in enumerate(holders if grid.world.rank < grid.parts else []):
                elsewhere = name == "embedding.weight" and not part.has_embedding or part.index and not part.is_cut(name)
                if elsewhere or not part.has(name):
                    continue
                box = part.box(name, size)
                if rank == grid.model.rank and rank:
                    self._pass(held, target=0)
                elif gathers:
                    gathered[box] = self._take([s.stop - s.start for s in box], rank) if rank else held
            digest.update(gathered.numpy().tobytes())
        return str(grid.world.bcast(digest.hexdigest() if grid.world.rank == 0 else None))

    def _pass(self, tensor: Tensor, target: int) -> None:
        flat = tensor.view(-1)
        for start, stop in pieces(0, flat.numel()):
            self.grid.model.Send(buf(flat[start:stop]), target)

    def _take(self, size: list[int], source: int) -> Tensor:
        found = torch.empty(size)
        flat = found.view(-1)
        for start, stop in pieces(0, flat.numel()):
            self.grid.model.Recv(buf(flat[start:stop]), source)
        return found
