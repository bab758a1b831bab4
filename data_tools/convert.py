"""Converts between shards and other formats of token data. Tokens, documents and loss masks stay the same.

  python -m data_tools.convert --to FORMAT SHARDS --out OUT                   writes a folder (megatron: OUT_train.bin, ...)
  python -m data_tools.convert --from FORMAT SRC --out DIR --tokenizer PATH   reads a file or a folder (megatron: or a prefix)

If neither --from nor --to is given, the format of SRC is recognized from its content. The formats below store ids without
their tokenizer. With --tokenizer, give the tokenizer that made the ids: byte, a tokenizer.json, or a folder that contains one.
To check that it is the right tokenizer, read the beginning of the converted text with `mpidp inspect OUT`.

formats:
FORMATS
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_tools.formats.flat import DTYPES
from data_tools.formats.table import FORMATS
from data_tools.from_tokens import FromOptions, from_tokens
from data_tools.to_tokens import to_tokens
from mpidp.runtime.command import Parser, run_entry
from mpidp.runtime.log import printable
from mpidp.runtime.options import add_new_out, program, take_out
from mpidp.storage.address import check_local

AUTO = "auto"


def main() -> None:
    """Run the command. Independent."""
    options = read_options(sys.argv[1:])
    if options.to:
        lines = to_tokens(options.to, options.input, Path(options.out))
    else:
        names = [one.name for one in fields(FromOptions) if one.name in options]
        given = FromOptions(**{name: getattr(options, name) for name in names})
        lines = from_tokens(options.source, options.input, Path(options.out), given)
    print(printable("\n".join(lines)))


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if the command line is invalid. Pure."""
    rows = "\n".join(f"  {name:11}{one.what}" for name, one in FORMATS.items())
    parser = Parser(prog=program("data_tools.convert"), description=(__doc__ or "").replace("FORMATS", rows),
                    usage="%(prog)s (--to FORMAT SHARDS | [--from FORMAT] SRC --tokenizer PATH) --out PATH [options]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--to", metavar="FORMAT", choices=tuple(FORMATS), help="write the shards in this format")
    direction.add_argument("--from", metavar="FORMAT", choices=(AUTO, *FORMATS), dest="source", default=AUTO,
                           help="read this format and write shards (default: %(default)s, which recognizes the format by the "
                                "content)")
    add("input", metavar="SHARDS|SRC", help="what to read: a folder of shards, or a file or folder of tokens")
    add_new_out(parser, "the path to write, which must not exist yet", metavar="PATH")
    group, usual, of_from = parser.add_argument_group("options of --from"), FromOptions, {}

    def only_from(option: str, text: str, **given: Any) -> None:
        action = group.add_argument(option, default=argparse.SUPPRESS, help=text, **given)  # FromOptions has the defaults
        of_from[action.dest] = option

    only_from("--tokenizer", "byte, a tokenizer.json, or a folder that contains one", metavar="PATH")
    only_from("--eod", "the end-of-document token of a tokenizer.json (default: the token with one of the usual names)")
    only_from("--eod-at", "whether the end-of-document token is at the end or at the start of documents, for formats that do not "
                          "store where documents end (default: auto, which decides by the data and the format)",
              choices=("auto", "end", "start"))
    only_from("--one-document", "treat each split as one document", action="store_true", dest="whole")
    only_from("--rows", "document: each row is a document; part: the rows are concatenated, and the end-of-document token "
                        "ends documents (default: auto, which means part if all rows have the same length, else document)",
              choices=("auto", "document", "part"))
    only_from("--add-eod", "for rows: append the end-of-document token to rows that do not end with it", action="store_true")
    only_from("--column", "the column that holds the ids (default: the first that exists of input_ids, tokens, token_ids, ids)",
              metavar="NAME")
    only_from("--dtype", "the type of the ids, if the format does not store it (default: uint16, or uint32 if the "
                         "tokenizer has more than 65,536 ids; for MDS: int64)",
              choices=DTYPES)
    only_from("--seq-len", "for data with a loss mask: pack whole documents into windows of N tokens; train with the same "
                           "model.seq_len", type=int, metavar="N")
    only_from("--shards", f"number of training files (default: {usual.shards})", type=int, metavar="N")
    only_from("--val-fraction", "for data without a validation split: the fraction of the data that becomes the validation "
                                f"split, taken from the end; 0: none (default: {usual.val_fraction})", type=float, metavar="F")
    options = parser.parse_intermixed_args(list(arguments))
    take_out(parser, options, "a second path", "--out PATH")
    if options.to and (unused := [option for name, option in of_from.items() if name in options]):
        parser.error(f"{', '.join(unused)} can be given only with --from, not with --to {options.to}")
    for option, path in (("SRC", options.input), ("--out", options.out)):
        check_local(option, path)
    options.input = Path(options.input)
    if not options.to and not getattr(options, "tokenizer", ""):
        parser.error(f"--from {options.source} needs --tokenizer PATH, because the files hold only token ids")
    return options


if __name__ == "__main__":
    run_entry(main)
