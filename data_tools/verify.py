"""Checks a folder of shards: `python -m data_tools.verify DIR`. If a file is damaged, the command prints the file's name and
exits with code 3."""

from __future__ import annotations

from pathlib import Path

from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.log import counted
from mpidp.runtime.options import program

PIECE_TOKENS = 2**22  # number of tokens that are read at a time


def verify(folder: str | Path) -> str:
    """Check the headers, checksums, ids, document offsets and tokenizer of the shards in `folder`. Return a summary. Raises
    DataError if one of them is wrong. Independent."""
    first = TokenStream(folder)
    index = first.index
    index.tokenizer_bytes(first.folder)
    index.special_tokens_bytes(first.folder)
    tokenizer = load_tokenizer(first.folder)
    if (tokenizer.vocab_size, tokenizer.eod) != (index.vocab_size, index.eod):
        raise DataError(f"{first.path / 'tokenizer.json'}: it has {tokenizer.vocab_size} ids and the end-of-document id "
                        f"{tokenizer.eod}, but index.json states {index.vocab_size} ids and the end-of-document id {index.eod}. "
                        f"Prepare {folder} again")
    streams = [TokenStream(folder, name) for name in index.splits]
    for stream in streams:
        stream.check(contents=True)
        at = 0
        for i, record in enumerate(stream.files):
            stream.doc_offsets(i)
            for start in range(at, at + record.tokens, PIECE_TOKENS):
                stream.check_ids(start, stream.read(start, min(PIECE_TOKENS, at + record.tokens - start)))
            at += record.tokens
    tokens, size = sum(s.num_tokens for s in streams), sum(record.size for record in index.files)
    files = counted(len(index.files), "file")
    return f"{folder}: {files}, {counted(tokens, 'token')}, {counted(size, 'byte')}: all match index.json"


def main() -> None:
    """Run the command. Independent."""
    parser = Parser(prog=program("data_tools.verify"), description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a folder of shards")
    print(verify(parser.parse_args().folder))


if __name__ == "__main__":
    run_entry(main)
