"""Measures how much faster generation is with the key-value cache, for the same model, prompts and samples.

    python benchmarks/generate.py [--model 14M] [--seq-len 512] [--prompts 16,256] [--tokens 256] [--batch 8] [--repeats 3]

`gain` is the time without the cache divided by the time with the cache, as a median over repeats. It is given for wall time and
for CPU time, which is less disturbed by other processes. The gain grows with the context, so it is measured after a short and
after a long prompt. `batch` generates from --batch prompts at the same time. Its tokens per second are the total over the
prompts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from inside import MODELS
from mpi4py import MPI

from mpidp.inference.decode import DecodedText, decode
from mpidp.inference.loading import Loaded
from mpidp.inference.sampling import Sampling, seed_of
from mpidp.model.rowwise import by_rows
from mpidp.model.shape import TransformerShape, default_hidden_dim, num_parameters
from mpidp.model.transformer import Transformer
from mpidp.parallel.grid import make_grid


class Forgetful(Transformer):
    """A Transformer without a cache, which computes every token from the whole context."""

    def new_cache(self, positions: int) -> None:
        return None


def grow(loaded: Loaded, prompts: list[list[int]], tokens: int) -> tuple[float, float, list[list[int]]]:
    """Return (wall seconds, CPU seconds, token ids of each prompt with its continuation)."""
    rows = [DecodedText(loaded.model, ids, tokens, seed_of(0, i), lambda token: False) for i, ids in enumerate(prompts)]
    began, busy = time.perf_counter(), time.process_time()
    decode(loaded, rows, Sampling(), ends=())
    return time.perf_counter() - began, time.process_time() - busy, [row.ids for row in rows]


def measure(plain: Loaded, cached: Loaded, prompts: list[list[int]], options: argparse.Namespace) -> None:
    times: dict[str, list[tuple[float, float]]] = {"without": [], "with": [], "batch": []}
    for _ in range(options.repeats):
        *seconds, slow = grow(plain, prompts[:1], options.tokens)
        times["without"].append(tuple(seconds))
        *seconds, fast = grow(cached, prompts[:1], options.tokens)
        times["with"].append(tuple(seconds))
        *seconds, several = grow(cached, prompts, options.tokens)
        times["batch"].append(tuple(seconds))
        if several[:1] != fast or slow != fast:
            print(f"texts differ: with cache {slow != fast}, in a batch {several[:1] != fast}")
    print(f"prompts of {len(prompts[0])} tokens, {options.tokens} generated")
    for name, found in times.items():
        made = options.tokens * (options.batch if name == "batch" else 1)
        seconds, busy = (statistics.median(one[i] for one in found) for i in (0, 1))
        print(f"  {name:<8} {seconds:8.2f} s {made / seconds:9.1f} tokens/s {1e3 * busy / made:9.2f} ms CPU per token")
    for i, what in enumerate(("time", "CPU time")):
        gains = sorted(slow[i] / fast[i] for slow, fast in zip(times["without"], times["with"], strict=True))
        print(f"  gain in {what}: {statistics.median(gains):.1f} (from {gains[0]:.1f} to {gains[-1]:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="14M", choices=list(MODELS))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompts", default="16,256", help="lengths of the prompts in tokens")
    parser.add_argument("--tokens", type=int, default=256, help="number of tokens to generate")
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
    plain, cached = (Loaded(kind(shape).eval(), torch.device("cpu"), torch.float32, grid) for kind in (Forgetful, Transformer))
    by_rows(cached.model)
    print(f"{num_parameters(shape) / 1e6:.1f} M parameters, seq_len {options.seq_len}, {options.threads} threads, "
          f"{options.repeats} repeats")
    draw = torch.Generator().manual_seed(1)
    for length in map(int, options.prompts.split(",")):
        measure(plain, cached, torch.randint(0, 256, (options.batch, length), generator=draw).tolist(), options)


if __name__ == "__main__":
    main()
