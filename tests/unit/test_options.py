"""Laws of the Transformer's options: settings and shape agree, sizes follow from them, and contradictions are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from mpidp.config.command_line import from_args
from mpidp.config.model_settings import ModelSettings, automatic, transformer_shape
from mpidp.config.schema import Config, fields_of
from mpidp.errors import UsageError
from mpidp.model.kinds import saved_shape
from mpidp.model.option_checks import option_problems
from mpidp.model.options import CHOICES, DEFAULTS
from mpidp.model.rope_scaling import rope_scaling
from mpidp.model.shape import TransformerShape, flops_per_token, num_parameters, shapes_of

SHAPE = TransformerShape(50, 3, 4, 2, 32, 48, 24)


def test_settings_and_shape_have_the_same_options() -> None:
    settings = {key: (about, value) for key, about, value in fields_of(Config())}
    for name, default in DEFAULTS.items():
        about, value = settings[f"model.{name}"]
        assert value == default and about.metadata["choices"] == CHOICES.get(name, ())
    model = replace(ModelSettings(), window=7, qk_norm="head", norm_place="both")
    assert transformer_shape(model, 9).changed() == {"window": 7, "qk_norm": "head", "norm_place": "both"}


def test_a_checkpoint_without_options_opens() -> None:
    sizes = {"vocab_size": 50, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "hidden_dim": 48}
    saved = sizes | {"seq_len": 24}
    assert saved_shape("transformer", saved) == SHAPE
    with pytest.raises(ValueError, match="model.window_layers='ab' must have one letter per layer"):
        saved_shape("transformer", saved | {"window": 4, "window_layers": "ab"})
    with pytest.raises(ValueError, match=r"model.window=\[\] must be of type int"):
        saved_shape("transformer", saved | {"window": []})


SIZES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]] = {  # options, added and removed parameters
    "no gate": ({"gated": False}, {}, {"feed_forward.gate.weight"}),
    "biases of attention": ({"attention_bias": "q, k,v"}, {"attention.q.bias": (32,), "attention.k.bias": (16,),
                                                           "attention.v.bias": (16,)}, set()),
    "biases": ({"attention_bias": "o", "mlp_bias": True},
               {"attention.o.bias": (32,), "feed_forward.gate.bias": (48,), "feed_forward.up.bias": (48,),
                "feed_forward.down.bias": (32,)}, set()),
    "norm of heads": ({"qk_norm": "head"}, {"attention.q_norm.weight": (8,), "attention.k_norm.weight": (8,)}, set()),
    "norm of layers": ({"qk_norm": "layer"}, {"attention.q_norm.weight": (32,), "attention.k_norm.weight": (16,)}, set()),
    "norms after": ({"norm_place": "after"}, {"attention_out_norm.weight": (32,), "feed_forward_out_norm.weight": (32,)},
                    {"attention_norm.weight", "feed_forward_norm.weight"}),
    "mix of the input": ({"input_mix": True}, {"input_mix.weight": (2,)}, set()),
    "four norms": ({"norm_place": "both"}, {"attention_out_norm.weight": (32,), "feed_forward_out_norm.weight": (32,)}, set()),
    "LayerNorm": ({"norm": "layer"}, {"attention_norm.bias": (32,), "feed_forward_norm.bias": (32,), "": (32,)}, set()),
}


@pytest.mark.parametrize("name", SIZES)
def test_options_add_and_remove_parameters(name: str) -> None:
    options, added, removed = SIZES[name]
    shape, plain = replace(SHAPE, **options), shapes_of(SHAPE)
    wanted = {key: size for key, size in plain.items() if key.split(".", 2)[-1] not in removed}
    wanted |= {f"blocks.{layer}.{key}": size for layer in range(3) for key, size in added.items() if key}
    if options == {"norm": "layer"}:
        wanted["norm.bias"] = (32,)
    assert shapes_of(shape) == wanted
    assert num_parameters(shape) == sum(map(math.prod, wanted.values()))


def test_learned_positions_have_a_table() -> None:
    shape = replace(SHAPE, positions="learned")
    assert shapes_of(shape)["positions.weight"] == (24, 32)
    assert shapes_of(replace(shape, position_rows=99))["positions.weight"] == (99, 32)
    assert flops_per_token(shape, num_parameters(shape)) == flops_per_token(SHAPE, num_parameters(SHAPE))
    assert automatic(replace(ModelSettings(), positions="learned"))["position_rows"] == 128


def test_a_window_reduces_the_operations_of_attention() -> None:
    n = num_parameters(SHAPE)
    whole, windowed = flops_per_token(SHAPE, n), flops_per_token(replace(SHAPE, window=8, window_layers="wwf"), n)
    assert whole - windowed == 12 * 2 * (24 - 8) * 32
    assert flops_per_token(replace(SHAPE, window=99), n) == whole


def test_letters_are_repeated_over_the_layers() -> None:
    shape = replace(SHAPE, num_layers=7, rotary_layers="yyyn", window=5, window_layers="wf")
    assert [shape.is_rotary(layer) for layer in range(7)] == [True, True, True, False, True, True, True]
    assert [shape.window_of(layer) for layer in range(4)] == [5, 0, 5, 0]
    assert replace(SHAPE, window=5).window_of(2) == 5 and SHAPE.window_of(0) == 0 and SHAPE.is_rotary(2)


WRONG = {  # options: words of the message
    "model.activation='tanh' must be one of 'silu', 'gelu', 'gelu_tanh', 'relu2'": {"activation": "tanh"},
    "model.attention_bias='q,w' names w": {"attention_bias": "q,w"},
    "model.rotary_layers='yx' must have one letter per layer, 'y' or 'n'": {"rotary_layers": "yx"},
    "model.rotary_dims=6 must be even and at most 4, the head size": {"rotary_dims": 6, "head_size": 4},
    "model.window_layers=wf requires model.window above 0": {"window_layers": "wf"},
    "model.window_rope_scaling=linear:2 requires model.window_rope_theta above 0": {
        "window": 3, "window_rope_scaling": "linear:2"},
    "model.position_rows=30 requires model.positions=learned": {"position_rows": 30},
    "model.seq_len=24 is more than model.position_rows=20": {"positions": "learned", "position_rows": 20},
    "model.rotary_dims=4 requires model.positions=rotary": {"positions": "learned", "rotary_dims": 4},
    "model.rope_scaling=linear:2 requires model.positions=rotary": {"positions": "learned", "rope_scaling": "linear:2"},
    "model.parallel=True requires model.norm_place=before": {"parallel": True, "norm_place": "both"},
    "model.rope_scaling has 1 short and 1 long factors, but 8 rotary dimensions need 4 of each": {
        "rope_scaling": "longrope:8,1,2,3"},
    "model.window_rope_scaling='dynamic:2' must be of the form 'linear:FACTOR'": {
        "window": 3, "window_rope_theta": 1e4, "window_rope_scaling": "dynamic:2"},
    "model.logit_cap=nan must be 0 or more": {"logit_cap": float("nan")},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_contradiction_is_refused_by_name(words: str) -> None:
    assert any(words in problem for problem in option_problems(replace(SHAPE, **WRONG[words])))


def test_settings_are_checked_in_the_same_way() -> None:
    with pytest.raises(UsageError, match="model.window_layers=wf requires model.window above 0"):
        from_args(["--model.window_layers=wf"])
    with pytest.raises(UsageError, match="model.window=8 requires model.kind=transformer"):
        from_args(["--model.kind=lstm", "--model.window=8"])


SCALINGS = {
    "linear:2": ("linear", 2.0, 1.0), "yarn:4,32": ("yarn", 4.0, 1.138629436111989), "yarn:4,32,32,1,1.5,0": ("yarn", 4.0, 1.5),
    "longrope:8,1.25,1,2,3,4": ("longrope", 1.0, 1.25), "llama3:8,1,4,16": ("llama3", 8.0, 1.0),
}


@pytest.mark.parametrize("text", SCALINGS)
def test_rotary_scalings_are_parsed(text: str) -> None:
    found = rope_scaling(text)
    assert found is not None and (found.kind, found.factor, found.attention) == pytest.approx(SCALINGS[text])


@pytest.mark.parametrize("text", [
    "linear", "linear:0.5", "linear:2,3", "yarn:4", "yarn:4,8,1,2", "yarn:4,8,32,1,1,2", "longrope:8,1,2", "longrope:8,1,0,1",
    "dynamic:2", "llama3:nan,1,4,8", "ntk:2", "yarn:inf,8",
])
def test_other_rotary_scalings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be of the form 'linear:FACTOR'"):
        rope_scaling(text)
