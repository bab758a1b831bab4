"""Counts the bytes of the tokens that an evaluation scores. Bits per byte are the total loss of these tokens in bits, divided by
this number."""

from __future__ import annotations

from mpi4py import MPI

from mpidp.data.shards import TokenStream
from mpidp.data.token_bytes import bytes_of_tokens
from mpidp.data.tokenizer import tokenizer_from_json
from mpidp.errors import DataError, UsageError

PIECE_TOKENS = 2**20  # tokens read at a time


def scored_bytes(stream: TokenStream, comm: MPI.Intracomm) -> int | None:
    """Return the number of UTF-8 bytes of those tokens of a split that Engine.evaluate scores. Return None if the shards have
    no tokenizer, or if the tokenizer is of an unknown kind. Collective over comm.

    The first token of the stream, and tokens that the loss mask excludes, are not scored. If attention is limited to single
    documents, the first token of each document is not scored either. The end-of-document token, and BOS before a document, have
    no bytes.
    """
    try:
        tokenizer = tokenizer_from_json(stream.index.tokenizer_bytes(stream.folder).decode(), stream.eod)
        of = bytes_of_tokens(tokenizer)
    except (DataError, UsageError, UnicodeDecodeError):
        of = None
    if not all(comm.allgather(of is not None)):
        return None
    assert of is not None
    found, targets = 0, stream.num_tokens - 1
    for at in range(comm.rank * PIECE_TOKENS, targets, comm.size * PIECE_TOKENS):
        length = min(PIECE_TOKENS, targets - at) + 1
        ids, starts = stream.read(at, length), stream.read_starts(at, length)
        lengths = of.count(ids, starts)
        mask = stream.read_mask(at, length)
        if mask is not None:
            lengths[~mask] = 0
        if stream.apart:
            lengths[starts] = 0
        found += int(lengths[1:].sum())
    return int(comm.allreduce(found))
