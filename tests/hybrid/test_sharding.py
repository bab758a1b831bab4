"""Laws of mesh.shard: level 1 changes no bit; levels 2 and 3 equal level 0 up to rounding; any level resumes from any other on
any number of ranks; each rank holds the predicted bytes."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import find_checkpoint
from mpidp.config.schema import Config
from mpidp.strategies.optimizer import MOMENTS
from mpidp.training.job import Job
from mpidp.training.step import compute
from mpidp.training.step_report import exchange_reports
from tests.memory_formulas import of_replicas, of_shards
from tests.registries import OPTIMIZERS
from tests.tiny import WORLD, Ran, at, corpus, job_at, pretended, sizes, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi
CLOSE = 1e-6  # relative tolerance
# 7 lanes, the last one short, on any number of ranks; 100 windows, so that an epoch ends with empty micro-batches in step 8.
UNEVEN: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.1}, "train": {"global_batch": 13, "steps": 20, "eval_every": 8, "eval_tokens": 0},
    "optim": {"clip": 0.5, "warmup_steps": 2},
}


def with_level(level: int, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings UNEVEN with this level and other settings."""
    found = {name: dict(values) for name, values in UNEVEN.items()}
    for name, values in (more | {"mesh": {"shard": level}}).items():
        found.setdefault(name, {}).update(values)
    return found


