"""Laws of adapters and frozen parameters: the initial model equals the base, the merged model equals the adapted one, and frozen
parameters do not change."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.config.schema import Config
from mpidp.errors import CheckpointError, UsageError
from mpidp.inference.plausible import check_settings, check_shape
from mpidp.model.frozen import trained
from mpidp.model.lora import attach, is_adapter, merged, saved_names
from mpidp.model.part import part_of, whole
from mpidp.model.shape import LSTMShape, TransformerShape
from mpidp.model.starting import base_weights, prepared, trained_on_meta, trained_sizes
from mpidp.model.transformer import Transformer

SHAPE = TransformerShape(50, 2, 4, 2, 32, 64, 16)
IDS = torch.arange(48).view(3, 16) % 50
ALL = "q,k,v,o,gate,up,down"


def starting_model(wanted: Any, shape: Any, part: Any) -> Any:
    return prepared(base_weights(wanted, shape, part), wanted, shape, part)


def settings(**changed: Any) -> dict[str, Any]:
    return Config().flat() | {k.replace("__", "."): v for k, v in changed.items()}


def test_at_the_start_an_adapter_adds_nothing() -> None:
    base, model = Transformer(SHAPE, seed=3), Transformer(SHAPE, seed=3)
    attach(model, 4, 16.0, ALL, seed=3)
    assert torch.equal(model(IDS), base(IDS))
    for (_, a), (_, b) in zip(base.named_parameters(), named_base(model), strict=True):
        assert torch.equal(a, b)


def named_base(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if not is_adapter(name)]


@pytest.mark.parametrize(("rank", "alpha", "targets"), [(1, 1.0, "q,v"), (4, 16.0, ALL), (16, 7.0, "o, down"), (3, 0.0, "gate")])
def test_merged_is_unmerged(rank: int, alpha: float, targets: str) -> None:
    model, plain = Transformer(SHAPE, seed=3), Transformer(SHAPE, seed=4)
    attach(model, rank, alpha, targets, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in trained(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            assert is_adapter(name) and name.split(".")[-2] in targets
    plain.load_state_dict(merged(dict(model.named_parameters()), alpha))
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    moved = (plain(IDS) - Transformer(SHAPE, seed=3)(IDS)).abs().max()
    assert moved > 0.001 if alpha else moved == 0


def test_what_it_adds_is_the_formula_and_its_gradient() -> None:
    """Compare with W x + (alpha / r) B A x in float64. The base has no gradient; initially A's gradient is zero, because B is."""
    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5, bias=False)}).double()
    attach(layer, 2, 3.0, "q", seed=1)
    q: Any = layer["q"].double()
    x = torch.randn(4, 6, dtype=torch.float64)
    q(x).sum().backward()
    assert q.weight.grad is None and not q.lora_a.grad.any() and q.lora_b.grad.any()
    with torch.no_grad():
        q.lora_b.copy_(torch.randn(5, 2))
        torch.testing.assert_close(q(x), x @ (q.weight + 1.5 * q.lora_b @ q.lora_a).T)


def test_an_adapter_is_drawn_by_its_own_name() -> None:
    found = []
    for targets in (ALL, "v"):
        model = Transformer(SHAPE, seed=3)
        attach(model, 4, 16.0, targets, seed=3)
        found.append(dict(model.named_parameters()))
    name = "blocks.1.attention.v.lora_a"
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[0][name.replace("1", "0", 1)])
    assert found[0][name].abs().max() <= 1 / 32**0.5 and found[0][name].std() > 0.4 / 32**0.5
    assert len([n for n in found[1] if is_adapter(n)]) == 4


def test_a_checkpoint_holds_adapters_where_there_are_any() -> None:
    model = Transformer(SHAPE)
    names = [name for name, _ in model.named_parameters()]
    assert saved_names(names) == names
    attach(model, 2, 16.0, "q", seed=0)
    assert sorted(saved_names([name for name, _ in model.named_parameters()])) == sorted(
        f"blocks.{i}.attention.q.lora_{x}" for i in (0, 1) for x in "ab"
    )


@pytest.mark.parametrize(("rank", "targets"), [(0, ""), (4, ALL), (4, "head"), (1, "v"), (2, "q,head")])
@pytest.mark.parametrize("lies", [False, True])
def test_a_checkpoint_of_any_adapters_is_plausible_and_a_larger_one_is_not(rank: int, targets: str, lies: bool) -> None:
    """A LoRA run saves fewer tensors than its model has layers, for example those of the head alone."""
    shape, how = replace(SHAPE, num_layers=40), settings(model__lora_rank=rank, model__lora_targets=targets)
    sizes = trained_sizes(how, shape, whole(shape))
    files = [{"bytes": 4 * sum(math.prod(size) for size in sizes.values())}]
    shape = replace(shape, model_dim=16 * SHAPE.model_dim, vocab_size=16 * SHAPE.vocab_size) if lies else shape
    meta = {"config": how, "fingerprint": {"threads": 1}, "shape": asdict(shape), "files": files, "tensors": sizes}
    check_settings(Path("step_1"), meta)
    with pytest.raises(CheckpointError, match="40 layers, and .* parameters are saved") if lies else nullcontext():
        check_shape(Path("step_1"), meta, shape)


