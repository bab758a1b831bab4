"""Lanes: how a global batch is cut, independently of how many ranks compute it. Pure.

A global batch of G sequences is cut into V = ceil(G / micro_batch) micro-batches (the last may be short), and these into
L lanes: lane l is the run of micro-batches [l V // L, (l + 1) V // L), whose gradients are accumulated in order. V and L
belong to the run; which rank computes a lane belongs to the cluster and never changes a bit of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_DEFAULT_LANES = 64


@dataclass(frozen=True)
class Lanes:
    """The cut of one global batch. Independent (no communication)."""

    global_batch: int  # sequences a step
    micro_batch: int  # sequences a forward pass
    num_lanes: int = 0  # 0: one lane a micro-batch, up to 64

    def __post_init__(self) -> None:
        if not 1 <= self.micro_batch <= self.global_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must be in 1..global_batch {self.global_batch}")
        if self.num_lanes == 0:
            object.__setattr__(self, "num_lanes", min(self.num_micro_batches, MAX_DEFAULT_LANES))
        if not 1 <= self.num_lanes <= self.num_micro_batches:
            raise ValueError(f"lanes {self.num_lanes} must be in 1..{self.num_micro_batches} micro-batches")

    @property
    def num_micro_batches(self) -> int:
        """V."""
        return -(-self.global_batch // self.micro_batch)

    def micro_batches(self, lane: int) -> range:
        """The micro-batches of a lane, in the order in which their gradients accumulate."""
        return range(lane * self.num_micro_batches // self.num_lanes, (lane + 1) * self.num_micro_batches // self.num_lanes)

    def lane_of(self, v: int) -> int:
        """The lane of a micro-batch."""
        return ((v + 1) * self.num_lanes - 1) // self.num_micro_batches

    def of_rank(self, rank: int, world_size: int) -> range:
        """The lanes that a rank computes: contiguous, as even as L allows; of a rank beyond world_size, none."""
        if rank >= world_size:
            return range(self.num_lanes, self.num_lanes)
        return range(rank * self.num_lanes // world_size, (rank + 1) * self.num_lanes // world_size)

    def sequences(self, v: int) -> range:
        """The places of micro-batch v in the global batch."""
        return range(v * self.micro_batch, min((v + 1) * self.micro_batch, self.global_batch))
