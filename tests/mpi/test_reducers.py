"""Laws of sums. The tree always gives the same bits, close to the exact sum. All reducers agree with the tree and with one
rank."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpidp.checkpoint.local_parameters import weights_sha256
from mpidp.comm.group import Group, alone, by_node
from mpidp.comm.transport import Messages
from mpidp.data.lanes import Lanes, even_ranges
from mpidp.reducers import overlap
from mpidp.reducers.buckets import GradientBuffer
from mpidp.reducers.tree import REDUCERS, slots_needed
from mpidp.runtime.topology import make_topology
from mpidp.strategies.synchronous import Synchronous
from mpidp.training.balance import Even, Terms
from tests.tiny import (
    WORLD,
    at,
    corpus,
    gradients_of,
    job_at,
    pretended,
    sizes,
    small_blocks,
    summed,
    tiny,
    train_at,
)
from tests.unit.test_tree import reference

pytestmark = pytest.mark.mpi

CPU = torch.device("cpu")
SHAPES = {"a": (3, 50), "b": (65,), "c": (1,), "d": (20, 20), "e": (64,)}
# (global_batch, micro_batch, lanes): V divisible by no number of ranks, short last micro-batches, several per lane
CUTS = [(8, 1, 0), (7, 1, 0), (11, 1, 0), (12, 1, 4), (13, 2, 5), (4, 1, 0)]


def contributions(v: int, step: int) -> dict[str, torch.Tensor]:
    """Return the gradient of a micro-batch. Magnitudes and signs differ strongly, so that another order of addition gives other
    bits."""
    generator = torch.Generator().manual_seed(1000 * step + v)
    return {
        name: torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 5, shape, generator=generator)
        for name, shape in SHAPES.items()
    }


@dataclass
class Anyhow:
    """Assign lanes to ranks: groups as in balance.even, but any rank and any order within a group."""

    ranges: list[range]
    static = False

    def lanes_of(self, group: Group, step: int) -> list[int]:
        """Return this rank's lanes. There may be none."""
        members = group.members[group.index]
        lanes = list(range(self.ranges[members[0]].start, self.ranges[members[-1]].stop))
        chance = random.Random(f"{step} {group.index}")
        chance.shuffle(lanes)
        owner = [chance.randrange(len(members)) for _ in lanes]
        return [lane for lane, rank in zip(lanes, owner, strict=True) if rank == group.node.rank]


def reduced(
    kind: str, comm: MPI.Intracomm, lanes: Lanes, bucket_bytes: int, steps: int = 2, nodes: int = 0, anyhow: bool = False,
    way: str = "none", open_wire: Callable[[MPI.Intracomm], Messages] = lambda comm: Messages(CPU),
) -> list[dict[str, np.ndarray]]:
    """Return this rank's sums of some steps, by parameter. nodes: number of simulated nodes, or 0 for messages only. anyhow:
    whether lanes move within a group. way: the overlap mode. open_wire: makes the transport."""
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    with pretended(nodes):
        mesh = make_topology(comm)
    group = by_node(mesh) if nodes else alone(mesh)
    ranges = even_ranges(lanes.num_lanes, comm.size)
    shares = Anyhow(ranges) if anyhow else Even(Terms(lanes.num_lanes, comm.size, comm.rank))
    slots = lanes.num_lanes if anyhow else 1
    if kind == "tree" and not anyhow:
        slots = slots_needed(lanes, ranges[comm.rank], 0, static=True, kept_apart=False)
    wire = open_wire(comm)
    reducer = REDUCERS[kind](group, lanes, wire, shares, slots)
    reducer.attach(
        GradientBuffer(named, slots, bucket_bytes, lambda elements: group.memory(elements, CPU), group.node.rank)
    )
    overlap.use(reducer, way)
    found = []
    for step in range(steps):
        mine = shares.lanes_of(group, step) if isinstance(shares, Anyhow) else list(ranges[comm.rank])
        reducer.observe_lanes([])
        todo = [v for lane in mine for v in lanes.micro_batches(lane)]
        for v in todo:
            reducer.open(v, last=v == todo[-1])
            for name, p in named:
                assert p.grad is not None
                p.grad += contributions(v, step)[name]
            if v == todo[-1] and reducer.overlaps():
                for bucket in reducer.buffer.buckets[:2]:  # finish sums the others, as for parameters without gradient
                    reducer.begin(bucket)
            reducer.close(v)
        found.append({name: view.numpy() for name, view in summed(reducer).items()})
    overlap.use(reducer, "none")
    group.close()
    wire.close()
    return found


