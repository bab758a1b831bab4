"""Laws of meshes for the options of the Transformer: N ranks equal one rank for shapes that together use every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import mpidp.evaluate
import mpidp.generate
from mpidp.config.model_settings import transformer_shape
from mpidp.config.schema import Config
from mpidp.model.options import CHOICES, DEFAULTS
from tests.hybrid.gradients import assert_gradients
from tests.hybrid.test_meshes import CLOSE, Mesh, assert_close, assert_foretold, fits, on, with_mesh
from tests.tiny import DEVICE, WORLD, at, corpus

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
    "mix": {"activation": "relu2", "gated": False, "qk_norm": "head", "input_mix": True, "logit_cap": 5.0},
}
SMALL: list[Mesh] = [(1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2), (2, 2, 1)]
WHOLE = {"mix"}  # models that cannot be split into stages
EVERY = [(name, mesh) for name in MODELS for mesh in SMALL if name not in WHOLE or mesh[1] == 1]
SHARDED = [(name, level, tp) for name in MODELS for level in (1, 2, 3) for tp in (1, 2)]


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
        if name in WHOLE and mesh[1] > 1:
            continue
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


@pytest.mark.parametrize(("name", "level", "tp"), SHARDED, ids=of_rows(SHARDED))
def test_every_model_is_sharded(shared_folder: Path, shared_tmp: Path, name: str, level: int, tp: int) -> None:
    """No level changes a bit. With tp, also with divided positions."""
    mesh = (2, 1, tp)
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, train = corpus(shared_folder), {"steps": 6, "eval_every": 4}
    split, comm = {"sequence": tp > 1}, {"transport": "messages"} if level == 1 else {}

    def config(folder: str, mesh: Mesh, /, **more: dict[str, Any]) -> Config:
        return with_mesh(data, shared_tmp / folder, mesh, model=model_on(name, mesh), train=train, **more)

    run = on(mesh, config("run", mesh, mesh=split | {"shard": level}, comm=comm))
    alone = on((1, 1, 1), config("alone", (1, 1, 1)))
    assert_close(run, alone, name)
    whole = alone if tp == 1 else on((1, 1, tp), config("whole", (1, 1, tp), mesh=split))
    assert (run.sha256, run.learned) == (whole.sha256, whole.learned)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_resumes_on_any_other_mesh(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """dp2 -> tp2 with divided positions -> pp2 with two chunks each -> dp2, level 3 -> one rank. Then use what was saved."""
    data, model, run = corpus(shared_folder), model_on(name, (1, 1, 1)), shared_tmp / "run"
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), model=model, train={"steps": 10}))
    meshes: list[tuple[Mesh, dict[str, Any]]] = [
        ((2, 1, 1), {}), ((1, 1, 2), {"sequence": True}), ((1, 2, 1), {"interleave": 2}), ((2, 1, 1), {"shard": 3}),
    ]
    for i, (mesh, split) in enumerate(meshes):
        if fits(mesh) and not (name in WHOLE and mesh[1] > 1):
            on(mesh, with_mesh(data, run, mesh, model=model, train={"steps": 2 * i + 2}, mesh=split))
    last = on((1, 1, 1), with_mesh(data, run, (1, 1, 1), model=model, train={"steps": 10}))
    assert last.losses == pytest.approx(alone.losses, rel=CLOSE)
    prompts = shared_tmp / "prompts.txt"
    if WORLD.rank == 0:
        prompts.write_text("the \nrank of\n")
    WORLD.barrier()

    def use(comm: MPI.Intracomm, pp: int, tp: int) -> tuple[float, list[str]]:
        found = mpidp.evaluate.evaluate(str(run), str(data), comm, device=DEVICE, threads=1, tp=tp, pp=pp)
        how = [f"--device={DEVICE}", "--threads=1", f"--tp={tp}", f"--pp={pp}", "--tokens=8", f"--prompts={prompts}"]
        rows = mpidp.generate.generate(comm, mpidp.generate.read_options([str(run), *how]))
        return found["loss"], [row["text"] for row in rows]

    loss, texts = at(1, lambda comm: use(comm, 1, 1))[0]
    for mesh in [mesh for mesh in ((1, 2, 1), (1, 1, 2), (1, 2, 2)) if fits(mesh) and (name not in WHOLE or mesh[1] == 1)]:
        found = at(mesh[1] * mesh[2], lambda comm, mesh=mesh: use(comm, *mesh[1:]))
        assert found[0] == (pytest.approx(loss, rel=CLOSE), texts), mesh  # rank 0 returns the texts


@pytest.mark.parametrize(("mesh", "name", "freeze", "lora"), [
    ((1, 1, 2), "neox", "*.attention.*,*norm*", {}), ((1, 2, 1), "olmo", "embedding.*,blocks.0.*", {}),
    ((1, 1, 2), "gemma", "*.q_norm.*,embedding.*", {}), ((1, 2, 2), "gpt2", "positions.*,*.bias", {}),
    ((2, 1, 1), "gpt2", "", {"lora_rank": 2, "lora_targets": "q,o,up,down"}),
    ((2, 1, 1), "olmo", "", {"lora_rank": 2}),
], ids=str)
def test_frozen_parameters_and_adapters_beside_biases(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, name: str, freeze: str, lora: dict[str, Any]
) -> None:
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, model = corpus(shared_folder), model_on(name, mesh, **lora)
    same = {"model": model, "train": {"steps": 6, "eval_every": 4}, "optim": {"freeze": freeze}}
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), **same))
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **same, mesh={"sequence": mesh[2] > 1}))
    assert_close(run, alone, name)
    if mesh[2] == 1:
        assert run.sha256 == alone.sha256


@pytest.mark.parametrize(("name", "sequence"), [(name, sequence) for name in MODELS for sequence in (False, True)], ids=str)
def test_sent_bytes_are_those_foretold(shared_folder: Path, shared_tmp: Path, name: str, sequence: bool) -> None:
    if not fits((1, 1, 2)):
        pytest.skip("needs two ranks")
    train, split = {"global_batch": 2, "recompute": name in ("olmo", "neox")}, {"sequence": sequence}
    model = model_on(name, (1, 1, 2))
    assert_foretold(with_mesh(corpus(shared_folder), shared_tmp / "run", (1, 1, 2), train=train, model=model, mesh=split))
