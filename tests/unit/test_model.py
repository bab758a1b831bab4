"""Laws of the Transformer: attention equals the formula, positions are relative, documents are separate, and dropout is a pure
function."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mpidp.model.attention import Attention
from mpidp.model.dropout import keyed_dropout
from mpidp.model.part import whole
from mpidp.model.rope import rope_table, rotate
from mpidp.model.shape import TransformerShape, default_hidden_dim, flops_per_token, num_parameters
from mpidp.model.transformer import Transformer

SHAPE = TransformerShape(
    vocab_size=50, num_layers=2, num_heads=4, num_kv_heads=4, model_dim=32, hidden_dim=48, seq_len=24, dropout=0.3
)


def key(number: int) -> Tensor:
    return torch.tensor(number)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SHAPE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def formula(module: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V head by head in float64, with each key-value head serving its group of query heads."""
    x = x.double()
    t, e = x.shape[1], module.head_dim
    q, k, v = ((x @ w.weight.detach().double().T) for w in (module.q, module.k, module.v))
    allowed = torch.ones(t, t, dtype=torch.bool).tril() if mask is None else mask
    heads = []
    for h in range(module.num_heads):
        shared = h // (module.num_heads // module.num_kv_heads)
        qh, kh, vh = q[..., h * e : (h + 1) * e], k[..., shared * e : (shared + 1) * e], v[..., shared * e : (shared + 1) * e]
        scores = qh @ kh.transpose(1, 2) / math.sqrt(e)
        heads.append(torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1) @ vh)
    return torch.cat(heads, dim=-1) @ module.o.weight.detach().double().T


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_formula(kv_heads: int, masked: bool) -> None:
    torch.manual_seed(1)
    shape = replace(SHAPE, num_kv_heads=kv_heads)
    module = Attention(shape, whole(shape))
    x = 2 * rand(3, 10, 32)
    nowhere = torch.ones(10, module.head_dim), torch.zeros(10, module.head_dim)  # cos, sin at position 0: no rotation
    mask = None
    if masked:
        ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
        mask = torch.ones(10, 10, dtype=torch.bool).tril() & (ids[:, None] == ids[None, :])
    expected = formula(module, x, mask)
    given = None if mask is None else mask.expand(3, 1, 10, 10)
    with torch.no_grad():
        torch.testing.assert_close(module(x, *nowhere, given).double(), expected, rtol=1e-5, atol=1e-6)
        exact = module.double()(x.double(), *(t.double() for t in nowhere), given)
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-13)


def test_grouped_queries_are_repeated_heads() -> None:
    grouped, full = Transformer(replace(SHAPE, num_kv_heads=2), seed=3), Transformer(SHAPE, seed=3)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    ids = tokens(2, 24)
    torch.testing.assert_close(grouped(ids), full(ids), rtol=1e-5, atol=1e-5)


def test_rotary_positions_are_relative_and_keep_lengths() -> None:
    cos, sin = rope_table(8, 64, 10000.0)
    q, k = rand(1, 1, 1, 8, seed=1), rand(1, 1, 1, 8, seed=2)

    def score(m: int, n: int) -> float:
        return float((rotate(q, cos[m : m + 1], sin[m : m + 1]) * rotate(k, cos[n : n + 1], sin[n : n + 1])).sum())

    for distance in (0, 1, 5, 30):
        scores = [score(n + distance, n) for n in (0, 1, 7, 33)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)
    assert abs(score(5, 0) - score(0, 5)) > 1e-3 and abs(score(3, 0) - score(4, 0)) > 1e-4
    x = rand(2, 4, 64, 8)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, cos, sin)[:, :, 0], x[:, :, 0])  # no rotation at position 0


def test_rotary_angles_are_the_formula() -> None:
    cos, sin = rope_table(6, 5, 100.0)
    for position in range(5):
        for i in range(3):
            angle = position / 100.0 ** (2 * i / 6)
            for column in (i, i + 3):  # half-split: the second half of a row repeats the first
                assert float(cos[position, column]) == pytest.approx(math.cos(angle), abs=1e-6)
                sign = -1 if column == i else 1  # rotate() multiplies the exchanged halves by sin
                assert float(sin[position, column]) == pytest.approx(sign * math.sin(angle), abs=1e-6)


def test_positions_can_be_given() -> None:
    model, ids = Transformer(SHAPE, seed=1), tokens(2, 10)
    explicit = model(ids, torch.arange(10).expand(2, 10))
    torch.testing.assert_close(explicit, model(ids), rtol=1e-5, atol=1e-5)
    shifted = model(ids, torch.arange(10).expand(2, 10) + 14)
    torch.testing.assert_close(shifted, model(ids), rtol=1e-4, atol=1e-4)  # shifting all positions changes nothing


def test_the_future_is_not_seen() -> None:
    model, ids = Transformer(SHAPE, seed=1), tokens(1, 24)
    changed = ids.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % SHAPE.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] - after[:, 15:]).abs().amax(dim=-1).min() > 1e-4


def test_packed_documents_are_separate_documents() -> None:
    model, ids = Transformer(SHAPE, seed=1), tokens(2, 24)
    cuts = [(0, 7), (7, 8), (8, 24)]
    doc_ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(cuts)]).expand(2, 24)
    positions = torch.cat([torch.arange(b - a) for a, b in cuts]).expand(2, 24)
    packed = model(ids, positions, doc_ids)
    for a, b in cuts:
        torch.testing.assert_close(packed[:, a:b], model(ids[:, a:b]), rtol=1e-5, atol=1e-5)
    assert (packed - model(ids)).abs().max() > 1e-2


