"""What is in a folder of shards: `python -m data_tools.inspect DIR`."""

from __future__ import annotations

from pathlib import Path

from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from mpidp.runtime.command import Parser, run_entry


def describe(folder: str | Path, excerpt_tokens: int = 200) -> str:
    """Splits, shards, their skew and the start of each split's text. DataError when it cannot be read. Independent."""
    index = TokenStream(folder).index
    tokenizer = load_tokenizer(folder)
    source = ", ".join(f"{key} {value}" for key, value in index.source.items())
    lines = [
        f"{folder}: from {source or 'an unknown source'}",
        f"tokenizer {index.tokenizer_kind}, vocabulary {index.vocab_size:,}, end of document {index.eod}, "
        f"sha256 {index.tokenizer_sha256[:16]}",
    ]
    for name in index.splits:
        lines += ["", *_describe_split(TokenStream(folder, name), tokenizer, excerpt_tokens)]
    return "\n".join(lines)


def _describe_split(stream: TokenStream, tokenizer: Tokenizer, excerpt_tokens: int) -> list[str]:
    sizes = [record.tokens for record in stream.files]
    skew = max(sizes) * len(sizes) / stream.num_tokens
    mask = ", with a loss mask" if stream.has_loss_mask else ""
    lines = [
        f"{stream.split}: {stream.num_tokens:,} tokens, {stream.num_documents:,} documents, "
        f"{stream.text_bytes:,} bytes of text ({stream.text_bytes / stream.num_tokens:.2f} a token){mask}",
        f"  {'file':<20} {'tokens':>15} {'documents':>12} {'bytes':>15}",
        *(f"  {r.name:<20} {r.tokens:>15,} {r.documents:>12,} {r.size:>15,}" for r in stream.files),
        f"  skew: the largest shard has {skew:.4f} times the mean",
    ]
    text = tokenizer.decode(stream.read(0, min(excerpt_tokens, stream.num_tokens)))
    return [*lines, "  it starts:", *(f"  | {line}" for line in text.splitlines())]


def main() -> None:
    """The command line. Independent."""
    parser = Parser(prog="python -m data_tools.inspect", description=__doc__)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--excerpt", type=int, default=200, metavar="TOKENS", help="how much to show (%(default)s)")
    options = parser.parse_args()
    print(describe(options.folder, max(0, options.excerpt)))


if __name__ == "__main__":
    run_entry(main)
