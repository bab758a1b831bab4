"""Laws of model.slices: with a given number of slices, every mesh gives one hash and one list of losses, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from tests.hybrid.test_meshes import CLOSE, Mesh, assert_close, fits, on, with_mesh
from tests.laws.test_adapters_on import replayed
from tests.laws.test_resume import crashed_in
from tests.tiny import Ran, corpus

pytestmark = pytest.mark.mpi
SLICES = 4
MESHES: list[Mesh] = [  # (dp, pp, tp) of 2, 4 and 8 ranks
    (dp, pp, tp) for dp, pp, tp in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)) if 2 <= dp * pp * tp <= 8
]
ODD = {"model_dim": 40, "hidden_dim": 60, "vocab_size": 261, "qk_norm": "head"}  # nothing is a multiple of a vector's length
WAYS: list[dict[str, dict[str, Any]]] = [
    {"model": ODD | {"norm": "layer", "activation": "gelu", "attention_bias": "q,k,v,o", "mlp_bias": True}},
    {"model": ODD, "optim": {"name": "muon"}},
    {"model": ODD, "optim": {"name": "normuon", "cautious_decay": True, "weight_decay": 0.3, "momentum_warmup": 6}},
    {"model": ODD, "optim": {"name": "sgd"}, "comm": {"transport": "messages"}, "mesh": {"shard": 1}},
    {"model": ODD, "optim": {"name": "muon"}, "comm": {"transport": "messages"}, "mesh": {"shard": 1}},
    {"model": {"tie_embeddings": True, "logit_cap": 20.0}, "train": {"loss": "chunked"}},
    {"model": {"positions": "learned", "attention_cap": 30.0, "window": 8}, "data": {"documents": "apart"}},
    {"model": {"parallel": True, "activation": "relu2", "gated": False, "norm_plus_one": True}, "train": {"recompute": True}},
    {"model": ODD, "train": {"dtype": "bfloat16"}, "optim": {"cautious_decay": True}},
    {"train": {"audit_every": 2, "global_batch": 16}},
    {"model": ODD | {"seq_len": 15, "norm": "layer", "mlp_bias": True, "attention_bias": "q,o"}, "mesh": {"sequence": True}},
    {"model": {"positions": "learned", "input_mix": True}, "data": {"documents": "apart"}, "train": {"recompute": True},
     "mesh": {"sequence": True}},
    {"train": {"dtype": "bfloat16"}, "mesh": {"sequence": True}},
    {"model": ODD | {"qk_norm": "layer", "attention_bias": "q,k"}, "mesh": {"sequence": True}},
]
ALONE: dict[str, Ran] = {}  # the runs on one rank; all ranks have the same


def sections(how: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    plain = {"model": {"slices": SLICES, "num_kv_heads": 4}, "train": {"steps": 4, "eval_every": 4, "eval_tokens": 64}}
    return {name: plain.get(name, {}) | how.get(name, {}) for name in {*plain, *how}}


def alone(data: Path, folder: Path, how: dict[str, dict[str, Any]]) -> Ran:
    if str(how) not in ALONE:
        plain = {"sequence": False, "shard": 0}
        ALONE[str(how)] = on((1, 1, 1), with_mesh(data, folder / "alone", (1, 1, 1), **sections(how | {"mesh": plain})))
    return ALONE[str(how)]


def assert_same(run: Ran, other: Ran) -> None:
    assert run.learned == other.learned
    assert run.sha256 == other.sha256


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_every_mesh_has_the_bits_of_one_rank(shared_folder: Path, shared_tmp: Path, mesh: Mesh) -> None:
    """With dropout, clipping, accumulation and a short last micro-batch, in sizes that no vector length divides."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, how = corpus(shared_folder), {"model": ODD}
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **sections(how)))
    assert_same(run, alone(data, shared_tmp, how))


@pytest.mark.check
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_every_way_of_training_keeps_the_bits(shared_folder: Path, shared_tmp: Path, how: dict[str, dict[str, Any]]) -> None:
    if not fits((1, 1, 2)):
        pytest.skip("needs two ranks")
    data, meshes = corpus(shared_folder), [(1, 1, 4), (2, 1, 2)] if fits((1, 1, 4)) else [(1, 1, 2)]
    if fits((1, 2, 2)) and "input_mix" not in how.get("model", {}):
        meshes.append((1, 2, 2))
    for mesh in meshes:
        run = on(mesh, with_mesh(data, shared_tmp / "x".join(map(str, mesh)), mesh, **sections(how)))
        assert_same(run, alone(data, shared_tmp, how))


