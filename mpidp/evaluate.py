"""`[mpirun -np N] python -m mpidp.evaluate RUN --data DIR [--json]`: loss over a whole validation split, shared over ranks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from mpidp.entry import Parser, begin, run_entry


def main() -> None:
    """Command line -> figures on rank 0."""
    parser = Parser(prog="python -m mpidp.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one checkpoint in it")
    parser.add_argument("--data", metavar="DIR", help="shards; default: those the run was trained on")
    parser.add_argument("--split", default="val", help="val or train")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads a rank; 0: cores / ranks of the node")
    parser.add_argument("--tp", type=int, default=1, help="ranks that compute every layer together, as mesh.tp in training")
    parser.add_argument("--pp", type=int, default=1, help="stages of layers, as mesh.pp in training")
    parser.add_argument("--json", action="store_true", help="one JSON line on standard output, everything else on standard error")
    options, world = begin(parser.parse_args)
    found = evaluate(
        options.run, options.data, world, options.split, options.device, options.threads, options.tp, options.pp
    )
    if world.rank == 0:
        step = found.pop("step")
        said = (
            f"step {step}: loss {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.2f}, "
            f"{found['bits_per_byte']:.4f} bits/byte over {found['tokens']:,} tokens"
        )
        print(said, file=sys.stderr if options.json else sys.stdout)
        if options.json:
            print(json.dumps(found))


def evaluate(
    run: str, data: str | None, world: Any, split: str = "val", device: str = "auto", threads: int = 0, tp: int = 1, pp: int = 1
) -> dict[str, Any]:
    """{loss, perplexity, bits_per_byte, tokens, step}; every token of the split but its first is a target once, in windows of
    the run's seq_len. The same figures at any number of ranks. DataError for data of another tokenizer. Collective over world."""
    from mpidp.comm.grid import make_grid
    from mpidp.comm.mesh import together
    from mpidp.data.shards import TokenStream
    from mpidp.engine import Engine
    from mpidp.errors import DataError
    from mpidp.loading import load_model, open_run

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
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * tokens / math.log(2) / max(1, stream.text_bytes),
        "tokens": tokens,
        "step": reader.meta["step"],
    }


if __name__ == "__main__":
    run_entry(main)
