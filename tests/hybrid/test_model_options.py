"""Laws of meshes for the options of the Transformer: N ranks equal one rank for shapes that together use every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpidp.config.model_settings import transformer_shape
from mpidp.config.schema import Config
from mpidp.model.options import CHOICES, DEFAULTS
from tests.hybrid.gradients import assert_gradients
from tests.hybrid.test_meshes import CLOSE, Mesh, assert_close, fits, on, with_mesh
from tests.tiny import corpus

pytestmark = pytest.mark.mpi
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation": "gelu_tanh", "gated": False, "attention_bias": "q,k,v,o", "mlp_bias": True, "norm": "layer",
        "positions": "learned", "position_rows": 20, "tie_embeddings": True,
    },
    "gemma": {
        "activation": "gelu_tanh", "qk_norm": "head", "norm_plus_one": True, "norm_place": "both", "window": 5,
        "window_layers": "wf", "window_rope_theta": 100.0, "window_rope_scaling": "linear:2", "embedding_scale": 5.5,
        "attention_scale": 0.3, "attention_cap": 3.0, "logit_cap": 4.0, "tie_embeddings": True, "head_dim": 10,
    },
    "olmo": {
        "qk_norm": "layer", "norm_place": "after", "rotary_layers": "yyn", "attention_bias": "q,v", "residual_scale": 0.7,
        "logit_scale": 0.5, "window": 6, "mlp_bias": True, "rope_scaling": "llama3:8,1,4,8",
    },
    "neox": {
        "activation": "gelu", "gated": False, "attention_bias": "q,k,v,o", "mlp_bias": True, "norm": "layer", "parallel": True,
        "rotary_dims": 4,
    },
    "nanochat": {
        "activation": "relu2", "gated": False, "qk_norm": "layer", "norm_plus_one": True, "norm": "layer", "norm_place": "both",
        "positions": "learned", "attention_bias": "o", "logit_cap": 5.0,
    },
}
SMALL: list[Mesh] = [(1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2), (2, 2, 1)]
EVERY = [(name, mesh) for name in MODELS for mesh in SMALL]


def model_on(name: str, mesh: Mesh, **more: Any) -> dict[str, Any]:
    return MODELS[name] | {"num_kv_heads": 4 if mesh[2] == 4 else 2} | more


def of_rows(rows: list[tuple[Any, ...]]) -> list[str]:
    return ["-".join(str(one).replace(", ", "x").strip("()") for one in row) for row in rows]


def test_the_models_use_every_option() -> None:
    shapes = [transformer_shape(Config().with_values(model=model).model, 9) for model in MODELS.values()]
    assert set().union(*(shape.changed() for shape in shapes)) == set(DEFAULTS)
    for option, choices in CHOICES.items():
        assert {getattr(shape, option) for shape in shapes} == set(choices), option


@pytest.mark.parametrize(("name", "sequence"), [(name, sequence) for name in MODELS for sequence in (False, True)], ids=str)
def test_gradients_of_every_model_are_those_of_one_rank(
    shared_folder: Path, shared_tmp: Path, name: str, sequence: bool
) -> None:
    """With biases that are not zero and gains that are not one, on all meshes of at most four ranks."""
    data = corpus(shared_folder)
    for mesh in [mesh for mesh in SMALL if mesh[0] == 1 and fits(mesh) and (mesh[2] > 1 or not sequence)]:
        model, train = model_on(name, mesh, seq_len=15), {"global_batch": 5, "recompute": mesh == (1, 2, 2)}
        alone = with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=model, train=train)
        run = with_mesh(data, shared_tmp / "run", mesh, model=model, train=train, mesh={"sequence": sequence})
        assert_gradients(alone, run, CLOSE, noise=0.1)


@pytest.mark.parametrize(("name", "mesh"), EVERY, ids=of_rows(EVERY))
def test_every_mesh_teaches_every_model_the_same(shared_folder: Path, shared_tmp: Path, name: str, mesh: Mesh) -> None:
    """With dropout, clipping and evaluations. Stages alone are exact to the bit, except with a tied embedding."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, model, train = corpus(shared_folder), model_on(name, mesh), {"steps": 8, "eval_every": 4}
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=model, train=train))
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=model, train=train))
    assert_close(run, alone, str(mesh))
    if mesh[2] == 1 and not model.get("tie_embeddings"):
        assert (run.sha256, run.learned) == (alone.sha256, alone.learned)
