"""`[mpirun -np N] python -m mpidp.evaluate RUN [--data DIR | --text FILE | --choices FILE] [--json]`: how good a trained model
is: its loss over a validation split or a text, or how often it finds the right answer; shared over ranks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from mpidp.runtime.command import Parser, begin, run_entry


def main() -> None:
    """Command line -> figures on rank 0."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    if options.text is not None:
        found = evaluate_text(options, world)
    elif options.choices is not None:
        found = evaluate_choices(options, world)
    else:
        found = evaluate(
            options.run, options.data, world, options.split, options.device, options.threads, options.tp, options.pp
        )
    if world.rank == 0:
        step = found.pop("step")
        print(f"step {step}: {_said(found)}", file=sys.stderr if options.json else sys.stdout)
        if options.json:
            print(json.dumps(found))


def read_options(words: list[str]) -> argparse.Namespace:
    """What a command line says. UsageError. Pure."""
    parser = Parser(prog="python -m mpidp.evaluate", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, or of one checkpoint in it")
    add("--data", metavar="DIR", help="shards (default: those the run was trained on); with --text and --choices where "
        "tokenizer.json is (default: RUN's own copy)")
    add("--split", default="val", help="val or train")
    add("--text", metavar="FILE", help="a text in UTF-8 instead of shards")
    add("--stride", type=int, default=0, help="tokens from one window of --text to the next; default: half of model.seq_len")
    add("--choices", metavar="FILE", help="questions: .jsonl with context, choices and label (an index from 0, or the right "
        "text) a line")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, default=0, help="CPU threads a rank; 0: as in training")
    add("--tp", type=int, default=1, help="ranks that compute every layer together, as mesh.tp in training")
    add("--pp", type=int, default=1, help="stages of layers, as mesh.pp in training")
    add("--json", action="store_true", help="one JSON line on standard output, everything else on standard error")
    options = parser.parse_args(words)
    if options.text is not None and options.choices is not None:
        parser.error("--text and --choices: give one of them")
    if options.stride < 0 or (options.stride and options.text is None):
        parser.error("--stride is a number of tokens, from one window of --text to the next")
    return options


def _said(found: dict[str, Any]) -> str:
    if "accuracy" in found:
        return (
            f"accuracy {found['accuracy']:.4f}, by bytes {found['accuracy_norm']:.4f}, by tokens {found['accuracy_token']:.4f} "
            f"over {found['items']:,} items (chance {found['chance']:.4f})"
            + (f"; of {found['cut_items']} the context's beginning did not fit" if found["cut_items"] else "")
        )
    return (
        f"loss {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_byte']:.4f} bits/byte over {found['tokens']:,} tokens"
    )


def evaluate_text(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """{loss, perplexity, bits_per_byte, tokens, step} of --text, as one document that begins after an end of document, or BOS.
    Every token is a target once, after at least seq_len - stride others where there are so many. The same figures at any number
    of ranks. UsageError, DataError, CheckpointError. Collective over world."""
    import numpy as np

    from mpidp.errors import UsageError
    from mpidp.inference.loading import open_model
    from mpidp.inference.rows import read_text
    from mpidp.inference.scoring import text_loss
    from mpidp.runtime.world import together

    reader, loaded, tokenizer = open_model(options, world)
    config, told = reader.meta["config"], None
    seq_len = config["model.seq_len"]
    with together(world):
        if options.stride > seq_len:
            raise UsageError(f"--stride {options.stride}: windows have {seq_len} tokens (model.seq_len), some would be left out")
        if world.rank == 0:
            text = read_text(options.text)
            told = (np.concatenate([[tokenizer.begin], tokenizer.encode(text)]), len(text.encode()))
    ids, text_bytes = world.bcast(told)
    loss = text_loss(loaded, ids, seq_len, options.stride or max(1, seq_len // 2), config["train.micro_batch"])
    return _figures(loss / (len(ids) - 1), len(ids) - 1, text_bytes) | {"step": reader.meta["step"]}


def evaluate_choices(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """{accuracy, accuracy_norm, accuracy_token, items, chance, cut_items, step} of --choices; see inference/choices.py. The same
    figures at any number of ranks. DataError, CheckpointError. Collective over world."""
    from mpidp.inference.choices import counted, encode, read_choices
    from mpidp.inference.loading import open_model
    from mpidp.inference.scoring import log_likelihoods
    from mpidp.runtime.world import together

    reader, loaded, tokenizer = open_model(options, world)
    seq_len, told = reader.meta["config"]["model.seq_len"], None
    with together(world):
        if world.rank == 0:
            items = read_choices(options.choices)
            told = (items, [encode(tokenizer, item, seq_len, options.choices) for item in items])
    items, encoded = world.bcast(told)
    return counted(items, encoded, log_likelihoods(loaded, encoded)) | {"step": reader.meta["step"]}


def _figures(loss: float, tokens: int, text_bytes: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * tokens / math.log(2) / max(1, text_bytes),
        "tokens": tokens,
    }


def evaluate(
    run: str, data: str | None, world: Any, split: str = "val", device: str = "auto", threads: int = 0, tp: int = 1, pp: int = 1
) -> dict[str, Any]:
    """{loss, perplexity, bits_per_byte, tokens, step}; every token of the split but its first is a target once, in windows of
    the run's seq_len. The same figures at any number of ranks. DataError for data of another tokenizer. Collective over world."""
    from mpidp.checkpoint.resume import open_run
    from mpidp.data.shards import TokenStream
    from mpidp.errors import DataError
    from mpidp.inference.loading import load_model
    from mpidp.parallel.engine import Engine
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import together

    grid = make_grid(world, tp, pp)
    world = grid.world
    reader = open_run(Path(run), world)
    with together(world):
        loaded = load_model(reader, grid, device, threads)
        stream = TokenStream(data or reader.meta["config"]["data.path"], split)
        if stream.tokenizer_sha256 != reader.meta["tokenizer"]:
            raise DataError(f"{stream.path} was prepared with another tokenizer than {run}: the ids would mean other text")
        config = reader.meta["config"]
        stream.keep_apart(config.get("data.documents", "joined"), config["model.seq_len"])
        stream.check(range(world.rank, len(stream.files), world.size))
        if stream.num_tokens < 2:
            raise DataError(f"{stream.path}: split {split!r} has {stream.num_tokens} tokens, too few to predict one")
    engine = Engine(
        loaded.model, loaded.device, loaded.dtype, seed=0, dropout=0.0, nominal_tokens=1, stages=loaded.stages,
        token_losses=loaded.losses, tells=loaded.model.part.speaks and grid.tp.rank == 0,
    )
    loss, tokens = engine.evaluate(stream, world, config["model.seq_len"], config["train.micro_batch"], replicas=grid.replicas.dp)
    return _figures(loss, tokens, stream.text_bytes) | {"step": reader.meta["step"]}


if __name__ == "__main__":
    run_entry(main)
