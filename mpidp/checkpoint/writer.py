"""The part of a save that one rank does. A thread copies the state, writes the copy, and on rank 0 commits the checkpoint.

The thread does not use MPI. All ranks write to the folder `.writing_step_XXXXXXXX_<token>`. A rank first writes its data file.
Then every rank except rank 0 writes a record, which is a small file that describes the data file. When rank 0 has read all
records, it commits the checkpoint. If a write fails, for example on a full disk, it is retried with growing pauses until the main
thread drops the save.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpidp.checkpoint.boxes import Piece, describe, pieces_of, write_pieces
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.manifest import commit
from mpidp.runtime.files import write_file
from mpidp.runtime.log import log

THREAD = "mpidp-save"
BLOCK = 4 << 20  # bytes per write
LONGEST_PAUSE = 60.0  # seconds between two attempts
LOST_SECONDS = 600.0  # rank 0 waits this long for records, or 20 times its own writing time if that is longer
IDLE, WAITS, WRITES, FAILS = range(4)  # finished; waiting for records; writing; sleeping until the next attempt


class Dropped(Exception):  # noqa: N818
    """Raised in the thread of a save when the main thread has dropped the save."""


class PeerFilesError(OSError):
    """Raised on rank 0 if files of other ranks are missing. Rank 0 then does not write its own file again, because that would not
    help."""


class HostMemory:
    """Host memory for the copies of the state. Successive saves use the same memory."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def allocate(self, size: int, pinned: bool) -> Tensor:
        """Return a uint8 tensor (size,). This is the tensor of the previous call if the sizes are equal. `pinned`: whether to
        pin the memory, for copies from a GPU. Independent."""
        if self._bytes is None or self._bytes.numel() != size:
            self._bytes = None
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._bytes


