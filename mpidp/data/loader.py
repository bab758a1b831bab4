"""The data loader. A thread reads and checks micro-batches ahead of time, and pins their memory. The thread never calls MPI.

The only state is one integer, `next_batch`. The loader prefetches the micro-batches that this rank is expected to compute.
Other micro-batches are read on demand, because lanes (fixed sequences of micro-batches) may move between ranks. On CUDA, the
tokens that a rank needs stay in the device's memory if there is enough space.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpidp.data.sampler import Pool, Sampler
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError

IGNORED = -100  # target that is ignored by the loss (torch's convention)
RESIDENT_SHARE = 0.25  # with resident="auto", the largest fraction of the device's free memory to use
PIECE_TOKENS = 2**23  # tokens read at a time


@dataclass
class MicroBatch:
    """The data of one forward pass of b sequences. In an epoch's last batch, b may be less than `micro_batch`, or 0."""

    v: int  # index of the micro-batch in its global batch
    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, -100 where a target is ignored
    num_tokens: int  # number of targets that are not ignored
    positions: Tensor | None = None  # (b, T) int64, the position of each token in its document
    doc_ids: Tensor | None = None  # (b, T) int64, the index of each token's document, counted within its training window

    @classmethod
    def of(cls, v: int, tokens: np.ndarray, counts: np.ndarray | None, starts: np.ndarray | None) -> MicroBatch:
        """Make a micro-batch in host memory. `v`: the index of the micro-batch in the global batch. `tokens`: the training
        windows, (b, T + 1) int64. Pure.

        `counts`: (b, T + 1) bool, true for tokens that are targets, or None if all tokens are targets. `starts`: (b, T + 1)
        bool, true for tokens that start a document, or None if documents are not kept apart. If documents are kept apart
        (attention stays within a document), the first token of a document is not a target, because it has no context. Tokens
        before the first document start in a window belong to an earlier document.
        """
        targets, positions, doc_ids = tokens[:, 1:].copy(), None, None
        if counts is not None:
            targets[~counts[:, 1:]] = IGNORED
        if starts is not None:
            targets[starts[:, 1:]] = IGNORED
            begins, places = starts[:, :-1], np.arange(targets.shape[1])
            doc_ids = torch.from_numpy(np.cumsum(begins, axis=1))
            positions = torch.from_numpy(places - np.maximum.accumulate(np.where(begins, places, 0), axis=1))
        num_tokens = targets.size if counts is None and starts is None else int(np.count_nonzero(targets != IGNORED))
        return cls(v, torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), num_tokens, positions, doc_ids)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        positions, doc_ids = (None if t is None else change(t) for t in (self.positions, self.doc_ids))
        return MicroBatch(self.v, change(self.tokens), change(self.targets), self.num_tokens, positions, doc_ids)

    def pinned(self) -> MicroBatch:
        """Return a copy of the micro-batch in pinned memory. Independent."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on `device`. On CUDA, the copy is asynchronous. Independent."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass
class Batch:
    """One global batch. batch[v] is micro-batch v, which is prefetched or read on demand. Access is thread-safe.

    Raises IndexError if v is out of range. If reading fails, the loader is closed and DataError is raised.
    """

    batch: int  # numbered from 0 over all epochs
    epoch: int
    micro_batches: dict[int, MicroBatch]  # the micro-batches read so far, by v
    read: Callable[[int, int], MicroBatch]  # read(batch, v) reads another micro-batch

    def __getitem__(self, v: int) -> MicroBatch:
        found = self.micro_batches.get(v)
        if found is None:
            found = self.micro_batches[v] = self.read(self.batch, v)
        return found


def check_targets(stream: TokenStream, first: int) -> None:
    """Raise DataError if the loss mask excludes every one of the stream's first targets. `first`: the number of targets to
    check. Independent."""
    if not stream.has_loss_mask:
        return
    first = min(first, stream.num_tokens - 1)
    for at in range(1, first + 1, PIECE_TOKENS):
        if np.any(stream.read_mask(at, min(PIECE_TOKENS, first + 1 - at))):
            return
    raise DataError(
        f"{stream.path}: the loss mask excludes all of the first {first:,} targets of split {stream.split!r}, so there is no "
        "loss. Prepare the shards again" + ", or evaluate on more tokens (train.eval_tokens)" * (stream.split != "train")
    )


class Loader:
    """An endless iterator of Batch objects, starting at start_batch. Independent.

    `micro_batches`: indices v of the micro-batches that this rank is expected to compute. `prefetch`: number of batches to
    read ahead. `resident`: whether the tokens of these micro-batches stay on a CUDA device ("true", "false" or "auto"). "auto"
    means "true" if the tokens need less than a quarter of the device's free memory. `resident` has no effect on CPUs, with a
    loss mask, or if documents are kept apart. If the thread has an error, such as DataError for an id outside the vocabulary,
    every later call of next() raises this error.
    """

    def __init__(
        self, stream: TokenStream, sampler: Sampler, micro_batches: Sequence[int], device: torch.device,
        start_batch: int = 0, prefetch: int = 2, resident: str = "auto",
    ) -> None:
        if resident not in ("auto", "true", "false"):
            raise ValueError(f"resident {resident!r} must be 'auto', 'true' or 'false'")
        self.next_batch = start_batch
        self._stream, self._sampler, self._device = stream, sampler, device
        self._micro_batches = tuple(micro_batches)
        self._resident = _Resident.make(stream, sampler, self._micro_batches, device, resident)
        self._advised: dict[int, tuple[int, int]] = {}  # lane -> (epoch, number) of the last pool that was read ahead
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start_batch,), name="mpidp-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._closed.is_set():
            raise ValueError("the loader is closed")
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            self.close()
            raise item
        ready = {host.v: self._on_device(host) for host in item}
        batch = Batch(self.next_batch, self.next_batch // self._sampler.steps_per_epoch, ready, self._read_now)
        self.next_batch += 1
        return batch

    def expect(self, micro_batches: Sequence[int]) -> None:
        """Set the micro-batches that the thread prefetches from now on. The set of tokens in the device's memory does not
        change.

        Batches that the thread has already prefetched contain other micro-batches. In these batches, the micro-batches that
        this call sets are read on demand.
        """
        self._micro_batches = tuple(micro_batches)

    def close(self) -> None:
        """Stop the thread. Further calls of close() do nothing."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # makes space, because the thread may be blocked in put()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self, batch: int) -> None:
        try:
            while not self._closed.is_set():
                ahead = []
                for v in self._micro_batches:
                    self._advise(batch, v)
                    ahead.append(self._read(batch, v))
                self._queue.put(ahead)
                batch += 1
        except BaseException as error:  # next() raises the error in the main thread
            self._queue.put(error)

    def _read_now(self, batch: int, v: int) -> MicroBatch:
        """Read micro-batch v in the calling thread and move it to the device. If this fails, later calls of next() raise the same
        error."""
        if not 0 <= v < self._sampler.lanes.num_micro_batches:
            raise IndexError(f"micro-batch {v} is not in 0..{self._sampler.lanes.num_micro_batches - 1}")
        try:
            return self._on_device(self._read(batch, v))
        except BaseException as error:
            self._error = error
            self.close()
            raise

    def _is_resident(self, v: int) -> bool:
        return self._resident is not None and self._resident.holds(self._sampler.extent([v]))

    def _read(self, batch: int, v: int) -> MicroBatch:
        """Return micro-batch v in host memory. If its tokens are already on the device, the micro-batch contains the numbers of
        its windows instead of tokens. This method is thread-safe."""
        sampler, stream, seq_len = self._sampler, self._stream, self._sampler.seq_len
        windows = sampler.windows(batch, v)
        if self._is_resident(v):
            ids = torch.from_numpy(windows)
            return MicroBatch(v, ids, ids, len(windows) * seq_len)
        block = np.empty((len(windows), seq_len + 1), dtype=np.int64)
        counts = None if not stream.has_loss_mask else np.empty(block.shape, dtype=np.bool_)
        starts = None if not stream.apart else np.empty(block.shape, dtype=np.bool_)
        for row, window in enumerate(windows.tolist()):
            block[row] = tokens = stream.read(window * seq_len, seq_len + 1)
            stream.check_ids(window * seq_len, tokens)
            if counts is not None:
                counts[row] = stream.read_mask(window * seq_len, seq_len + 1)
            if starts is not None:
                starts[row] = stream.read_starts(window * seq_len, seq_len + 1)
        found = MicroBatch.of(v, block, counts, starts)
        return found.pinned() if self._device.type == "cuda" else found

    def _advise(self, batch: int, v: int) -> None:
        """Start reading ahead the pools (groups of 16 blocks, see sampler.py) that contain this micro-batch, and for each of
        these pools also the next pool. Each pool is read ahead only once."""
        if self._is_resident(v):
            return
        for pool in self._sampler.pools(batch, v):
            self._advise_pool(pool)
            if (following := self._sampler.following(pool)) is not None:
                self._advise_pool(following)

    def _advise_pool(self, pool: Pool) -> None:
        if self._advised.get(pool.lane, (-1, -1)) < (pool.epoch, pool.number):
            self._advised[pool.lane] = (pool.epoch, pool.number)
            for first, count in self._sampler.blocks(pool):
                self._stream.advise(first * self._sampler.seq_len, count * self._sampler.seq_len + 1)

    def _on_device(self, host: MicroBatch) -> MicroBatch:
        if self._resident is not None and self._is_resident(host.v):
            tokens, targets = self._resident.gather(host.tokens)
            return MicroBatch(host.v, tokens, targets, host.num_tokens)
        return host.to(self._device)