def expected(lanes: Lanes, step: int, name: str) -> np.ndarray:
    """Add the micro-batches of a lane in order, and the lanes as the tree is defined."""
    values = []
    for lane in range(lanes.num_lanes):
        total = np.zeros(SHAPES[name], dtype=np.float32)
        for v in lanes.micro_batches(lane):
            total = total + contributions(v, step)[name].numpy()
        values.append(total)
    return reference(np.stack(values))


def check_bits(cut: tuple[int, int, int], ranks: tuple[int, ...] = (1, 2, 3, 4), bucket_bytes: int = 600, **how: Any) -> None:
    """Assert that the tree's sums equal the definition at these numbers of ranks. Collective over WORLD."""
    lanes = Lanes(*cut)
    for n in sizes(*ranks):
        with small_blocks():
            every = at(n, lambda comm: reduced("tree", comm, lanes, bucket_bytes, **how))
        for found in every:
            for step, sums in enumerate(found):
                for name in SHAPES:
                    np.testing.assert_array_equal(sums[name].view(np.int32), expected(lanes, step, name).view(np.int32))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("nodes", [0, 1, 2, 3])  # with 3 and 4 ranks, 2 and 3 nodes have different sizes
def test_the_tree_gives_the_bits_of_its_definition(cut: tuple[int, int, int], nodes: int) -> None:
    check_bits(cut, tuple(n for n in (1, 2, 3, 4) if n >= nodes), nodes=nodes)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("nodes", [1, 2])
def test_lanes_may_change_hands_within_a_group(cut: tuple[int, int, int], nodes: int) -> None:
    check_bits(cut, tuple(n for n in (1, 2, 3, 4) if n >= nodes), nodes=nodes, anyhow=True, steps=4)


@pytest.mark.parametrize("nodes", [0, 1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 10**9])
@pytest.mark.parametrize("way", ["none", "thread", "poll"])
def test_buckets_that_are_summed_early_have_the_same_bits(way: str, bucket_bytes: int, nodes: int) -> None:
    for cut in [(11, 1, 0), (13, 2, 5)]:
        check_bits(cut, tuple(n for n in (2, 3, 4) if n >= nodes), bucket_bytes, nodes=nodes, way=way)


