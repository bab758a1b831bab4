"""Laws of interleaved stages: no sum changes, so the weights are bit for bit those of one rank, for any number of micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from tests.hybrid.test_meshes import CLOSE, Mesh, assert_close, fits, on, with_mesh
from tests.tiny import WORLD, corpus

pytestmark = pytest.mark.mpi
STEPS = {"steps": 8, "eval_every": 4}


def model(pp: int, times: int) -> dict[str, Any]:
    return {"num_layers": max(5, pp * times)}


def once(shared_folder: Path, shared_tmp: Path, layers: dict[str, Any], /, **how: dict[str, Any]) -> Any:
    how["train"] = STEPS | how.get("train", {})
    return on((1, 1, 1), with_mesh(corpus(shared_folder), shared_tmp / "alone", (1, 1, 1), model=layers, **how))


@pytest.mark.parametrize(("mesh", "times", "batch", "how"), [
    ((1, 2, 1), 2, 13, {}), ((1, 2, 1), 2, 2, {}), ((1, 3, 1), 2, 11, {"lanes": 1}), ((2, 2, 1), 2, 13, {"lanes": 3}),
    ((1, 4, 1), 2, 9, {"recompute": True}), ((2, 2, 1), 2, 13, {"shard": 1}),
], ids=str)
def test_stages_that_come_again_change_no_bit(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, times: int, batch: int, how: dict[str, Any]
) -> None:
    """With dropout, clipping, short micro-batches, and fewer micro-batches than stages."""
    if not fits(mesh):
        pytest.skip("more ranks than there are")
    layers, train = model(mesh[1], times), STEPS | {"global_batch": batch} | {k: v for k, v in how.items() if k != "shard"}
    cut = {"interleave": times, "shard": how.get("shard", 0)}
    comm = {"transport": "messages"} if "shard" in how else {}
    alone = once(shared_folder, shared_tmp, layers, train=train)
    run = on(mesh, with_mesh(corpus(shared_folder), shared_tmp / "run", mesh, model=layers, train=train, mesh=cut, comm=comm))
    assert (run.sha256, run.learned) == (alone.sha256, alone.learned)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_with_cut_layers_they_teach_the_same(shared_folder: Path, shared_tmp: Path, tied: bool) -> None:
    mesh = (1, 2, 2) if WORLD.size > 3 else (1, 2, 1)
    if not fits(mesh):
        pytest.skip("needs two ranks")
    layers = model(2, 2) | {"tie_embeddings": tied}
    alone = once(shared_folder, shared_tmp, layers)
    cut = {"interleave": 2, "sequence": mesh[2] > 1}
    run = on(mesh, with_mesh(corpus(shared_folder), shared_tmp / "run", mesh, model=layers, train=STEPS, mesh=cut))
    assert_close(run, alone, str(mesh), CLOSE)


def test_a_run_goes_on_whatever_the_interleave(shared_folder: Path, shared_tmp: Path) -> None:
    if not fits((1, 2, 1)):
        pytest.skip("needs two ranks")
    data, layers = corpus(shared_folder), model(2, 2)
    alone = once(shared_folder, shared_tmp, layers)
    for steps, mesh, times in ((2, (1, 2, 1), 2), (4, (1, 2, 1), 1), (6, (1, 1, 1), 1), (8, (1, 2, 1), 2)):
        train, cut = STEPS | {"steps": steps}, {"interleave": times}
        run = on(mesh, with_mesh(data, shared_tmp / "run", mesh, model=layers, train=train, mesh=cut))
    assert (run.sha256, run.losses) == (alone.sha256, alone.losses)


def test_more_chunks_than_layers_are_refused(shared_folder: Path, shared_tmp: Path) -> None:
    if not fits((1, 2, 1)):
        pytest.skip("needs two ranks")
    with pytest.raises(UsageError, match="mesh.pp=2 x mesh.interleave=3: .*has only 5. Use at most mesh.interleave=2"):
        on((1, 2, 1), with_mesh(corpus(shared_folder), shared_tmp / "run", (1, 2, 1), model=model(2, 2), mesh={"interleave": 3}))
