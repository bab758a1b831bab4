"""Measures the cost of a generated token after a short and after a long prompt, for one prompt and for a batch.

    python benchmarks/generate.py [--model 14M] [--seq-len 512] [--prompts 16,256] [--tokens 64] [--batch 8] [--repeats 3]

| row | what |
|---|---|
| one | one prompt, with the key-value cache |
| without | one prompt without the cache: every token is computed from the whole context |
| batch | --batch prompts of equal length together; the bits are those of each prompt alone |
| inexact | the same with --exact=false |
| transformers, its batch | generate() of transformers with its cache, on the exported model, if transformers is installed |

The cost of a token is a difference of CPU times, divided by --tokens. The difference is the time for --tokens + 1 tokens minus
the time for one token, which includes the prompt. The cost is a median over repeats, in which the rows alternate. All rows must
generate the same tokens with greedy decoding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from inside import MODELS
from mpi4py import MPI

from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.hf.tokens import huggingface_json
from mpidp.hf.write import write_folder
from mpidp.inference.decode import DecodedText, decode
from mpidp.inference.loading import Loaded
from mpidp.inference.sampling import Sampling
from mpidp.model.rowwise import by_rows
from mpidp.model.shape import TransformerShape, default_hidden_dim, num_parameters
from mpidp.model.transformer import Transformer
from mpidp.parallel.grid import make_grid

Program = Callable[[list[list[int]], int], list[list[int]]]  # prompts of equal length, number of tokens -> prompts and texts


class Forgetful(Transformer):
    """A Transformer without a cache, which computes every token from the whole context."""

    def new_cache(self, positions: int) -> None:
        return None


def ours(model: Any, exact: bool) -> Program:
    loaded = Loaded(model.eval(), torch.device("cpu"), torch.float32, make_grid(MPI.COMM_SELF))
    if exact:
        by_rows(model)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        rows = [DecodedText(model, ids, tokens, 0, lambda token: False) for ids in prompts]
        decode(loaded, rows, Sampling(0.0), exact=exact)
        return [row.ids for row in rows]

    return generate


def theirs(model: Transformer, folder: Path) -> Program:
    from transformers import AutoModelForCausalLM

    tokenizer = huggingface_json(ByteTokenizer())
    write_folder(folder / "hf", model.shape, model.state_dict().__getitem__, tokenizer, SpecialTokens(None, (256,)))
    loaded = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        found = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                                do_sample=False, use_cache=True, pad_token_id=256)
        return found.tolist()  # type: ignore[no-any-return]

    return generate


def measure(programs: dict[str, Program], prompts: list[list[int]], options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.repeats):
        texts = {}
        for name, generate in programs.items():
            some, spent = prompts if "batch" in name or name == "inexact" else prompts[:1], []
            for tokens in (1, options.tokens + 1):
                began = time.process_time()
                texts[name] = generate(some, tokens)[0]
                spent.append(time.process_time() - began)
            seconds[name].append((spent[1] - spent[0]) / options.tokens)
        if others := [name for name, text in texts.items() if text != texts["one"]]:
            print(f"other tokens than one: {', '.join(others)}")
    print(f"after a prompt of {len(prompts[0])} tokens, CPU time of a token of every prompt:")
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, seconds["one"], strict=True))
        print(f"  {name:<22} {1e3 * statistics.median(found):8.2f} ms, {ratio:6.2f} times one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="14M", choices=list(MODELS))
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompts", default="16,256", help="lengths of the prompts in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="number of tokens to generate")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = MODELS[options.model]
    hidden = given.get("hidden_dim", default_hidden_dim(given["model_dim"]))
    heads = given["num_heads"]
    shape = TransformerShape(257, given["num_layers"], heads, heads, given["model_dim"], hidden, options.seq_len)
    model, forgetful = Transformer(shape), Forgetful(shape)
    print(f"{num_parameters(shape) / 1e6:.1f} M parameters, seq_len {options.seq_len}, {options.threads} threads, "
          f"{options.repeats} repeats, batches of {options.batch}")
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        if find_spec("transformers") is not None:
            programs["transformers"] = programs["transformers, its batch"] = theirs(model, Path(folder))
        inexact = ours(copy.deepcopy(model), exact=False)
        one = ours(model, exact=True)
        programs = {"one": one, "without": ours(forgetful, exact=True), "batch": one, "inexact": inexact} | programs
        draw = torch.Generator().manual_seed(1)
        for length in map(int, options.prompts.split(",")):
            measure(programs, torch.randint(0, 256, (options.batch, length), generator=draw).tolist(), options)


if __name__ == "__main__":
    main()
