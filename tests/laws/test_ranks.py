"""Law: the number of ranks does not change the bits of the weights and the logged losses, for any lanes, buckets and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.model import products
from tests.registries import OPTIMIZERS
from tests.tiny import Ran, corpus, masked_corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi

# name -> (numbers of ranks, config sections). 100 training windows: with 16 a step an epoch ends after 7 steps.
CASES: dict[str, tuple[tuple[int, ...], dict[str, dict[str, Any]]]] = {
    "8 lanes, dropout": ((1, 2, 3, 4, 5, 8), {"model": {"dropout": 0.1}, "train": {"steps": 9}}),
    "12 lanes, GQA": ((1, 2, 3, 4, 5, 8), {"model": {"num_kv_heads": 2}, "train": {"global_batch": 24}}),
    "7 lanes, short last micro-batch": (
        (1, 2, 3, 4, 5), {"model": {"dropout": 0.2}, "train": {"global_batch": 13, "steps": 9}},
    ),
    "24 micro-batches in 8 lanes": (
        (1, 2, 3, 5, 8), {"model": {"dropout": 0.1}, "train": {"global_batch": 24, "micro_batch": 1, "lanes": 8, "steps": 5}},
    ),
    "11 micro-batches in 5 uneven lanes": ((1, 2, 3, 4, 5), {"train": {"global_batch": 21, "lanes": 5, "steps": 6}}),
    "tied embeddings, sequential": (
        (1, 3, 8), {"model": {"tie_embeddings": True, "dropout": 0.1}, "data": {"order": "sequential"}, "train": {"steps": 8}},
    ),
    "sgd, no clipping": ((1, 3, 8), {"optim": {"name": "sgd", "lr": 0.3, "clip": 0.0}}),
    "adam, hard clipping": ((1, 4, 7), {"optim": {"name": "adam", "clip": 0.05}}),
    **{name: ((1, 2, 5), {"optim": {"name": name}}) for name in OPTIMIZERS if name not in ("adamw", "adam", "sgd")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_ranks_changes_no_bit(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    ranks, sections = CASES[name]
    data = corpus(shared_folder)
    runs = {n: train_at(n, tiny(data, shared_tmp / f"at{n}", **sections)) for n in sizes(*ranks)}
    alone = runs.pop(1)
    assert_it_learned(alone)
    for n, run in runs.items():
        assert run.sha256 == alone.sha256, f"{n} ranks"
        assert run.lines == alone.lines, f"{n} ranks"


def assert_it_learned(run: Ran) -> None:
    """Assert that the losses change. Otherwise two runs could be equal because nothing was trained."""
    assert len(run.losses) == run.end["step"] and len(set(run.losses)) == len(run.losses)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert all(line["grad_norm"] > 0 for line in run.lines if "grad_norm" in line)
    assert any("val_loss" in line for line in run.learned)


@pytest.mark.check
@pytest.mark.timeout(600)
def test_compiled_blocks(shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and evaluations end with short micro-batches, so blocks are compiled for several shapes."""
    monkeypatch.setattr(products, "SMALLEST", 0)  # also small products by the library of large ones
    data, sections = corpus(shared_folder), {"train": {"compile": True, "global_batch": 13, "steps": 9}}
    with torch._dynamo.config.patch(recompile_limit=8):  # restores the value that compile_blocks() sets
        runs = [train_at(n, tiny(data, shared_tmp / f"at{n}", **sections)) for n in sizes(1, 2, 3)]
    assert_it_learned(runs[0])
    assert all((run.sha256, run.lines) == (runs[0].sha256, runs[0].lines) for run in runs)


def test_a_run_crosses_the_end_of_an_epoch(shared_folder: Path, shared_tmp: Path) -> None:
    run = train_at(1, tiny(corpus(shared_folder), shared_tmp / "run", train={"steps": 9}))
    tokens = [line["tokens"] for line in run.lines if "train_loss" in line]
    steps = [b - a for a, b in zip([0, *tokens], tokens, strict=False)]
    assert steps.count(16 * 16) == 8 and 0 < min(steps) < 16 * 16  # one short batch with empty micro-batches
    assert {line["epoch"] for line in run.lines if "train_loss" in line} == {0, 1}


def test_the_size_of_buckets_changes_no_bit(shared_folder: Path, shared_tmp: Path) -> None:
    data, found = corpus(shared_folder), []
    for n in sizes(1, 3, 8):
        for size in (0.001, 0.03, 64.0):
            run = train_at(n, tiny(data, shared_tmp / f"{n}_{size}", comm={"bucket_mb": size}, train={"steps": 4}))
            found.append((run.sha256, run.lines))
    assert all(one == found[0] for one in found)


def test_how_the_data_is_cut_into_shards_changes_no_bit(shared_folder: Path, shared_tmp: Path) -> None:
    found = []
    for shards in (1, 5):
        data = corpus(shared_folder, shards=shards)
        assert len(list(data.glob("train_*.h5"))) == shards
        for n in sizes(1, 4):
            run = train_at(n, tiny(data, shared_tmp / f"{n}_{shards}", train={"steps": 8}))
            found.append((run.sha256, run.lines))
    assert all(one == found[0] for one in found)


def test_micro_batches_of_unlike_numbers_of_targets(shared_folder: Path, shared_tmp: Path) -> None:
    """With a loss mask some micro-batches have few targets, so a mean of means would give a different result."""
    data = masked_corpus(shared_folder)
    runs = [train_at(n, tiny(data, shared_tmp / str(n), train={"steps": 8})) for n in sizes(1, 2, 3, 5, 8)]
    tokens = [line["tokens"] for line in runs[0].lines if "train_loss" in line]
    assert len({b - a for a, b in zip(tokens, tokens[1:], strict=False)}) > 3
    assert all((run.sha256, run.lines) == (runs[0].sha256, runs[0].lines) for run in runs)


def test_other_seeds_are_other_runs(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    hashes = {
        train_at(2, tiny(data, shared_tmp / str(i), model={"dropout": dropout}, train={"seed": seed, "steps": 2})).sha256
        for i, (seed, dropout) in enumerate([(1, 0.0), (2, 0.0), (2, 0.1)])
    }
    assert len(hashes) == 3