@dataclass
class Save:
    """One rank's part of a save. Creating the object starts the save's thread. Independent."""

    step: int
    folder: Path  # RUN/checkpoints/.writing_...
    entries: Mapping[str, Entry]
    share: tuple[int, int] | None  # which replicated tensors this rank writes (see pieces_of)
    meta: Mapping[str, Any]  # further content of the manifest
    rank: int
    writers: list[int]  # ranks that write a file
    keep: int  # number of checkpoints to keep
    wait: bool  # whether the main thread waits for the save: CPU tensors are not copied first, and failed writes are not retried
    memory: HostMemory
    may_commit: Callable[[], bool]  # on rank 0: returns whether this job still holds the run's lock
    state: int = WRITES
    error: Exception | None = None  # the error of the last failed attempt
    progress: int = 0  # number of blocks written
    saved: dict[str, float] | None = None  # on rank 0 after the commit: seconds and CPU seconds of the save
    dropping: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)  # set when the thread no longer reads the state
    committing: threading.Lock = field(default_factory=threading.Lock)  # held by the thread while it commits the checkpoint
    began: float = field(default_factory=time.monotonic)  # start of the save

    def __post_init__(self) -> None:
        self._device = next((entry.tensor.device for entry in self.entries.values() if entry.tensor.is_cuda), None)
        self._ready = torch.cuda.current_stream(self._device).record_event() if self._device else None
        self._pieces: list[Piece] = []
        self._records: dict[int, dict[str, Any]] = {}
        self.thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._try(self._copy())
        except Dropped:
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self.released.set()
            self.state = IDLE

    def _try(self, blocks: list[memoryview]) -> None:
        """Write this rank's file, and on rank 0 commit the checkpoint. Retry after errors until this succeeds or the save is
        dropped."""
        pause = 1.0
        while True:
            self.state = WRITES
            try:
                self._write(blocks)
                if self.rank == 0:
                    self._collect()
                    self._commit()
                return
            except OSError as error:
                self._fail(error, None if self.wait or isinstance(error, PeerFilesError) else pause)
            except Dropped:
                raise
            except Exception as error:  # a bug here must not stop training
                self._fail(error, None)
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _fail(self, error: Exception, pause: float | None) -> None:
        """Print a warning if `error` is the first error of this save, unless the main thread waits for the save. Then sleep for
        `pause` seconds (None: this save is not retried). Raises Dropped as soon as the save is dropped."""
        if self.error is None and not self.wait:
            log.warning("warning: rank %d: the checkpoint of step %d could not be written (%s). Training continues, and %s",
                        self.rank, self.step, describe_error(error),
                        "the next checkpoint is written when it is due" if pause is None else "the save is retried")
        self.error, self.state = error, FAILS
        if self.dropping.wait(pause):
            raise Dropped

    def _copy(self) -> list[memoryview]:
        """Copy the state to host memory. Return the bytes of the pieces (the boxes that this rank writes), in order. If the
        main thread waits for the save and the state is on the CPU, return the bytes of the state itself, without copying it
        first."""
        try:
            self._pieces = pieces_of(self.entries, self.share)
            if self.wait and self._ready is None:
                return [_bytes_of(piece.tensor).data for piece in self._pieces]
            stream = torch.cuda.Stream(self._device) if self._device else None
            with nullcontext() if stream is None else torch.cuda.stream(stream):  # this also selects the device
                host, offset = self.memory.allocate(sum(piece.tensor.nbytes for piece in self._pieces), stream is not None), 0
                if stream is not None and self._ready is not None:
                    stream.wait_event(self._ready)
                for piece in self._pieces:
                    if self.dropping.is_set():
                        raise Dropped
                    place = host[offset : offset + piece.tensor.nbytes]
                    if piece.tensor.is_cuda:
                        place.view(piece.tensor.dtype).view(piece.tensor.shape).copy_(piece.tensor, non_blocking=True)
                    else:  # NumPy, because torch would start a thread pool for this thread
                        np.copyto(place.numpy(), _bytes_of(piece.tensor))
                    offset += piece.tensor.nbytes
                if stream is not None:
                    stream.synchronize()
        except Exception as error:  # for example, not enough memory
            self.released.set()
            if not isinstance(error, Dropped):
                self._fail(error, None)
            raise
        self.released.set()
        return [host.numpy().data]

    def _in_blocks(self, blocks: list[memoryview]) -> Iterator[memoryview]:
        for block in blocks:
            for at in range(0, len(block), BLOCK):
                if self.dropping.is_set():
                    raise Dropped
                self.progress += 1
                yield block[at : at + BLOCK]

    def _write(self, blocks: list[memoryview]) -> None:
        """Write this rank's data file. Ranks other than 0 also write the record that describes it."""
        name = f"rank_{self.rank:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        size, crc = write_pieces(self.folder / f"{name}.safetensors", self._pieces, self._in_blocks(blocks))
        ranges = {piece.name: piece.box for piece in self._pieces}
        file = {"file": f"{name}.safetensors", "bytes": size, "crc32": crc, "pieces": ranges}
        first = self.share is not None and self.share[0] == 0  # only the first writer describes the replicated tensors
        described = {n: e for n, e in self.entries.items() if first or e.layout != "replicated"}
        self._records[self.rank] = {"file": file, "tensors": describe(described)}  # each tensor is described once
        if self.rank:  # rank 0 syncs and renames the folder when it sees the record
            write_file(self.folder / f"{name}.json", json.dumps(self._records[self.rank]).encode(), sync_folder=False)

    def _collect(self) -> None:
        """Wait for the records of all ranks that write, and read the records. Raises PeerFilesError if some are still missing
        after a long time (see LOST_SECONDS). The folder is listed each time, because a file server may show new files late."""
        self.state, began, pause = WAITS, time.monotonic(), 0.002
        until = began + max(LOST_SECONDS, 20 * (began - self.began))
        while missing := [rank for rank in self.writers if rank not in self._records]:
            try:
                there = set(os.listdir(self.folder))
                for rank in missing:
                    if f"rank_{rank:05d}.json" in there:
                        self._records[rank] = json.loads((self.folder / f"rank_{rank:05d}.json").read_bytes())
            except FileNotFoundError as error:  # a rank that dropped the save has removed the folder
                raise PeerFilesError(f"{self.folder} has disappeared") from error
            if time.monotonic() > until:
                raise PeerFilesError(f"{self.folder}: the files of ranks {missing} are missing")
            if self.dropping.wait(pause):
                raise Dropped
            pause = min(0.25, 1.5 * pause)
        self.state = WRITES

    def _commit(self) -> None:
        """Commit the checkpoint. All files must be complete. Raises OSError if this job no longer holds the lock of the run."""
        if not self.may_commit():
            raise OSError(f"{self.folder.parents[1]}: this job no longer holds the lock of this run")
        for rank in self.writers:
            (self.folder / f"rank_{rank:05d}.json").unlink(missing_ok=True)
        records = [self._records[rank] for rank in self.writers]
        tensors = {name: about for record in records for name, about in record["tensors"].items()}
        files = [record["file"] for record in records]
        body = {"step": self.step, **self.meta, "tensors": dict(sorted(tensors.items())), "files": files}
        with self.committing:
            if self.dropping.is_set():
                raise Dropped
            commit(self.folder, body, self.keep)
            self.saved = {"seconds": time.monotonic() - self.began, "cpu_seconds": time.thread_time()}


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def describe_error(error: Exception) -> str:
    """Return the message of an OSError, or the traceback of another exception. Independent."""
    return str(error) if isinstance(error, OSError) else "".join(traceback.format_exception(error)).strip()
