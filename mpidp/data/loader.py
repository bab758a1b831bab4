"""Micro-batches ahead of time: a thread that reads, checks and pins, and never calls MPI.

The whole state is one integer, next_batch. What a rank is expected to compute is read ahead; lanes may change hands, so any
other micro-batch is read when it is asked for, with the same bits. On CUDA, a rank's part of the corpus that fits stays on
the device as its stored bit pattern, and a batch is then one gather.
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

IGNORED = -100  # a target that does not count, by torch's convention
RESIDENT_SHARE = 0.25  # of the device's free memory, at most, under resident="auto"
PIECE_TOKENS = 2**23


@dataclass
class MicroBatch:
    """One forward pass. b may be less than micro_batch, or 0, in an epoch's last batch."""

    v: int
    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, -100 where a target does not count
    num_tokens: int  # targets that count
    positions: Tensor | None = None  # (b, T) int64, within each document
    doc_ids: Tensor | None = None  # (b, T) int64

    @classmethod
    def of(cls, v: int, tokens: np.ndarray, counts: np.ndarray | None, starts: np.ndarray | None) -> MicroBatch:
        """Of windows (b, T + 1) int64, on the host. counts: which of them count as targets, all by default; starts: which begin a
        document, (b, T + 1) bools, where documents are kept apart: then these are no targets, for nothing foretells them. What
        goes before the first start of a window is the rest of a document. Pure."""
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
        """In memory that a GPU can read by itself. Independent."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> MicroBatch:
        """On the device, some time soon. Independent."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass
class Batch:
    """One global batch: batch[v] is any micro-batch of it, read ahead where it was expected. From any thread.

    Raises IndexError beyond the last v, and what reading raises (DataError), after which the loader is closed.
    """

    batch: int  # counted from 0 over all epochs
    epoch: int
    micro_batches: dict[int, MicroBatch]  # by v, those at hand: read ahead, or asked for since
    read: Callable[[int, int], MicroBatch]  # of (batch, v), any other

    def __getitem__(self, v: int) -> MicroBatch:
        found = self.micro_batches.get(v)
        if found is None:
            found = self.micro_batches[v] = self.read(self.batch, v)
        return found


def check_targets(stream: TokenStream, first: int) -> None:
    """DataError where none of the first targets counts by the loss mask, before work is lost on them. Reads no further than to
    one that does. Independent."""
    if not stream.has_loss_mask:
        return
    first = min(first, stream.num_tokens - 1)
    for at in range(1, first + 1, PIECE_TOKENS):
        if np.any(stream.read_mask(at, min(PIECE_TOKENS, first + 1 - at))):
            return
    raise DataError(
        f"{stream.path}: none of the first {first:,} targets of split {stream.split!r} counts by its loss mask, so there is no "
        "loss: prepare it again" + ", or evaluate on more of it (train.eval_tokens)" * (stream.split != "train")
    )


class Loader:
    """An endless iterator of Batch from start_batch on. Independent.

    micro_batches: the v that this rank is expected to compute. prefetch: batches read ahead. resident: "auto", "true" or
    "false"; on CUDA, keep the tokens that these v read on the device ("auto": when they take under a quarter of its free
    memory); no effect elsewhere, with a loss mask, or where documents are kept apart. Errors of the thread (DataError: an id
    outside the vocabulary) are raised by next(), and again by every later one.
    """

    def __init__(
        self, stream: TokenStream, sampler: Sampler, micro_batches: Sequence[int], device: torch.device,
        start_batch: int = 0, prefetch: int = 2, resident: str = "auto",
    ) -> None:
        if resident not in ("auto", "true", "false"):
            raise ValueError(f"resident {resident!r} must be one of auto, true, false")
        self.next_batch = start_batch
        self._stream, self._sampler, self._device = stream, sampler, device
        self._micro_batches = tuple(micro_batches)
        self._resident = _Resident.make(stream, sampler, self._micro_batches, device, resident)
        self._advised: dict[int, tuple[int, int]] = {}  # lane -> the last (epoch, number) whose pool was asked for; the thread's
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
        """From now on read these v ahead; batches that were read ahead before lack the new ones, which are then read when
        they are asked for. What is resident stays as it is."""
        self._micro_batches = tuple(micro_batches)

    def close(self) -> None:
        """Stop the thread; may be called twice."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # the thread may be waiting for a place
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
        except BaseException as error:  # raised again by next(): a thread's own traceback would be lost
            self._queue.put(error)

    def _read_now(self, batch: int, v: int) -> MicroBatch:
        """Micro-batch v on the device, by the thread that wants it; what fails here fails in next() too."""
        if not 0 <= v < self._sampler.lanes.num_micro_batches:
            raise IndexError(f"micro-batch {v} is not one of {self._sampler.lanes.num_micro_batches}")
        try:
            return self._on_device(self._read(batch, v))
        except BaseException as error:
            self._error = error
            self.close()
            raise

    def _is_resident(self, v: int) -> bool:
        return self._resident is not None and self._resident.holds(self._sampler.extent([v]))

    def _read(self, batch: int, v: int) -> MicroBatch:
        """Micro-batch v on the host; if its tokens are resident, the ids of its windows in their place. From any thread."""
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
        """Ask for each pool's blocks once, a pool ahead. Only in the thread: a lane read on demand was asked for by the rank
        that expected it."""
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
    """The tokens of a range of windows on the device, as the signed integers of the same bits."""

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
        """None where the tokens are streamed."""
        windows = sampler.extent(micro_batches)
        if device.type != "cuda" or resident == "false" or stream.has_loss_mask or stream.apart or not windows:
            return None
        size = len(windows) * sampler.seq_len * stream.token_bytes
        if resident == "auto" and size >= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return None
        return cls(stream, sampler.seq_len, windows, device)

    def holds(self, windows: range) -> bool:
        """Are the tokens of all these windows here?"""
        return self._windows.start <= windows.start and windows.stop <= self._windows.stop

    def gather(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each (b, T) int64, of window ids (b,)."""
        starts = (windows * self._seq_len - self._first).to(self._device, non_blocking=True)
        block = self._tokens[starts[:, None] + self._offsets].to(torch.int64) & self._mask
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

