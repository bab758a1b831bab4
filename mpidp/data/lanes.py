"""Divides the global batch into lanes (fixed sequences of micro-batches). The lanes do not depend on the number of ranks.
Pure.

A global batch of G sequences is split into V = ceil(G / micro_batch) micro-batches. The last micro-batch may be shorter. The
micro-batches are divided into L lanes. Lane l consists of micro-batches [l V // L, (l + 1) V // L). The gradients of a lane's
micro-batches are accumulated in order. V and L are fixed for a run. Therefore the gradient of a lane has the same bits on any
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DEFAULT_LANES = 64


def even_ranges(num_lanes: int, size: int) -> list[range]:
    """Split lanes 0..num_lanes-1 into `size` contiguous ranges of nearly equal length, and return the ranges. Pure."""
    return [range(i * num_lanes // size, (i + 1) * num_lanes // size) for i in range(size)]


@dataclass(frozen=True)
class Lanes:
    """The partition of one global batch into micro-batches, and of the micro-batches into lanes. Independent."""

    global_batch: int  # sequences per step
    micro_batch: int  # sequences per forward pass
    num_lanes: int = 0  # 0: one lane per micro-batch, up to 64

    def __post_init__(self) -> None:
        if not 1 <= self.micro_batch <= self.global_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must be at least 1, and at most global_batch {self.global_batch}")
        if self.num_lanes == 0:
            object.__setattr__(self, "num_lanes", min(self.num_micro_batches, MAX_DEFAULT_LANES))
        if not 1 <= self.num_lanes <= self.num_micro_batches:
            raise ValueError(f"num_lanes {self.num_lanes} must be at least 1, and at most {self.num_micro_batches} (the number "
                             "of micro-batches)")

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches, V."""
        return -(-self.global_batch // self.micro_batch)

    def micro_batches(self, lane: int) -> range:
        """Return the micro-batches of a lane, in the order of gradient accumulation."""
        return range(lane * self.num_micro_batches // self.num_lanes, (lane + 1) * self.num_micro_batches // self.num_lanes)

    def lane_of(self, v: int) -> int:
        """Return the lane of micro-batch v."""
        return ((v + 1) * self.num_lanes - 1) // self.num_micro_batches

    def of_rank(self, rank: int, world_size: int) -> range:
        """Return the contiguous range of lanes that a rank computes. The ranges of all ranks have nearly equal lengths. If
        `rank` is at least `world_size`, the range is empty."""
        if rank >= world_size:
            return range(self.num_lanes, self.num_lanes)
        return even_ranges(self.num_lanes, world_size)[rank]

    def sequences(self, v: int) -> range:
        """Return the range of sequences of the global batch that micro-batch v contains."""
        return range(v * self.micro_batch, min((v + 1) * self.micro_batch, self.global_batch))
