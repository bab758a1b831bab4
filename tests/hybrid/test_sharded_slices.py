"""Laws of model.slices with mesh.shard=2|3: no level changes a bit on any mesh, and a run resumes at any level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.config.schema import Config
from mpidp.faults.inject import VARIABLE
from tests.hybrid.test_meshes import Mesh, fits, on, with_mesh
from tests.hybrid.test_sharding import saved
from tests.hybrid.test_slices import ODD
from tests.tiny import Ran, corpus, small_blocks

pytestmark = pytest.mark.mpi
# Slices whose rows, columns and norm blocks do not end where those of other slices, owners or vectors end.
MODEL = ODD | {"num_kv_heads": 4, "attention_bias": "q,o", "mlp_bias": True, "norm": "layer"}
ALONE: dict[str, Ran] = {}  # the runs on one rank; all ranks have the same
MUON: dict[str, Any] = {"optim": {"name": "muon"}}
TIED: dict[str, Any] = {"model": {"tie_embeddings": True}}
FROZEN: dict[str, Any] = {"optim": {"freeze": "embedding.*,blocks.0.*,blocks.1.attention.*"}}
SGD: dict[str, Any] = {"optim": {"name": "sgd", "lr": 0.1}, "model": {"tie_embeddings": True}}


def config(data: Path, run: Path, mesh: Mesh, slices: int, level: int, how: dict[str, Any], steps: int = 4) -> Config:
    plain = {"train": {"steps": steps, "eval_every": 4, "eval_tokens": 64}, "mesh": {"shard": level}}
    return with_mesh(data, run, mesh, **plain | how | {"model": MODEL | {"slices": slices} | how.get("model", {})})


def alone(data: Path, folder: Path, slices: int, how: dict[str, Any], steps: int = 4) -> Ran:
    key = str((slices, how, steps))
    if key not in ALONE:
        ALONE[key] = on((1, 1, 1), config(data, folder / "alone", (1, 1, 1), slices, 0, how, steps))
    return ALONE[key]


@pytest.mark.parametrize(("level", "mesh", "how"), [
    (2, (2, 1, 1), {}), (3, (2, 1, 1), {}), (3, (2, 1, 2), {}), (2, (2, 2, 1), {}), (3, (4, 1, 1), MUON), (2, (2, 1, 2), MUON),
    (3, (2, 2, 1), {"train": {"steps": 4, "eval_every": 4, "recompute": True}}), (2, (3, 1, 1), SGD),
    (3, (2, 1, 2), {"mesh": {"shard": 3, "sequence": True}, "train": {"steps": 4, "dtype": "bfloat16"}}), (2, (2, 2, 2), {}),
    (2, (2, 1, 1), FROZEN), (3, (2, 1, 2), FROZEN), (3, (2, 2, 1), {"mesh": {"shard": 3, "interleave": 2}}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("slices", [2, 4])
def test_no_level_changes_a_bit_of_slices(
    shared_folder: Path, shared_tmp: Path, level: int, mesh: Mesh, how: dict[str, Any], slices: int
) -> None:
    """With dropout, clipping, accumulation and a short last micro-batch."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data = corpus(shared_folder)
    with small_blocks():
        one = alone(data, shared_tmp, slices, {name: of for name, of in how.items() if name != "mesh"})
        run = on(mesh, config(data, shared_tmp / "run", mesh, slices, level, how))
    assert (run.learned, run.sha256) == (one.learned, one.sha256)


@pytest.mark.parametrize("level", [0, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_of_a_stage_is_skipped(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """The parameter is the last norm, which every rank of the stage has, and which the first of them counts in the norm."""
    mesh, data = ((2, 1, 2) if level else (1, 1, 2)), corpus(shared_folder)
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    monkeypatch.setenv(VARIABLE, "nan:1:2")
    run = on(mesh, config(data, shared_tmp / "run", mesh, 2, level, TIED))
    monkeypatch.setenv(VARIABLE, "nan:0:2")
    one = on((1, 1, 1), config(data, shared_tmp / "alone", (1, 1, 1), 2, 0, TIED))
    assert len(one.events("skipped")) == 1 and (run.lines, run.sha256) == (one.lines, one.sha256)


@pytest.mark.check
def test_slices_go_on_at_any_level(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    places = [((2, 1, 1), 3), ((1, 1, 1), 0), ((2, 1, 2), 2), ((2, 2, 1), 3), ((2, 1, 1), 1), ((2, 1, 1), 2)]
    ways = [(mesh, level) for mesh, level in places if fits(mesh)]
    if len(ways) < 2:
        pytest.skip("needs two ranks")
    with small_blocks():
        for number, (mesh, level) in enumerate(ways, 1):
            run = on(mesh, config(data, shared_tmp / "run", mesh, 4, level, {}, 2 * number))
        one = on((1, 1, 1), config(data, shared_tmp / "alone", (1, 1, 1), 4, 0, {}, 2 * len(ways)))
    assert (run.losses, run.sha256) == (one.losses, one.sha256)
    mine, its = saved(shared_tmp / "run"), saved(shared_tmp / "alone")
    assert mine.meta["tensors"].keys() == its.meta["tensors"].keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)
