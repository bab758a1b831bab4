"""Reads and writes llm.c's .bin files: a header of 256 int32, then the ids. Documents are found by their end-of-document token.

The header begins with a magic number, a version, and the number of tokens. For GPT-2 (uint16 ids) the magic number is 20240520
and the version is 1. For Llama 3 (uint32 ids) the magic number is 20240801 and the version is 7. llm.c writes the end-of-document
token before each document. For Llama 3 it writes the token that begins a text instead. A document may continue in the next file.
modded-nanogpt uses the same files. (Source: llm.c, dev/data/data_common.py and fineweb.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools.formats.blocks import ReadOptions, TokenBlock, read_array
from data_tools.formats.flat import EVALUATION, GPT2, LLAMA3, check_head, head_of
from data_tools.formats.stream import SplitTokens
from mpidp.errors import DataError

HEADER_BYTES = 256 * 4
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {GPT2: (1, np.dtype("<u2")), LLAMA3: (7, np.dtype("<u4"))}
FILE_TOKENS = 10**8  # largest number of tokens of a file, as in llm.c's fineweb.py


def is_one(path: Path) -> bool:
    """Return whether a file begins with a magic number of llm.c. Independent."""
    return int.from_bytes(head_of(path)[:4], "little") in (*KINDS, EVALUATION)


def read(path: Path, options: ReadOptions) -> Iterator[TokenBlock]:
    """Yield the ids of a .bin file as blocks. Raises DataError if the file is damaged or has another format. Independent."""
    head = head_of(path)
    first, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if first not in KINDS or len(head) < HEADER_BYTES:
        check_head(path, head)
        raise DataError(f"{path} is not a file of llm.c, because its first number is {first}, not {GPT2} or {LLAMA3}. To read "
                        "a file without header, use --from nanogpt")
    wanted, kind = KINDS[first]
    if version != wanted:
        raise DataError(f"{path} has version {version}, but mpidp reads only version {wanted} of files whose first number is "
                        f"{first}")
    size = path.stat().st_size - HEADER_BYTES
    if tokens < 0 or size != tokens * kind.itemsize:
        raise DataError(f"{path}: its header states {tokens} tokens of {kind.itemsize} bytes each, but {size} bytes follow. "
                        "The file is cut or damaged: copy it again")
    yield from (TokenBlock(ids) for ids in read_array(path, kind, HEADER_BYTES, tokens))


def write(tokens: SplitTokens, out: Path) -> list[str]:
    """Write files OUT/tokens_SPLIT_NUMBER.bin of at most FILE_TOKENS tokens each. Return remarks for the user. Raises OSError if
    a file cannot be written. Independent."""
    first = GPT2 if tokens.dtype.itemsize == 2 else LLAMA3
    version, kind = KINDS[first]
    number, left, file = 0, 0, None
    for block in tokens.blocks():
        ids = block.ids.astype(kind)
        while len(ids):
            if file is None:
                file, left = open(out / f"tokens_{tokens.split}_{number:06d}.bin", "xb"), FILE_TOKENS  # noqa: SIM115 - _end closes
                file.write(np.array([first, version] + [0] * 254, "<i4").tobytes())
            file.write(ids[:left].tobytes())
            left, ids = left - len(ids[:left]), ids[left:]
            if not left:
                _end(file, FILE_TOKENS)
                number, file = number + 1, None
    if file is not None:
        _end(file, FILE_TOKENS - left)
    return []


def _end(file: IO[bytes], tokens: int) -> None:
    """Write the number of tokens into the header, and close the file."""
    with file:
        file.seek(8)
        file.write(np.array([tokens], "<i4").tobytes())
