"""Laws of optimizers of whole matrices (muon, normuon): on data parallelism, pipelines and mesh.shard the bits are those of one
rank; on tensor parallelism the losses equal those of one rank up to rounding."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mpidp.config.schema import Config
from tests.hybrid.test_meshes import fits
from tests.hybrid.test_sharding import saved
from tests.mpi.test_kinds import KINDS
from tests.tiny import WORLD, Ran, corpus, pretended, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi
Sections = dict[str, dict[str, Any]]
MESSAGES: Sections = {"comm": {"transport": "messages"}}
COPIES: Sections = {"comm": {"copies": "rank"}}
LEVEL_1: Sections = {"mesh": {"shard": 1}}
RECIPE: Sections = {
    "optim": {"cautious_decay": True, "weight_decay": 0.5, "momentum_warmup": 6}, "model": {"zero_init": True, "num_kv_heads": 2},
}
RECIPE_ADAMW: Sections = {"optim": {"cautious_decay": True, "weight_decay": 0.5}}
CLOSE = 2e-3  # of losses after a few steps: the products of Muon are in bfloat16, where a rounding error of a sum may become 2^-9


def config(data: Path, run: Path, name: str, steps: int = 8, **sections: dict[str, Any]) -> Config:
    """A model with matrices of several shapes, whose number is no multiple of the number of ranks."""
    found: Sections = {
        "model": {} if "kind" in sections.get("model", {}) else {"num_layers": 3, "num_kv_heads": 2},
        "train": {"steps": steps, "global_batch": 13, "eval_every": 4},
        "optim": {"name": name, "schedule": "constant", "clip": 0.5},
    }
    for section, values in sections.items():
        found[section] = found.get(section, {}) | values
    return tiny(data, run, **found)


def state_of(run: Path) -> dict[str, Any]:
    reader = saved(run)
    return {name: reader[name] for name in reader}


EXACT = [  # (name, ranks, nodes to pretend, settings)
    ("muon", 3, 0, MESSAGES), ("normuon", 4, 2, LEVEL_1), ("muon", 4, 0, MESSAGES | LEVEL_1), ("normuon", 3, 0, {}),
    ("muon", 4, 2, {}), ("normuon", 4, 0, COPIES), ("muon", 3, 0, {"mesh": {"pp": 3}}), ("normuon", 4, 0, {"mesh": {"pp": 2}}),
    ("muon", 3, 2, COPIES | LEVEL_1), ("normuon", 4, 0, MESSAGES | {"mesh": {"pp": 2, "shard": 1}}),
    ("muon", 3, 0, {"train": {"balance": "measured"}}), ("normuon", 2, 0, {"model": KINDS["lstm"]}),
    ("muon", 3, 2, {"model": KINDS["own"]}), ("normuon", 3, 0, LEVEL_1 | MESSAGES | {"model": KINDS["own"]}),
    ("muon", 3, 3, {"train": {"audit_every": 2}}), ("normuon", 3, 2, RECIPE), ("muon", 4, 0, RECIPE | {"mesh": {"pp": 2}}),
    ("adamw", 3, 2, RECIPE_ADAMW),
    ("muon", 2, 0, {"mesh": {"shard": 3}}), ("normuon", 3, 0, RECIPE | {"mesh": {"shard": 2}}),
    ("normuon", 3, 0, RECIPE | {"mesh": {"shard": 3}}), ("muon", 4, 0, {"mesh": {"pp": 2, "shard": 3}}),
    ("muon", 3, 0, {"model": KINDS["own"], "mesh": {"shard": 2}}), ("adamw", 3, 0, RECIPE_ADAMW | {"mesh": {"shard": 3}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ranks", "nodes", "sections"), EXACT, ids=str)
def test_the_bits_are_those_of_one_rank(
    shared_folder: Path, shared_tmp: Path, name: str, ranks: int, nodes: int, sections: Sections
) -> None:
    if ranks > WORLD.size:
        pytest.skip("more ranks than there are")
    data, same = corpus(shared_folder), {key: sections[key] for key in sections.keys() & {"model", "optim"}}
    with small_blocks() if sections.get("mesh", {}).get("shard", 0) > 1 else nullcontext():
        alone = train_at(1, config(data, shared_tmp / "alone", name, **same))
        with pretended(nodes) if nodes else nullcontext():
            run = train_at(ranks, config(data, shared_tmp / "run", name, **sections))
    assert (run.sha256, run.learned) == (alone.sha256, alone.learned)
    mine, its = state_of(shared_tmp / "run"), state_of(shared_tmp / "alone")
    assert mine.keys() == its.keys() and all(bool((mine[key] == its[key]).all()) for key in its)
    assert run.losses[-1] < run.losses[0] - 0.1


def assert_near(run: Ran, alone: Ran) -> None:
    assert run.losses == pytest.approx(alone.losses, rel=CLOSE)
    assert run.end["val_loss"] == pytest.approx(alone.end["val_loss"], rel=CLOSE)


CUT: list[tuple[str, tuple[int, int, int], int, Sections]] = [  # (name, (dp, pp, tp), pretended nodes, settings)
    ("normuon", (1, 1, 2), 0, {}), ("muon", (2, 1, 2), 0, {}),
    ("normuon", (2, 1, 2), 0, {"mesh": {"shard": 2}}), ("muon", (1, 2, 2), 0, {}), ("normuon", (2, 1, 2), 3, {}),
    ("muon", (2, 1, 2), 0, MESSAGES | LEVEL_1), ("muon", (2, 1, 2), 0, {"mesh": {"shard": 3, "sequence": True}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "nodes", "sections"), CUT, ids=str)
def test_cut_matrices_are_updated_as_whole_ones(
    shared_folder: Path, shared_tmp: Path, name: str, mesh: tuple[int, int, int], nodes: int, sections: Sections
) -> None:
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    data = corpus(shared_folder)
    alone = train_at(1, config(data, shared_tmp / "alone", name))
    dp, pp, tp = mesh
    with pretended(nodes) if nodes else nullcontext():
        cut = sections | {"mesh": sections.get("mesh", {}) | {"pp": pp, "tp": tp}}
        run = train_at(dp * pp * tp, config(data, shared_tmp / "run", name, **cut))
    assert_near(run, alone)
    assert state_of(shared_tmp / "run").keys() == state_of(shared_tmp / "alone").keys()


@pytest.mark.check
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_a_run_continues_on_any_mesh(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """dp4 -> dp2 x tp2 -> shard 3 -> shard 1 -> one rank equals an uninterrupted run."""
    data, most = corpus(shared_folder), WORLD.size
    alone = train_at(1, config(data, shared_tmp / "alone", name, steps=15, **RECIPE))
    ways: list[tuple[int, dict[str, int]]] = [(4, {}), (4, {"tp": 2}), (3, {"shard": 3}), (4, {"shard": 1}), (1, {})]
    for i, (ranks, mesh) in enumerate(ways, start=1):
        ranks = min(ranks, most // mesh.get("tp", 1) * mesh.get("tp", 1))
        if ranks:
            run = train_at(ranks, config(data, shared_tmp / "run", name, steps=3 * i, mesh=mesh, **RECIPE))
    assert_near(run, alone)
    assert state_of(shared_tmp / "run").keys() == state_of(shared_tmp / "alone").keys()


@pytest.mark.parametrize("servers", [1, 2])
def test_servers_update_whole_matrices(shared_folder: Path, shared_tmp: Path, servers: int) -> None:
    """In mode sync, the weights equal those of comm.reducer=root on the same number of workers."""
    if WORLD.size < 2 + servers:
        pytest.skip("more ranks than there are")
    data = corpus(shared_folder)
    root = train_at(2, config(data, shared_tmp / "root", "muon", comm={"reducer": "root"}))
    how = {"name": "server", "mode": "sync", "servers": servers}
    run = train_at(2 + servers, config(data, shared_tmp / "run", "muon", strategy=how, comm={"reducer": "allreduce"}))
    assert run.sha256 == root.sha256
    for mode in ("async", "ssp"):
        later = config(data, shared_tmp / mode, "normuon", steps=20, strategy=how | {"mode": mode}, comm={"reducer": "allreduce"})
        run = train_at(2 + servers, later)
        assert run.end["val_loss"] < root.losses[0] - 0.5
