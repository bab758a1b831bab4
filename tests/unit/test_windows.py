"""Laws of windows, soft-caps and packed documents: blocks equal a dense mask, a cache equals the whole sequence, and options
change nothing in how a model is initialized, recomputed or adapted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpidp.model import documents, scores
from mpidp.model.cache import Cache, attend, joined
from mpidp.model.documents import Documents, dense_mask, within
from mpidp.model.joint_cache import join
from mpidp.model.lora import attach, merged
from mpidp.model.part import Part, part_of
from mpidp.model.rowwise import by_rows
from mpidp.model.scores import Scores, causal
from mpidp.model.shape import TransformerShape, shapes_of
from mpidp.model.transformer import Transformer

SHAPE = TransformerShape(50, 4, 4, 2, 32, 48, 24)
EVERYTHING: dict[str, Any] = {  # options that can be combined
    "attention_bias": "q,k,v,o", "mlp_bias": True, "qk_norm": "head", "norm_place": "both", "norm_plus_one": True, "window": 5,
    "window_layers": "wf", "rotary_layers": "yyn", "rotary_dims": 4, "window_rope_theta": 100.0, "embedding_scale": 3.0,
    "residual_scale": 0.5, "attention_scale": 0.4, "logit_scale": 0.7, "attention_cap": 2.0, "logit_cap": 4.0,
}
SHAPES = {
    "window": replace(SHAPE, window=5), "everything": replace(SHAPE, **EVERYTHING),
    "GPT-2": replace(SHAPE, positions="learned", norm="layer", gated=False, activation="gelu_tanh", attention_bias="q,k,v,o",
                     mlp_bias=True, position_rows=30),
    "parallel": replace(SHAPE, parallel=True, qk_norm="layer", norm="layer"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS", 4)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, how: Scores) -> Tensor:
    """Attention with a dense mask."""
    found = q @ k.transpose(-2, -1) * (how.scale or 1 / math.sqrt(q.shape[-1]))
    found = how.cap * torch.tanh(found / how.cap) if how.cap else found
    return found.masked_fill(~allowed, -math.inf).softmax(-1) @ v


HOW = [
    Scores(), Scores(5), Scores(4, 0.3), Scores(1), Scores(30), Scores(cap=0.7), Scores(5, 0.6, 1.5), Scores(9), Scores(0, 0.2),
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("t", [1, 3, 4, 13, 24])
def test_blocks_equal_a_dense_mask(how: Scores, t: int) -> None:
    given = [rand(2, 3, t, 8, seed=i).requires_grad_() for i in range(3)]
    allowed = dense_mask(torch.zeros(2, t, dtype=torch.int64), how.window)
    results = [causal(*given, how), formula(*given, allowed, how)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result.square().sum(), given) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [0, 6])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_documents_equal_a_dense_mask(how: Scores, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(documents.GROUP, "cpu", group)
    given = [rand(2, 3, 24, 8, seed=i).requires_grad_() for i in range(3)]
    lengths = [[1, 2, 2, 14, 1, 3, 1], [24]]  # a group of three documents, a document alone, a group
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    found = Documents(ids)
    grouped = [(5, False), (14, True), (5, False)]
    assert found.groups == [grouped if group else [(length, True) for length in lengths[0]], [(24, True)]]
    results = [within(found, *given, how), formula(*given, dense_mask(ids, how.window), how)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result.square().sum(), given) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_mask_is_that_of_transformers() -> None:
    """A position attends to itself and to the window - 1 positions before it."""
    allowed = dense_mask(torch.zeros(1, 6, dtype=torch.int64), 3)[0, 0]
    assert allowed.int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0],
                                      [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("name", SHAPES)
def test_packed_documents_are_separate_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cuts = Transformer(SHAPES[name], seed=1), tokens(2, 24), [(0, 7), (7, 8), (8, 24)]
    doc_ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(cuts)]).expand(2, 24)
    positions = torch.cat([torch.arange(b - a) for a, b in cuts]).expand(2, 24)
    packed = model(ids, positions, doc_ids)
    for a, b in cuts:
        torch.testing.assert_close(packed[:, a:b], model(ids[:, a:b]), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("mpidp.model.transformer.DENSE", 6)
    torch.testing.assert_close(model(ids, positions, doc_ids), packed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_equals_the_whole_sequence(name: str, rows: bool) -> None:
    model, ids = Transformer(SHAPES[name], seed=1).eval(), tokens(2, 24)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    with torch.no_grad():
        wanted = model(ids)
        if rows:
            by_rows(model)
        caches, found, done = [model.new_cache(24), model.new_cache(24)], [], 0
        for cut in (9, 1, 1, 4, 6, 1, 1, 1):
            found.append(model(ids[:, done : done + cut], caches=caches))
            done += cut
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [[9] + [1] * 15, [1] * 24, [2, 20, 1, 1], [4, 3, 3, 3, 11]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_keeps_only_the_window(name: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of single positions are those of a cache that keeps all positions, bit for bit."""
    model, ids, found = Transformer(SHAPES[name], seed=1).eval(), tokens(1, 24), []
    by_rows(model)
    for slack in (64, 1):
        monkeypatch.setattr("mpidp.model.cache.SLACK", slack)
        cache, done, logits = Cache(24), 0, []
        with torch.no_grad():
            for cut in cuts:
                logits.append(model(ids[:, done : done + cut], caches=[cache]))
                done += cut
        found.append(torch.cat(logits, 1))
        for layer, (keys, _) in cache.kept.items():
            window = SHAPES[name].window_of(layer)
            assert keys.shape[1] == (min(24, window + slack) if window else 24)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert set(cuts[1:]) != {1} or torch.equal(*found)


