"""`python -m mpidp.export RUN OUT --format hf [--dtype bfloat16]`: export a model in Hugging Face's format (docs/huggingface.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpidp.runtime.command import Parser, begin, run_entry


def main() -> None:
    """Export a model and print a summary on rank 0."""
    parser = Parser(prog="python -m mpidp.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one checkpoint in it")
    parser.add_argument("out", metavar="OUT", help="folder to create; it must not exist")
    parser.add_argument("--format", default="hf", choices=("hf",), help="hf: for transformers, vLLM, llama.cpp (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights (%(default)s)")
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="largest weights file, in 10^9 bytes (%(default)s)")
    options, world = begin(lambda: _checked(parser))
    summary = export(world, options.run, options.out, options.dtype, int(options.max_file_gb * 1e9))
    if world.rank == 0:
        print(summary)


def _checked(parser: Parser) -> argparse.Namespace:
    options = parser.parse_args()
    if not options.max_file_gb > 0:
        parser.error("--max-file-gb: must be above 0")
    return options


def export(world: Any, run: str, out: str, dtype: str = "float32", max_file_bytes: int = 5 * 10**9) -> str:
    """Export a run's newest valid checkpoint to the folder `out`; return a one-line summary on rank 0. Only rank 0 writes.

    CheckpointError, UsageError. Collective over world.
    """
    from mpidp.checkpoint.resume import open_run
    from mpidp.data.tokenizer import load_tokenizer
    from mpidp.errors import UsageError
    from mpidp.hf.tokens import huggingface_json
    from mpidp.hf.write import write_folder
    from mpidp.inference.loading import load_model
    from mpidp.model.lora import merged
    from mpidp.model.shape import TransformerShape, num_parameters
    from mpidp.parallel.grid import make_grid
    from mpidp.runtime.world import raise_together

    reader, grid = open_run(Path(run), world), make_grid(world)
    summary, folder = "", reader.path.parent.parent
    with raise_together(world):
        kind = reader.meta["config"]["model.kind"]
        if kind != "transformer":
            raise UsageError(f"{run} has model.kind={kind}: only model.kind=transformer can be exported (as Llama)")
        if world.rank == 0:
            shape = TransformerShape(**reader.meta["shape"])
            tokenizer, eod = huggingface_json(load_tokenizer(folder, reader.meta["eod"])), reader.meta["eod"]
            weight = lambda name: reader[f"model/{name}"]  # noqa: E731
            if reader.meta["config"].get("model.lora_rank", 0):
                model = load_model(reader, grid, "cpu", 0).model
                weight = merged(model.state_dict(), reader.meta["config"]["model.lora_alpha"]).__getitem__
            write_folder(
                Path(out), shape, weight, tokenizer, eod, dtype, max_file_bytes, folder / "hf"
            )
            step, count = reader.meta["step"], num_parameters(shape)
            summary = f"{out}: LlamaForCausalLM with {count:,} parameters in {dtype}, from step {step} of {run}"
    return summary


if __name__ == "__main__":
    run_entry(main)
