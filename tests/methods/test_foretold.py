"""The predicted traffic of a method equals the count in metrics.jsonl, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpidp.config.schema import checked
from mpidp.data.index import read_index
from mpidp.plan.methods.predict import METHODS, sent_bytes, sizes_of, variant
from mpidp.plan.methods.traffic import Cluster
from tests.tiny import WORLD, corpus, everywhere, tiny, train_at

pytestmark = pytest.mark.mpi
STEPS = 6
PLAIN = {"overlap": "none", "bucket_mb": 0.01, "transport": "messages"}
SUMS: dict[str, dict[str, Any]] = {
    "tree": {}, "tree of 5 lanes": {"train": {"lanes": 5}}, "allreduce": {"comm": {"reducer": "allreduce"}},
    "naive": {"comm": {"reducer": "naive"}}, "root": {"comm": {"reducer": "root"}},
    "every 2 steps": {"strategy": {"name": "local", "sync_every": 2}},
    "every 4 steps, 2 bits": {"strategy": {"name": "local", "sync_every": 4}, "comm": {"compress": "int2"}},
    "pairs, meeting every 2 rounds": {"strategy": {"name": "local", "group": "pairs", "sync_every": 1, "meet_every": 2}},
}


def counted(run_dir: Path) -> int:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return sum(line.get("comm_bytes", 0) for line in lines)


def config_of(shared_folder: Path, run_dir: Path, sections: dict[str, Any]) -> Any:
    plain = {"comm": PLAIN, "train": {"steps": STEPS, "eval_every": 0}}
    return checked(tiny(corpus(shared_folder), run_dir, **plain).with_values(**sections))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", [*SUMS, *(name for name in METHODS if name != "delayed")])
def test_bytes_are_as_foretold(shared_folder: Path, name: str) -> None:
    run_dir = shared_folder / f"run {name}"
    if name in SUMS:
        config = config_of(shared_folder, run_dir, SUMS[name])
    else:
        config = variant(config_of(shared_folder, run_dir, {}), name)
    cluster = Cluster(WORLD.size, WORLD.size, 1e-3, 1e8)
    train_at(WORLD.size, config)
    sizes = sizes_of(config, read_index(Path(config.data.path)).vocab_size)
    foretold = sent_bytes(config, sizes, cluster, STEPS)
    assert len(sizes.buckets) > 1
    everywhere(counted(run_dir) == foretold > 0, f"{counted(run_dir)} bytes counted, {foretold} foretold")


@pytest.mark.mpi(min_size=4)
def test_nodes_whose_ranks_share_memory_send_slices(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if WORLD.size != 4:
        pytest.skip("two nodes of two")
    monkeypatch.setenv("MPIDP_PRETEND_NODES", "2")
    config = config_of(shared_folder, shared_folder / "run nodes", {"comm": {"transport": "auto"}})
    train_at(4, config)
    sizes = sizes_of(config, read_index(Path(config.data.path)).vocab_size)
    foretold = sent_bytes(config, sizes, Cluster(4, 2, 1e-3, 1e8), STEPS)
    found = counted(shared_folder / "run nodes")
    everywhere(found == foretold, f"{found} bytes counted, {foretold} foretold")
