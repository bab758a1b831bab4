"""`[mpirun -np N] python -m mpidp.generate RUN --prompt TEXT | --prompts FILE [--out FILE.jsonl]` generates text with a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpidp.inference.generation import generate, lines_of, write_rows
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.options import (
    add_batch,
    add_compute,
    add_out,
    add_run,
    add_sampling,
    add_texts,
    add_tokenizer,
    check_sampling,
    note_old_spelling,
    program,
)


def main() -> None:
    """Generate texts, and print them on rank 0 or write them to a file. Collective over COMM_WORLD."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    alone = options.prompts is None and options.out is None
    streams = alone and (options.stream or sys.stdout.isatty())
    rows = generate(world, options, _print if streams else None)
    if options.out is not None:
        write_rows(Path(options.out), rows, world)
    if world.rank or options.out is not None:
        return
    if streams:
        print()
    elif options.prompts is None:
        print(("" if options.chat else options.prompt) + rows[0]["text"])
    else:
        sys.stdout.write(lines_of(rows))


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if the command line is invalid. Pure."""
    parser = Parser(
        prog=program("mpidp.generate"), usage="[mpirun -np N] %(prog)s RUN [--prompt TEXT | --prompts FILE] [options]",
        description="Generate text with a trained model. The prompts are divided among the ranks.",
    )
    add = parser.add_argument
    add_run(parser)
    add("--prompt", help="text to continue (default: a newline)")
    add("--prompts", metavar="FILE", help='file of prompts: rows with {"prompt": TEXT} (.jsonl, .json, .csv, .parquet), or '
        "text with one prompt per line; also .gz and .zst")
    add_out(parser, "write JSON lines to this file, in the order of the prompts, and print nothing", metavar="FILE")
    add_sampling(parser)
    add_batch(parser, "prompts")
    add("--stream", action="store_true", help="with one prompt: print the text while it is generated (default on a terminal)")
    add("--chat", action="store_true", help="answer chats. --prompt is one message of the user. In --prompts, a row has a "
                                            "list 'messages' of {role, content}. The run's chat template makes the prompt, "
                                            "and only the answer is printed")
    add_texts(parser, "default: 'tokens' if the tokenizer comes with a model, else 'text'")
    add_tokenizer(parser)
    add_compute(parser)
    add("--data", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.data is not None:
        note_old_spelling("--data", "--tokenizer")
        options.tokenizer = options.tokenizer or options.data
    check_sampling(parser, options)
    if options.seq_len < 0:
        parser.error(f"--seq-len {options.seq_len}: must not be negative")
    if options.chat and options.prompt is None and options.prompts is None:
        parser.error("--chat needs the user's message (--prompt) or a file of chats (--prompts)")
    if options.chat and options.special == "text":
        parser.error("--special=text does not work with --chat, because special tokens of the chat template must become ids")
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    if options.prompts is not None and options.prompt is not None:
        parser.error("--prompt and --prompts: give only one of them")
    if options.stream and (options.prompts is not None or options.out is not None):
        parser.error("--stream works only with a single --prompt and without --out")
    options.prompt = "\n" if options.prompt is None else options.prompt
    return options


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    run_entry(main)
