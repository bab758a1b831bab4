"""Laws of sums: the tree gives one sum, bit for bit, close to the exact one; all reducers agree with it and with one rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpidp.comm.buckets import GradientBuffer
from mpidp.comm.reducers import REDUCERS
from mpidp.comm.transport import Messages
from mpidp.engine import weights_sha256
from mpidp.lanes import Lanes
from mpidp.strategies.synchronous import Synchronous
from tests.tiny import WORLD, at, corpus, gradients_of, job_at, sizes, tiny, train_at
from tests.unit.test_tree import reference

pytestmark = pytest.mark.mpi

SHAPES = {"a": (3, 50), "b": (65,), "c": (1,), "d": (20, 20), "e": (64,)}
# (global_batch, micro_batch, lanes): V divisible by no number of ranks, short last micro-batches, several a lane
CUTS = [(8, 1, 0), (7, 1, 0), (11, 1, 0), (12, 1, 4), (13, 2, 5), (4, 1, 0)]


def contributions(v: int, step: int) -> dict[str, torch.Tensor]:
    """The gradient of a micro-batch: of very different sizes and signs, so that any other order gives other bits."""
    generator = torch.Generator().manual_seed(1000 * step + v)
    return {
        name: torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 5, shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def reduced(kind: str, comm: MPI.Intracomm, lanes: Lanes, bucket_bytes: int, steps: int = 2) -> list[dict[str, np.ndarray]]:
    """The sums of some steps, by parameter, as this rank sees them."""
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    reducer = REDUCERS[kind](comm, lanes, Messages(torch.device("cpu")))
    buffer = GradientBuffer(named, reducer.num_slots, bucket_bytes)
    reducer.attach(buffer)
    found = []
    for step in range(steps):
        for lane in lanes.of_rank(comm.rank, comm.size):
            for v in lanes.micro_batches(lane):
                reducer.open(v)
                for name, p in named:
                    assert p.grad is not None
                    p.grad += contributions(v, step)[name]
                reducer.close(v)
        reducer.finish()
        found.append({name: p.grad.numpy().copy() for name, p in named})
    return found


def expected(lanes: Lanes, step: int, name: str) -> np.ndarray:
    """Micro-batches of a lane added in order, lanes by the tree's definition."""
    values = []
    for lane in range(lanes.num_lanes):
        total = np.zeros(SHAPES[name], dtype=np.float32)
        for v in lanes.micro_batches(lane):
            total = total + contributions(v, step)[name].numpy()
        values.append(total)
    return reference(np.stack(values))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("bucket_bytes", [1, 600, 10**9])
def test_the_tree_gives_the_bits_of_its_definition(cut: tuple[int, int, int], bucket_bytes: int) -> None:
    lanes = Lanes(*cut)
    for n in sizes(1, 2, 3, 4):
        for found in at(n, lambda comm: reduced("tree", comm, lanes, bucket_bytes)):
            for step, sums in enumerate(found):
                for name in SHAPES:
                    np.testing.assert_array_equal(sums[name].view(np.int32), expected(lanes, step, name).view(np.int32))


