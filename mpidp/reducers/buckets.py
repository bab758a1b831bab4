"""Flat memory: parameters and gradients are views of flat tensors. The flat tensors are cut into buckets. Autograd hooks
report each bucket whose gradients are complete.

The layout depends only on the model. Parameters are in reverse order of definition, which is roughly the order in which
backward computes their gradients. The bucket size and the number of ranks do not change the layout. They only determine where
the flat tensors are cut into buckets and slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from mpidp.comm.slices import ALIGN, NORM_BLOCK, round_up


@dataclass(frozen=True)
class Bucket:
    """Consecutive parameters, in the elements [start, stop) of the flat buffer. A parameter is never divided between two
    buckets."""

    index: int
    start: int
    stop: int
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]  # offset of each parameter in the flat buffer, in elements


def unit_of(name: str) -> str:
    """Return the name of the unit (group of parameters, such as those of a Transformer block) to which parameter `name`
    belongs. For example, the unit of blocks.3.attention.q.weight is `blocks.3`. If a name has no number, the unit is the part
    before the first dot. A unit is never divided between two pipeline stages. Pure."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1]) if numbers else words[0]


class FlatLayout:
    """The place of each parameter in a flat tensor of num_elements elements. num_elements is a multiple of NORM_BLOCK. Units
    (unit_of()) begin at multiples of NORM_BLOCK. Therefore each norm block (NORM_BLOCK elements) of a pipeline stage is also a
    norm block of the whole model. Independent."""

    def __init__(self, named_parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        self.parameters = list(reversed(named_parameters))
        self.device = self.parameters[0][1].device
        self.offsets: list[int] = []
        offset, unit = 0, ""
        for name, p in self.parameters:
            if unit_of(name) != unit:
                offset, unit = round_up(offset, NORM_BLOCK), unit_of(name)
            self.offsets.append(offset)
            offset += round_up(p.numel(), ALIGN)
        self.num_elements = round_up(offset, NORM_BLOCK)

    def placed(self) -> list[tuple[int, str, torch.nn.Parameter]]:
        """Return a list of (offset, name, parameter), in ascending order of offsets."""
        return [(o, name, p) for o, (name, p) in zip(self.offsets, self.parameters, strict=True)]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return one view of `flat` for each parameter, in the order in which the parameters lie in `flat`. `flat`:
        (num_elements,). Each view has the shape of its parameter."""
        return [flat[o : o + p.numel()].view_as(p) for o, _, p in self.placed()]

    def adopt(self, flat: torch.Tensor) -> None:
        """Make the parameters views of `flat`, without changing their values."""
        with torch.no_grad():
            for (_, p), view in zip(self.parameters, self.views(flat), strict=True):
                if view.data_ptr() != p.data_ptr():  # otherwise p already is this view: the memory is reused after a failure
                    view.copy_(p)
                p.data = view

    def cut(self, bucket_bytes: int) -> list[Bucket]:
        """Divide the parameters into buckets of at least `bucket_bytes` bytes, and return them. The last bucket may be
        smaller."""
        buckets: list[Bucket] = []
        members: list[tuple[int, str, torch.nn.Parameter]] = []
        placed = self.placed()
        for i, one in enumerate(placed):
            members.append(one)
            last = i + 1 == len(placed)
            stop = self.num_elements if last else placed[i + 1][0]
            if last or (stop - members[0][0]) * 4 >= bucket_bytes:
                offsets = tuple(o for o, _, _ in members)
                names, shapes = tuple(name for _, name, _ in members), tuple(p.shape for _, _, p in members)
                buckets.append(Bucket(len(buckets), offsets[0], stop, names, shapes, offsets))
                members = []
        return buckets


class GradientBuffer:
    """Flat float32 gradient buffers (slots) for all parameters. Their shape is (slots, num_elements)."""

    def __init__(
        self, named_parameters: list[tuple[str, torch.nn.Parameter]], slots: int, bucket_bytes: int,
        memory: Callable[[int], list[torch.Tensor]] | None = None, me: int = 0,
    ) -> None:
        """memory: takes a number of elements, and returns a list of zeroed float32 tensors of this size, one for each rank that
        shares memory. If it is None, the buffers are in private memory. me: index of this rank's tensor in the list. Independent
        if `memory` is."""
        self.layout = FlatLayout(named_parameters)
        self.num_elements = self.layout.num_elements
        needed = slots * self.num_elements
        parts = [torch.zeros(needed, device=self.layout.device)] if memory is None else memory(needed)
        self.parts = [part.view(-1, self.num_elements) for part in parts]  # the slots of every rank that shares memory
        self.flat = self.parts[me]
        self.total = self.parts[0][0]  # the sum, after the reduction
        self.views = list(zip(*(self.layout.views(slot) for slot in self.flat), strict=True))
        self.buckets = self.layout.cut(bucket_bytes)
        self.cut_chunks(lambda name: 0, 1)
        self._hooks: list[RemovableHandle] = []

    def cut_chunks(self, chunk_of: Callable[[str], int], count: int) -> None:
        """Divide the parameters into `count` chunks (groups of layers) for point(). chunk_of: returns the index of a
        parameter's chunk, given the parameter's name. In the flat order, chunks must be in descending order of index."""
        chunks = [chunk_of(name) for name, _ in self.layout.parameters]
        starts = [next((o for o, mine in zip(self.layout.offsets, chunks, strict=True) if mine <= chunk), self.num_elements)
                  for chunk in range(count)]
        self.spans = [(start, stop) for start, stop in zip(starts, [self.num_elements, *starts], strict=False)]
        self._members = [[i for i, mine in enumerate(chunks) if mine == chunk] for chunk in range(count)]
        self._pointing_at: list[int | None] = [None] * count

    def point(self, slot: int, chunk: int | None = None) -> None:
        """Make the .grad of each parameter of a chunk a view of slot `slot`, so that backward accumulates into the slot. If
        `chunk` is None, do this for all chunks."""
        for one in range(len(self.spans)) if chunk is None else [chunk]:
            if slot != self._pointing_at[one]:
                for i in self._members[one]:
                    self.layout.parameters[i][1].grad = self.views[i][slot]
                self._pointing_at[one] = slot

    def on_full(self, armed: Callable[[], bool], begin: Callable[[Bucket], None]) -> None:
        """Register hooks that call begin(bucket) during backward, as soon as all gradients of the bucket are complete. The hooks
        do nothing while armed() returns False."""
        for bucket in self.buckets:
            waiting = set(bucket.names)

            def hook(_: torch.Tensor, name: str, bucket: Bucket = bucket, waiting: set[str] = waiting) -> None:
                if armed():
                    waiting.discard(name)
                    if not waiting:
                        waiting.update(bucket.names)
                        begin(bucket)

            for name, p in self.layout.parameters:
                if name in waiting:
                    self._hooks.append(p.register_post_accumulate_grad_hook(lambda grad, name=name, hook=hook: hook(grad, name)))

    def forget(self) -> None:
        """Remove the hooks of on_full()."""
        for hook in self._hooks:
            hook.remove()