def test_dropout_is_a_pure_function_of_key_and_site() -> None:
    x = rand(4, 8, 16)
    state = torch.get_rng_state()
    first = keyed_dropout(x, 0.4, key(123), 3)
    torch.manual_seed(77)
    assert torch.equal(first, keyed_dropout(x, 0.4, key(123), 3))
    torch.set_rng_state(state)
    for other in (keyed_dropout(x, 0.4, key(124), 3), keyed_dropout(x, 0.4, key(123), 4), keyed_dropout(x, 0.4, key(2**31), 3)):
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    flat = keyed_dropout(x.flatten(), 0.4, key(123), 3)
    assert torch.equal(first.flatten(), flat)  # depends on the position only, not on the shape


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(p: float) -> None:
    n = 1 << 20
    kept = keyed_dropout(torch.ones(n), p, key(9), 0)
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1.0 / (1.0 - p)]))
    share = float((kept != 0).float().mean())
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert float(kept.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / n))


def test_masks_of_keys_and_sites_are_unrelated() -> None:
    n = 1 << 18
    masks = [keyed_dropout(torch.ones(n), 0.5, key(k), site) != 0 for k in (0, 1, 2, 2**32 - 1) for site in (0, 1, 2)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(float((a == b).float().mean()) - 0.5) < 6 * 0.5 / math.sqrt(n)
        assert abs(float((a[1:] == a[:-1]).float().mean()) - 0.5) < 6 * 0.5 / math.sqrt(n)


def test_the_bits_of_a_mask_are_pinned() -> None:
    """A resumed run must get the same masks as before: only change this deliberately."""
    mask = (keyed_dropout(torch.ones(16), 0.5, key(1), 2) != 0).int().tolist()
    assert mask == [0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(("p", "k"), [(0.0, key(1)), (0.5, None)])
def test_no_dropout_is_the_input_itself(p: float, k: Tensor | None) -> None:
    x = rand(3)
    assert keyed_dropout(x, p, k, 0) is x


def test_dropout_has_the_gradient_of_its_mask() -> None:
    x = rand(50).requires_grad_()
    keyed_dropout(x, 0.5, key(5), 1).sum().backward()
    assert torch.equal(x.grad, keyed_dropout(torch.ones(50), 0.5, key(5), 1))


def test_a_key_drops_in_the_whole_model_and_evaluation_does_not() -> None:
    model, ids = Transformer(SHAPE, seed=1), tokens(2, 10)
    assert torch.equal(model(ids, key=key(4)), model(ids, key=key(4)))
    assert not torch.equal(model(ids, key=key(4)), model(ids, key=key(5)))
    assert torch.equal(model(ids), Transformer(replace(SHAPE, dropout=0.0), seed=1)(ids, key=key(4)))


def test_the_same_seed_is_the_same_model() -> None:
    one, two, other = Transformer(SHAPE, seed=5), Transformer(SHAPE, seed=5), Transformer(SHAPE, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert all(p.dtype == torch.float32 for p in one.parameters())


def test_initial_sizes() -> None:
    model = Transformer(replace(SHAPE, vocab_size=500, model_dim=128, hidden_dim=256), seed=1)
    std, narrow = 1 / math.sqrt(128), 1 / math.sqrt(128 * 4)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert float(model.blocks["0"].attention.q.weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert float(model.blocks["1"].feed_forward.down.weight.detach().std()) == pytest.approx(narrow, rel=0.05)
    assert float(model.blocks["0"].attention.o.weight.detach().std()) == pytest.approx(narrow, rel=0.05)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters() if p.dim() == 1)


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(replace(SHAPE, tie_embeddings=True), seed=1)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    model(tokens(1, 5)).sum().backward()
    assert num_parameters(SHAPE) - num_parameters(replace(SHAPE, tie_embeddings=True)) == 50 * 32


def test_counts() -> None:
    expected = 2 * 50 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert num_parameters(SHAPE) == expected == sum(p.numel() for p in Transformer(SHAPE).parameters())
    assert flops_per_token(SHAPE, expected) == 6 * (expected - 50 * 32) + 12 * 2 * 24 * 32
    q, tables = "blocks.1.attention.q.weight", ["embedding.weight", "norm.weight"]
    assert flops_per_token(SHAPE, expected, [q, "head.weight", *tables]) == flops_per_token(SHAPE, expected) - 2 * (32 + 50) * 32
    tied = replace(SHAPE, tie_embeddings=True)
    assert flops_per_token(tied, 0, [q, *tables]) == flops_per_token(tied, 0) - 2 * (32 + 50) * 32
    assert [default_hidden_dim(d) for d in (24, 128, 384, 768)] == [64, 384, 1024, 2048]


def test_one_graph_serves_all_blocks() -> None:
    """torch.compile gives up after 8 graphs of one function, and then runs it uncompiled."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = Transformer(replace(SHAPE, num_layers=10, dropout=0.1), seed=0), CompileCounter()
    for block in model.blocks.values():
        block.compile(dynamic=False, backend=counter)
    model(torch.zeros(2, SHAPE.seq_len, dtype=torch.int64), key=torch.tensor(5)).sum().backward()
    assert counter.frame_count == 1


def test_every_shape_of_a_batch_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that computes more shapes than another, because it has the rest of an epoch or of an evaluation, computes the same
    bits."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = Transformer(replace(SHAPE, num_layers=1), seed=0), CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    with torch._dynamo.config.patch(recompile_limit=8):  # restores the value that compile_blocks() sets
        model.compile_blocks()
        for rows in range(1, 11):
            model(torch.zeros(rows, 4, dtype=torch.int64))
    assert counter.frame_count == 10