def exact(lanes: Lanes, step: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sum, sum of absolute values) in float64."""
    parts = np.stack([contributions(v, step)[name].double().numpy() for v in range(lanes.num_micro_batches)])
    return parts.sum(axis=0), np.abs(parts).sum(axis=0)


@pytest.mark.parametrize("num_lanes", [4, 7, 8, 11, 16, 37])
def test_the_tree_is_close_to_the_exact_sum(num_lanes: int) -> None:
    lanes = Lanes(num_lanes, 1)
    for sums in at(WORLD.size, lambda comm: reduced("tree", comm, lanes, 600, steps=1)):
        for name in SHAPES:
            total, absolute = exact(lanes, 0, name)
            bound = (math.log2(num_lanes) + 1) * 2.0**-24 * absolute
            assert (np.abs(sums[0][name] - total) <= bound).all()


@pytest.mark.parametrize("kind", ["allreduce", "naive", "root"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_others_are_close_to_the_exact_sum(kind: str, cut: tuple[int, int, int]) -> None:
    lanes = Lanes(*cut)
    found = at(WORLD.size, lambda comm: reduced(kind, comm, lanes, 600))
    for sums in found[:1] if kind == "root" else found:
        for step, of_step in enumerate(sums):
            for name in SHAPES:
                total, absolute = exact(lanes, step, name)
                assert (np.abs(of_step[name] - total) <= 2 * lanes.num_micro_batches * 2.0**-24 * absolute).all()


def test_bucketed_allreduce_is_one_allreduce_a_parameter() -> None:
    lanes = Lanes(11, 1)
    naive = at(WORLD.size, lambda comm: reduced("naive", comm, lanes, 1))
    for bucket_bytes in (1, 600, 10**9):
        bucketed = at(WORLD.size, lambda comm, size=bucket_bytes: reduced("allreduce", comm, lanes, size))
        for ours, plain in zip(bucketed, naive, strict=True):
            for a, b in zip(ours, plain, strict=True):
                for name in SHAPES:
                    assert np.linalg.norm(a[name] - b[name]) <= 1e-6 * np.linalg.norm(b[name])


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_one_rank_sends_nothing_and_more_count_their_bytes(kind: str) -> None:
    def sent(comm: MPI.Intracomm) -> int:
        lanes, wire = Lanes(8, 1), Messages(torch.device("cpu"))
        reducer = REDUCERS[kind](comm, lanes, wire)
        buffer = GradientBuffer([("w", torch.nn.Parameter(torch.zeros(200_000)))], reducer.num_slots, 10**9)
        reducer.attach(buffer)
        reducer.finish()
        reducer.publish([torch.zeros(10)])
        return wire.take()[0]

    assert at(1, sent)[0] in ((0,) if kind != "root" else (0, 40))
    if WORLD.size > 1:
        total = sum(at(WORLD.size, sent))
        elements = 4 * 262_144 if kind != "naive" else 4 * 200_000  # buffers are padded to whole blocks
        least = elements * (WORLD.size - 1) * (1 if kind == "root" else 2)
        assert 0.99 * least <= total <= (3 if kind == "tree" else 1.01) * least


# The same with a model and its training -----------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {"train": {"global_batch": 13, "steps": 20, "eval_every": 0}, "model": {"dropout": 0.1}}


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_gradients_are_those_of_one_rank(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data = corpus(shared_folder)

    def gradients(comm: MPI.Intracomm) -> list[dict[str, torch.Tensor]]:
        job = job_at(comm, tiny(data, shared_tmp / f"{kind}{comm.size}", comm={"reducer": kind}, **SECTIONS))
        return [gradients_of(job, batch) for batch in (0, 7)]  # the second is an epoch's short last batch

    alone = at(1, gradients)[0]
    for n in sizes(2, 3, 4):
        found = at(n, gradients)
        for ours in found[:1] if kind == "root" else found:
            for a, b in zip(ours, alone, strict=True):
                assert a.keys() == b.keys()
                for name in a:
                    assert float(b[name].norm()) > 0
                    assert float((a[name] - b[name]).norm()) <= 1e-6 * float(b[name].norm()), (kind, n, name)


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_losses_are_those_of_one_rank_and_replicas_stay_equal(
    shared_folder: Path, shared_tmp: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, hashes = corpus(shared_folder), []
    real_step = Synchronous.step

    def step(self: Synchronous, lr: float, tokens: int) -> Any:
        stats = real_step(self, lr, tokens)
        hashes.append(weights_sha256(torch.nn.ParameterList(self.parameters)))
        return stats

    monkeypatch.setattr(Synchronous, "step", step)
    alone = train_at(1, tiny(data, shared_tmp / "1", comm={"reducer": kind}, **SECTIONS))
    assert len(alone.losses) == 20 and alone.losses[-1] < alone.losses[0]
    for n in sizes(2, 3, 4):
        hashes.clear()
        run = train_at(n, tiny(data, shared_tmp / str(n), comm={"reducer": kind}, **SECTIONS))
        assert run.losses == pytest.approx(alone.losses, rel=1e-5)
        assert run.end["val_loss"] == pytest.approx(alone.end["val_loss"], rel=1e-5)
        of_ranks = WORLD.allgather(list(hashes))[:n]
        assert len(of_ranks[0]) == 20 and len(set(of_ranks[0])) == 19  # the learning rate ends at 0
        assert all(other == of_ranks[0] for other in of_ranks)
        if kind == "tree":
            assert (run.sha256, run.lines) == (alone.sha256, alone.lines)
