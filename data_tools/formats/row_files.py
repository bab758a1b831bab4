"""Files of rows in the layout of LitData and MDS. A file has the number of rows (uint32), the offsets of all rows and of the end
(uint32), a description, and then the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_tools.formats.blocks import TokenBlock, readable
from data_tools.formats.columns import labels_of
from data_tools.formats.stream import whole_documents
from mpidp.errors import DataError, UsageError

FILE_BYTES = 2**26  # approximate size of a file, as in both libraries
MAX_BYTES = 2**32  # offsets are uint32


class RowFiles:
    """Writes rows to files of about FILE_BYTES bytes. Raises OSError if a file cannot be written, and UsageError if a row is too
    long. Independent."""

    def __init__(self, name: Callable[[int], Path], about: bytes = b"") -> None:
        """`name`: a function that returns the path of file number 0, 1, and so on. `about`: the description that each file
        contains."""
        self.written: list[tuple[Path, int, int, int]] = []  # for each file: path, bytes, rows and tokens
        self.digest = hashlib.sha256()
        self._name, self._about = name, about
        self._begin()

    def _begin(self) -> None:
        self._rows: list[bytes] = []
        self._size, self._tokens = 8 + len(self._about), 0

    def add(self, row: bytes, tokens: int) -> None:
        """Append a row, which has `tokens` tokens. A row of more than FILE_BYTES bytes gets its own file."""
        if self._rows and self._size + len(row) + 4 > FILE_BYTES:
            self.close()
        self._rows.append(row)
        self._size, self._tokens = self._size + len(row) + 4, self._tokens + tokens

    def close(self) -> None:
        """Write the rows that are not yet in a file."""
        if not self._rows:
            return
        begin = 8 + 4 * len(self._rows) + len(self._about)
        offsets = np.cumsum([begin, *map(len, self._rows)])
        if offsets[-1] >= MAX_BYTES:
            raise UsageError(f"a document has {self._tokens:,} tokens, but a file of this format must have less than 4 GiB: "
                             "choose another format")
        path = self._name(len(self.written))
        with open(path, "xb") as file:
            for data in (np.array([len(self._rows), *offsets], "<u4").tobytes(), self._about, *self._rows):
                file.write(data)
                self.digest.update(data)
        self.written.append((path, int(offsets[-1]), len(self._rows), self._tokens))
        self._begin()


def documents(blocks: Iterable[TokenBlock]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield (ids, labels) of each document. labels is None if there is no loss mask. Otherwise, labels is an int64 array: the
    id of each token in the loss, and -100 for the other tokens. Pure."""
    for block in whole_documents(blocks):
        assert block.starts is not None
        labels = labels_of(block)
        for low, high in zip(block.starts.tolist(), [*block.starts[1:].tolist(), len(block.ids)], strict=True):
            yield block.ids[low:high], None if labels is None else labels[low:high]


def mapped(path: Path) -> np.ndarray:
    """Return the bytes of a file, (n,) uint8. Raises DataError if the file cannot be read. Independent."""
    with readable(path):
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)


def offsets_of(data: np.ndarray, rows: int, shown: Path, count_at: int = 0, table_at: int = 4) -> np.ndarray:
    """Return the offsets of all rows and of the end, (rows + 1,) int64.

    `data`: the bytes of a file. `count_at`, `table_at`: positions in `data` of the number of rows and of the first offset, in
    bytes. `shown`: the path in error messages. Raises DataError if the stored number is not `rows`, or if the offsets are not
    valid. Pure.
    """
    if len(data) < table_at + 4 * (rows + 1) or int(data[count_at : count_at + 4].view("<u4")[0]) != rows:
        raise DataError(f"{shown}: its header does not state {rows} samples, the number in index.json; copy the dataset again")
    offsets = np.frombuffer(data[table_at : table_at + 4 * (rows + 1)].tobytes(), "<u4").astype(np.int64)
    if (np.diff(offsets) < 0).any() or not count_at and offsets[-1] > len(data):
        raise DataError(f"{shown}: its offsets of samples decrease or lie outside the file; copy the dataset again")
    return offsets
