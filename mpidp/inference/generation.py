"""Generates texts for prompts or chats on all replicas. torch and MPI are imported only when generate() runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpidp.runtime.log import log


def lines_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows as JSON lines. Values that JSON lacks, such as the dates of a .parquet file, become strings. Pure."""
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace").decode()  # an unpaired surrogate is escaped as in JSON


def generate(world: Any, options: argparse.Namespace, write: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Generate a text for each prompt. On rank 0 of `world`, return one row per prompt, in order. On other ranks, return an
    empty list.

    A row has the fields of the prompt's input row, and three more. text: the generated text. tokens: the number of generated
    tokens. ended: why generation ended (tokens, eod or stop). If options.exact is "true", a text depends neither on the number
    of replicas nor on the other prompts. write: a function that first gets the first prompt (with --chat: ""), and then each
    new piece of the text that is generated for this prompt. Raises UsageError if --out cannot be written, DataError if a
    prompt or the tokenizer is invalid, and CheckpointError if the run has no valid checkpoint. Collective over world.
    """
    from mpidp.inference.chats import template_of
    from mpidp.inference.decode import continue_prompts
    from mpidp.inference.loading import load_encoder, load_model, open_source
    from mpidp.inference.rows import warn_of_names
    from mpidp.inference.sampling import Sampling
    from mpidp.model.rowwise import by_rows
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together

    sampling, exact = Sampling(options.temperature, options.top_k, options.top_p), options.exact == "true"
    rows: list[dict[str, Any]] = []
    with raise_together(world):
        if world.rank == 0:
            rows = _read(options)
    rows, moment = world.bcast((rows, time.time()))  # the current time, which a chat template may write into a prompt
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
            if exact:
                by_rows(loaded.model)
        for first in firsts:
            places = range(first, min(first + options.batch, len(rows)))
            texts |= {i: _text(template, rows[i], i) for i in places}
            encode = encoder.chat if options.chat else encoder.prompt
            groups.append({i: _encoded(encode, texts[i], seq_len, i) for i in places})
    named = encoder.named(list(texts.values())) if firsts and grid.model.rank == 0 else ("", 0)
    warn_of_names(grid.world.gather(named) or (), "prompts")
    writes, done = write if grid.world.rank == 0 else None, []
    if writes is not None:
        writes("" if options.chat else rows[0]["prompt"])
    with raise_together(grid.world):  # ranks of a replica communicate here, and raise DataError together
        for group in groups:
            done += continue_prompts(
                loaded, encoder, group, sampling, options.tokens, options.seed, options.stop, writes, exact=exact
            )
    gathered = grid.world.gather(done if grid.model.rank == 0 else []) or []
    found = sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])
    cut = sum(continuation.cut for _, continuation in found)
    if cut:
        log.warning("warning: %d of %d outputs, together with their prompts, are longer than the context of %d tokens. They "
                    "were continued with a sliding window of %d to %d tokens", cut, len(rows), seq_len, seq_len // 2, seq_len)
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
    """Return the text of the prompt in `row`. template: the chat template, or None without --chat. index: the number of the
    prompt, from 0. Raises DataError if the template rejects the chat."""
    from mpidp.errors import DataError
    from mpidp.inference.chats import rendered

    try:
        return str(row["prompt"]) if template is None else rendered(template, row)
    except DataError as error:
        raise DataError(f"prompt {index + 1}: {error}") from None


def _encoded(encode: Callable[[str], list[int]], prompt: str, seq_len: int, index: int) -> list[int]:
    """Return encode(prompt). encode: Encoder.prompt, or Encoder.chat for a chat. index: the number of the prompt, from 0. Raises
    DataError if the prompt has more than `seq_len` tokens."""
    from mpidp.errors import DataError

    try:
        ids = encode(prompt)
    except DataError as error:
        raise DataError(f"prompt {index + 1}: {error}") from None
    if len(ids) > seq_len:
        raise DataError(f"prompt {index + 1} has {len(ids)} tokens, but model.seq_len is {seq_len}. Shorten the prompt")
    return ids


def write_rows(path: Path, rows: list[dict[str, Any]], world: Any) -> None:
    """Write the rows as JSON lines. Only rank 0 writes. If the file cannot be written, print the rows, and raise UsageError.
    Collective over world."""
    from mpidp.errors import UsageError
    from mpidp.runtime.files import write_file
    from mpidp.runtime.world import raise_together

    with raise_together(world):
        try:
            if world.rank == 0:
                write_file(path, lines_of(rows).encode())
        except OSError as error:
            sys.stdout.write(lines_of(rows))  # no text is lost
            raise UsageError(f"--out {path} cannot be written ({error.strerror}). The texts are on standard output") from None
