"""The shard format: HDF5 files of tokens and an index.json. Files are validated. Local files are then mapped into memory, and
remote files are read in ranges (shard_folder.py).

    DIR/train_00000.h5 ...  DIR/val_00000.h5 ...  DIR/tokenizer.json  DIR/index.json (written last)

A shard has these datasets. They are contiguous and unfiltered, so that they can be mapped into memory:
  tokens       (n,)  uint16 if vocab_size <= 65536, else uint32
  doc_offsets  (d,)  uint64, positions in this shard where documents start; a document may continue in the next shard
  loss_mask    (n,)  uint8, optional: 0 where a token is not a target
and the scalar attributes format, version, split, shard, num_shards, vocab_size, eod, tokenizer_sha256.

index.json: format "mpidp-shards", version 1, vocab_size, eod, tokenizer {kind, file, sha256}, source (any), window and
special_tokens (optional), splits {name: {tokens, documents, text_bytes, loss_mask}}, files [{name, split, tokens, documents,
text_bytes, size, crc32, sha256}]. `text_bytes`: the number of UTF-8 bytes of the text. `size`, `crc32`, `sha256`: the size and
the checksums of the file. If the index has the key `window`, the shards are packed: no document crosses a multiple of `window`
tokens, each split ends with one more token, and documents must be kept apart (attention must stay within a document). The
files of a split, in the order of the index, form one stream of tokens.

An HDF5 file can be malicious: its links can refer to any file of the machine, and a small file can declare huge datasets.
Therefore a dataset must be hard-linked, contiguous, unfiltered and inside the file. Its length must be the length that the index
states.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpidp.data.index import FileRecord, read_index
from mpidp.data.shard_folder import Shard, Slices, open_folder
from mpidp.data.shard_writer import SHARD_FORMAT, VERSION
from mpidp.data.tokenizer import token_dtype
from mpidp.errors import DataError, UsageError
from mpidp.runtime.files import most_open_files
from mpidp.storage.remote import DEFAULT_CACHE, CacheOptions

AUTO_BYTES = 128 * 2**20  # data.verify=auto checks checksums only up to this total size, which takes under a second


@dataclass
class _Mapped:
    """An open, validated shard."""

    file: Shard
    tokens: Slices
    mask: Slices | None
    doc_offsets: Slices
    offset: int  # where the tokens start in the file, in bytes


class TokenStream:
    """All tokens of one split: the tokens of its shards, concatenated in the order of index.json. Independent. Thread-safe.

    The constructor reads only index.json. It raises DataError if the index or the split is missing or invalid. A shard is opened
    when it is first read. If too many shards are open, the least recently used shard is closed.
    """

    def __init__(self, path: str | Path, split: str = "train", cache: CacheOptions = DEFAULT_CACHE) -> None:
        """`path`: a folder of shards, or an address such as s3://bucket/prefix. `cache`: the options of the local cache, if
        `path` is an address."""
        self.storage, self.split = open_folder(path, cache), split
        self.path, self.folder = self.storage.path, self.storage.local  # folder: where index.json and tokenizer.json are
        self.index = index = read_index(self.folder, shown=str(self.path))
        if split not in index.splits:
            raise DataError(f"{self.path} has no split {split!r}, but only {', '.join(sorted(index.splits))}. "
                            "To get a split 'val', prepare the shards again with --val-fraction above 0")
        totals = index.splits[split]
        self.files: list[FileRecord] = [record for record in index.files if record.split == split]
        self.num_tokens: int = totals.tokens
        self.num_documents: int = totals.documents
        self.text_bytes: int = totals.text_bytes
        self.has_loss_mask: bool = totals.loss_mask
        self.vocab_size, self.eod = index.vocab_size, index.eod
        self.apart: bool = index.window > 0  # whether attention stays within documents, and document starts are not targets
        self.tokenizer_sha256, self.index_sha256 = index.tokenizer_sha256, index.sha256
        self.dtype = token_dtype(self.vocab_size)
        self.token_bytes: int = self.dtype.itemsize
        self.bytes_read = 0  # bytes returned by read() and read_mask()
        self.bytes_fetched = 0  # bytes that advise() asked the kernel to read
        self._starts = np.cumsum([0] + [record.tokens for record in self.files])
        self._mapped: dict[int, _Mapped] = {}  # in order of last use
        # training and validation may open a quarter each of the files that the process may open
        self._most_mapped = max(1, most_open_files() // 4)
        self._checked: set[int] = set()  # files whose document starts have been validated
        self._lock = threading.Lock()  # the loader's thread and the training loop may both read

    def keep_apart(self, documents: str, seq_len: int) -> None:
        """Set whether documents are kept apart (attention stays within a document). `documents`: the value of data.documents
        (auto, joined, apart).

        `seq_len`: the length of a training window. Raises UsageError if the shards are packed and `seq_len` is not a multiple
        of their window length. Independent.
        """
        packed = self.index.window
        self.apart = documents == "apart" or documents == "auto" and packed > 0
        if packed and seq_len % packed:
            raise UsageError(
                f"model.seq_len={seq_len} would split documents: {self.path} was packed for windows of {packed} tokens. "
                f"Use model.seq_len={packed} or a multiple of it, or prepare the shards again with --seq-len {seq_len}"
            )

    def check(self, files: Iterable[int] | None = None, contents: bool = False) -> None:
        """Raise DataError if a file is missing, or has a wrong size or header. `files`: indices of the files to check (default:
        all). `contents`: whether to check the checksums, too."""
        for i in range(len(self.files)) if files is None else files:
            self._map(i)
            if contents:
                crc32, sha256 = self._map(i).file.checksums()
                if (crc32, sha256) != (self.files[i].crc32, self.files[i].sha256):
                    self._map(i).file.forget()
                    raise self._error(i, f"its bytes changed since index.json was written (its crc32 is {crc32}, "
                                       f"but was {self.files[i].crc32})")

    def is_cheap(self, files: Iterable[int]) -> bool:
        """Return whether these files are so small that checking their checksums takes less than about a second."""
        return sum(self.files[i].size for i in files) <= AUTO_BYTES

    def read(self, start: int, count: int) -> np.ndarray:
        """Return a copy of tokens [start, start + count): (count,) uint16 or uint32."""
        out = np.empty(count, dtype=self.dtype)
        for i, first, n, at in self._pieces(start, count):
            out[at : at + n] = self._map(i).tokens[first : first + n]
        with self._lock:
            self.bytes_read += out.nbytes
        return out

    def read_mask(self, start: int, count: int) -> np.ndarray | None:
        """Return bool (count,) for tokens [start, start + count), true for tokens that are targets. Return None if the split has
        no loss mask."""
        if not self.has_loss_mask:
            return None
        out = np.empty(count, dtype=np.bool_)
        for i, first, n, at in self._pieces(start, count):
            mask = self._map(i).mask
            assert mask is not None  # _map rejects files without a mask
            out[at : at + n] = mask[first : first + n] != 0
        with self._lock:
            self.bytes_read += out.nbytes
        return out

    def read_starts(self, start: int, count: int) -> np.ndarray:
        """Return bool (count,) for tokens [start, start + count), true for tokens that start a document."""
        out = np.zeros(count, dtype=np.bool_)
        for i, first, n, at in self._pieces(start, count):
            starts = self._map(i).doc_offsets[:] if i in self._checked else self.doc_offsets(i)
            self._checked.add(i)
            low, high = np.searchsorted(starts, np.array([first, first + n], dtype=np.uint64))
            out[at + (starts[low:high].astype(np.int64) - first)] = True
        return out

    def advise(self, start: int, count: int) -> None:
        """Start reading tokens [start, start + count) ahead of time, and return immediately."""
        for i, first, n, _ in self._pieces(start, count):
            mapped = self._map(i)
            mapped.file.advise(mapped.offset + first * self.token_bytes, n * self.token_bytes)
            self.bytes_fetched += n * self.token_bytes

    def files_of(self, start: int, count: int) -> list[int]:
        """Return the indices of the files that contain tokens [start, start + count)."""
        return [i for i, *_ in self._pieces(start, count)]

    def locate(self, position: int) -> tuple[str, int]:
        """Return (file name, position in the file) of the token at this position of the stream."""
        i = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.files[i].name, position - int(self._starts[i])

    def check_ids(self, start: int, ids: np.ndarray) -> None:
        """Raise DataError if an id is not below the vocabulary size. `ids`: ids that were read from position `start` of the
        stream."""
        if ids.size and ids.max() >= self.vocab_size:
            bad = int(np.argmax(ids >= self.vocab_size))
            name, at = self.locate(start + bad)
            raise DataError(f"{self.path / name}: token {at} is {ids[bad]}, not below vocab_size {self.vocab_size}, so the "
                            f"file is damaged. Run python -m data_tools.verify {self.path}, then prepare the shards again")

    def doc_offsets(self, file: int) -> np.ndarray:
        """Return the positions in a file at which documents start, uint64 (d,). Raises DataError if the positions are outside
        the file or not in ascending order. `file`: the index of the file."""
        offsets = self._map(file).doc_offsets[:]
        if offsets.size and (offsets[-1] >= self.files[file].tokens or (offsets[1:] <= offsets[:-1]).any()):
            raise self._error(file, "its doc_offsets lie outside the file, or are not in ascending order")
        return offsets

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Split tokens [start, start + count) by file. For each file, yield (index of the file, first token within the file,
        number of tokens, first token within the range)."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise ValueError(f"tokens [{start}, {start + count}) are outside the stream of {self.num_tokens} tokens")
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            first = start + done - int(self._starts[i])
            n = min(count - done, self.files[i].tokens - first)
            yield i, first, n, done
            done, i = done + n, i + 1

    def _map(self, i: int) -> _Mapped:
        with self._lock:
            if i in self._mapped:
                self._mapped[i] = self._mapped.pop(i)  # now the most recently used
                if not self._mapped[i].file.is_whole():  # reading the missing part would end the process with SIGBUS
                    raise self._error(i, "it was truncated while it was in use")
            else:
                try:
                    opened = self._open(i)
                except FileNotFoundError:
                    raise self._error(i, "it is missing") from None
                except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py raises these on damaged files
                    raise self._error(i, f"it cannot be opened as HDF5 ({error})") from None
                while len(self._mapped) >= self._most_mapped:
                    self._mapped.pop(next(iter(self._mapped)))
                self._mapped[i] = opened
            return self._mapped[i]

    def _open(self, i: int) -> _Mapped:
        record = self.files[i]
        shard = self.storage.open(record.name)
        if not shard.is_regular:
            raise self._error(i, "it is not a regular file")
        if shard.size != record.size:
            raise self._error(i, f"it has {shard.size} bytes, not {record.size}, so it is truncated or the wrong file")
        lengths = {"tokens": (record.tokens, self.dtype), "doc_offsets": (record.documents, np.dtype("<u8"))}
        if self.has_loss_mask:
            lengths["loss_mask"] = (record.tokens, np.dtype("u1"))
        spans = shard.read_header(partial(self._spans, i, lengths))
        views = {name: shard.view(dtype, spans[name][0], length) for name, (length, dtype) in lengths.items()}
        return _Mapped(shard, views["tokens"], views.get("loss_mask"), views["doc_offsets"], spans["tokens"][0])

    def _spans(self, i: int, lengths: dict[str, tuple[int, np.dtype[Any]]], source: Any) -> dict[str, tuple[int, int]]:
        """Validate file number i. Return {dataset: (its offset in the file, its size)}, both in bytes. `lengths`: {dataset:
        (number of elements, dtype)}. `source`: the object to pass to h5py.File."""
        with h5py.File(source, "r", locking=False) as file:
            if file.userblock_size:
                raise self._error(i, "it has an HDF5 user block, which shards must not have")
            wanted = {"format": SHARD_FORMAT, "version": VERSION, "split": self.split, "vocab_size": self.vocab_size,
                      "tokenizer_sha256": self.tokenizer_sha256}
            if "eod" in file.attrs:
                wanted["eod"] = self.eod
            for name, value in wanted.items():
                if (found := _attribute(file, name)) != value:
                    raise self._error(i, f"its attribute {name} is {found!r}, but index.json implies {value!r}")
            if not self.has_loss_mask and file.id.links.exists(b"loss_mask"):
                raise self._error(i, "it has a loss mask, but index.json says that there is none")
            return {name: self._span(i, file, name, length, dtype) for name, (length, dtype) in lengths.items()}

    def _span(self, i: int, file: h5py.File, name: str, length: int, dtype: np.dtype[Any]) -> tuple[int, int]:
        """Validate the dataset `name` of file number i. Return (offset of the dataset in the file, its size), both in bytes."""
        key = name.encode()
        if not file.id.links.exists(key) or file.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise self._error(i, f"its dataset {name} is missing, or is only a link to another file")
        if h5py.h5o.get_info(file.id, key).type != h5py.h5o.TYPE_DATASET:
            raise self._error(i, f"its entry {name} is not a dataset")
        dataset = h5py.h5d.open(file.id, key)
        layout = dataset.get_create_plist()
        if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count() or layout.get_nfilters():
            raise self._error(i, f"its dataset {name} is not stored contiguously, without filters and inside the file")
        stored_type = {1: h5py.h5t.STD_U8LE, 2: h5py.h5t.STD_U16LE, 4: h5py.h5t.STD_U32LE, 8: h5py.h5t.STD_U64LE}
        if not dataset.get_type().equal(stored_type[dtype.itemsize]):
            raise self._error(i, f"its dataset {name} is not of type {dtype.name}")
        if dataset.shape != (length,):
            raise self._error(i, f"its dataset {name} has shape {dataset.shape}, but index.json implies ({length},)")
        if length == 0:
            return 0, 0
        size, offset = dataset.get_storage_size(), dataset.get_offset()
        if size != length * dtype.itemsize or offset is None or not 0 < offset <= self.files[i].size - size:
            raise self._error(i, f"its dataset {name} does not lie inside the file")
        return offset, size

    def _error(self, i: int, reason: str) -> DataError:
        return DataError(f"{self.path / self.files[i].name}: {reason}. Restore the file, or prepare {self.path} again")


def _attribute(file: h5py.File, name: str) -> int | str | None:
    """Return a scalar attribute, or None if there is no such attribute."""
    if name not in file.attrs or file.attrs.get_id(name).shape != ():
        return None
    value = file.attrs[name]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return int(value) if isinstance(value, np.integer) else str(value)
