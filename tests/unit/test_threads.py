"""Law: the number of threads changes no bit of losses and gradients in float32.

A rank of a default run has cores / ranks threads, so results that depend on the threads would depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpidp.c10d.sums import fold
from mpidp.comm.slices import global_norm, squares_of_blocks
from mpidp.model.kinds import make_model
from mpidp.model.lora import attach
from mpidp.model.shape import TransformerShape
from mpidp.parallel.chunked_loss import defer_head
from mpidp.strategies.muon import normalized
from mpidp.strategies.newton_schulz import orthogonalized

V, D, T, B = 256, 64, 288, 3  # B T D is above 32,768 elements, from which torch divides an operation among threads
BASE: dict[str, Any] = {
    "vocab_size": V, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "model_dim": D, "hidden_dim": 128, "seq_len": T,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh", "attention_bias": "q,k,v,o",
             "mlp_bias": True, "tie_embeddings": True},
    "gemma": {"qk_norm": "head", "norm_plus_one": True, "window": 40, "attention_cap": 5.0, "logit_cap": 5.0},
    "nanochat": {"norm": "layer", "norm_plus_one": True, "qk_norm": "layer", "norm_place": "both", "input_mix": True,
                 "window": 40},
}
THREADS = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def threads_are_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(work: Callable[[], list[Tensor]], names: list[str] | None = None) -> None:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(work())
    for threads, tensors in zip(THREADS[1:], found[1:], strict=True):
        differ = [i for i, (one, other) in enumerate(zip(tensors, found[0], strict=True)) if not torch.equal(one, other)]
        assert not differ, f"{threads} threads: {[names[i] for i in differ] if names else differ}"


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", ["whole", "chunked", "packed", "adapters"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_a_model(name: str, how: str) -> None:
    shape = TransformerShape(**BASE | MODELS[name])
    model = make_model(shape, seed=1)
    if how == "adapters":
        attach(model, 8, 16.0, "q,v,down", seed=1)
        for param in model.parameters():
            param.data.add_(0.01)  # an adapter's second matrix is zero at the beginning
    ids = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(2))
    documents = torch.arange(T).div(100, rounding_mode="floor").expand(B, T) if how == "packed" else None
    loss_of = defer_head(model, shape, 128, torch.float32, 0, None) if how == "chunked" else \
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]

    def work() -> list[Tensor]:
        loss = loss_of(model(ids[:, :-1], None, documents).flatten(0, 1), ids[:, 1:].flatten())
        return [loss, *torch.autograd.grad(loss / (B * T), [param for _, param in named])]

    assert_same_bits(work, ["loss", *(name for name, _ in named)])


def test_the_norm_of_a_gradient() -> None:
    flat = rand(25 << 12)
    assert_same_bits(lambda: [squares_of_blocks(flat), torch.tensor(global_norm(flat))])


@pytest.mark.parametrize("size", [(64, 64), (300, 128), (256, 512)], ids=str)
def test_the_directions_of_muon(size: tuple[int, int]) -> None:
    matrices = [rand(*size, seed=i) for i in range(3)]
    assert_same_bits(lambda: [*orthogonalized(matrices), *normalized(orthogonalized(matrices[:1])[0], torch.ones(size[0], 1))])


@pytest.mark.parametrize("ranks", [2, 5, 37])
def test_sums_of_halves_over_ranks(ranks: int) -> None:
    """Neither do the bits depend on where in the tensor a value is."""
    blocks, out = rand(ranks, 40_003).bfloat16(), torch.empty(40_003, dtype=torch.bfloat16)
    assert_same_bits(lambda: [fold(blocks, "SUM", out) or out.clone()])
    part = torch.empty(20_000, dtype=torch.bfloat16)
    fold(blocks[:, 7:20_007], "SUM", part)
    assert torch.equal(part, out[7:20_007])