@pytest.mark.parametrize("shape", [SHAPE, LSTMShape(50, 2, 32, 16)])
def test_layers_that_no_model_has_are_refused_before_they_are_listed(shape: Any) -> None:
    meta = {"config": settings(), "fingerprint": {"threads": 1}, "shape": asdict(replace(shape, num_layers=2**31))}
    with pytest.raises(CheckpointError, match=r"num_layers=2147483648 is not an integer in 1\.\.65536"):
        check_settings(Path("step_1"), meta)


@pytest.mark.parametrize(("rank", "targets", "words"), [
    (4, "q,w", r"names w, which this model does not have.*layers: down, gate, .*q, up"), (4, " ,", "names no layer"),
    (17, "k", r"lora_rank=17.*blocks.0.attention.k \(16 x 32\).*at most 16"),
])  # fmt: skip
def test_adapters_that_cannot_be(rank: int, targets: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        attach(Transformer(SHAPE), rank, 16.0, targets, seed=0)


def test_an_adapter_of_no_layer_is_not_merged() -> None:
    with pytest.raises(ValueError, match="q.lora_a is an adapter without a layer"):
        merged({"q.lora_a": torch.ones(1, 2)}, 1.0)


@pytest.mark.parametrize(("patterns", "left"), [
    ("", 21), ("embedding.*", 20), ("blocks.0.*, blocks.1.*", 3), ("*.attention.?.weight", 13), ("*norm*", 16),
    ("blocks.*,embedding.weight,head.weight", 1),
])  # fmt: skip
def test_patterns_freeze_what_they_match(patterns: str, left: int) -> None:
    for shape in (SHAPE, replace(SHAPE, tie_embeddings=True)) if "head" not in patterns else (SHAPE,):
        found = dict(trained(starting_model(settings(optim__freeze=patterns), shape, whole(shape))))
        sizes = trained_sizes(settings(optim__freeze=patterns), shape, whole(shape))
        assert {name: tuple(p.shape) for name, p in found.items()} == sizes
        assert len(found) == left - (shape != SHAPE)
    assert len(trained_on_meta(settings(optim__freeze=patterns), SHAPE, whole(SHAPE))) == left


@pytest.mark.parametrize(("changed", "words"), [
    ({"optim__freeze": "embeding.*"}, r"optim.freeze: 'embeding.\*' matches no parameter. .*embedding.weight"),
    ({"optim__freeze": "head.*,layers.*"}, r"layers.\*' matches no parameter"),
    ({"optim__freeze": "*"}, "freezes all trainable parameters"),
    ({"optim__freeze": "*lora*"}, "lora.* matches no parameter"),
    ({"optim__freeze": "*lora*", "model__lora_rank": 2}, "freezes all trainable parameters"),
])  # fmt: skip
def test_freezing_nothing_or_all_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trained_sizes(settings(**changed), SHAPE, whole(SHAPE))


def test_a_stage_of_a_pipeline_must_have_something_to_train() -> None:
    first, last = (part_of(SHAPE, stage, 2, 0, 1) for stage in (0, 1))
    with pytest.raises(UsageError, match="of a pipeline stage"):
        trained_sizes(settings(optim__freeze="embedding.*,blocks.*"), SHAPE, first)
    assert list(trained_sizes(settings(optim__freeze="embedding.*,blocks.*"), SHAPE, last)) == ["norm.weight", "head.weight"]
    assert [name for name, _ in trained(starting_model(settings(optim__freeze="embedding.*,blocks.*"), SHAPE, last))] == [
        "norm.weight", "head.weight",
    ]


def test_adapters_of_some_layers_may_be_frozen() -> None:
    model = starting_model(settings(optim__freeze="blocks.0.*", model__lora_rank=2), SHAPE, whole(SHAPE))
    assert {name.split(".")[1] for name, _ in trained(model)} == {"1"} and len(trained(model)) == 14
    sizes = trained_sizes(settings(optim__freeze="blocks.0.*", model__lora_rank=2), SHAPE, whole(SHAPE))
    assert {name: tuple(p.shape) for name, p in trained(model)} == sizes
