"""For files that store nothing but ids: determines the type of the ids, and detects files of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, readable
from mpidp.data.tokenizer import token_dtype
from mpidp.errors import DataError
from mpidp.runtime.files import open_regular

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int32", "int64")  # choices of --dtype
GPT2, LLAMA3, EVALUATION = 20240520, 20240801, 20240522  # the first number of a file of llm.c
NUMPY = b"\x93NUMPY"
HEAD_BYTES = 2**16  # number of bytes at the start of a file that are examined
OTHERS = (  # (first bytes of a file, what the file is, what to do)
    (b"PAR1", "a parquet file", "use --from hf"), (b"ARROW1", "an Arrow file", "use --from hf"),
    (b"\xff\xff\xff\xff", "an Arrow file", "use --from hf"), (b"MMIDIDX", "an index of Megatron-LM", "use --from megatron "
                                                                                                     "PREFIX"),
    (GPT2.to_bytes(4, "little"), "a file of llm.c", "use --from llmc"),
    (LLAMA3.to_bytes(4, "little"), "a file of llm.c", "use --from llmc"),
    (EVALUATION.to_bytes(4, "little"), "a file of multiple-choice questions for llm.c", "it holds no tokens to train on"),
    (b"\x89HDF", "an HDF5 file", "shards need no conversion"), (b"\x1f\x8b", "compressed with gzip", "decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "decompress it"), (b"PK\x03\x04", "a zip archive", "unpack it"),
    (NUMPY, "a .npy file with numpy's header", "use --from olmo"),
)


def head_of(path: Path) -> bytes:
    """Return the first HEAD_BYTES bytes of a file. Raises DataError if the file cannot be read. Independent."""
    with readable(path), open_regular(path) as file:
        return file.read(HEAD_BYTES)


def check_head(path: Path, head: bytes) -> None:
    """Raise DataError if `head`, the first bytes of the file, shows another format, for example parquet or gzip. Pure."""
    for magic, what, way in OTHERS:
        if head.startswith(magic):
            raise DataError(f"{path} is {what}: {way}")
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:3] in (b"\x95", b"}", b"]", b"c"):
        raise DataError(f"{path} looks like a pickle, and pickles are never read: write the ids to a file of another format")


def type_of_ids(path: Path, head: bytes, options: ReadOptions) -> np.dtype[Any]:
    """Return the type of the ids in a file without header. The type is --dtype if given. Otherwise it is uint16, or uint32 if
    the tokenizer has more than 65,536 ids. `head`: the first bytes of the file. Raises DataError if every second number in
    `head` is 0, because the ids then probably have a wider type. Pure."""
    kind = np.dtype(options.dtype).newbyteorder("<") if options.dtype else token_dtype(options.vocab_size)
    wider, numbers = kind.itemsize, np.frombuffer(head[: len(head) // 16 * 16], kind)
    if kind.itemsize < 8 and len(numbers) >= 8 and not numbers[1::2].any() and numbers[::2].any():
        wider = kind.itemsize * (4 if kind.itemsize == 2 and not numbers[2::4].any() else 2)
        raise DataError(f"{path}: every second {kind.name} is 0, so the ids seem to have the wider type uint{8 * wider}. "
                        f"Give --dtype uint{8 * wider}, or another file")
    return kind
