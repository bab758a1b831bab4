"""`[mpirun -np N] python -m mpidp.evaluate RUN [--data DIR | --text FILE | --choices FILE | --tasks NAMES] [--json]` evaluates a
trained model. It computes one of these: the loss on a split of shards, the loss on a text, the accuracy on multiple-choice
questions, or the metrics of lm-eval tasks. The work is divided among the ranks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.options import (
    add_compute,
    add_data,
    add_json,
    add_out,
    add_run,
    add_texts,
    add_tokenizer,
    note_old_spelling,
    program,
)


def main() -> None:
    """Evaluate a model, and print the results on rank 0. Collective over COMM_WORLD."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    if options.text is not None:
        found = evaluate_text(options, world)
    elif options.choices is not None:
        found = evaluate_choices(options, world)
    elif options.tasks is not None:
        found = evaluate_tasks(options, world)
    else:
        found = evaluate(
            options.run, options.data, world, options.split, options.device, options.threads, options.tp, options.pp,
            options.model_kind, options.base, options.seq_len,
        )
    if world.rank == 0:
        step = found.pop("step")
        print(f"step {step}: {_summary(found)}", file=sys.stderr if options.json else sys.stdout)
        if options.json:
            print(json.dumps(found))


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if the command line is invalid. Pure."""
    parser = Parser(
        prog=program("mpidp.evaluate"),
        usage="[mpirun -np N] %(prog)s RUN [--data DIR | --text FILE | --choices FILE | --tasks NAMES] [options]",
        description="Evaluate a trained model: its loss on a split of shards or on a text, its accuracy on multiple-choice "
        "questions, or its metrics on lm-eval tasks. The work is divided among the ranks.",
    )
    add = parser.add_argument
    add_run(parser)
    add_data(parser, "to evaluate on", default="the run's data.path")
    add("--split", default="val", help="val or train (default: %(default)s)")
    add("--text", metavar="FILE", help="evaluate the loss on a UTF-8 text file (also .gz, .zst) instead of shards")
    add("--stride", type=int, default=0, help="with --text: each window starts this many tokens after the previous one. 0 means "
        "half of model.seq_len (default: %(default)s)")
    add("--choices", metavar="FILE", help="multiple-choice questions: rows (.jsonl, .json, .parquet) with context, choices and "
        "label (index from 0, or the right choice's text)")
    add("--tasks", metavar="NAME,...", help="tasks of EleutherAI's lm-eval, for example arc_easy,hellaswag "
        "(pip install 'mpidp[evaluation]')")
    add("--tasks-dir", metavar="DIR", help="folder of your own task files (.yaml) for --tasks")
    add("--allow-code", action="store_true", help="permit task files of --tasks-dir to call Python functions (!function)")
    add("--few-shot", type=int, metavar="N", help="number of examples before each item of --tasks (default: as in the task)")
    add("--limit", type=int, default=0, metavar="N", help="maximum number of items of each task of --tasks. 0 means all "
                                                          "(default: %(default)s)")
    add("--chat", action="store_true", help="with --tasks: write the prompts as chats, with the model's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system message")
    add_out(parser, "with --tasks: write all results and every item to this file (JSON)", metavar="FILE")
    add_texts(parser, "default: with --choices, 'tokens' if the tokenizer comes with a model; with --text, 'text'")
    add_tokenizer(parser)
    add_compute(parser)
    add_json(parser)
    options = parser.parse_args(arguments)
    given = [name for name in ("--text", "--choices", "--tasks") if getattr(options, name[2:]) is not None]
    if len(given) > 1:
        parser.error(f"{given[0]} and {given[1]}: give only one of them")
    _check_task_options(parser, options)
    if options.data is not None and (options.text is not None or options.choices is not None):
        note_old_spelling("--data with --text or --choices", "--tokenizer")
        options.data, options.tokenizer = None, options.tokenizer or options.data
    if options.tokenizer is not None and not given:
        parser.error("--tokenizer works only with --text, --choices or --tasks, because shards are tokens already")
    if options.special is not None and options.text is None and options.choices is None:
        parser.error("--special works only with --text or --choices, because shards are tokens already")
    if options.seq_len < 0:
        parser.error(f"--seq-len {options.seq_len}: must not be negative")
    if options.stride < 0:
        parser.error(f"--stride {options.stride}: must not be negative")
    if options.stride and options.text is None:
        parser.error("--stride works only with --text")
    return options


def _check_task_options(parser: Parser, options: argparse.Namespace) -> None:
    if options.tasks is None:
        for name in ("tasks_dir", "allow_code", "few_shot", "limit", "chat", "system", "out"):
            if getattr(options, name) not in (None, False, 0):
                parser.error(f"--{name.replace('_', '-')} works only with --tasks")
        return
    if options.data is not None:
        parser.error("--data and --tasks: give only one of them")
    if not all(name.strip() for name in options.tasks.split(",")):
        parser.error(f"--tasks {options.tasks!r} has an empty name. Give names of tasks, separated by commas")
    if options.limit < 0 or (options.few_shot or 0) < 0:
        parser.error("--limit and --few-shot must not be negative")
    if options.system is not None and not options.chat:
        parser.error("--system works only with --chat, because a system message is a part of a chat")
    if options.allow_code and options.tasks_dir is None:
        parser.error("--allow-code works only with --tasks-dir")


def _summary(found: dict[str, Any]) -> str:
    if "tasks" in found:
        return "\n" + "\n".join(
            f"{task}  {metric}  {value:.4f}" if isinstance(value, float) else f"{task}  {metric}  {value}"
            for task, figures in found["tasks"].items() for metric, value in figures.items()
        )
    if "accuracy" in found:
        return (
            f"accuracy {found['accuracy']:.4f}, normalized per character {found['accuracy_norm']:.4f}, "
            f"normalized per token {found['accuracy_token']:.4f} over {found['items']:,} items (chance {found['chance']:.4f})"
            + (f"; {found['cut_items']} contexts were truncated on the left" if found["cut_items"] else "")
        )
    bits = "unknown" if found["bits_per_byte"] is None else f"{found['bits_per_byte']:.4f}"
    return (
        f"loss {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.2f}, {bits} bits/byte "
        f"over {found['tokens']:,} tokens"
    )


def evaluate_text(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Return {loss, perplexity, bits_per_byte, tokens, step} for the file --text. BOS or an end-of-document token is inserted
    before the text. step: the step of the checkpoint.

    Each token is a target once. Its context has at least seq_len - stride tokens, or all earlier tokens if there are fewer.
    The number of ranks does not change the results. Raises UsageError if --stride is invalid, DataError if the text or the
    tokenizer is invalid, and CheckpointError if the run has no valid checkpoint. Collective over world.
    """
    from mpidp.errors import UsageError
    from mpidp.inference.loading import open_model
    from mpidp.inference.rows import read_text, warn_of_names
    from mpidp.inference.scoring import text_loss
    from mpidp.runtime.world import raise_together

    reader, loaded, encoder = open_model(options, world, options.special or "text")
    config, encoded = reader.meta["config"], None
    seq_len = config["model.seq_len"]
    with raise_together(world):
        if options.stride > seq_len:
            raise UsageError(f"--stride {options.stride} would skip tokens: the stride must be at most {seq_len} (model.seq_len)")
        if world.rank == 0:
            text = read_text(options.text)
            warn_of_names([encoder.named([text])], "texts")
            encoded = (encoder.document(text), len(text.encode()))
    ids, text_bytes = world.bcast(encoded)
    loss = text_loss(loaded, ids, seq_len, options.stride or max(1, seq_len // 2), config["train.micro_batch"])
    return _figures(loss / (len(ids) - 1), len(ids) - 1, text_bytes) | {"step": reader.meta["step"]}


def evaluate_choices(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Return {accuracy, accuracy_norm, accuracy_token, items, chance, cut_items, step} for the questions in the file
    --choices. inference/choices.py defines these values, except `step`, the step of the checkpoint. The number of ranks does
    not change the results. Raises DataError if the questions or the tokenizer are invalid, and CheckpointError if the run has
    no valid checkpoint. Collective over world."""
    from mpidp.inference.choices import accuracies, encode, read_choices
    from mpidp.inference.loading import open_model
    from mpidp.inference.rows import warn_of_names
    from mpidp.inference.scoring import log_likelihoods
    from mpidp.runtime.world import raise_together

    reader, loaded, encoder = open_model(options, world, options.special)
    seq_len, questions = reader.meta["config"]["model.seq_len"], None
    with raise_together(world):
        if world.rank == 0:
            items = read_choices(options.choices)
            warn_of_names([encoder.named([text for item in items for text in (item.context, *item.choices)])], "texts")
            questions = (items, [encode(encoder, item, seq_len, options.choices) for item in items])
    items, encoded = world.bcast(questions)
    return accuracies(items, encoded, log_likelihoods(loaded, encoded)) | {"step": reader.meta["step"]}


def evaluate_tasks(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Evaluate the model on the tasks --tasks, and write the file --out. Return {tasks: {task: {metric: value}}, step} on rank 0
    of `world`, and {} on other ranks.

    The values equal those that lm-eval computes for the exported model, on any number of ranks. A metric has lm-eval's name,
    such as "acc" or "acc_stderr", followed by ",FILTER" if the task has filters. Raises UsageError or DataError if lm-eval, a
    task or its data is missing, and CheckpointError if the run has no valid checkpoint. Collective over world.
    """
    from mpidp.inference.base_folder import BaseFolder
    from mpidp.inference.harness import figures_of, prefix_of, run_tasks, write_results
    from mpidp.inference.loading import home_of, open_model
    from mpidp.inference.shared_requests import SharedRequests
    from mpidp.inference.tasks import TaskOptions, load_tasks
    from mpidp.runtime.files import check_writable
    from mpidp.runtime.world import raise_together

    wanted = TaskOptions(
        [name.strip() for name in options.tasks.split(",")], options.tasks_dir or "", options.few_shot, options.limit,
        options.chat, options.system, options.allow_code,
    )
    tasks = None
    with raise_together(world):
        if world.rank == 0:
            if options.out is not None:
                check_writable(options.out)
            tasks = load_tasks(wanted)
    reader, loaded, encoder = open_model(options, world, "tokens")
    config, home = reader.meta["config"], home_of(reader)
    prefix = prefix_of(encoder, isinstance(reader, BaseFolder) or (home / "hf").is_dir())
    requests = SharedRequests(loaded, encoder, config["train.micro_batch"])
    found = run_tasks(requests, tasks, wanted, str(home), prefix, config["model.seq_len"], samples=options.out is not None)
    with raise_together(world):
        if found is not None and options.out is not None:
            write_results(Path(options.out), found)
    return {} if found is None else {"step": reader.meta["step"], "tasks": figures_of(found)}


def _figures(loss: float, tokens: int, text_bytes: int | None) -> dict[str, Any]:
    """Return {loss, perplexity, bits_per_byte, tokens}. `loss`: the mean loss over the tokens. `tokens`: the number of tokens.
    `text_bytes`: the number of bytes of these tokens, or None if it is not known."""
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * tokens / math.log(2) / text_bytes if text_bytes else None,
        "tokens": tokens,
    }


def evaluate(
    run: str, data: str | None, world: Any, split: str = "val", device: str = "auto", threads: int = 0, tp: int = 1, pp: int = 1,
    kind: str = "", base: str = "", seq_len: int = 0,
) -> dict[str, Any]:
    """Return {loss, perplexity, bits_per_byte, tokens, step} for a split of shards, which is divided into windows of the run's
    seq_len tokens. step: the step of the checkpoint.

    Each token except the first is a target once, unless the loss mask excludes it. bits_per_byte is the sum of the losses in
    bits, divided by the number of bytes of the same tokens. If the number of bytes is not known, bits_per_byte is None. The
    number of ranks does not change the results.

    `run`: a run or a Hugging Face folder. `data`: the folder of shards, or "" or None for the run's shards. For a Hugging Face
    folder, `data` is required. `seq_len`: the context length for a Hugging Face folder, or 0 for the model's own (at most
    USUAL_SEQ_LEN). `kind`: the value of --model.kind, for a run with a custom model. Raises DataError if the shards have
    another tokenizer than the model, or if the loss is not finite. Collective over world.
    """
    from mpidp.data.shards import TokenStream
    from mpidp.errors import DataError, UsageError
    from mpidp.inference.loading import check_same_tokenizer, load_model, open_source
    from mpidp.inference.scored_bytes import scored_bytes
    from mpidp.model.loss_chunks import chunk_rows
    from mpidp.parallel.chunked_loss import defer_head
    from mpidp.parallel.engine import Engine
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together

    grid = make_grid(world, tp, pp)
    world = grid.world
    reader = open_source(Path(run), world, seq_len)
    with raise_together(world):
        if not data and not reader.meta["config"].get("data.path"):
            raise UsageError(f"{run} is a Hugging Face folder, which names no shards to evaluate on. Give --data, --text or "
                             "--choices")
        loaded = load_model(reader, grid, device, threads, kind, base)
        stream = TokenStream(data or reader.meta["config"]["data.path"], split)
        check_same_tokenizer(reader, stream)
        config = reader.meta["config"]
        stream.keep_apart(config.get("data.documents", "joined"), config["model.seq_len"])
        own = range(world.rank, len(stream.files), world.size)
        stream.check(own, contents=stream.is_cheap(own))
        if stream.num_tokens < 2:
            raise DataError(f"{stream.path}: split {split!r} has {stream.num_tokens} tokens; at least 2 are needed")
    shape, places = loaded.model.shape, config["train.micro_batch"] * config["model.seq_len"]
    if rows := chunk_rows(config.get("train.loss", "whole"), shape, places):  # as in training, so the loss has the same bits
        first = loaded.model.part.own_range(shape.vocab_size).start
        loaded.losses = defer_head(loaded.model, shape, rows, loaded.dtype, first, loaded.tensor_comm)
    engine = Engine(
        loaded.model, loaded.device, loaded.dtype, seed=0, dropout=0.0, nominal_tokens=1, stages=loaded.stages,
        token_losses=loaded.losses, reports_loss=loaded.model.part.has_head and grid.tp.rank == 0,
    )
    loss, tokens = engine.evaluate(stream, world, config["model.seq_len"], config["train.micro_batch"], replicas=grid.replicas.dp)
    if not math.isfinite(loss):
        raise loaded.diverged("loss")
    return _figures(loss, tokens, scored_bytes(stream, world)) | {"step": reader.meta["step"]}


if __name__ == "__main__":
    run_entry(main)
