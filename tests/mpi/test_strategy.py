"""Laws of the synchronous update. It uses the mean over tokens, is clipped by one norm, and is equal on all ranks. A skipped
update is skipped on all ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.parallel.engine import Engine
from mpidp.parallel.schedule import one_f_one_b
from mpidp.reducers.tree import REDUCERS
from mpidp.strategies import STRATEGIES
from mpidp.strategies.optimizer import Optimizer
from mpidp.strategies.protocol import StepStats
from mpidp.training.job import Job
from mpidp.training.run_summary import held_floats
from tests.tiny import WORLD, at, corpus, job_at, masked_corpus, micro_batches_of, pretended, sizes, tiny

pytestmark = pytest.mark.mpi


def run_batch(job: Job, number: int, spoil: int = -1) -> int:
    """Run forward and backward of a global batch. Return the number of its target tokens. spoil: micro-batch whose gradient
    becomes NaN."""
    loader = job.open_loader(number)
    batch = next(loader)
    loader.close()
    real, engine = Engine.loss_sum, job.engine
    engine.loss_sum = lambda mb, key: real(engine, mb, key) * (math.nan if mb.v == spoil else 1.0)  # type: ignore[method-assign]
    done = engine.run(one_f_one_b(micro_batches_of(job)), batch, job.strategy)
    return job.comm.allreduce(sum(done.num_tokens))


def whole_batch(job: Job, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all inputs and targets of a global batch together."""
    loader = job.open_loader(number)
    batch = next(loader)
    loader.close()
    parts = job.comm.allgather([(batch[v].tokens, batch[v].targets) for v in micro_batches_of(job)])
    tokens, targets = zip(*(pair for part in parts for pair in part), strict=True)
    return torch.cat(tokens), torch.cat(targets)


