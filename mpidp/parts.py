"""This rank's part of the model among the others' parts: how it is saved, loaded and counted once.

A checkpoint names global tensors, so what was trained on one mesh goes on on any other. What only those know that have the very
same part (a flat tensor of a strategy) is named after the part, and goes on where the model is cut in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpidp.checkpoint import Reader
from mpidp.comm.buckets import FlatLayout, GradientBuffer
from mpidp.comm.buffers import buf
from mpidp.comm.grid import Grid
from mpidp.comm.group import Group
from mpidp.comm.transport import pieces
from mpidp.errors import UsageError
from mpidp.model.part import Part, part_of
from mpidp.model.shape import TransformerShape, shapes_of
from mpidp.state import Entry


class Parts:
    """Independent, but for what says otherwise."""

    def __init__(self, grid: Grid, shape: TransformerShape) -> None:
        self.grid, self.shape, self.sizes = grid, shape, shapes_of(shape)
        self.part = self._part_of(grid.model.rank)

    def _part_of(self, rank: int) -> Part:
        stage, number = divmod(rank, self.grid.tp.size)
        return part_of(self.shape, stage, self.grid.pp.size, number, self.grid.tp.size)

    def _counts(self, part: Part, name: str) -> bool:
        """Is a parameter saved and counted by the ranks that have this part, not by others that have it too? Pure."""
        elsewhere = part.tied and name == "head.weight" and not part.embeds
        return not elsewhere and (part.index == 0 or part.is_cut(name))

    def _entry(self, name: str, entry: Entry) -> tuple[str, Entry] | None:
        """name: PARAMETER or PARAMETER/KEY of this part."""
        what, slash, key = name.partition("/")
        whole = self.part.global_name(what)
        if whole not in self.sizes:
            return f"{self.grid.label}/{name}", entry
        if not self._counts(self.part, what):
            return None
        box, size = self.part.box(whole, self.sizes[whole]), self.sizes[whole]
        if tuple(entry.tensor.shape) != tuple(s.stop - s.start for s in box) or not self.part.is_cut(what):
            return (f"{whole}{slash}{key}", entry) if self.part.index == 0 else None  # whole; or the number of its updates
        return f"{whole}{slash}{key}", Entry(entry.tensor, entry.layout, tuple(s.start for s in box), size)

    def entries(self, model: nn.Module, strategy: Mapping[str, Entry]) -> dict[str, Entry]:
        """What a checkpoint is made of, as far as this rank has it."""
        found: dict[str, Entry] = {}
        held = {f"model/{name}": Entry(p) for name, p in model.named_parameters()}
        for name, entry in (held | {f"strategy/{name}": entry for name, entry in strategy.items()}).items():
            if self.grid.parts == 1:
                found[name] = entry
                continue
            where, _, rest = name.partition("/")
            if (one := self._entry(rest, entry)) is not None:
                found[f"{where}/{one[0]}"] = one[1]
        return found

    def _read(self, reader: Reader, prefix: str, what: str, key: str = "") -> Tensor:
        """A parameter's part of PREFIX/parameter[/KEY], or what has no parts."""
        whole = self.part.global_name(what)
        name, size = f"{prefix}/{whole}{key}", self.sizes[whole]
        if tuple(reader.meta["tensors"][name]["shape"]) != size:
            return reader[name]
        box = self.part.box(whole, size)
        return reader.part(name, [s.start for s in box], [s.stop - s.start for s in box])

    @torch.no_grad()
    def load(self, reader: Reader, model: nn.Module) -> None:
        """The parameters of this part, from a checkpoint of any mesh."""
        for name, p in model.named_parameters():
            p.copy_(self._read(reader, "model", name).view(p.shape))

    def strategy_state(self, reader: Reader, rank: int, size: int, model: nn.Module) -> dict[str, Tensor]:
        """What the strategy's load_state_dict is given; rank, size: of the replicas. UsageError where it was written for parts
        that are cut in another way."""
        if self.grid.parts == 1 and not any(name.startswith("strategy/part_") for name in reader):
            return reader.under("strategy/", rank, size)
        of_whole = {self.part.global_name(name): name for name, _ in model.named_parameters()}
        found: dict[str, Tensor] = {}
        label = f"strategy/{self.grid.label}/"
        for name in reader:
            where, _, rest = name.partition("/")
            what, slash, key = rest.partition("/")
            if where != "strategy":
                continue
            if name.startswith(label):
                found[name.removeprefix(label)] = reader.own(name, rank, size)
            elif what.startswith("part_"):
                if not any(other.startswith(label) for other in reader):
                    self._refuse(reader)
            elif what in of_whole:
                found[f"{of_whole[what]}{slash}{key}"] = self._read(reader, "strategy", of_whole[what], slash + key)
            elif what not in self.sizes:
                self._refuse(reader)
        return found

    def _refuse(self, reader: Reader) -> None:
        raise UsageError(
            f"{reader.path} has state that belongs to parts of a model cut in another way (of strategy.name other than "
            "synchronous, or of comm.compress): go on with the mesh.tp and mesh.pp that it was trained with"
        )

    def norm(self, layout: FlatLayout, squares: Tensor, flat: Tensor) -> float:
        """Of a flat gradient of this part over the whole model; squares: of its blocks. Collective over grid.model."""
        twice = 0.0
        if self.grid.parts > 1:
            for (_, name, _), view in zip(layout.placed(), layout.views(flat), strict=True):
                if not self._counts(self.part, name):
                    twice += float(torch.linalg.vector_norm(view.double()).square())
        return self.grid.norm(squares, twice)

    def tie(self, buffer: GradientBuffer, group: Group) -> None:
        """Where embedding and head are one tensor and lie in two stages, their gradients are added: both have the sum. Collective
        over grid.pp and group.node."""
        pp = self.grid.pp
        if not self.part.tied or pp.size == 1 or pp.rank not in (0, pp.size - 1):
            return
        layout, other = buffer.layout, pp.size - 1 - pp.rank
        name = "embedding.weight" if self.part.embeds else "head.weight"
        view = next(v for (_, n, _), v in zip(layout.placed(), layout.views(buffer.total), strict=True) if n == name)
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
        digest, mine = hashlib.sha256(), {self.part.global_name(name): p for name, p in model.named_parameters()}
        grid = self.grid
        if grid.parts == 1:
            for _, p in sorted(model.named_parameters()):
                digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
            return digest.hexdigest()
        if grid.world.rank < grid.parts:  # the first replica, whose rank 0 is rank 0 of all
            holders = [self._part_of(rank) for rank in range(grid.parts)]
            for name, size in sorted(self.sizes.items()):
                whole = torch.empty(size) if grid.model.rank == 0 else torch.empty(0)
                for rank, part in enumerate(holders):
                    elsewhere = name == "embedding.weight" and not part.embeds or part.index and not part.is_cut(name)
                    if elsewhere or not part.has(name):
                        continue
                    box = part.box(name, size)
                    if rank == grid.model.rank:
                        tensor = mine[name].detach().float().cpu().contiguous()
                        if rank:
                            self._pass(tensor, target=0)
                    if grid.model.rank == 0:
                        whole[box] = tensor if rank == 0 else self._take([s.stop - s.start for s in box], rank)
                if grid.model.rank == 0:
                    digest.update(whole.numpy().tobytes())
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
