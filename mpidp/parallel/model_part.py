"""Saves, loads and hashes this rank's part of the model. Every parameter is saved and hashed once, even if several ranks hold it.

A checkpoint stores tensors under their names in the whole model, so a run can resume on any mesh. The flat tensors of some
strategies are an exception. A flat tensor contains elements of many parameters. Each part of the model stores its own flat
tensors, under names that contain the part's label (Grid.label). Flat tensors can be loaded only if the model is divided in the
same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpidp.checkpoint.added_rows import BoxReader
from mpidp.checkpoint.boxes import tensor_of
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import boxes_held, parameters_of, weights_sha256, whole
from mpidp.checkpoint.reader import Reader
from mpidp.comm.buffers import buf
from mpidp.comm.group import Group
from mpidp.comm.slices import NORM_BLOCK
from mpidp.comm.transport import pieces
from mpidp.errors import UsageError
from mpidp.model.part import Part, part_of
from mpidp.model.shape import Shape, shapes_of
from mpidp.parallel.grid import Grid
from mpidp.parallel.sliced_norm import NormBySlices
from mpidp.reducers.buckets import GradientBuffer


class ModelPartition:
    """The part of the model that this rank holds. Methods are independent unless their docstrings say otherwise."""

    def __init__(
        self, grid: Grid, shape: Shape, sequence: bool = False, chunks: int = 1, slices: int = 1,
        adapters: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """sequence: whether sequence parallelism is used. chunks: number of chunks (groups of consecutive layers) per pipeline
        stage. slices: model.slices. adapters: the shapes of the adapters' parameters, by name. Independent."""
        self.grid, self.shape, self.sequence, self.chunks, self.sizes = grid, shape, sequence, chunks, shapes_of(shape)
        self.sizes.update(adapters or {})
        self.part = self._part_of(grid.model.rank)
        self.norm_by_slices = NormBySlices(grid, self.part, self.sizes, slices, self.counts) if slices > 1 else None

    def _part_of(self, rank: int) -> Part:
        stage, number = divmod(rank, self.grid.tp.size)
        return part_of(self.shape, stage, self.grid.pp.size, number, self.grid.tp.size, self.sequence, self.chunks)

    @property
    def plain_norm(self) -> bool:
        """Whether norm() needs no communication, because it only adds the squares of this rank's flat gradient."""
        return self.grid.parts == 1 and self.norm_by_slices is None

    def counts(self, name: str) -> bool:
        """Return whether this rank saves its section of parameter `name` in checkpoints, and counts the gradient of this section
        in the gradient norm. If several ranks of a replica hold the same section, this is True on only one of them. Pure."""
        part = self.part
        elsewhere = part.tied and name == "head.weight" and not part.has_embedding
        return not elsewhere and (part.index == 0 or part.is_cut(name))

    def _placed(self, name: str, entry: Entry) -> tuple[str, Entry]:
        """Return the name and the entry that a tensor of this part has in a checkpoint. name: PARAMETER, or PARAMETER/KEY for
        optimizer state of the parameter. If a tensor is stored as several boxes (rectangular blocks), #NUMBER follows. The
        returned entry contains the position of the tensor in the whole model. If `name` belongs to no parameter, the entry is
        unchanged and the returned name begins with this part's label."""
        number = name.removeprefix(tensor_of(name))
        what, slash, key = tensor_of(name).partition("/")
        whole = self.part.global_name(what)
        if whole not in self.sizes:
            return f"{self.grid.label}/{name}", entry
        box, size = self.part.box(whole, self.sizes[whole]), self.sizes[whole]
        here = tuple(s.stop - s.start for s in box)
        if here != tuple(entry.tensor.shape if entry.shape is None else entry.shape):  # a scalar entry: the number of updates
            return f"{whole}{slash}{key}{number}", entry
        at = tuple(s.start + inside for s, inside in zip(box, entry.place, strict=True))
        return f"{whole}{slash}{key}{number}", Entry(entry.tensor, entry.layout, at, size)

    def _saves(self, name: str, entry: Entry) -> bool:
        """Return whether this rank saves the entry. Return False if another rank saves the same entry."""
        what = tensor_of(name).partition("/")[0]
        if self.part.global_name(what) not in self.sizes:
            return True
        return self.counts(what) and (self.part.index == 0 or entry.tensor.dim() > 0)

    def entries(self, model: nn.Module, strategy: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the entries that this rank contributes to a checkpoint. strategy: the entries of the strategy's state."""
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
    def broadcast_parameters(self, model: nn.Module) -> list[int]:
        """Broadcast the first replica's parameters to all replicas. Return the ranks of grid.replicas.dp whose parameters
        differed. Call this before parameters are moved to shared memory. Otherwise all ranks of a node would write to the same
        memory. Collective over grid.replicas.dp."""
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
        """Set the parameters of this part to those in `reader`, a model folder or a checkpoint that was written on any mesh."""
        for name, entry in parameters_of(model).items():
            whole, placed = (name, entry) if self.grid.parts == 1 else self._placed(name, entry)
            entry.tensor.copy_(reader.box(f"model/{tensor_of(whole)}", placed))

    def strategy_state(self, reader: Reader, model: nn.Module, strategy: Mapping[str, Entry]) -> dict[str, Tensor]:
        """Return the state for the strategy's load_state_dict, read from a checkpoint. strategy: the entries of the strategy's
        current state. Raises UsageError if the checkpoint has flat tensors of a model that was divided in another way."""
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
            f"{reader.path} was written with other values of mesh.tp and mesh.pp. It contains state of comm.compress, or of a "
            "strategy.name other than 'synchronous', and mpidp cannot divide this state in another way. Resume with the mesh.tp "
            "and mesh.pp with which the checkpoint was written"
        )

    def norm(self, buffer: GradientBuffer, squares: Tensor, flat: Tensor) -> float:
        """Return the L2 norm of a gradient over the whole model. flat: the gradient of this rank's part, with the layout of
        `buffer`. squares: the sum of squares of each norm block (4,096 elements) of `flat`. Collective over grid.model."""
        if self.norm_by_slices is not None:
            return self.norm_by_slices(buffer.layout, flat)
        placed = zip(buffer.layout.placed(), buffer.layout.views(flat), strict=True)
        return self.norm_of(buffer.spans, squares, [view for (_, name, _), view in placed if not self.counts(name)])

    def norm_of(self, spans: Sequence[tuple[int, int]], squares: Tensor, uncounted: Iterable[Tensor]) -> float:
        """Return the L2 norm of a gradient over the whole model. spans: (start, stop) of each chunk (group of consecutive
        layers) in the flat gradient. squares: the sum of squares of each norm block (4,096 elements) of the flat gradient.
        uncounted: the gradients of the parameters for which counts() returns False, in flat order. Collective over
        grid.model."""
        twice = 0.0
        for gradient in uncounted:
            twice += float(torch.linalg.vector_norm(gradient.double()).square())
        return self.grid.norm([squares[start // NORM_BLOCK : stop // NORM_BLOCK] for start, stop in spans], twice)

    @property
    def tied_name(self) -> str:
        """The name of the embedding or the head of this part, if another stage holds the same parameter. Otherwise an empty
        string."""
        if not self.part.tied or self.grid.pp.size == 1 or self.grid.pp.rank not in (0, self.grid.pp.size - 1):
            return ""
        return "embedding.weight" if self.part.has_embedding else "head.weight"

    def tied_gradient(self, mine: Tensor) -> Tensor:
        """Send `mine`, this stage's gradient (n,) of the tied embedding, to the other stage that holds this parameter. Return
        the other stage's gradient, on the CPU. Collective over these two ranks of grid.pp."""
        pp = self.grid.pp
        other, theirs = pp.size - 1 - pp.rank, torch.empty_like(mine := mine.cpu())
        for start, stop in pieces(0, mine.numel()):
            pp.Sendrecv(buf(mine[start:stop]), other, recvbuf=buf(theirs[start:stop]), source=other)
        return theirs

    def tie(self, buffer: GradientBuffer, group: Group) -> None:
        """If the embedding and the head share one parameter and are in different stages, add their gradients. In both stages,
        buffer.total then has the sum. Collective over grid.pp and group.node."""
        layout = buffer.layout
        placed = zip(layout.placed(), layout.views(buffer.total), strict=True)
        found = [view.view(-1) for (_, name, _), view in placed if name == self.tied_name]
        if not found:  # not tied, or frozen in both stages
            return
        mine = found[0].cpu()
        group.fence()  # all ranks have read the gradient before one of them writes
        theirs = self.tied_gradient(mine)
        if group.node.rank == 0:
            found[0].add_(theirs.to(found[0].device))
        group.fence()

    def sha256(self, model: nn.Module) -> str:
        """Return the SHA-256 hash of the whole model's parameters. They are hashed in the order of their names, as little-endian
        float32 values. Collective over grid.world."""
        digest, grid = hashlib.sha256(), self.grid
        if grid.parts == 1:
            return weights_sha256(model)
        mine = {self.part.global_name(name): p for name, p in model.named_parameters()}
        holders = [self._part_of(rank) for rank in range(grid.parts)]
        gathers = grid.world.rank == 0  # whether this rank receives from the ranks of the first replica
        for name, size in sorted(self.sizes.items()):
            held = whole(mine[name]).float().cpu().contiguous() if name in mine else torch.empty(0)
            gathered = torch.empty(size if gathers else 0)
            for rank, part in enumerate(holders if grid.world.rank < grid.parts else []):
                elsewhere = name == "embedding.weight" and not part.has_embedding or part.index and not part.is_cut(name)
                if elsewhere or not part.has(name):
                    continue
                box = part.box(name, size)
                if rank == grid.model.rank and rank:
                    self._send(held, target=0)
                elif gathers:
                    gathered[box] = self._receive([s.stop - s.start for s in box], rank) if rank else held
            digest.update(gathered.numpy().tobytes())
        return str(grid.world.bcast(digest.hexdigest() if grid.world.rank == 0 else None))

    def _send(self, tensor: Tensor, target: int) -> None:
        flat = tensor.view(-1)
        for start, stop in pieces(0, flat.numel()):
            self.grid.model.Send(buf(flat[start:stop]), target)

    def _receive(self, size: list[int], source: int) -> Tensor:
        found = torch.empty(size)
        flat = found.view(-1)
        for start, stop in pieces(0, flat.numel()):
            self.grid.model.Recv(buf(flat[start:stop]), source)
        return found
