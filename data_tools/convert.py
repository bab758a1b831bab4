"""Convert between shards and other formats of token data. Tokens, documents and loss masks stay the same.

  python -m data_tools.convert --to FORMAT SHARDS --out OUT                   writes a folder (megatron: OUT_train.bin, ...)
  python -m data_tools.convert --from FORMAT SRC --out DIR --tokenizer PATH   reads a file or a folder (megatron: or a prefix)

Without --from and --to, the format of SRC is recognized by its content. The other formats contain only token ids. Give the
tokenizer that made them with --tokenizer (byte, a tokenizer.json, or a folder that contains one). `mpidp inspect` shows the
beginning of the text: look at it to check that you gave the right tokenizer.

formats:
FORMATS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.formats.flat import DTYPES
from data_tools.formats.table import FORMATS
from data_tools.from_tokens import FromOptions, from_tokens
from data_tools.to_tokens import to_tokens
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.log import printable
from mpidp.runtime.options import add_new_out, program, take_out

AUTO = "auto"


def main() -> None:
    """Command-line entry point. Independent."""
    options = read_options(sys.argv[1:])
    if options.to:
        lines = to_tokens(options.to, options.input, Path(options.out))
    else:
        given = FromOptions(options.tokenizer, options.shards, options.val_fraction, options.eod, options.eod_at, options.dtype,
                            options.column, options.rows, options.whole, options.add_eod, options.seq_len)
        lines = from_tokens(options.source, options.input, Path(options.out), given)
    print(printable("\n".join(lines)))


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if it is invalid. Pure."""
    rows = "\n".join(f"  {name:11}{one.what}" for name, one in FORMATS.items())
    parser = Parser(prog=program("data_tools.convert"), description=(__doc__ or "").replace("FORMATS", rows),
                    usage="%(prog)s (--to FORMAT SHARDS | [--from FORMAT] SRC --tokenizer PATH) --out PATH [options]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--to", metavar="FORMAT", choices=tuple(FORMATS), help="write the shards in this format")
    direction.add_argument("--from", metavar="FORMAT", choices=(AUTO, *FORMATS), dest="source", default=AUTO,
                           help="read this format and write shards (%(default)s: recognize it by its content)")
    add("input", metavar="SHARDS|SRC", type=Path, help="what to read: a folder of shards, or a file or folder of tokens")
    add_new_out(parser, "what to write; it must not exist", metavar="PATH")
    add("--tokenizer", metavar="PATH", help="with --from: byte, a tokenizer.json, or a folder that contains one")
    add("--eod", help="with --from: the end-of-document token of the tokenizer.json, if it has an unusual name")
    add("--eod-at", choices=("auto", "end", "start"), default="auto",
        help="with --from, if the format does not store documents: whether documents end or begin with the end-of-document "
        "token (%(default)s: determined from the data and the format)")
    add("--one-document", action="store_true", dest="whole", help="with --from: each split is one document")
    add("--rows", choices=("auto", "document", "part"), default="auto",
        help="with --from, for rows: document: each row is a document; part: rows are joined to a stream, in which the "
        "end-of-document token ends documents (%(default)s: part if all rows have the same length)")
    add("--add-eod", action="store_true", help="with --from, for rows: append the end-of-document token where it is missing")
    add("--column", metavar="NAME", default="",
        help="with --from: the column that holds the ids (input_ids, tokens, token_ids or ids)")
    add("--dtype", choices=DTYPES, default="",
        help="with --from: the type of the ids, if the format does not store it (uint16, or uint32 for more than 65,536 ids)")
    add("--seq-len", type=int, metavar="N", default=0,
        help="with --from, for data with a loss mask: pack whole documents into windows of N tokens; train with the same "
        "model.seq_len")
    add("--shards", type=int, metavar="N", default=4, help="with --from: number of training files (%(default)s)")
    add("--val-fraction", type=float, metavar="F", default=0.05,
        help="with --from, for data without a validation split: the fraction of the data for validation, taken from its end; "
        "0: none (%(default)s)")
    options = parser.parse_intermixed_args(list(arguments))
    take_out(parser, options, "a second path", "--out PATH")
    if not options.to and not options.tokenizer:
        parser.error(f"--from {options.source} needs --tokenizer: the files hold token ids only")
    return options


if __name__ == "__main__":
    run_entry(main)
