"""Text with a key-value cache beside text without one: the same model, prompt and draws, in turns.

    python benchmarks/generate.py [--model 14M] [--seq-len 512] [--prompt 16] [--tokens 256] [--batch 8] [--repeats 3]

`gain` is the median over repeats of the time without over the time with the cache in the same repeat. `batch` goes on from so
many prompts at the same time, with the cache; its tokens a second are those of all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from inside import MODELS
from mpi4py import MPI

from mpidp.comm.grid import make_grid
from mpidp.decode import Row, decode
from mpidp.loading import Loaded
from mpidp.model.shape import TransformerShape, default_hidden_dim, num_parameters
from mpidp.model.transformer import Transformer
from mpidp.sampling import Sampling, seed_of


class Forgetful(Transformer):
    """Has no cache: every token is computed from the whole window."""

    def new_cache(self, positions: int) -> None:
        return None


def grow(loaded: Loaded, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """(seconds, what was added)."""
    rows = [Row(loaded.model, ids, tokens, seed_of(0, i), lambda token: False) for i, ids in enumerate(prompts)]
    began = time.perf_counter()
    decode(loaded, rows, Sampling(), eod=-1)
    return time.perf_counter() - began, [row.ids for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="14M", choices=list(MODELS))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16, help="its tokens")
    parser.add_argument("--tokens", type=int, default=256, help="to add")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = MODELS[options.model]
    hidden = given.get("hidden_dim", default_hidden_dim(given["model_dim"]))
    heads = given["num_heads"]
    shape = TransformerShape(257, given["num_layers"], heads, heads, given["model_dim"], hidden, options.seq_len)
    grid = make_grid(MPI.COMM_SELF)
    cached, plain = (Loaded(kind(shape).eval(), torch.device("cpu"), torch.float32, grid) for kind in (Transformer, Forgetful))
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 256, (options.batch, options.prompt), generator=draw).tolist()
    times: dict[str, list[float]] = {"without": [], "with": [], "batch": []}
    for _ in range(options.repeats):
        seconds, slow = grow(plain, prompts[:1], options.tokens)
        times["without"].append(seconds)
        seconds, fast = grow(cached, prompts[:1], options.tokens)
        times["with"].append(seconds)
        assert fast == slow, "the cache changed a token"
        seconds, several = grow(cached, prompts, options.tokens)
        times["batch"].append(seconds)
        assert several[:1] == fast, "the batch changed a token"
    print(f"{num_parameters(shape) / 1e6:.1f} M parameters, seq_len {options.seq_len}, a prompt of {options.prompt} tokens, "
          f"{options.tokens} added, {options.threads} threads, {options.repeats} repeats")
    for name, found in times.items():
        made = options.tokens * (options.batch if name == "batch" else 1)
        print(f"{name:<8} {statistics.median(found):8.2f} s {made / statistics.median(found):9.1f} tokens/s")
    gains = sorted(slow / fast for slow, fast in zip(times["without"], times["with"], strict=True))
    print(f"gain     {statistics.median(gains):8.1f} (from {gains[0]:.1f} to {gains[-1]:.1f})")


if __name__ == "__main__":
    main()