def exact(lanes: Lanes, step: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum, sum of absolute values) in float64."""
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


def sent(comm: MPI.Intracomm, kind: str, nodes: int = 0) -> int:
    """Return the bytes that this rank sends for a sum of 8 lanes."""
    with pretended(nodes):
        mesh = make_topology(comm)
    group, lanes, wire = by_node(mesh) if nodes else alone(mesh), Lanes(8, 1), Messages(CPU)
    slots = slots_needed(lanes, even_ranges(8, comm.size)[comm.rank], 0, static=True, kept_apart=False) if kind == "tree" else 1
    reducer = REDUCERS[kind](group, lanes, wire, Even(Terms(8, comm.size, comm.rank)), slots)
    named = [("w", torch.nn.Parameter(torch.zeros(200_000)))]
    reducer.attach(GradientBuffer(named, slots, 10**9, lambda n: group.memory(n, CPU), group.node.rank))
    reducer.finish()
    reducer.publish([torch.zeros(10)])
    group.close()
    return wire.pop_counts()[0]


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_one_rank_sends_nothing_and_more_count_their_bytes(kind: str) -> None:
    assert at(1, lambda comm: sent(comm, kind))[0] in ((0,) if kind != "root" else (0, 40))
    if WORLD.size > 1:
        total = sum(at(WORLD.size, lambda comm: sent(comm, kind)))
        elements = 4 * 200_704 if kind != "naive" else 4 * 200_000  # buffers are padded to whole blocks
        least = elements * (WORLD.size - 1) * (1 if kind == "root" else 2)
        assert 0.99 * least <= total <= (3 if kind == "tree" else 1.01) * least


def test_within_a_node_nothing_is_sent_and_between_nodes_as_much_as_between_so_many_ranks() -> None:
    assert sum(at(WORLD.size, lambda comm: sent(comm, "tree", nodes=1))) == 0
    for nodes in (n for n in (2, 4) if WORLD.size % n == 0):
        assert sum(at(WORLD.size, lambda comm, nodes=nodes: sent(comm, "tree", nodes))) == 2 * 4 * 200_704 * (nodes - 1)


def test_lanes_can_be_looked_at_where_they_are_kept_apart() -> None:
    """Each lane is observed once, with its own gradient, before it is added to another lane. The sum has the same bits as without
    observers."""
    lanes = Lanes(13, 2, 7)

    def look(comm: MPI.Intracomm) -> dict[int, bool]:
        named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
        group, ranges = by_node(make_topology(comm)), even_ranges(7, comm.size)
        slots = slots_needed(lanes, ranges[comm.rank], 0, static=True, kept_apart=True)
        reducer = REDUCERS["tree"](group, lanes, Messages(CPU), Even(Terms(7, comm.size, comm.rank)), slots)
        reducer.attach(GradientBuffer(named, slots, 600, lambda n: group.memory(n, CPU), group.node.rank))
        seen: dict[int, bool] = {}

        def see(lane: int, flat: torch.Tensor) -> None:
            assert lane not in seen
            views = dict(zip([n for _, n, _ in reducer.buffer.layout.placed()], reducer.buffer.layout.views(flat), strict=True))
            seen[lane] = all(torch.equal(views[name], contributions(lane, 0)[name]) for name in SHAPES)

        for step in (0, 1):  # in the second step lanes are not kept apart: siblings share slots again
            reducer.observe_lanes([see] if step == 0 else [])
            for lane in ranges[comm.rank]:
                reducer.open(lane)
                for name, p in named:
                    p.grad += contributions(lane, step)[name]
                reducer.close(lane)
            for name, total in summed(reducer).items():
                np.testing.assert_array_equal(total.numpy().view(np.int32), expected(lanes, step, name).view(np.int32))
        group.close()
        return seen

    for n in sizes(1, 2, 3):
        found = at(n, look)
        assert [list(seen) for seen in found] == [list(lanes) for lanes in even_ranges(7, n)]
        assert all(all(seen.values()) for seen in found)


def test_other_reducers_do_not_keep_lanes_apart() -> None:
    for kind in ("allreduce", "naive", "root"):
        reducer = REDUCERS[kind](alone(make_topology(WORLD)), Lanes(8, 1), Messages(CPU), Even(Terms(8, 1, 0)))
        reducer.observe_lanes([])
        with pytest.raises(ValueError, match="single lanes cannot be observed"):
            reducer.observe_lanes([lambda lane, gradient: None])
        reducer.group.close()


@pytest.mark.parametrize("nodes", [0, 1, 2])
def test_the_norm_is_the_same_bits_whoever_computes_which_blocks(nodes: int) -> None:
    def norm(comm: MPI.Intracomm, nodes: int) -> tuple[float, float, float]:
        with pretended(nodes):
            mesh = make_topology(comm)
        group = by_node(mesh) if nodes else alone(mesh)
        reducer = REDUCERS["tree"](group, Lanes(8, 1), Messages(CPU), Even(Terms(8, comm.size, comm.rank)), 4)
        named = [("w", torch.nn.Parameter(torch.zeros(5000)))]
        reducer.attach(GradientBuffer(named, 4, 600, lambda n: group.memory(n, CPU), group.node.rank))
        total = torch.randn(5000, generator=torch.Generator().manual_seed(1))
        if group.node.rank == 0:
            reducer.buffer.total[:5000] = total
        group.fence()
        found = reducer.norm()
        reducer.scale(0.37)
        scaled = float(reducer.buffer.total[:5000].sub(total * 0.37).abs().max())
        group.close()
        return found, float(torch.linalg.vector_norm(total.double())), scaled

    with small_blocks():
        one = at(1, lambda comm: norm(comm, 0))[0][0]
        for n in (n for n in sizes(1, 2, 3, 4) if n >= nodes):
            for found, exact_norm, scaled in at(n, lambda comm: norm(comm, nodes)):
                assert found == one == pytest.approx(exact_norm, rel=1e-6) and scaled == 0.0


# With a model and training ------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {"train": {"global_batch": 13, "steps": 20, "eval_every": 0}, "model": {"dropout": 0.1}}


@pytest.mark.parametrize("kind", list(REDUCERS))
def test_gradients_are_those_of_one_rank(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data = corpus(shared_folder)

    def gradients(comm: MPI.Intracomm) -> list[dict[str, torch.Tensor]]:
        job = job_at(comm, tiny(data, shared_tmp / f"{kind}{comm.size}", comm={"reducer": kind}, **SECTIONS))
        return [gradients_of(job, batch) for batch in (0, 7)]  # the second is the short last batch of an epoch

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

    def step(self: Synchronous, *of: Any) -> Any:
        stats = real_step(self, *of)
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
        assert len(set(of_ranks[0])) == len(of_ranks[0]) == 20, "every step learns, also the last one"
        assert all(other == of_ranks[0] for other in of_ranks)
        if kind == "tree":
            assert (run.sha256, run.lines) == (alone.sha256, alone.lines)
