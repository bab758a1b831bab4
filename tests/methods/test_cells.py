"""Every supported combination of strategy, reducer, compression and group trains, and ends with one finite model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import mpidp.train
from mpidp.config.schema import Config, checked, fields_of
from mpidp.errors import UsageError
from tests.tiny import at, corpus, tiny

pytestmark = pytest.mark.mpi
AXES = {key: about.metadata["choices"] for key, about, _ in fields_of()}
STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "synchronous": [{}, {"quorum": 0.5}], "delayed": [{}], "server": [{"mode": mode} for mode in AXES["strategy.mode"]],
    "local": [
        {"sync_every": 2, "overlap": overlap, "fragments": fragments}
        for overlap, fragments in ((False, 1), (True, 1), (False, 2))
    ] + [{"group": group} for group in AXES["strategy.group"] if group != "all"],
}  # fmt: skip
PARTS = 4  # every fourth cell
RANKS = min(3, MPI.COMM_WORLD.size)


def cells() -> list[dict[str, dict[str, Any]]]:
    found = []
    for name in AXES["strategy.name"]:
        for more, reducer, code in itertools.product(STRATEGIES.get(name, [{}]), AXES["comm.reducer"], AXES["comm.compress"]):
            found.append({
                "strategy": {"name": name, **more},
                "comm": {"reducer": reducer, "compress": code, "bucket_mb": 0.01, "overlap": "none"}, "train": {"steps": 4},
            })  # fmt: skip
    return found


def allowed(sections: dict[str, dict[str, Any]]) -> bool:
    try:
        checked(Config().with_values(**sections))
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("part", range(PARTS))
def test_all_cells_train_or_are_refused(shared_folder: Path, shared_tmp: Path, part: int) -> None:
    data, every = corpus(shared_folder), cells()
    chosen = [sections for sections in every if allowed(sections) and sections["comm"]["reducer"] != "auto"]
    assert len(chosen) > 40 and len(every) > 2 * len(chosen)
    chosen = chosen[part::PARTS]

    def run(comm: MPI.Intracomm) -> list[tuple[str, float]]:
        ends = []
        for i, sections in enumerate(chosen):
            end = mpidp.train.run(tiny(data, shared_tmp / str(i), **sections), comm)
            assert end is not None
            ends.append((end["weights_sha256"], end["val_loss"]))
        return ends

    ranks = at(RANKS, run)
    for i, (sections, ends) in enumerate(zip(chosen, zip(*ranks, strict=True), strict=True)):
        assert len({sha for sha, _ in ends}) == 1, f"{i}: {sections}: no common model"
        assert all(math.isfinite(loss) for _, loss in ends), f"{i}: {sections}"
    assert len({ends[0][0] for ends in zip(*ranks, strict=True)}) > len(chosen) // 2, "they are not all the same run"
