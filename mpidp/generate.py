"""`python -m mpidp.generate RUN --prompt TEXT --tokens N [--temperature --top-k --seed]`: text from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpidp.entry import Parser, begin, run_entry


def main() -> None:
    """Command line -> text on rank 0's standard output."""
    parser = Parser(prog="python -m mpidp.generate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one checkpoint in it")
    parser.add_argument("--prompt", default="\n", help="the text to go on from")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="choose among this many likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="DIR", help="where tokenizer.json is; default: RUN's own copy")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads a rank; 0: as in training")
    parser.add_argument("--tp", type=int, default=1, help="ranks that compute every layer together, as mesh.tp in training")
    parser.add_argument("--pp", type=int, default=1, help="stages of layers, as mesh.pp in training")
    options, world = begin(lambda: _checked(parser))
    text = generate(world, options)
    if world.rank == 0:
        print(text)


def _checked(parser: Parser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.tokens < 0 or options.temperature < 0 or options.top_k < 0:
        parser.error("--tokens, --temperature and --top-k cannot be negative")
    return options


def generate(world: Any, options: argparse.Namespace) -> str:
    """Prompt and continuation. Rank 0 computes, or the first replica of the mesh; the others sleep meanwhile: the text does not
    depend on their number. Collective over world."""
    from mpidp.comm.grid import make_grid
    from mpidp.comm.mesh import polite_barrier, together
    from mpidp.data.tokenizer import load_tokenizer
    from mpidp.errors import DataError
    from mpidp.loading import load_model, open_run

    grid = make_grid(world, options.tp, options.pp)
    reader = open_run(Path(options.run), world)
    text = ""
    with together(grid.world):
        if grid.world.rank < grid.parts:
            loaded = load_model(reader, grid, options.device, options.threads)
            tokenizer = load_tokenizer(options.data or reader.path.parent.parent, reader.meta["eod"])
            if tokenizer.vocab_size > loaded.model.shape.vocab_size:
                raise DataError(
                    f"the tokenizer has {tokenizer.vocab_size} tokens, the model {loaded.model.shape.vocab_size}: give --data"
                )
    if grid.world.rank < grid.parts:
        ids = tokenizer.encode(options.prompt).tolist() or [tokenizer.eod]
        new = sample(loaded, ids, options.tokens, options.temperature, options.top_k, options.seed)
        text = options.prompt + tokenizer.decode(new)
    polite_barrier(grid.world)
    return text


def sample(loaded: Any, ids: list[int], tokens: int, temperature: float, top_k: int, seed: int) -> list[int]:
    """`tokens` ids that go on from ids, drawn on the CPU so that every device draws alike. Collective over the ranks that have a
    part of the model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids, begin = list(ids), len(ids)
    for _ in range(tokens):
        logits = loaded.last_logits(torch.tensor([ids[-loaded.model.shape.seq_len :]], device=loaded.device))
        if temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        if 0 < top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
        ids.append(int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)))
    return ids[begin:]


if __name__ == "__main__":
    run_entry(main)
