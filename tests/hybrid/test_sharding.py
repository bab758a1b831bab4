"""Laws of mesh.shard: no level changes a bit, on any mesh; any level resumes from any other on any number of ranks; each rank
holds the predicted bytes."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import find_checkpoint
from mpidp.config.schema import Config
from mpidp.errors import UsageError
from mpidp.faults.inject import VARIABLE
from mpidp.strategies.optimizer import MOMENTS
from mpidp.training.job import Job
from mpidp.training.step import compute
from mpidp.training.step_report import exchange_reports
from tests.laws.test_skipped import spoilt
from tests.memory_formulas import of_replicas, of_shards
from tests.mpi.test_kinds import KINDS
from tests.registries import OPTIMIZERS
from tests.tiny import WORLD, at, corpus, job_at, pretended, sizes, small_blocks, tiny, train_at

pytestmark = pytest.mark.mpi
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


MESSAGES = {"comm": {"transport": "messages"}}
ELEMENTWISE = [name for name in OPTIMIZERS if name in MOMENTS]  # muon updates whole matrices
NEW = [name for name in ELEMENTWISE if name not in ("adamw", "adam", "sgd")]  # those have rows of their own


TIED = {"model": {"tie_embeddings": True, "num_kv_heads": 2}, "train": {"lanes": 5}}  # some lanes have two micro-batches
SGD: dict[str, dict[str, Any]] = {"optim": {"name": "sgd", "lr": 0.1, "clip": 0.0}}
FROZEN: dict[str, dict[str, Any]] = {"optim": {"freeze": "embedding.*,blocks.0.*,blocks.1.attention.*"}}
SOME_FROZEN: dict[str, dict[str, Any]] = {"optim": {"freeze": "embedding.*,blocks.0.attention.*,blocks.1.feed_forward.*"}}
MIDDLE = {"model": {"num_layers": 3}, "optim": {"freeze": "blocks.0.*,blocks.1.*"}}  # backward passes through frozen blocks
LORA = {"model": {"lora_rank": 2, "lora_targets": "q,down"}}
RECOMPUTE = {"train": {"recompute": True, "loss": "chunked", "lanes": 4}}
FOUR_LAYERS = {"model": {"num_layers": 4}}
OWN = {"model": KINDS["own"]}


@pytest.mark.parametrize(("level", "nodes", "sections"), [
    (1, 0, MESSAGES), (1, 0, {}), (1, 2, {}), (1, 3, {}), (1, 0, {"comm": {"copies": "rank"}}),
    (1, 0, MESSAGES | {"optim": {"name": "sgd"}}), (1, 2, {"optim": {"name": "adam"}, "model": {"tie_embeddings": True}}),
    (2, 0, {}), (3, 0, {}), (2, 2, TIED), (3, 0, TIED), (2, 0, SGD), (3, 0, SGD), (2, 0, RECOMPUTE), (3, 0, RECOMPUTE),
    (2, 0, FROZEN), (3, 0, FROZEN), (3, 0, MIDDLE), (2, 0, LORA), (3, 0, LORA), (2, 0, OWN), (2, 0, {"model": KINDS["lstm"]}),
    (3, 0, {"train": {"dtype": "bfloat16"}}), (3, 0, {"optim": {"name": "adam"}}),
    *((level, 0, {"optim": {"name": name}}) for name in NEW for level in (1, 2, 3)),
])  # fmt: skip
def test_no_level_changes_a_bit(
    shared_folder: Path, shared_tmp: Path, level: int, nodes: int, sections: dict[str, Any]
) -> None:
    """Level 1: with messages; with a window where the ranks of a node share one copy or have one each; over several nodes."""
    data, sections = corpus(shared_folder), sections | {"train": sections.get("train", {}) | {"steps": 9}}
    with small_blocks():
        alone = train_at(1, tiny(data, shared_tmp / "alone", **with_level(0, **sections | {"comm": {}})))
        assert alone.losses[-1] < alone.losses[0] - 0.01
        for n in sizes(1, 2, 3, 4):
            with pretended(nodes) if nodes else nullcontext():
                run = train_at(n, tiny(data, shared_tmp / f"at{n}", **with_level(level, **sections)))
            assert (run.sha256, run.learned) == (alone.sha256, alone.learned), f"{n} ranks"
            mine, its = saved(shared_tmp / f"at{n}"), saved(shared_tmp / "alone")
            assert mine.meta["tensors"].keys() == its.meta["tensors"].keys()
            assert all(torch.equal(mine[name], its[name]) for name in its), f"{n} ranks"
            digest = hashlib.sha256(b"".join(mine[name].numpy().tobytes() for name in sorted(mine) if name.startswith("model/")))
            assert "lora_rank" in sections.get("model", {}) or run.sha256 == digest.hexdigest(), "the hash is of whole parameters"


@pytest.mark.parametrize(("level", "mesh", "sections"), [
    (2, (2, 2, 1), {}), (3, (2, 2, 1), {}), (3, (2, 2, 1), FOUR_LAYERS | {"mesh": {"interleave": 2}}),
    (2, (2, 2, 1), FOUR_LAYERS | {"mesh": {"interleave": 2}}), (2, (2, 1, 2), {}), (3, (2, 1, 2), {}),
    (3, (2, 1, 2), {"mesh": {"sequence": True}}), (3, (2, 2, 1), RECOMPUTE), (3, (2, 2, 1), SOME_FROZEN), (2, (2, 2, 1), TIED),
    (3, (2, 2, 1), TIED), (3, (2, 1, 2), TIED), (3, (2, 2, 1), LORA), (2, (2, 1, 2), LORA),
])  # fmt: skip
def test_no_level_changes_a_bit_on_a_mesh(
    shared_folder: Path, shared_tmp: Path, level: int, mesh: tuple[int, int, int], sections: dict[str, Any]
) -> None:
    """dp replicas at this level equal one replica, and without tied embeddings pp stages equal one."""
    dp, pp, tp = mesh
    if dp * pp * tp > WORLD.size:
        pytest.skip("more ranks than there are")
    data, sections = corpus(shared_folder), sections | {"train": sections.get("train", {}) | {"steps": 9}}
    cut = {"pp": pp, "tp": tp} | sections.pop("mesh", {})
    one = cut if sections.get("model", {}).get("tie_embeddings") else cut | {"pp": 1, "interleave": 1}
    with small_blocks():
        alone = train_at(one["pp"] * tp, tiny(data, shared_tmp / "alone", **with_level(0, **sections) | {"mesh": one}))
        config = tiny(data, shared_tmp / "run", **with_level(0, **sections) | {"mesh": cut | {"shard": level}})
        run = train_at(dp * pp * tp, config)
    assert (run.sha256, run.learned) == (alone.sha256, alone.learned)
    mine, its = saved(shared_tmp / "run"), saved(shared_tmp / "alone")
    assert mine.meta["tensors"].keys() == its.meta["tensors"].keys()
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_any_level_goes_on_from_any_other(shared_folder: Path, shared_tmp: Path) -> None:
    data, constant, most = corpus(shared_folder), {"optim": {"schedule": "constant"}}, min(4, WORLD.size)

    def config(run: str, steps: int, level: int) -> Config:
        transport = {"transport": "messages"} if level < 2 else {}
        return tiny(data, shared_tmp / run, **with_level(level, train={"steps": steps}, comm=transport, **constant))

    with small_blocks():
        alone = train_at(1, config("alone", 12, 0))
        for steps, ranks, level in ((2, 3, 3), (4, 1, 0), (6, 4, 1), (8, 4, 2), (10, 2, 3), (12, 3, 2)):
            run = train_at(min(ranks, most), config("mixed", steps, level))
    assert len(run.events("resume")) == 5 and (run.sha256, run.losses) == (alone.sha256, alone.losses)
    mine, its = saved(shared_tmp / "mixed"), saved(shared_tmp / "alone")
    assert all(torch.equal(mine[name], its[name]) for name in its)


def one_step(job: Job, limit: float = float("inf")) -> bool:
    """Make one step; return whether an update was made. Gradients are freed by then. Collective over job.comm."""
    loader = job.open_loader(0)
    batch = next(loader)
    loader.close()
    report = exchange_reports(job, compute(job, batch), 0.0, False)
    return not job.strategy.step(1e-2, report.tokens, limit).skipped


def held_at(comm: MPI.Intracomm, config: Config) -> tuple[dict[str, int], dict[str, int], int, dict[str, int], int]:
    """Return bytes (with a step's gradients, between steps), elements of the flat layout, elements of its units, and parameters
    that have memory after a forward."""
    job = job_at(comm, config)
    loader = job.open_loader(0)
    compute(job, next(loader))
    loader.close()
    strategy: Any = job.strategy
    assert strategy.buffer or all(p.grad is None for p in job.engine.model.parameters())
    full = strategy.held()
    strategy.discard()
    job.engine.model(torch.zeros(1, 1, dtype=torch.int64))
    whole = sum(p.untyped_storage().nbytes() > 0 for p in job.engine.model.parameters())
    if not strategy.buffer:
        strategy.parameters.free()
    units = {} if strategy.buffer else {unit.name: unit.length for unit in strategy.units}
    return full, strategy.held(), strategy.buffer.num_elements if strategy.buffer else sum(units.values()), units, whole


@pytest.mark.parametrize(("name", "moments"), [(name, len(MOMENTS[name])) for name in ELEMENTWISE if name != "adam"])
def test_each_rank_holds_what_the_formulas_say(shared_folder: Path, shared_tmp: Path, name: str, moments: int) -> None:
    data, block = corpus(shared_folder), 256
    for n in sizes(1, 2, 3, 4):
        kept = {}
        for level in (0, 1, 2, 3):
            comm = {"transport": "messages"} if level < 2 else {}
            config = tiny(data, shared_tmp / f"{n}_{level}", **with_level(level, comm=comm, optim={"name": name}))
            with small_blocks(block):
                rows = at(n, lambda comm, config=config: held_at(comm, config))
            for rank, (full, rest, elements, units, whole) in enumerate(rows):
                if level < 2 or n == 1:
                    slots = full["gradients"] // (4 * elements)
                    assert full == rest == of_replicas(elements, slots, moments, *((rank, n) if level else ())), (n, level, rank)
                else:
                    right = of_shards(units, rank, n, {2: 2, 3: 2, 4: 1}[n], moments, block, level)
                    assert {key: rest[key] for key in ("parameters", "gradients")} == {
                        key: right[key] for key in ("parameters", "gradients")
                    }, (n, level, rank)
                    assert 0.9 * right["optimizer"] <= rest["optimizer"] <= right["optimizer"]
                    block_bytes = 4 * max(length for unit, length in units.items() if unit.startswith("blocks."))
                    assert full == rest | {"parameters": rest["parameters"] + (block_bytes if level == 3 else 0)}
                    assert whole == (len(units) - 2 + 18 if level == 2 else 12), "level 3 keeps one of two blocks"
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


@pytest.mark.parametrize("level", [2, 3])
def test_gradients_that_are_not_finite_are_skipped_as_at_level_0(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    data, lines = corpus(shared_folder), {}
    for n in sizes(2, 3):
        for how in (0, level):
            with monkeypatch.context() as patch:
                patch.setenv(VARIABLE, "nan:1:2,times=2")
                run = train_at(n, tiny(data, shared_tmp / f"injected_{n}_{how}", **with_level(how, train={"steps": 4})))
            with spoilt(lambda batch, v: (batch, v) in {(1, 1), (2, 4)}, math.nan):
                again = train_at(n, tiny(data, shared_tmp / f"computed_{n}_{how}", **with_level(how, train={"steps": 4})))
            assert again.lines == run.lines and [line["batch"] for line in run.events("skipped")] == [1, 2]
            lines[how] = run.lines
        assert lines[level] == lines[0]


@pytest.mark.parametrize("fault", ["wrong:1:2", "flip:1:2,tensor=0,bit=3"])
def test_faults_that_no_audit_can_find_are_refused(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """At each level of sharding, and with a strategy whose replicas differ."""
    if WORLD.size == 1:
        pytest.skip("needs two ranks")
    monkeypatch.setenv(VARIABLE, fault)
    said = f"'{fault}' is not possible with %s: an audit compares .*, so no audit can find the fault. Choose another value"
    for level in (1, 2, 3):
        with pytest.raises(UsageError, match=said % "mesh.shard=1.2.3"):
            train_at(2, tiny(corpus(shared_folder), shared_tmp / f"run_{level}", **with_level(level)))
    with pytest.raises(UsageError, match=said % "strategy.name=delayed.*"):
        train_at(2, tiny(corpus(shared_folder), shared_tmp / "run_local", strategy={"name": "local"}))
    assert not list(shared_tmp.glob("run*/checkpoints/*"))
    monkeypatch.setenv(VARIABLE, "nan:1:2")
    with pytest.raises(UsageError, match="'nan:1:2' changes the gradient of one lane .*, but only comm.reducer=tree keeps the"):
        train_at(2, tiny(corpus(shared_folder), shared_tmp / "run", comm={"reducer": "allreduce"}))