@pytest.mark.parametrize("how", [how for how in WAYS if how.get("train", {}).get("dtype") != "bfloat16"], ids=str)
def test_slices_learn_what_whole_layers_learn(shared_folder: Path, shared_tmp: Path, how: dict[str, dict[str, Any]]) -> None:
    """Only the rounding of sums changes."""
    data, model = corpus(shared_folder), how.get("model", {}) | {"slices": 1}
    plain = sections(how | {"model": model, "mesh": {}})
    whole = on((1, 1, 1), with_mesh(data, shared_tmp / "plain", (1, 1, 1), **plain))
    assert_close(alone(data, shared_tmp, how), whole, str(how), 2e-3 if "muon" in str(how) else CLOSE)


@pytest.mark.parametrize(("mesh", "cut"), [
    ((1, 2, 1), {}), ((1, 2, 1), {"interleave": 2}), ((1, 2, 2), {"sequence": True}), ((2, 2, 1), {"shard": 3}), ((1, 4, 1), {}),
    ((2, 2, 1), {"shard": 2, "interleave": 2}),
], ids=str)
def test_stages_of_a_tied_embedding_keep_the_bits(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, cut: dict[str, Any]
) -> None:
    """Also if the run began on one rank, and is replayed on one rank."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, model = corpus(shared_folder), ODD | {"tie_embeddings": True, "num_layers": 4}

    def how(steps: int, cut: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return sections({"model": model, "mesh": cut, "train": {"steps": steps, "save_every": 2, "eval_every": 0}})

    on((1, 1, 1), with_mesh(data, shared_tmp / "run", (1, 1, 1), **how(2, {})))
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **how(4, cut)))
    one = alone(data, shared_tmp, how(4, {}))
    assert (run.sha256, run.losses) == (one.sha256, one.losses)
    assert replayed(1, shared_tmp / "run", 4)["same"]


@pytest.mark.check
def test_interleaved_stages_keep_the_bits(shared_folder: Path, shared_tmp: Path) -> None:
    mesh = (1, 2, 2) if fits((1, 2, 2)) else (1, 2, 1)
    if not fits(mesh):
        pytest.skip("needs two ranks")
    data, how = corpus(shared_folder), {"train": {"recompute": True}}
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **sections(how | {"mesh": {"interleave": 2}})))
    assert_same(run, alone(data, shared_tmp, how))


@pytest.mark.check
def test_a_run_resumes_on_any_mesh_with_the_same_bits(shared_folder: Path, shared_tmp: Path) -> None:
    """dp4 -> tp4 -> pp2 x tp2 -> one rank -> dp2 x tp2, and a crash in between: the run equals an uninterrupted run."""
    data, train = corpus(shared_folder), {"save_every": 2, "eval_every": 3, "eval_tokens": 64}
    meshes = [mesh for mesh in ((4, 1, 1), (1, 1, 4), (1, 2, 2), (1, 1, 1), (2, 1, 2)) if fits(mesh)]
    if len(meshes) < 2:
        pytest.skip("needs four ranks")
    for number, mesh in enumerate(meshes, 1):
        how = sections({"model": ODD, "train": train | {"steps": 2 * number}})
        run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **how))
        if number == 2:
            later = with_mesh(data, shared_tmp / "run", mesh, **sections({"model": ODD, "train": train | {"steps": 6}}))
            crashed_in(2, mesh[0] * mesh[1] * mesh[2], later)
    whole = with_mesh(data, shared_tmp / "whole", (1, 1, 1), **sections({"model": ODD, "train": train | {"steps": 10}}))
    one = on((1, 1, 1), whole)
    assert (run.sha256, run.losses) == (one.sha256, one.losses)


def test_the_number_of_slices_cannot_change(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    config = with_mesh(data, shared_tmp / "run", (1, 1, 1), **sections({"train": {"steps": 2, "eval_every": 0}}))
    on((1, 1, 1), config)
    with pytest.raises(UsageError, match="model.slices was 4"):
        on((1, 1, 1), config.with_values(model={"slices": 2}))


@pytest.mark.parametrize(("model", "mesh", "said"), [
    ({"slices": 2, "num_kv_heads": 4}, (1, 1, 4), "mesh.tp=4 does not divide model.slices=2.*Use mesh.tp=1 or 2"),
    ({"slices": 4, "num_kv_heads": 2}, (1, 1, 1), "model.slices=4 does not divide model.num_kv_heads=2. Use model.slices=2"),
    ({"slices": 4, "num_kv_heads": 4, "hidden_dim": 62}, (1, 1, 1), "model.slices=4 does not divide model.hidden_dim=62"),
])
def test_slices_that_do_not_fit_are_refused(
    shared_folder: Path, shared_tmp: Path, model: dict[str, Any], mesh: Mesh, said: str
) -> None:
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data = corpus(shared_folder)
    with pytest.raises(UsageError, match=said):
        on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=model))
