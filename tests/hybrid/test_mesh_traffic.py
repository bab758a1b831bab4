"""Laws: a step sends the bytes that `mpidp plan mesh` predicts between replicas and between stages. The operations of a token,
from which MFU is computed, do not depend on the mesh. The first lines of a run state the memory that a rank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.config.schema import Config
from mpidp.plan.mesh.search import model_of_config
from mpidp.plan.mesh.sizes import Shape, Work
from mpidp.plan.mesh.time import LinkSpeed, Machine, step_of
from mpidp.training.run_summary import held_floats
from mpidp.training.step import compute
from mpidp.training.step_report import exchange_reports
from tests.tiny import WORLD, at, corpus, everywhere, job_at, small_blocks, tiny

pytestmark = pytest.mark.mpi
FREE = LinkSpeed(0.0, 1.0)
MACHINE = Machine(1.0, 1.0, FREE, FREE, 8, 8)


def sent_by(comm: MPI.Intracomm, config: Config) -> tuple[int, int]:
    """Return (bytes that this rank sends in the second step, vocabulary size). Collective over comm."""
    job, sent = job_at(comm, config), 0
    loader = job.open_loader(0)
    for _ in range(2):
        job.transport.pop_counts()
        report = exchange_reports(job, compute(job, next(loader)), 0.0, False)
        assert not job.strategy.step(1e-3, report.divisor).skipped
        sent = job.transport.pop_counts()[0]
    loader.close()
    return sent, job.plan.shape.vocab_size


THREE = {"num_layers": 3}
TIED = {"num_layers": 4, "tie_embeddings": True}


@pytest.mark.parametrize(("dp", "pp", "shard", "model", "train"), [
    (2, 1, 0, {}, {}), (2, 1, 1, THREE, {}), (2, 1, 2, THREE, {}), (2, 1, 3, THREE, {}), (2, 1, 3, {"num_layers": 1}, {}),
    (2, 1, 3, THREE, {"dtype": "bfloat16"}), (2, 1, 3, THREE, {"recompute": True}), (2, 1, 3, {"lora_rank": 2}, {}),
    (4, 1, 3, THREE, {}), (2, 2, 3, {"num_layers": 6}, {}), (1, 2, 0, TIED, {}), (1, 2, 0, TIED | {"slices": 2}, {}),
    (1, 4, 0, TIED, {}), (1, 4, 0, TIED | {"slices": 2}, {}), (1, 4, 0, {"num_layers": 4}, {}),
])  # fmt: skip
def test_a_step_sends_the_predicted_bytes(
    shared_folder: Path, shared_tmp: Path, dp: int, pp: int, shard: int, model: dict[str, Any], train: dict[str, Any]
) -> None:
    if dp * pp > WORLD.size:
        pytest.skip("more ranks than there are")
    mesh, data = {"pp": pp, "shard": shard}, corpus(shared_folder)
    train = {"global_batch": 16, "micro_batch": 2, "lanes": dp} | train
    comm = {"overlap": "none"} if shard > 1 else {"transport": "messages", "overlap": "none"}
    config = tiny(data, shared_tmp / "run", model={"model_dim": 64, "hidden_dim": 128} | model, mesh=mesh, train=train, comm=comm)
    with small_blocks():
        found = at(dp * pp, lambda comm: sent_by(comm, config))
    sizes = model_of_config(config.flat(), found[0][1])
    work = Work(16, 2, float(config.train.recompute), 2 if config.train.dtype == "bfloat16" else 4, slices=config.model.slices)
    step = step_of(sizes, Shape(dp, pp, 1, shard), work, MACHINE)
    most, foretold = max(sent for sent, _ in found), step.dp_bytes + step.pp_bytes
    everywhere(foretold <= most <= 1.02 * foretold, f"{most} bytes sent, {foretold:.0f} foretold")


def held_by(comm: MPI.Intracomm, config: Config) -> tuple[float, float]:
    """Return (bytes that this rank holds between steps, bytes that the summary states). Collective over comm."""
    job = job_at(comm, config)
    level = config.mesh.shard if comm.size > 1 else 0
    frozen = [p for name, p in job.engine.model.named_parameters() if not p.requires_grad]
    others = [p for name, p in job.engine.model.named_parameters() if not p.requires_grad and not name.startswith("blocks.")]
    held = sum(job.strategy.held().values()) + 4 * sum(p.numel() for p in (others if level == 3 else frozen))
    count = sum(p.numel() for name, p in job.engine.model.named_parameters() if "lora" not in name)
    return float(held), 4 * held_floats(job.plan, count)[0]


@pytest.mark.parametrize("shard", [0, 1, 2, 3])
@pytest.mark.parametrize("sections", [
    {}, {"optim": {"name": "sgd"}}, {"optim": {"freeze": "embedding.*,blocks.0.*"}}, {"model": {"lora_rank": 8}},
], ids=["", "sgd", "freeze", "lora"])  # fmt: skip
def test_the_summary_states_the_memory_that_a_rank_holds(
    shared_folder: Path, shared_tmp: Path, shard: int, sections: dict[str, dict[str, Any]]
) -> None:
    if WORLD.size < 2:
        pytest.skip("needs two ranks")
    sections = sections | {"model": {"model_dim": 128, "hidden_dim": 256} | sections.get("model", {}), "mesh": {"shard": shard}}
    sections |= {} if shard > 1 else {"comm": {"transport": "messages"}}
    config = tiny(corpus(shared_folder), shared_tmp / "run", **sections)
    with small_blocks():
        found = at(2, lambda comm: held_by(comm, config))
    everywhere(all(abs(held - said) < 0.02 * said for held, said in found), f"bytes held, bytes stated: {found}")


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"tp": 2}])
def test_operations_do_not_depend_on_the_mesh(shared_folder: Path, shared_tmp: Path, mesh: dict[str, int]) -> None:
    if WORLD.size < 2:
        pytest.skip("needs two ranks")
    found = []
    for ranks, axes in ((1, {}), (2, mesh)):
        config = tiny(corpus(shared_folder), shared_tmp / f"run{ranks}", model={"lora_rank": 2}, mesh=axes)
        found += at(ranks, lambda comm, config=config: job_at(comm, config).record.facts["flops_per_token"])
    everywhere(len(set(found)) == 1, f"operations per token: {found}")