@pytest.mark.parametrize("kind", list(REDUCERS))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [0, 6])  # the second is short: some micro-batches have fewer sequences, others none
def test_the_update_is_that_of_the_mean_over_tokens(
    shared_folder: Path, shared_tmp: Path, kind: str, masked: bool, number: int
) -> None:
    """The reference is one forward and backward over the whole batch by autograd, in float64. The result is not a mean of means.
    """
    data = (masked_corpus if masked else corpus)(shared_folder)
    clip = 0.5
    sections: dict[str, Any] = {"comm": {"reducer": kind}, "optim": {"name": "sgd", "clip": clip, "beta1": 0.0}}
    sections["optim"] |= {"weight_decay": 0.0, "warmup_steps": 0}

    def step(comm: MPI.Intracomm) -> tuple[float, float, float]:
        job = job_at(comm, tiny(data, shared_tmp, **sections))
        tokens, targets = whole_batch(job, number)
        before = {name: p.detach().clone() for name, p in job.engine.model.named_parameters()}
        model = copy.deepcopy(job.engine.model).double()
        model.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        mean = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
        counted = run_batch(job, number)
        assert counted == int((targets != -100).sum())
        stats = job.strategy.step(0.1, counted)
        worst = 0.0
        for name, p in job.engine.model.named_parameters():
            wanted = before[name].double() - 0.1 * mean[name] * min(1.0, clip / norm)
            worst = max(worst, float((p.detach().double() - wanted).abs().max()))
            assert not torch.equal(p, before[name])
        return stats.grad_norm, norm, worst

    for grad_norm, norm, worst in at(WORLD.size, step):
        assert grad_norm == pytest.approx(norm, rel=1e-5) and norm > clip  # clipping applies, and the logged norm is not clipped
        assert worst < 1e-6


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_one_gradient_that_is_not_finite_skips_the_update_everywhere(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    config = tiny(corpus(shared_folder), shared_tmp, comm={"reducer": kind})

    def steps(comm: MPI.Intracomm, spoil: bool) -> tuple[list[StepStats], list[str], dict[str, Any]]:
        job = job_at(comm, config)
        stats, hashes = [], []
        for number in range(4):
            spoilt = number == 2
            if spoilt and not spoil:
                continue
            tokens = run_batch(job, number, spoil=7 if spoilt else -1)
            stats.append(job.strategy.step(0.01, tokens))
            hashes.append(weights_sha256(job.engine.model))
        state = job.strategy.state_dict()
        return stats, hashes, {name: e.tensor.tolist() for name, e in state.items()}

    found = at(WORLD.size, lambda comm: steps(comm, spoil=True))
    clean = at(WORLD.size, lambda comm: steps(comm, spoil=False))
    for (stats, hashes, state), (plain_stats, plain_hashes, plain_state) in zip(found, clean, strict=True):
        assert [s.skipped for s in stats] == [False, False, True, False] and not math.isfinite(stats[2].grad_norm)
        assert [s for s in stats if not s.skipped] == plain_stats and not any(s.skipped for s in plain_stats)
        assert hashes[2] == hashes[1]  # no weight has changed
        assert [hashes[i] for i in (0, 1, 3)] == plain_hashes  # and the next step is not affected
        assert state == plain_state


@pytest.mark.parametrize(("copies", "nodes"), [("rank", 1), ("node", 1), ("node", 2), ("node", 3), ("rank", 2)])
def test_start_makes_all_replicas_rank_0s(shared_folder: Path, shared_tmp: Path, copies: str, nodes: int) -> None:
    config = tiny(corpus(shared_folder), shared_tmp, comm={"copies": copies})

    def start(comm: MPI.Intracomm) -> tuple[str, str]:
        job = job_at(comm, config)
        before = weights_sha256(job.engine.model)
        comm.Barrier()
        with torch.no_grad():
            for p in job.engine.model.parameters() if copies == "rank" or job.strategy.group.node.rank == 0 else ():
                p += comm.rank
        job.strategy.start()
        return before, weights_sha256(job.engine.model)

    with pretended(min(nodes, WORLD.size)):
        found = at(WORLD.size, start)
    assert len({h for pair in found for h in pair}) == 1


@pytest.mark.parametrize(("copies", "nodes"), [("rank", 1), ("node", 1), ("node", 2), ("auto", 2)])
def test_how_many_copies_there_are(shared_folder: Path, shared_tmp: Path, copies: str, nodes: int) -> None:
    """Values that a rank writes into its parameters and moments are visible on the ranks that share its copy, and on no other
    rank."""
    config = tiny(corpus(shared_folder), shared_tmp, comm={"copies": copies}, train={"audit_every": 2})

    def seen(comm: MPI.Intracomm) -> list[int]:
        job = job_at(comm, config)
        flats = [flat.view(-1) for flat in job.strategy.flats().values()]
        assert len(flats) == 3 and all(bool(flat.isfinite().all()) for flat in flats)
        comm.Barrier()
        for flat in flats:
            flat[comm.rank] = 1000.0 + comm.rank
        comm.Barrier()
        whose = [[r for r in range(comm.size) if float(flat[r]) == 1000.0 + r] for flat in flats]
        assert whose[0] == whose[1] == whose[2] and [comm.rank in ranks for ranks in job.audit.replicas].count(True) == 1
        assert whose[0] == next(list(ranks) for ranks in job.audit.replicas if comm.rank in ranks)
        return whose[0]

    with pretended(min(nodes, WORLD.size)):
        found = at(WORLD.size, seen)
    if copies == "rank" or nodes >= WORLD.size:
        assert found == [[rank] for rank in range(WORLD.size)]
    else:
        of_node = [rank * min(nodes, WORLD.size) // WORLD.size for rank in range(WORLD.size)]
        assert found == [[r for r in range(WORLD.size) if of_node[r] == node] for node in of_node]


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_who_holds_the_optimizers_state(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    config = tiny(corpus(shared_folder), shared_tmp, comm={"reducer": kind})

    def layouts(comm: MPI.Intracomm) -> set[str]:
        job = job_at(comm, config)
        job.strategy.step(0.01, run_batch(job, 0))
        names = {name.rpartition("/")[0] for name in job.strategy.state_dict()}
        assert names in ({n for n, _ in job.engine.model.named_parameters()}, set())
        return {entry.layout for entry in job.strategy.state_dict().values()}

    found = at(WORLD.size, layouts)
    assert found == ([{"sharded"}] + [set()] * (WORLD.size - 1) if kind == "root" else [{"replicated"}] * WORLD.size)


def test_no_clipping_when_off_or_when_small(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)

    def stepped(comm: MPI.Intracomm, clip: float) -> tuple[str, float]:
        job = job_at(comm, tiny(data, shared_tmp, optim={"clip": clip, "name": "sgd"}))
        stats = job.strategy.step(0.1, run_batch(job, 0))
        return weights_sha256(job.engine.model), stats.grad_norm

    off, large, small = (at(WORLD.size, lambda comm, clip=clip: stepped(comm, clip))[0] for clip in (0.0, 1e9, 1e-3))
    assert off == large and small[0] != off[0] and small[1] == off[1] > 1e-3


def test_names_become_classes_in_one_place() -> None:
    assert set(STRATEGIES) == {"synchronous", "quorum", "delayed", "local", "server"}
    assert Optimizer.__module__ == "mpidp.strategies.optimizer"
    needed = {
        "start", "micro_batch", "observe_lanes", "discard", "step", "drain", "state_dict", "load_state_dict", "close", "flats",
    }
    assert all(needed <= set(dir(kind)) for kind in STRATEGIES.values())


def vectors(job: Job) -> float:
    """Return the bytes of this rank's gradient buffers, its share of the parameters and moments, and all other flat tensors."""
    found, sharing = job.strategy.held(), len(job.memory.group.members[job.memory.group.index]) if job.memory.one_copy else 1
    others = [*getattr(job.strategy.reducer, "held", {}).values(), *getattr(job.strategy.reducer, "_before", {}).values()]
    others += [getattr(job.strategy, name, torch.empty(0)) for name in ("_anchor", "_momentum")]
    return found["gradients"] + (found["parameters"] + found["optimizer"]) / sharing + 4 * sum(one.numel() for one in others)


@pytest.mark.parametrize("sections", [
    {}, {"comm": {"copies": "rank"}}, {"comm": {"transport": "messages"}}, {"train": {"audit_every": 2}},
    {"comm": {"compress": "topk", "momentum": 0.9}}, {"comm": {"compress": "int8"}, "strategy": {"name": "local"}},
    {"strategy": {"name": "delayed", "staleness": 3}}, {"strategy": {"quorum": 0.5, "staleness": 2}},
    {"strategy": {"name": "local", "overlap": True}}, {"strategy": {"name": "local", "group": "pairs"}},
], ids=str)  # fmt: skip
def test_the_memory_that_a_run_prints_is_what_a_rank_holds(
    shared_folder: Path, shared_tmp: Path, sections: dict[str, Any]
) -> None:
    data = corpus(shared_folder)

    def one(comm: MPI.Intracomm) -> tuple[float, float]:
        job = job_at(comm, tiny(data, shared_tmp / str(comm.size), **sections))
        return 4 * held_floats(job.plan, job.strategy.buffer.num_elements)[0], vectors(job)

    for n in sizes(1, 2, 4):
        foretold, found = at(n, one)[0]  # on rank 0
        assert foretold == pytest.approx(found)
