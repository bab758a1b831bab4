"""Prints what a folder of shards contains: `python -m data_tools.inspect DIR`."""

from __future__ import annotations

from pathlib import Path

from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.log import counted, one_line, printable
from mpidp.runtime.options import program


def describe(folder: str | Path, excerpt_tokens: int = 200) -> str:
    """Return a text that describes the splits and their shards. Raises DataError if the shards cannot be read. Independent.

    For each split, the description shows the first `excerpt_tokens` tokens, decoded, and the skew. The skew is the number of
    tokens of the largest shard, divided by the mean over all shards.
    """
    stream = TokenStream(folder)
    index, tokenizer = stream.index, load_tokenizer(stream.folder)
    source = ", ".join(f"{key} {value}" for key, value in index.source.items())
    lines = [
        f"{folder}: from {source or 'an unknown source'}",
        f"tokenizer {index.tokenizer_kind}, vocabulary {index.vocab_size:,}, end of document {index.eod}, "
        f"sha256 {index.tokenizer_sha256[:16]}",
    ]
    lines = [one_line(line) for line in lines]
    for name in index.splits:
        lines += ["", *_describe_split(TokenStream(folder, name), tokenizer, excerpt_tokens)]
    return "\n".join(lines)


def _describe_split(stream: TokenStream, tokenizer: Tokenizer, excerpt_tokens: int) -> list[str]:
    sizes = [record.tokens for record in stream.files]
    skew = max(sizes) * len(sizes) / stream.num_tokens
    mask = ", with a loss mask" if stream.has_loss_mask else ""
    lines = [
        f"{stream.split}: {counted(stream.num_tokens, 'token')}, {counted(stream.num_documents, 'document')}, "
        f"{stream.text_bytes:,} bytes of text ({stream.text_bytes / stream.num_tokens:.2f} per token){mask}",
        f"  {'file':<20} {'tokens':>15} {'documents':>12} {'bytes':>15}",
        *(f"  {r.name:<20} {r.tokens:>15,} {r.documents:>12,} {r.size:>15,}" for r in stream.files),
        f"  skew: largest shard / mean shard = {skew:.4f}",
    ]
    text = tokenizer.decode(stream.read(0, min(excerpt_tokens, stream.num_tokens)))
    return [*map(one_line, lines), "  first text:", *(f"  | {line}" for line in text.splitlines())]


def main() -> None:
    """Run the command. Independent."""
    parser = Parser(prog=program("data_tools.inspect"), description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a folder of shards")
    parser.add_argument("--excerpt", type=int, default=200, metavar="TOKENS", help="number of tokens to show as text (default: "
                                                                                   "%(default)s)")
    options = parser.parse_args()
    print(printable(describe(options.folder, max(0, options.excerpt))))


if __name__ == "__main__":
    run_entry(main)
