"""`[mpirun -np N] python -m mpidp.generate RUN --prompt TEXT | --prompts FILE [--out FILE.jsonl]`: text from a trained model."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpidp.runtime.command import Parser, begin, run_entry


def main() -> None:
    """Command line -> texts on rank 0's standard output, or in a file."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    alone = options.prompts is None and options.out is None
    streams = alone and (options.stream or sys.stdout.isatty())
    rows = generate(world, options, _say if streams else None)
    if options.out is not None:
        _write(Path(options.out), rows, world)
    if world.rank or options.out is not None:
        return
    if streams:
        print()
    elif options.prompts is None:
        print(options.prompt + rows[0]["text"])
    else:
        sys.stdout.write(_lines(rows))


def read_options(words: list[str]) -> argparse.Namespace:
    """What a command line says. UsageError. Pure."""
    parser = Parser(prog="python -m mpidp.generate", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, or of one checkpoint in it")
    add("--prompt", help="the text to go on from (default: a line's end)")
    add("--prompts", metavar="FILE", help='many: .jsonl with {"prompt": TEXT} a line, or any other file with a prompt a line')
    add("--out", metavar="FILE", help="write JSON lines there, in the order of the prompts, and print nothing")
    add("--tokens", type=int, default=200, help="how many to add at most")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top-k", type=int, default=50, help="choose among this many likeliest; 0: all")
    add("--top-p", type=float, default=1.0, help="choose among the fewest likeliest that have this share of the probability")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="prompts that a rank goes on from at the same time; changes no text")
    add("--stream", action="store_true", help="print a single prompt's text as it comes, as on a terminal")
    add("--data", metavar="DIR", help="where tokenizer.json is; default: RUN's own copy")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, default=0, help="CPU threads a rank; 0: as in training")
    add("--tp", type=int, default=1, help="ranks that compute every layer together, as mesh.tp in training")
    add("--pp", type=int, default=1, help="stages of layers, as mesh.pp in training")
    options = parser.parse_args(words)
    if options.tokens < 0 or options.top_k < 0 or not 0 <= options.temperature < math.inf:
        parser.error("--tokens, --temperature and --top-k cannot be negative, nor the temperature infinite")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p} is a share of the probability: above 0, at most 1 (all tokens)")
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: at least one prompt at a time")
    if "" in options.stop:
        parser.error("--stop '': an empty text is everywhere; give one to end before")
    if options.prompts is not None and options.prompt is not None:
        parser.error("--prompt and --prompts: give one of them")
    if options.stream and (options.prompts is not None or options.out is not None):
        parser.error("--stream shows the text of one --prompt, without --out")
    options.prompt = "\n" if options.prompt is None else options.prompt
    return options


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _lines(rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace").decode()  # half a surrogate pair in a row: as JSON writes it


def generate(world: Any, options: argparse.Namespace, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """A row a prompt, in their order, on rank 0 of world (elsewhere none): what its line said, and text (what is added), tokens
    (how many), ended (tokens, eod or stop). Groups of --batch prompts are dealt out over the replicas; who computes with whom
    changes no text. say: is given the first prompt and its text piece by piece. UsageError, DataError, CheckpointError.
    Collective over world."""
    from mpidp.checkpoint.resume import open_run
    from mpidp.inference.decode import go_on
    from mpidp.inference.loading import load_model, load_tokenizer_for
    from mpidp.inference.sampling import Sampling
    from mpidp.model.rowwise import by_rows
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import polite_barrier, together

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    rows: list[dict[str, Any]] = []
    with together(world):
        if world.rank == 0:
            rows = _read(options)
    rows = world.bcast(rows)
    grid = make_grid(world, options.tp, options.pp)
    reader = open_run(Path(options.run), world)
    seq_len, replica = reader.meta["config"]["model.seq_len"], grid.world.rank // grid.parts
    firsts = range(0, len(rows), options.batch)[replica :: grid.world.size // grid.parts]
    groups: list[dict[int, list[int]]] = []
    with together(grid.world):
        if firsts:
            loaded = load_model(reader, grid, options.device, options.threads)
            tokenizer = load_tokenizer_for(loaded, reader, options.data)
            by_rows(loaded.model)
        for first in firsts:
            places = range(first, min(first + options.batch, len(rows)))
            groups.append({i: _encoded(tokenizer, rows[i]["prompt"], seq_len, i) for i in places})
    tells, done = say if grid.world.rank == 0 else None, []
    if tells is not None:
        tells(rows[0]["prompt"])
    for group in groups:
        done += go_on(loaded, tokenizer, group, sampling, options.tokens, options.seed, options.stop, tells)
    polite_barrier(grid.world)
    gathered = grid.world.gather(done if grid.model.rank == 0 else []) or []
    found = sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])
    cut = sum(continuation.cut for _, continuation in found)
    if cut:
        print(f"{cut} of {len(rows)} texts grew beyond the {seq_len} tokens that the model sees: from there on it went on from "
              f"their last {seq_len // 2} to {seq_len}", file=sys.stderr)
    return [
        rows[i] | {"text": continuation.text, "tokens": continuation.tokens, "ended": continuation.ended}
        for i, continuation in found
    ]


def _read(options: argparse.Namespace) -> list[dict[str, Any]]:
    from mpidp.errors import UsageError
    from mpidp.inference.rows import read_prompts

    if options.out is not None:  # before there is work to lose
        folder = Path(options.out).absolute().parent
        if Path(options.out).is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"--out {options.out}: no file can be written there; give one in a folder that exists")
    return [{"prompt": options.prompt}] if options.prompts is None else read_prompts(options.prompts)


def _encoded(tokenizer: Any, prompt: str, seq_len: int, index: int) -> list[int]:
    """The ids to go on from: after BOS where the model knows it; of an empty prompt, that or the end of the document before.
    DataError for one that the model cannot see."""
    from mpidp.errors import DataError

    try:
        ids = tokenizer.encode(prompt).tolist()
        ids = [tokenizer.begin, *ids] if tokenizer.bos is not None or not ids else ids
    except (DataError, UnicodeEncodeError) as error:  # the latter: half a surrogate pair
        raise DataError(f"prompt {index + 1}: {error}") from None
    if len(ids) > seq_len:
        raise DataError(f"prompt {index + 1} has {len(ids)} tokens, and the model sees {seq_len} (model.seq_len): shorten it")
    return list(ids)


def _write(path: Path, rows: list[dict[str, Any]], world: Any) -> None:
    from mpidp.errors import UsageError
    from mpidp.runtime.files import write_file
    from mpidp.runtime.world import together

    with together(world):
        try:
            if world.rank == 0:
                write_file(path, _lines(rows).encode())
        except OSError as error:
            raise UsageError(f"--out {path}: {error.strerror}; give a file that can be written") from None


if __name__ == "__main__":
    run_entry(main)