def saved(run: Path | str) -> Reader:
    """Return the newest checkpoint. Collective over WORLD."""
    reader, _ = find_checkpoint(Path(run), "must", WORLD)
    assert reader is not None
    return reader


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def assert_close(run: Ran, folder: Path, alone: Ran, its: Path, what: str) -> None:
    """Compare the losses of every step and evaluation, weights and optimizer state."""
    assert len(run.learned) == len(alone.learned), what
    for mine, line in zip(run.learned, alone.learned, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            if key in line:
                assert mine[key] == pytest.approx(line[key], rel=CLOSE if key != "grad_norm" else 1e-5), f"{what}: {key}, {line}"
    mine, theirs = saved(folder), saved(its)
    assert mine.meta["tensors"].keys() == theirs.meta["tensors"].keys(), what
    for name in theirs:
        loose = CLOSE if name.startswith("model/") or name.endswith("/step") else 1e-4
        assert apart(mine[name], theirs[name]) <= loose, f"{what}: {name} {apart(mine[name], theirs[name])}"


MESSAGES = {"comm": {"transport": "messages"}}
ELEMENTWISE = [name for name in OPTIMIZERS if name in MOMENTS]  # muon updates whole matrices
NEW = [name for name in ELEMENTWISE if name not in ("adamw", "adam", "sgd")]  # those have rows of their own


@pytest.mark.parametrize(("nodes", "sections"), [
    (0, MESSAGES), (0, {}), (2, {}), (3, {}), (0, {"comm": {"copies": "rank"}}), (0, MESSAGES | {"optim": {"name": "sgd"}}),
    (2, {"optim": {"name": "adam"}, "model": {"tie_embeddings": True}}),
    *((0, {"optim": {"name": name}}) for name in NEW),
])  # fmt: skip
def test_level_1_changes_no_bit(shared_folder: Path, shared_tmp: Path, nodes: int, sections: dict[str, Any]) -> None:
    """With messages; with a window where the ranks of a node share one copy or have one each; over several nodes."""
    data, sections = corpus(shared_folder), sections | {"train": {"steps": 9}}
    with small_blocks():
        alone = train_at(1, tiny(data, shared_tmp / "alone", **with_level(0, **sections | {"comm": {}})))
        for n in sizes(1, 2, 3, 4):
            with pretended(nodes) if nodes else nullcontext():
                run = train_at(n, tiny(data, shared_tmp / f"at{n}", **with_level(1, **sections)))
            assert (run.sha256, run.learned) == (alone.sha256, alone.learned), f"{n} ranks"
            mine, its = saved(shared_tmp / f"at{n}"), saved(shared_tmp / "alone")
            assert mine.meta["tensors"].keys() == its.meta["tensors"].keys()
            assert all(torch.equal(mine[name], its[name]) for name in its), f"{n} ranks"


TIED = {"optim": {"name": "adam"}, "model": {"tie_embeddings": True, "num_kv_heads": 2}, "train": {"lanes": 5, "steps": 9}}


@pytest.mark.parametrize(("level", "ranks", "sections"), [
    (2, (1, 3, 4), {}), (3, (2, 3), {}), (2, (2, 3), {"optim": {"name": "sgd", "lr": 0.1, "clip": 0.0}, "train": {"steps": 9}}),
    (3, (2, 4), TIED),
    *((2 + i % 2, (2, 3), {"optim": {"name": name}, "train": {"steps": 9}}) for i, name in enumerate(NEW)),
])  # fmt: skip
def test_levels_2_and_3_are_level_0(
    shared_folder: Path, shared_tmp: Path, level: int, ranks: tuple[int, ...], sections: dict[str, Any]
) -> None:
    data = corpus(shared_folder)
    alone = train_at(1, tiny(data, shared_tmp / "alone", **with_level(0, **sections)))
    assert alone.losses[-1] < alone.losses[0] - 0.1 and any("val_loss" in line for line in alone.learned)
    for n in sizes(*ranks):
        run = train_at(n, tiny(data, shared_tmp / f"at{n}", **with_level(level, **sections)))
        assert_close(run, shared_tmp / f"at{n}", alone, shared_tmp / "alone", f"{n} ranks at level {level}")
        reader, digest = saved(shared_tmp / f"at{n}"), hashlib.sha256()
        for name in sorted(name for name in reader if name.startswith("model/")):
            digest.update(reader[name].numpy().tobytes())
        assert run.sha256 == digest.hexdigest(), "the hash is of the gathered parameters"


def test_any_level_goes_on_from_any_other(shared_folder: Path, shared_tmp: Path) -> None:
    data, constant = corpus(shared_folder), {"optim": {"schedule": "constant"}}

    def config(run: str, steps: int, level: int, comm: str = "messages") -> Config:
        transport = {"transport": comm} if level < 2 else {}
        return tiny(data, shared_tmp / run, **with_level(level, train={"steps": steps}, comm=transport, **constant))

    alone = train_at(1, config("alone", 12, 0))
    most = min(4, WORLD.size)
    for steps, ranks, level in ((3, 3, 3), (6, 1, 0), (9, 2, 1), (12, 4, 2)):
        run = train_at(min(ranks, most), config("mixed", steps, level))
    assert run.losses == pytest.approx(alone.losses, rel=CLOSE) and len(run.events("resume")) == 3
    mine, its = saved(shared_tmp / "mixed"), saved(shared_tmp / "alone")
    for name in its:
        if name.startswith("model/"):
            assert apart(mine[name], its[name]) <= CLOSE, name
    with small_blocks():
        for steps, ranks, level in ((3, 3, 1), (6, 1, 0), (9, 4, 1), (12, 2, 1)):
            run = train_at(min(ranks, most), config("bits", steps, level))
        alone = train_at(1, config("alone in small blocks", 12, 0))
    assert (run.sha256, run.losses) == (alone.sha256, alone.losses)


def one_step(job: Job, limit: float = float("inf")) -> bool:
    """Make one step; return whether an update was made. Gradients are freed by then. Collective over job.comm."""
    loader = job.open_loader(0)
    batch = next(loader)
    loader.close()
    report = exchange_reports(job, compute(job, batch), 0.0, False)
    return not job.strategy.step(1e-2, report.tokens, limit).skipped


def held_at(comm: MPI.Intracomm, config: Config) -> tuple[dict[str, int], dict[str, int], int, list[tuple[int, ...]], int]:
    """Return bytes (with a step's gradients, between steps), elements of the flat layout, shapes, and whole parameters after a
    forward."""
    job = job_at(comm, config)
    shapes = [tuple(p.shape) for p in job.engine.model.parameters()]
    loader = job.open_loader(0)
    compute(job, next(loader))
    loader.close()
    strategy: Any = job.strategy
    full = strategy.held()
    strategy.discard()
    most = max(sum(len(job.lanes.micro_batches(lane)) for lane in lanes) for lanes in job.balance.ranges)
    assert most == -(-7 // comm.size)
    with torch.no_grad():
        job.engine.model(torch.zeros(1, 1, dtype=torch.int64))
    whole = sum(not hasattr(p, "to_local") for p in job.engine.model.parameters())
    return full, strategy.held(), strategy.buffer.num_elements if strategy.buffer else 0, shapes, whole


@pytest.mark.parametrize(("name", "moments"), [(name, len(MOMENTS[name])) for name in ELEMENTWISE if name != "adam"])
def test_each_rank_holds_what_the_formulas_say(shared_folder: Path, shared_tmp: Path, name: str, moments: int) -> None:
    data = corpus(shared_folder)
    for n in sizes(1, 2, 3, 4):
        kept = {}
        for level in (0, 1, 2, 3):
            comm = {"transport": "messages"} if level < 2 else {}
            config = tiny(data, shared_tmp / f"{n}_{level}", **with_level(level, comm=comm, optim={"name": name}))
            with small_blocks():
                rows = at(n, lambda comm, config=config: held_at(comm, config))
            for rank, (full, rest, elements, shapes, whole) in enumerate(rows):
                if level < 2:
                    slots = full["gradients"] // (4 * elements)
                    assert full == rest == of_replicas(elements, slots, moments, *((rank, n) if level else ())), (n, level, rank)
                else:
                    right = of_shards(shapes, rank, n, moments)
                    assert full == right, (n, level, rank)
                    assert rest == right | {"gradients": 0}
                    assert whole == (len(shapes) if level == 2 else 0), "level 2 keeps what it gathered, level 3 nothing"
                kept[level, rank] = full
        last = n - 1
        assert kept[1, last]["optimizer"] <= kept[0, last]["optimizer"] / n + 4 * 64 * 2
        if n > 1:
            assert kept[2, last]["gradients"] < kept[1, last]["gradients"] and kept[3, 0]["parameters"] < kept[1, 0]["parameters"]


def test_a_gradient_beyond_the_limit_makes_no_update_anywhere(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)

    def work(comm: MPI.Intracomm, level: int) -> list[bool]:
        job = job_at(comm, tiny(data, shared_tmp / f"{comm.size}_{level}", **with_level(level)))
        before = job.parts.sha256(job.engine.model)
        made, same = one_step(job, 1e-9), job.parts.sha256(job.engine.model) == before
        return [made, same, one_step(job), job.parts.sha256(job.engine.model) != before]

    for n in sizes(1, 3):
        for level in (2, 3):
            assert at(n, lambda comm, level=level: work(comm, level)) == [[False, True, True, True]] * n
