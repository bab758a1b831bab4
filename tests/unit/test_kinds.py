"""Laws of other kinds of models: sizes follow from shapes, dropout depends on the micro-batch, and unsuitable models are
rejected."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.config.command_line import from_args
from mpidp.config.model_settings import ModelSettings
from mpidp.config.resolve import model_shape
from mpidp.config.rules import TRANSFORMER_ONLY
from mpidp.config.schema import to_toml
from mpidp.errors import UsageError
from mpidp.model.kinds import make_model, saved_shape
from mpidp.model.lstm import LSTM
from mpidp.model.own import options_of
from mpidp.model.part import check_split
from mpidp.model.shape import CustomShape, LSTMShape, flops_per_token, num_parameters, shapes_of

V, D, T = 11, 8, 6
FOR_LSTM = {"options", "slices", "zero_init", "recipe", "lora_rank", "lora_alpha", "lora_targets"}  # other rules refuse these
TOKENS = torch.arange(2 * T).view(2, T) * 5 % V


def own(name: str, *words: str) -> CustomShape:
    config = from_args([f"--model.kind=tests.own_models:{name}", f"--model.model_dim={D}", f"--model.seq_len={T}", *words])
    found = model_shape(config, V)
    assert isinstance(found, CustomShape)
    return found


def shapes() -> list[Any]:
    return [LSTMShape(V, 2, D, T), LSTMShape(V, 1, D, T, dropout=0.5, tie_embeddings=True), own("Gru", "--model.dropout=0.5")]


@pytest.mark.parametrize("i", range(3))
def test_shapes_say_what_the_model_is(i: int) -> None:
    shape = shapes()[i]
    model = make_model(shape, seed=3)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes_of(shape) == named and num_parameters(shape) == sum(math.prod(size) for size in named.values())
    products = {name: math.prod(s) for name, s in named.items() if name != "embedding.weight" or "head.weight" not in named}
    assert isinstance(shape, CustomShape) or flops_per_token(shape, 0) == 6 * sum(products.values())
    assert model(TOKENS).shape == (2, T, V)
    kind = "lstm" if isinstance(shape, LSTMShape) else "tests.own_models:Gru"
    assert saved_shape(kind, dataclasses.asdict(shape), kind) == shape  # as stored in a checkpoint
    again = make_model(shape, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(UsageError, match="Use tp=1 and pp=1"):
        check_split(shape, 2, 1)
    check_split(shape, 1, 1)


@pytest.mark.parametrize("i", [1, 2])
def test_dropout_is_a_function_of_the_key(i: int) -> None:
    model = make_model(shapes()[i]).train()
    keys = [torch.tensor(k) for k in (1, 2, 1)]
    one, two, again = (model(TOKENS, key=key) for key in keys)
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert torch.equal(model.eval()(TOKENS), model(TOKENS))  # no dropout in evaluation


def test_every_setting_of_the_model_has_an_effect_on_an_lstm_or_is_refused() -> None:
    used = {"kind", *(field.name for field in dataclasses.fields(LSTMShape))}
    plain = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    refused = {name: value for name, value in plain.items() if name not in used | FOR_LSTM}
    assert refused == TRANSFORMER_ONLY


def test_an_lstm_begins_each_window_anew_and_sees_no_later_token() -> None:
    model = LSTM(LSTMShape(V, 2, D, T))
    both = model(TOKENS)
    assert torch.allclose(both[1:], model(TOKENS[1:]), atol=1e-6) and torch.allclose(both[:, :3], model(TOKENS[:, :3]), atol=1e-6)
    assert (model.layers[0].bias_ih_l0[D : 2 * D] == 1).all()
    with pytest.raises(UsageError, match="packed documents"):
        model(TOKENS, doc_ids=TOKENS)


@pytest.mark.parametrize(("name", "said"), [
    ("nobody", "has no nobody"), ("NUMBER", "NUMBER .int. is not callable"), ("unsaid", "annotated to return"),
    ("lost", "no module"), ("not_one", "returned a str"), ("fails", "no such file of weights"),
    ("Short", r"returned \(2, 11\)"), ("Tupled", "returned tuple"), ("Seer", "later tokens"),
    ("Long", "failed for shape \\(1, 1\\)"), ("Deaf", "no gradient"), ("Running", "BatchNorm"),
    ("Frozen", "embedding.weight does not require"), ("Half", "float16, but must be float32"), ("Empty", "no parameters"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_with_words(name: str, said: str) -> None:
    words = [f"--model.kind=tests.own_models:{name}", f"--model.seq_len={T}"]
    if name == "lost":
        words[0] = "--model.kind=no_such_module_of_mine:f"
    if name in ("Short", "Tupled", "Seer", "Long", "Deaf", "Running", "Frozen", "Half"):
        words.append(f"--model.model_dim={D}")
    with pytest.raises(UsageError, match=said):
        model_shape(from_args(words), V)


@pytest.mark.parametrize("kind", ["os:system", "subprocess:run", "builtins:exec", "shutil:rmtree"])
def test_a_name_in_a_run_calls_nothing_but_models(kind: str) -> None:
    saved = {"vocab_size": V, "seq_len": T, "factory": kind, "arguments": {}, "parameters": []}
    with pytest.raises(UsageError, match="must be a subclass of torch.nn.Module"):
        make_model(saved_shape(kind, saved, kind))


def test_a_factory_gets_what_it_names() -> None:
    shape = own("Gru", "--model.dropout=0.25", "--model.options=depth=2")
    assert shape.arguments == {"vocab_size": V, "model_dim": D, "dropout": 0.25, "depth": 2}
    for word, said in [("--model.options=width=3", "has no such argument"), ("--model.num_heads=2", "has no such argument"),
                       ("--model.options=model_dim=3", "which is a setting"), ("--model.options=depth", "form NAME=VALUE")]:
        with pytest.raises(UsageError, match=said):
            own("Gru", word)


@pytest.mark.parametrize("words", [
    ("--model.kind=lstm", "--model.model_dim=6"), ("--model.kind=a.b:make", "--model.options=x=1,y=é \\"),
])  # fmt: skip
def test_kinds_come_back_from_a_file(words: tuple[str, ...], tmp_path: Path) -> None:
    config = from_args(words)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert from_args([str(tmp_path / "run.toml")]) == config


def test_options() -> None:
    assert options_of("") == {}
    assert options_of("a=1, b=1e-3,c=true,d=gelu,e=false") == {"a": 1, "b": 1e-3, "c": True, "d": "gelu", "e": False}


@pytest.mark.parametrize(("words", "said"), [
    (("--model.kind=gpt",), "model.kind=gpt must be transformer, lstm, or MODULE:FACTORY"), (("--model.kind=a.:b",), "must be"),
    (("--model.options=a=1",), "requires model.kind=MODULE:FACTORY"),
    *((("--model.kind=lstm", f"--model.{name}"), "no effect with lstm") for name in
      ("num_heads=2", "head_dim=8", "rope_scaling=linear:2", "norm_eps=0.1")),
])  # fmt: skip
def test_settings_of_other_kinds(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_args(words)