@pytest.mark.parametrize("name", SHAPES)
def test_recomputing_blocks_changes_nothing(name: str) -> None:
    found = []
    for recompute in (False, True):
        model = Transformer(replace(SHAPES[name], dropout=0.1), seed=1)
        model.recompute = recompute
        model(tokens(2, 24), key=torch.tensor(3)).square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", SHAPES)
def test_initial_weights_do_not_depend_on_the_part(name: str) -> None:
    shape = SHAPES[name]
    state = Transformer(shape, seed=7).state_dict()
    assert {key: tuple(p.shape) for key, p in state.items()} == shapes_of(shape)
    for stage in range(2):
        part: Part = part_of(shape, stage, 2, 0, 1)
        piece = Transformer(shape, seed=7, part=part)
        assert {key: tuple(p.shape) for key, p in piece.named_parameters()} == part.sizes(shapes_of(shape))
        assert all(torch.equal(p, state[key]) for key, p in piece.named_parameters())
    for key, p in state.items():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float("bias" not in key and not shape.norm_plus_one))), key


@pytest.mark.parametrize("name", SHAPES)
def test_stages_together_are_the_model(name: str) -> None:
    shape, ids = SHAPES[name], tokens(2, 24)
    x: Any = ids
    for stage in range(3):
        x = Transformer(shape, seed=7, part=part_of(shape, stage, 3, 0, 1))(x, length=24)
    assert torch.equal(x, Transformer(shape, seed=7)(ids))


@pytest.mark.parametrize("name", ["GPT-2", "everything"])
def test_adapters_of_layers_with_biases_can_be_merged(name: str) -> None:
    model = Transformer(SHAPES[name], seed=1)
    attach(model, 2, 4.0, "q,k,v,o,up,down", 5)
    for key, p in model.named_parameters():
        if key.endswith(("bias", "lora_b")):
            nn.init.normal_(p, 0.0, 0.3)
    plain = Transformer(SHAPES[name], seed=2)
    plain.load_state_dict(merged(model.state_dict(), 4.0))
    torch.testing.assert_close(plain(tokens(2, 24)), model(tokens(2, 24)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_near(name: str) -> None:
    model = Transformer(SHAPES[name], seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(tokens(2, 24))
    near.float().square().mean().backward()
    wanted = model(tokens(2, 24))
    assert float((near - wanted).detach().norm() / wanted.detach().norm()) < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_joined_caches_keep_only_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of equal length that are computed together have the bits of each one alone."""
    monkeypatch.setattr("mpidp.model.cache.SLACK", 2)
    model, ids, found = Transformer(replace(SHAPE, window=5, window_layers="wf"), seed=1).eval(), tokens(2, 24), []
    by_rows(model)
    for together in (True, False):
        caches = [Cache(24), Cache(24)]
        for row, cache in enumerate(caches):
            model(ids[row : row + 1, :9], caches=[cache])
        found.append([])
        for place in range(9, 24):
            if together:
                join(caches)
                assert joined(caches)
            found[-1].append(model(ids[:, place : place + 1], caches=caches))
    assert torch.equal(torch.cat(found[0], 1), torch.cat(found[1], 1))


def test_joined_caches_that_kept_other_positions_are_computed_alone() -> None:
    """One row of joined caches took its positions together, the other row one by one: their places in the tensors differ."""
    torch.manual_seed(0)
    q, k, v, how = torch.randn(2, 2, 70, 4), torch.randn(2, 2, 70, 4), torch.randn(2, 2, 70, 4), Scores(2, None, 0.0)
    caches = [Cache(80), Cache(80)]

    def take(rows: slice, cut: int) -> Tensor:
        at = caches[rows][0].length
        found = attend(caches[rows], 0, *(x[rows, :, at : at + cut] for x in (q, k, v)), how)
        for cache in caches[rows]:
            cache.length += cut
        return found

    take(slice(2), 1)
    join(caches)
    take(slice(1), 68)
    for _ in range(68):
        take(slice(1, 2), 1)
    assert not joined(caches)
    assert torch.allclose(take(slice(2), 1), causal(q, k, v, how)[:, :, 69:], atol=1e-6)
