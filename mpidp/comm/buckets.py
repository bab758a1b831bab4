"""Flat gradient buffers with .grad as views into them, cut into buckets that autograd hooks fill.

The flat layout depends on the model alone (parameters in reverse order of definition, which is about the order in which
backward finishes them), never on bucket size or number of ranks: only the cuts into buckets do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ALIGN = 64  # elements: every parameter and every slice begins at a multiple, so kernels see the same alignment everywhere
NORM_BLOCK = 1 << 16  # elements: the gradient norm is a sum over blocks of this size, in order


@dataclass(frozen=True)
class Bucket:
    """A run of whole parameters in the flat buffer: elements [start, stop)."""

    index: int
    start: int
    stop: int
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]  # of each parameter in the flat buffer


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class GradientBuffer:
    """`slots` flat float32 gradient buffers of all parameters, shape (slots, num_elements). Independent."""

    def __init__(self, named_parameters: list[tuple[str, torch.nn.Parameter]], slots: int, bucket_bytes: int) -> None:
        self._parameters = list(reversed(named_parameters))
        self._offsets: list[int] = []
        offset = 0
        for _, p in self._parameters:
            self._offsets.append(offset)
            offset += _round_up(p.numel(), ALIGN)
        self.num_elements = _round_up(offset, NORM_BLOCK)
        device = self._parameters[0][1].device
        self.flat = torch.zeros(slots, self.num_elements, device=device)
        self.views = [[self.flat[s, o : o + p.numel()].view_as(p) for s in range(slots)] for o, (_, p) in self._placed()]
        self.buckets = self._cut(bucket_bytes)
        self._pointing_at = -1

    def _placed(self) -> list[tuple[int, tuple[str, torch.nn.Parameter]]]:
        return list(zip(self._offsets, self._parameters, strict=True))

    def _cut(self, bucket_bytes: int) -> list[Bucket]:
        buckets: list[Bucket] = []
        members: list[tuple[int, tuple[str, torch.nn.Parameter]]] = []
        placed = self._placed()
        for i, (offset, named) in enumerate(placed):
            members.append((offset, named))
            last = i + 1 == len(placed)
            stop = self.num_elements if last else placed[i + 1][0]
            if last or (stop - members[0][0]) * 4 >= bucket_bytes:
                names = tuple(name for _, (name, _) in members)
                shapes = tuple(p.shape for _, (_, p) in members)
                offsets = tuple(o for o, _ in members)
                buckets.append(Bucket(len(buckets), offsets[0], stop, names, shapes, offsets))
                members = []
        return buckets

    def point(self, slot: int) -> None:
        """Make every .grad a view of this slot; backward then adds into it."""
        if slot != self._pointing_at:
            for (_, p), views in zip(self._parameters, self.views, strict=True):
                p.grad = views[slot]
            self._pointing_at = slot

    def on_full(self, armed: Callable[[], bool], begin: Callable[[Bucket], None]) -> None:
        """While armed(), call begin(bucket) from backward as soon as all gradients of a bucket are in."""
        for bucket in self.buckets:
            waiting = set(bucket.names)

            def hook(_: torch.Tensor, name: str, bucket: Bucket = bucket, waiting: set[str] = waiting) -> None:
                if armed():
                    waiting.discard(name)
                    if not waiting:
                        waiting.update(bucket.names)
                        begin(bucket)

            for name, p in self._parameters:
                if name in waiting:
                    p.register_post_accumulate_grad_hook(lambda grad, name=name, hook=hook: hook(grad, name))


def slice_bounds(length: int, size: int) -> list[int]:
    """Cut `length` elements into `size` slices at multiples of ALIGN: size + 1 bounds. Pure."""
    units = -(-length // ALIGN)
    return [min(length, r * units // size * ALIGN) for r in range(size)] + [length]
