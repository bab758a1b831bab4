"""Laws of the loss in chunks: loss and gradients are those of the cross entropy of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpidp.model.loss_chunks import AUTO_CHUNKS, CHUNK_LOGITS, chunk_rows
from mpidp.model.shape import LSTMShape, TransformerShape
from mpidp.model.transformer import Transformer
from mpidp.parallel.chunked_loss import ChunkedLoss, defer_head

N, D, V = 37, 16, 99


def shape_of(**options: Any) -> TransformerShape:
    return TransformerShape(**{
        "vocab_size": V, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "model_dim": D, "hidden_dim": 24, "seq_len": N,
    } | options)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N,))
    targets[[3, 36]] = -100
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), targets


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, shape: TransformerShape) -> Tensor:
    logits = hidden @ weight.T * shape.logit_scale
    logits = shape.logit_cap * torch.tanh(logits / shape.logit_cap) if shape.logit_cap else logits
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("options", [{}, {"logit_cap": 5.0}, {"logit_scale": 0.3}, {"logit_cap": 5.0, "logit_scale": 0.3}])
def test_loss_and_gradients_are_those_of_all_logits(rows: int, options: dict[str, float]) -> None:
    shape, (hidden, weight, targets) = shape_of(**options), inputs()
    wanted = whole(hidden, weight, targets, shape)
    found = ChunkedLoss(shape, lambda: [weight], rows, torch.float32)(hidden, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss / 7, (hidden, weight)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_evaluation_computes_none() -> None:
    shape, (hidden, weight, targets) = shape_of(), inputs()
    loss = ChunkedLoss(shape, lambda: [weight.detach()], 8, torch.float32)
    (found,) = torch.autograd.grad(loss(hidden, targets), (hidden,))
    (wanted,) = torch.autograd.grad(whole(hidden, weight, targets, shape), (hidden,))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        value = loss(hidden, targets)
    assert not value.requires_grad and float(value) == float(loss(hidden, targets).detach())


def test_bfloat16_products_are_those_of_autocast() -> None:
    shape, (hidden, weight, targets) = shape_of(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
    wanted = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    found = ChunkedLoss(shape, lambda: [weight], 8, torch.bfloat16)(hidden, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_a_deferred_head_has_the_same_gradients(tied: bool) -> None:
    shape, (_, _, targets) = shape_of(tie_embeddings=tied, logit_cap=4.0), inputs()
    tokens, gradients = torch.randint(0, V, (1, N)), []
    for chunked in (False, True):
        model = Transformer(shape, seed=1)
        loss = defer_head(model, shape, 8, torch.float32, 0, None) if chunked else None
        out = model(tokens).flatten(0, 1)
        (F.cross_entropy(out, targets, reduction="sum") if loss is None else loss(out, targets)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-5)


def test_auto_is_chunked_if_the_logits_are_large() -> None:
    large = shape_of(vocab_size=50304)
    rows = CHUNK_LOGITS // 50304 // 64 * 64
    assert chunk_rows("auto", large, AUTO_CHUNKS * rows) == rows == chunk_rows("chunked", large, 1)
    assert chunk_rows("auto", large, AUTO_CHUNKS * rows - 1) == 0 == chunk_rows("whole", large, 10**6)
    assert chunk_rows("chunked", shape_of(vocab_size=10**9), 1) == 64
    assert chunk_rows("auto", LSTMShape(50304, 1, 8, 8), 10**6) == 0
