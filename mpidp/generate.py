"""`[mpirun -np N] python -m mpidp.generate RUN --prompt TEXT | --prompts FILE [--out FILE.jsonl]`: generate text with a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.log import log
from mpidp.runtime.options import add_compute, add_out, add_run, add_texts, add_tokenizer, note_old_spelling, program


def main() -> None:
    """Generate texts and print them on rank 0, or write them to a file."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    alone = options.prompts is None and options.out is None
    streams = alone and (options.stream or sys.stdout.isatty())
    rows = generate(world, options, _print if streams else None)
    if options.out is not None:
        _write(Path(options.out), rows, world)
    if world.rank or options.out is not None:
        return
    if streams:
        print()
    elif options.prompts is None:
        print(("" if options.chat else options.prompt) + rows[0]["text"])
    else:
        sys.stdout.write(_lines(rows))


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if it is invalid. Pure."""
    parser = Parser(
        prog=program("mpidp.generate"), usage="[mpirun -np N] %(prog)s RUN [--prompt TEXT | --prompts FILE] [options]",
        description="Generate text with a trained model. The ranks share the prompts.",
    )
    add = parser.add_argument
    add_run(parser)
    add("--prompt", help="text to continue (default: a newline)")
    add("--prompts", metavar="FILE", help='file of prompts: rows with {"prompt": TEXT} (.jsonl, .json, .csv, .parquet), or '
        "text with one prompt per line; also .gz and .zst")
    add_out(parser, "write JSON lines to this file, in the order of the prompts, and print nothing", metavar="FILE")
    add("--tokens", type=int, default=200, help="largest number of tokens to generate (%(default)s)")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0: always the likeliest token (%(default)s)")
    add("--top-k", type=int, default=50, help="sample from the K likeliest tokens; 0: all (%(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from the fewest tokens with this total probability (%(default)s)")
    add("--stop", metavar="TEXT", action="append", default=[], help="stop before TEXT; may be given several times")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--batch", type=int, default=8, help="prompts per batch on each rank; does not change the texts (%(default)s)")
    add("--stream", action="store_true", help="print a single prompt's text while it is generated (default on a terminal)")
    add("--chat", action="store_true", help="chats: --prompt is a message of the user, a row of --prompts has messages (role, "
        "content). The run's chat template makes the prompt, and only the answer is printed")
    add_texts(parser, "default: tokens if the tokenizer is a model's, else text")
    add_tokenizer(parser)
    add_compute(parser)
    add("--data", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.data is not None:
        note_old_spelling("--data", "--tokenizer")
        options.tokenizer = options.tokenizer or options.data
    if options.tokens < 0 or options.top_k < 0 or not 0 <= options.temperature < math.inf:
        parser.error("--tokens, --temperature and --top-k must not be negative, and the temperature must be finite")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p}: must be above 0 and at most 1 (all tokens)")
    if options.seq_len < 0:
        parser.error(f"--seq-len {options.seq_len}: must not be negative")
    if options.chat and options.prompt is None and options.prompts is None:
        parser.error("--chat: give the user's message with --prompt, or chats with --prompts")
    if options.chat and options.special == "text":
        parser.error("--special text does not apply to --chat: the special tokens of the template become ids")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: must be from 0 to {2**63 - 1}")
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    if "" in options.stop:
        parser.error("--stop '': the text must not be empty")
    if options.prompts is not None and options.prompt is not None:
        parser.error("--prompt and --prompts: give only one of them")
    if options.stream and (options.prompts is not None or options.out is not None):
        parser.error("--stream works only with a single --prompt and without --out")
    options.prompt = "\n" if options.prompt is None else options.prompt
    return options


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def _lines(rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace").decode()  # an unpaired surrogate is escaped as in JSON


def generate(world: Any, options: argparse.Namespace, write: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Generate a text for each prompt. Return one row per prompt, in order, on rank 0 of world; other ranks return no rows.

    A row has the keys of its input line, and three more: text (the generated text), tokens (number of generated tokens), ended
    (why it ended: tokens, eod or stop). Batches of prompts are distributed over the replicas, which does not change any text.
    write: called with the first prompt and then with its text, piece by piece. Raises UsageError if --out cannot be written,
    DataError if a prompt or the tokenizer is invalid, and CheckpointError if the run has no valid checkpoint. Collective over
    world.
    """
    from mpidp.inference.chats import template_of
    from mpidp.inference.decode import continue_prompts
    from mpidp.inference.loading import load_encoder, load_model, open_source
    from mpidp.inference.rows import warn_of_names
    from mpidp.inference.sampling import Sampling
    from mpidp.model.rowwise import by_rows
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    rows: list[dict[str, Any]] = []
    with raise_together(world):
        if world.rank == 0:
            rows = _read(options)
    rows, moment = world.bcast((rows, time.time()))  # the time that a chat template may write into a prompt
    grid = make_grid(world, options.tp, options.pp)
    reader = open_source(Path(options.run), world, options.seq_len)
    seq_len, replica = reader.meta["config"]["model.seq_len"], grid.world.rank // grid.parts
    firsts = range(0, len(rows), options.batch)[replica :: grid.world.size // grid.parts]
    groups: list[dict[int, list[int]]] = []
    texts: dict[int, str] = {}
    with raise_together(grid.world):
        if firsts:
            loaded = load_model(reader, grid, options.device, options.threads, options.model_kind, options.base)
            encoder = load_encoder(loaded, reader, options.tokenizer, "tokens" if options.chat else options.special)
            template = template_of(encoder.table, options.run, moment) if options.chat else None
            by_rows(loaded.model)
        for first in firsts:
            places = range(first, min(first + options.batch, len(rows)))
            texts |= {i: _text(template, rows[i], i) for i in places}
            groups.append({i: _encoded(encoder, texts[i], seq_len, i) for i in places})
    named = encoder.named(list(texts.values())) if firsts and grid.model.rank == 0 else ("", 0)
    warn_of_names(grid.world.gather(named) or (), "prompts")
    writes, done = write if grid.world.rank == 0 else None, []
    if writes is not None:
        writes("" if options.chat else rows[0]["prompt"])
    with raise_together(grid.world):  # ranks of a replica communicate here, and raise DataError together
        for group in groups:
            done += continue_prompts(loaded, encoder, group, sampling, options.tokens, options.seed, options.stop, writes)
    gathered = grid.world.gather(done if grid.model.rank == 0 else []) or []
    found = sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])
    cut = sum(continuation.cut for _, continuation in found)
    if cut:
        log.warning("warning: %d of %d outputs exceed the %d-token context; continuing with a sliding window of %d-%d tokens",
                    cut, len(rows), seq_len, seq_len // 2, seq_len)
    return [
        rows[i] | {"text": continuation.text, "tokens": continuation.tokens, "ended": continuation.ended}
        for i, continuation in found
    ]


def _read(options: argparse.Namespace) -> list[dict[str, Any]]:
    from mpidp.inference.chats import read_chats
    from mpidp.inference.rows import read_prompts
    from mpidp.runtime.files import check_writable

    if options.out is not None:
        check_writable(options.out)
    if options.prompts is None:
        return [{"prompt": options.prompt}]
    return read_chats(options.prompts) if options.chat else read_prompts(options.prompts)


def _text(template: Any, row: dict[str, Any], index: int) -> str:
    """Return the text of a prompt. template: the chat template, for --chat. Raises DataError if it rejects the chat."""
    from mpidp.errors import DataError
    from mpidp.inference.chats import rendered

    try:
        return str(row["prompt"]) if template is None else rendered(template, row)
    except DataError as error:
        raise DataError(f"prompt {index + 1}: {error}") from None


def _encoded(encoder: Any, prompt: str, seq_len: int, index: int) -> list[int]:
    """Encode a prompt, after BOS if the training data has it. An empty prompt becomes BOS or the end-of-document token.

    Raises DataError if the prompt does not fit into the model's context.
    """
    from mpidp.errors import DataError

    try:
        ids: list[int] = encoder.prompt(prompt)
    except DataError as error:
        raise DataError(f"prompt {index + 1}: {error}") from None
    if len(ids) > seq_len:
        raise DataError(f"prompt {index + 1} has {len(ids)} tokens; the model's context is {seq_len} (model.seq_len): shorten it")
    return ids


def _write(path: Path, rows: list[dict[str, Any]], world: Any) -> None:
    from mpidp.errors import UsageError
    from mpidp.runtime.files import write_file
    from mpidp.runtime.world import raise_together

    with raise_together(world):
        try:
            if world.rank == 0:
                write_file(path, _lines(rows).encode())
        except OSError as error:
            sys.stdout.write(_lines(rows))  # no text is lost
            raise UsageError(f"--out {path}: cannot be written ({error.strerror}); the texts are on standard output") from None


if __name__ == "__main__":
    run_entry(main)
