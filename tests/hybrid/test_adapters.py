"""Laws of LoRA adapters on a model that is divided over ranks. With slices, every mesh gives the bits of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import find_checkpoint
from mpidp.errors import DataError
from mpidp.evaluate import evaluate
from mpidp.export import export
from mpidp.generate import generate, read_options
from tests.hybrid.test_meshes import CLOSE, Mesh, assert_close, fits, on, with_mesh
from tests.hybrid.test_slices import ODD, assert_same, sections
from tests.laws.test_adapters_on import base, replayed
from tests.laws.test_adapters_on import on as adapted
from tests.laws.test_resume import crashed_in
from tests.tiny import DEVICE, WORLD, Ran, at, corpus, train_at

pytestmark = pytest.mark.mpi
LORA = {"lora_rank": 3, "lora_alpha": 9.0}
MLP: dict[str, Any] = {"norm": "layer", "mlp_bias": True, "attention_bias": "q,o"}
WAYS: list[dict[str, dict[str, Any]]] = [
    {"model": ODD | LORA | MLP | {"seq_len": 15}, "mesh": {"sequence": True}},
    {"model": ODD | LORA | {"qk_norm": "layer", "attention_bias": "q,k"}, "optim": {"name": "muon"}},
    {"model": LORA | {"lora_targets": "k,down"}, "train": {"recompute": True, "audit_every": 2}, "optim": {"name": "sgd"}},
    {"model": LORA | {"tie_embeddings": True}, "train": {"dtype": "bfloat16"}, "optim": {"freeze": "*.lora_a"}},
    {"model": LORA | {"qk_norm": "layer"}, "mesh": {"sequence": True, "shard": 1}, "comm": {"transport": "messages"}},
    {"model": ODD | LORA, "mesh": {"sequence": True, "shard": 3}},
    {"model": LORA | {"lora_targets": "v,o,up"}, "mesh": {"shard": 2}, "optim": {"name": "normuon"}},
]
MESHES = [(1, 2, 2), (1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 1), (2, 1, 1)]
ALONE: dict[str, Ran] = {}  # the runs on one rank; all ranks have the same


def alone(data: Path, folder: Path, how: dict[str, dict[str, Any]]) -> Ran:
    if str(how) not in ALONE:
        config = with_mesh(data, folder / "alone", (1, 1, 1), **how | {"mesh": {}})
        ALONE[str(how)] = on((1, 1, 1), config)
    return ALONE[str(how)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_with_slices_every_mesh_has_the_bits_of_one_rank(
    shared_folder: Path, shared_tmp: Path, how: dict[str, dict[str, Any]], mesh: Mesh
) -> None:
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data, how = corpus(shared_folder), sections(how)
    cut = how.get("mesh", {}) | {"sequence": how.get("mesh", {}).get("sequence", False) and mesh[2] > 1}
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **how | {"mesh": cut}))
    assert_same(run, alone(data, shared_tmp, how))
    assert len(set(run.losses)) == len(run.losses), "the adapters learn"


@pytest.mark.parametrize("how", WAYS[:3], ids=str)
def test_slices_learn_what_whole_layers_learn(shared_folder: Path, shared_tmp: Path, how: dict[str, dict[str, Any]]) -> None:
    """Only the rounding of sums changes."""
    data, plain = corpus(shared_folder), sections(how | {"model": how["model"] | {"slices": 1}})
    near = 2e-3 if "muon" in str(how) else CLOSE
    assert_close(alone(data, shared_tmp, sections(how)), alone(data, shared_tmp / "whole", plain), str(how), near)


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)], ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
def test_without_slices_every_mesh_learns_what_one_rank_learns(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, sequence: bool
) -> None:
    if not fits(mesh) or sequence and mesh[2] == 1:
        pytest.skip("more ranks than there are, or no rank to share positions with")
    data, how = corpus(shared_folder), sections({"model": ODD | LORA | MLP | {"slices": 1}})
    run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **how, mesh={"sequence": sequence}))
    assert_close(run, alone(data, shared_tmp, how), str(mesh))
    if mesh[2] == 1:
        assert_same(run, alone(data, shared_tmp, how))


@pytest.mark.check
def test_the_first_chunk_of_a_stage_may_have_no_trained_parameters(shared_folder: Path, shared_tmp: Path) -> None:
    if not fits((1, 2, 1)):
        pytest.skip("needs two ranks")
    data, how = corpus(shared_folder), sections({"model": LORA | {"num_layers": 4}, "optim": {"freeze": "blocks.0.*"}})
    run = on((1, 2, 1), with_mesh(data, shared_tmp / "run", (1, 2, 1), **how | {"mesh": {"interleave": 2}}))
    assert_same(run, alone(data, shared_tmp, how))


@pytest.mark.check
def test_a_run_resumes_on_any_mesh_with_the_same_bits_and_can_be_used(shared_folder: Path, shared_tmp: Path) -> None:
    """dp4 -> tp4 -> pp2 x tp2 -> one rank, and a crash in between: the run equals an uninterrupted run, and has its adapters."""
    meshes = [mesh for mesh in ((4, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (1, 1, 1)) if fits(mesh)]
    if len(meshes) < 2:
        pytest.skip("needs two ranks")
    data, model = corpus(shared_folder), ODD | LORA | {"lora_targets": "q,v,o,down"}

    def how(steps: int) -> dict[str, dict[str, Any]]:
        return sections({"model": model, "train": {"save_every": 2, "steps": steps}})

    for number, mesh in enumerate(meshes, 1):
        run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, **how(2 * number)))
        if number == 2:
            crashed_in(2, mesh[0] * mesh[1] * mesh[2], with_mesh(data, shared_tmp / "run", mesh, **how(6)))
    one = on((1, 1, 1), with_mesh(data, shared_tmp / "whole", (1, 1, 1), **how(2 * len(meshes))))
    assert (run.sha256, run.losses) == (one.sha256, one.losses)
    mine, its = (newest(shared_tmp / name) for name in ("run", "whole"))
    assert set(mine) == set(its) and all(mine[name].equal(its[name]) for name in its)
    assert all("lora" in name for name in its if name.startswith("model/"))


def newest(run: Path) -> Reader:
    reader, _ = find_checkpoint(run, "must", WORLD)
    assert reader is not None
    return reader


@pytest.mark.check
def test_adapters_on_a_folder_can_be_trained_and_used_on_a_mesh(shared_folder: Path, shared_tmp: Path) -> None:
    """The base model is read on every mesh. Export has the same bytes, evaluation and texts are those of one rank, and one rank
    replays a step."""
    if not fits((1, 1, 2)):
        pytest.skip("needs two ranks")
    data, source = corpus(shared_folder), base(shared_tmp, corpus(shared_folder), "folder")
    uses = {}
    for name, cut in {"alone": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}.items():
        n, config = 2 if cut else 1, adapted(data, shared_tmp / name, source, lora_targets="q,o,up,down", slices=2)
        run = train_at(n, config.with_values(mesh=cut))
        uses[name] = run.sha256, run.losses
        at(1, lambda comm, name=name: export(comm, str(shared_tmp / name), str(shared_tmp / f"{name}-out")))
        assert replayed(1, shared_tmp / name, 4)["same"]
    assert uses["tp2"] == uses["pp2"] == uses["alone"]
    assert len({(shared_tmp / f"{name}-out/model.safetensors").read_bytes() for name in uses}) == 1

    def use(comm: MPI.Intracomm, tp: int, pp: int) -> tuple[float, list[str]]:
        words = ["--prompt=the rank", "--prompt=in order", "--tokens=9", f"--device={DEVICE}", "--threads=1"]
        rows = generate(comm, read_options([str(shared_tmp / "tp2"), *words, f"--tp={tp}", f"--pp={pp}"]))
        loss = evaluate(str(shared_tmp / "tp2"), None, comm, device=DEVICE, threads=1, tp=tp, pp=pp)["loss"]
        return loss, [row["text"] for row in rows]

    loss, texts = at(1, lambda comm: use(comm, 1, 1))[0]
    for cut in ((2, 1), (1, 2)):
        assert at(2, lambda comm, cut=cut: use(comm, *cut))[0] == (pytest.approx(loss, rel=CLOSE), texts)
    if fits((2, 1, 2)):  # one prompt, so the second replica does not load the model
        assert at(4, lambda comm: use(comm, 2, 1))[0] == (pytest.approx(loss, rel=CLOSE), texts)
    if WORLD.rank == 0:
        source.rename(shared_tmp / "aside")
    WORLD.barrier()
    with pytest.raises(DataError, match="neither a run .*nor a Hugging Face folder"):
        at(2, lambda comm: use(comm, 2, 1))


@pytest.mark.check
def test_the_head_can_have_an_adapter_with_a_loss_in_chunks(shared_folder: Path, shared_tmp: Path) -> None:
    data, model, found = corpus(shared_folder), {"lora_rank": 2, "lora_targets": "v,head"}, []
    for loss in ("whole", "chunked"):
        found.append(on((1, 1, 1), with_mesh(data, shared_tmp / loss, (1, 1, 1), model=model, train={"loss": loss, "steps": 4})))
    assert_close(found[1], found[0], "chunks")
    plain = with_mesh(data, shared_tmp / "v", (1, 1, 1), model=model | {"lora_targets": "v"}, train={"steps": 4})
    assert on((1, 1, 1), plain).losses[-1] != pytest.approx(found[1].losses[-1], rel=1e-4)
