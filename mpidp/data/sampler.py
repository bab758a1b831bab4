"""The order of training windows. The windows of a micro-batch are a pure function of (seed, batch, micro-batch). Independent.

T is seq_len. Window w consists of the T + 1 tokens [w T, w T + T + 1) of the stream. Its first T tokens are the inputs, and its
last T tokens are the targets. An epoch contains each window exactly once. Batches are numbered over all epochs. The last batch of
an epoch may be shorter.

With order="sequential", window k is at position k of an epoch.

With order="shuffled", each lane (a fixed sequence of micro-batches of each batch) reads its own contiguous section of the
stream. A section is divided into blocks of about 1 MiB, and the order of the blocks is permuted. A pool consists of 16 blocks
that follow each other in the permuted order. The windows of a pool are permuted, too. Therefore each read covers many
consecutive bytes, and neighbouring windows of the corpus are rarely in the same batch. The permutations depend only on (seed,
epoch, lane).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from mpidp.data.lanes import Lanes
from mpidp.data.permutation import keys_of, permute, unpermute
from mpidp.errors import DataError

BLOCK_BYTES = 2**20
POOL_BLOCKS = 16
RUN = 256  # number of windows of a pool whose order is computed at a time
ORDERS = ("shuffled", "sequential")


class Pool(NamedTuple):
    """Identifies a pool (blocks that are read together). In each epoch, a lane reads its pools in the order of `number`."""

    lane: int  # with sequential order: the micro-batch v
    epoch: int  # with sequential order: the batch
    number: int


@dataclass(frozen=True)
class Sampler:
    """The order of a stream's windows. Raises DataError if the stream is shorter than one window."""

    num_tokens: int
    seq_len: int  # T, tokens per window
    lanes: Lanes
    seed: int
    order: str = "shuffled"
    token_bytes: int = 2  # bytes of a stored token, which determine the number of windows in a block

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} must be one of {', '.join(ORDERS)}")
        if self.num_windows < 1:
            raise DataError(f"{self.num_tokens} tokens are fewer than one training window of seq_len {self.seq_len} + 1 tokens. "
                            "Choose a smaller seq_len, or prepare more text")

    @cached_property
    def num_windows(self) -> int:
        """The number of windows per epoch."""
        return max(0, self.num_tokens - 1) // self.seq_len

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of global batches per epoch. The last batch may be shorter."""
        return -(-self.num_windows // self.lanes.global_batch)

    @cached_property
    def block_windows(self) -> int:
        """The number of windows per block."""
        return max(1, BLOCK_BYTES // (self.seq_len * self.token_bytes))

    @property
    def bytes_ahead(self) -> int:
        """The number of bytes of two pools: the pool that a lane reads now, and the next pool, which is read ahead. With
        sequential order, 0."""
        return 2 * POOL_BLOCKS * BLOCK_BYTES if self.order == "shuffled" else 0

    def batch_sequences(self, batch: int) -> int:
        """Return the number of windows in the global batch with number `batch`."""
        step = batch % self.steps_per_epoch
        return min(self.lanes.global_batch, self.num_windows - step * self.lanes.global_batch)

    def part(self, lane: int) -> range:
        """Return the range of windows that lane (sequence of micro-batches) number `lane` reads in each epoch. Use this method
        only if `order` is "shuffled"."""
        places, full = self._places(lane), self.steps_per_epoch - 1
        rest = self.batch_sequences(full)  # an epoch's last batch has positions 0..rest-1
        return range(full * places.start + min(places.start, rest), full * places.stop + min(places.stop, rest))

    def windows(self, batch: int, v: int) -> np.ndarray:
        """Return the numbers of the windows in micro-batch `v` of global batch `batch`: int64 (b,). In the last batch of
        an epoch, b may be smaller than usual, or 0."""
        epoch, lane, positions = self._positions(batch, v)
        if self.order == "sequential":
            return np.arange(positions.start, positions.stop, dtype=np.int64)
        if not positions:
            return np.empty(0, dtype=np.int64)
        part = self.part(lane)
        pieces = []
        for pool in self._pools_of(part, positions, epoch, lane):
            extent = self._extent(pool)
            inside = range(max(positions.start, extent.start), min(positions.stop, extent.stop))
            for run in range((inside.start - extent.start) // RUN, -(-(inside.stop - extent.start) // RUN)):
                first = extent.start + run * RUN
                pieces.append(_run_of(self, pool, run)[max(0, inside.start - first) : inside.stop - first])
        return np.concatenate(pieces)

    def pools(self, batch: int, v: int) -> list[Pool]:
        """Return the pools that contain the windows of micro-batch `v` of global batch `batch`. Usually, this is a single
        pool."""
        epoch, lane, positions = self._positions(batch, v)
        if not positions:
            return []
        if self.order == "sequential":
            return [Pool(v, batch, 0)]
        return self._pools_of(self.part(lane), positions, epoch, lane)

    def following(self, pool: Pool) -> Pool | None:
        """Return the pool (group of blocks) that the lane reads after `pool` in the same epoch, or None if it is the last."""
        if self.order == "sequential" or (pool.number + 1) * POOL_BLOCKS >= self._num_blocks(self.part(pool.lane)):
            return None
        return pool._replace(number=pool.number + 1)

    def blocks(self, pool: Pool) -> list[tuple[int, int]]:
        """Return (first window, number of windows) for each block of a pool, in reading order."""
        if self.order == "sequential":
            _, _, positions = self._positions(batch=pool.epoch, v=pool.lane)
            return [(positions.start, len(positions))]
        part, size = self.part(pool.lane), self.block_windows
        return [(part.start + int(b) * size, min(size, len(part) - int(b) * size)) for b in self._blocks(pool)]

    def extent(self, micro_batches: Sequence[int]) -> range:
        """Return the smallest range of windows that contains the windows of these micro-batches in every epoch."""
        if self.order == "sequential" or not micro_batches:
            return range(self.num_windows if micro_batches else 0)
        parts = [self.part(self.lanes.lane_of(v)) for v in micro_batches]
        return range(min(p.start for p in parts), max(p.stop for p in parts))

    def _places(self, lane: int) -> range:
        micro_batches = self.lanes.micro_batches(lane)
        return range(micro_batches.start * self.lanes.micro_batch,
                     min(micro_batches.stop * self.lanes.micro_batch, self.lanes.global_batch))

    def _positions(self, batch: int, v: int) -> tuple[int, int, range]:
        """Return (epoch, lane, positions) of micro-batch `v`. If `order` is "shuffled", the positions of its windows are
        counted from the beginning of the lane's section, and otherwise from the beginning of the epoch."""
        epoch, step = divmod(batch, self.steps_per_epoch)
        lane, places = self.lanes.lane_of(v), self.lanes.sequences(v)
        stop = max(places.start, min(places.stop, self.batch_sequences(batch)))
        of_lane = range(self.lanes.global_batch) if self.order == "sequential" else self._places(lane)
        offset = step * len(of_lane) - of_lane.start
        return epoch, lane, range(places.start + offset, stop + offset)

    def _num_blocks(self, part: range) -> int:
        return -(-len(part) // self.block_windows)

    def _gap(self, part: range, epoch: int, lane: int) -> tuple[int, int]:
        """Return (end, lacks) for the last block of a lane's section. This block may be shorter than the others. `end`: the
        position at which the block ends in the permuted order. `lacks`: the number of windows by which the block is shorter.
        `part`: the windows of the section."""
        num_blocks = self._num_blocks(part)
        lacks = num_blocks * self.block_windows - len(part)
        slot = _slot_of(num_blocks - 1, num_blocks, self.seed, epoch, lane)
        return (slot + 1) * self.block_windows - lacks, lacks

    def _skip_gap(self, part: range, pool: Pool, positions: np.ndarray) -> np.ndarray:
        end, lacks = self._gap(part, pool.epoch, pool.lane)
        return positions + np.where(positions >= end, lacks, 0)

    def _extent(self, pool: Pool) -> range:
        """Return the range of positions that the windows of a pool have in the section of the pool's lane."""
        part, full = self.part(pool.lane), self.block_windows * POOL_BLOCKS
        end, lacks = self._gap(part, pool.epoch, pool.lane)
        start, stop = pool.number * full, (pool.number + 1) * full
        return range(start - (lacks if start >= end else 0), min(len(part), stop - (lacks if stop >= end else 0)))

    def _pools_of(self, part: range, positions: range, epoch: int, lane: int) -> list[Pool]:
        ends = self._skip_gap(part, Pool(lane, epoch, 0), np.array([positions.start, positions.stop - 1]))
        first, last = (int(e) // (self.block_windows * POOL_BLOCKS) for e in ends)
        return [Pool(lane, epoch, number) for number in range(first, last + 1)]

    def mixed(self, pool: Pool, positions: range) -> np.ndarray:
        """Return the numbers of the windows that a lane reads at `positions` of its section. All these positions must be in
        `pool`."""
        extent, part = self._extent(pool), self.part(pool.lane)
        at = np.arange(positions.start - extent.start, positions.stop - extent.start, dtype=np.uint64)
        mixed = permute(at, len(extent), keys_of(self.seed, "window", *pool)).astype(np.int64) + extent.start
        mixed = self._skip_gap(part, pool, mixed)
        slots = mixed // self.block_windows - pool.number * POOL_BLOCKS
        return part.start + self._blocks(pool)[slots] * self.block_windows + mixed % self.block_windows

    def _blocks(self, pool: Pool) -> np.ndarray:
        return _blocks_of(self._num_blocks(self.part(pool.lane)), self.seed, pool)


@lru_cache(maxsize=1024)
def _run_of(sampler: Sampler, pool: Pool, run: int) -> np.ndarray:
    """Divide the windows of a pool, in reading order, into groups of RUN windows, and return the numbers of the windows in
    group number `run`. The last group may be smaller. The result is cached."""
    extent = sampler._extent(pool)
    return sampler.mixed(pool, range(extent.start + run * RUN, min(extent.start + (run + 1) * RUN, extent.stop)))


@lru_cache(maxsize=1024)
def _slot_of(block: int, num_blocks: int, seed: int, epoch: int, lane: int) -> int:
    return int(unpermute(np.array([block], dtype=np.uint64), num_blocks, keys_of(seed, "block", lane, epoch))[0])


@lru_cache(maxsize=1024)
def _blocks_of(num_blocks: int, seed: int, pool: Pool) -> np.ndarray:
    slots = np.arange(pool.number * POOL_BLOCKS, min((pool.number + 1) * POOL_BLOCKS, num_blocks), dtype=np.uint64)
    return permute(slots, num_blocks, keys_of(seed, "block", pool.lane, pool.epoch)).astype(np.int64)