class _Resident:
    """The tokens of a range of windows, in the device's memory. A token is stored as a signed integer with the same bits as the
    unsigned integer in the shard."""

    def __init__(self, stream: TokenStream, seq_len: int, windows: range, device: torch.device) -> None:
        self._windows, self._first, self._seq_len, self._device = windows, windows.start * seq_len, seq_len, device
        self._mask = 2 ** (8 * stream.token_bytes) - 1
        count, signed = len(windows) * seq_len + 1, {2: np.int16, 4: np.int32}[stream.token_bytes]
        self._tokens = torch.empty(count, dtype={2: torch.int16, 4: torch.int32}[stream.token_bytes], device=device)
        for at in range(0, count, PIECE_TOKENS):
            piece = stream.read(self._first + at, min(PIECE_TOKENS, count - at))
            stream.check_ids(self._first + at, piece)
            self._tokens[at : at + len(piece)] = torch.from_numpy(piece.view(signed))
        self._offsets = torch.arange(seq_len + 1, device=device)

    @classmethod
    def make(
        cls, stream: TokenStream, sampler: Sampler, micro_batches: Sequence[int], device: torch.device, resident: str
    ) -> _Resident | None:
        """Copy the tokens of these micro-batches to the device. Return None if the tokens must be read from the shards
        instead."""
        windows = sampler.extent(micro_batches)
        if device.type != "cuda" or resident == "false" or stream.has_loss_mask or stream.apart or not windows:
            return None
        size = len(windows) * sampler.seq_len * stream.token_bytes
        if resident == "auto" and size >= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        return cls(stream, sampler.seq_len, windows, device)

    def holds(self, windows: range) -> bool:
        """Return whether the tokens of all these windows are on the device."""
        return self._windows.start <= windows.start and windows.stop <= self._windows.stop

    def gather(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (tokens, targets) of some windows, each (b, T) int64. `windows`: the numbers of the windows, (b,)."""
        starts = (windows * self._seq_len - self._first).to(self._device, non_blocking=True)
        block = self._tokens[starts[:, None] + self._offsets].to(torch.int64) & self._mask
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

