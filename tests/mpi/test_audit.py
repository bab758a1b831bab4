"""Laws of audits over ranks: every flipped bit and every wrong gradient is found, nothing else is reported, and errors are
repaired if this is possible."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import mpidp.faults.inject
import mpidp.training.step
from mpidp.comm.work_stealing import Tickets
from mpidp.errors import MpidpError
from mpidp.faults.inject import InjectedFaults, parse
from mpidp.training.job import Job
from mpidp.training.step import compute
from tests.registries import OPTIMIZERS
from tests.tiny import WORLD, at, corpus, job_at, pretended, sizes, small_blocks, tiny

pytestmark = pytest.mark.mpi
FLIPS = 100
WRONG = 20


def flip(flat: torch.Tensor, place: int, bit: int) -> None:
    flat[place : place + 1].view(torch.int32).bitwise_xor_(1 << bit if bit < 31 else -(1 << 31))


def audited_job(
    comm: MPI.Intracomm, data: Path, run: Path, faults: InjectedFaults | None = None, /, **sections: dict[str, Any]
) -> Job:
    """Return a job after two steps, so that its moments are not zero."""
    sections["comm"] = {"copies": "rank", "overlap": "none"} | sections.get("comm", {})
    sections["train"] = {"audit_every": 1} | sections.get("train", {})
    job = job_at(comm, tiny(data, run, **sections), faults)
    for number in range(2):
        learn(job, number)
        job.strategy.step(0.01, 256)
    return job


def learn(job: Job, number: int) -> Any:
    """Compute the gradients of a batch as the training loop does. The number of the step is that of the batch plus 1. Collective
    over job.comm."""
    loader = job.open_loader(number)
    batch = next(loader)
    loader.close()
    job.position.step = number
    return compute(job, batch)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adam"])  # its state is adamw's
def test_every_flipped_bit_is_found(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    """Flip any bit of any tensor of weights or moments, on any rank. Two simultaneous flips are both found."""
    data = corpus(shared_folder)

    def audit(comm: MPI.Intracomm) -> None:
        job = audited_job(comm, data, shared_tmp / str(comm.size), optim={"name": name})
        assert job.audit.weights() is None
        layout, flats = job.strategy.buffer.layout, job.strategy.flats()
        assert len(flats) == 1 + len(job.strategy.optimizer.rule.moments)
        right = {suffix: flat.clone() for suffix, flat in flats.items()}
        chance = random.Random(name)  # the same random numbers on every rank
        for _ in range(FLIPS):
            rank, suffix = chance.randrange(comm.size), chance.choice(list(flats))
            offset, tensor, p = chance.choice(layout.placed())
            place, bit = offset + chance.randrange(p.numel()), chance.randrange(32)
            if comm.rank == rank:
                flip(flats[suffix], place, bit)
            found = job.audit.weights()
            if comm.size == 1:
                assert found is None  # no replica to compare with
                flip(flats[suffix], place, bit)
                continue
            assert found is not None and f"{tensor}{suffix} differs" in found.what, (suffix, tensor, bit)
            assert found.repaired == (comm.size > 2)
            if comm.size > 2:
                assert found.ranks == [rank]
            else:
                assert found.ranks == [0, 1] and "without a majority" in found.what
                if comm.rank == rank:
                    flip(flats[suffix], place, bit)
            # compare bits, not values: a flip can give a NaN
            assert all(torch.equal(flat.view(torch.int32), right[s].view(torch.int32)) for s, flat in flats.items())
        assert job.audit.weights() is None

    for n in sizes(1, 2, 3, 4):
        at(n, audit)


@pytest.mark.parametrize("nodes", [2, 3])
def test_copies_of_nodes_are_compared_and_mended(shared_folder: Path, shared_tmp: Path, nodes: int) -> None:
    if nodes > WORLD.size:
        pytest.skip("too few ranks")
    data = corpus(shared_folder)

    def audit(comm: MPI.Intracomm) -> None:
        job = audited_job(comm, data, shared_tmp, comm={"copies": "node"})
        replicas, flats = job.audit.replicas, job.strategy.flats()
        assert len(replicas) == nodes
        right = {suffix: flat.clone() for suffix, flat in flats.items()}
        for bad, suffix in enumerate([*flats, *flats]):
            members = replicas[bad % nodes]
            for writer in (members[0], members[-1]):
                comm.Barrier()
                if comm.rank == writer:
                    flip(flats[suffix], 5, 17)
                comm.Barrier()
                found = job.audit.weights()
                assert found is not None and found.repaired == (nodes == 3)
                assert found.ranks == (list(members) if nodes == 3 else list(range(comm.size)))
                comm.Barrier()
                if nodes == 2 and comm.rank == writer:
                    flip(flats[suffix], 5, 17)
                comm.Barrier()
                assert all(torch.equal(flat, right[s]) for s, flat in flats.items())

    with pretended(nodes):
        at(WORLD.size, audit)


class Spoiler:
    """Replaces the injected fault by any change at any place of the gradient."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.draw(1)

    def draw(self, elements: int) -> None:
        self.place, self.bit = self.chance.randrange(elements), self.chance.randrange(32)

    def __call__(self, lane: int, gradient: torch.Tensor) -> None:
        flip(gradient, self.place, self.bit)


def wrong_gradients(job: Job, until: int, patch: pytest.MonkeyPatch) -> list[tuple[int, list[list[int]], str]]:
    """Return WRONG tuples (the rank that computes wrongly, the suspects of each finding, the outcome). Collective over
    job.comm."""
    spoiler = Spoiler(random.Random(job.comm.size))
    patch.setattr(mpidp.faults.inject, "make_wrong", spoiler)
    named: list[list[int]] = []
    patch.setattr(mpidp.training.step, "report_finding", lambda job, step, finding, action: named.append(finding.ranks))
    found = []
    for i in range(WRONG):
        rank, number = spoiler.chance.randrange(job.comm.size), 2 + i
        spoiler.draw(job.strategy.buffer.num_elements)
        job.services.faults = parse(f"wrong:{rank}:{number + 1},until={number + 1 + until}", job.comm.rank)
        named.clear()
        try:
            done = learn(job, number)
            ended = "done"
            losses = sorted(v for part in job.comm.allgather(done.micro_batches) for v in part)
            assert losses == list(range(job.lanes.num_micro_batches)), "every micro-batch once"
        except MpidpError as error:
            ended = str(error)
            job.strategy.discard()
        found.append((rank, list(named), ended))
        job.strategy.reducer.finish()  # whatever is in the buffers
        job.strategy.group.fence()
        job.comm.Barrier()
        job.services.faults = InjectedFaults()
    return found


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", ["even", "steal"])
def test_every_glitch_is_found_and_gone_when_the_step_is_done_again(
    shared_folder: Path, shared_tmp: Path, kind: str, nodes: int
) -> None:
    """Even if ranks steal lanes, no rank may check its own lane."""
    data = corpus(shared_folder)

    def audit(comm: MPI.Intracomm) -> None:
        slow = parse(f"delay:{comm.size - 1}:1,seconds=0.003", comm.rank)
        job = audited_job(comm, data, shared_tmp / str(comm.size), slow, train={"balance": kind})
        with pytest.MonkeyPatch.context() as patch:
            for rank, named, ended in wrong_gradients(job, 0, patch):
                assert ended == "done" and len(named) == 1 and rank in named[0]

    with small_blocks():
        for n in (n for n in sizes(2, 3, 4) if n >= nodes):
            with pretended(nodes):
                at(n, audit)


def test_lanes_are_stolen_where_nobody_looks(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps between audits, ranks take lanes of other ranks. Therefore the law above covers stealing."""
    if WORLD.size == 1:
        pytest.skip("nobody to steal from")
    data, stolen, real = corpus(shared_folder), [], Tickets.steal

    def steal(self: Tickets) -> int | None:
        lane = real(self)
        stolen.extend([] if lane is None else [lane])
        return lane

    monkeypatch.setattr(Tickets, "steal", steal)

    def work(comm: MPI.Intracomm) -> int:
        slow = parse(f"delay:{comm.size - 1}:1,seconds=0.02", comm.rank)
        job = audited_job(comm, data, shared_tmp, slow, train={"balance": "steal", "audit_every": 100})
        for number in (2, 3):
            learn(job, number)
            job.strategy.step(0.01, 256)
        return len(stolen)

    assert sum(at(WORLD.size, work)) > 0


def test_every_rank_that_computes_wrongly_again_and_again_is_named(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)

    def audit(comm: MPI.Intracomm) -> None:
        job = audited_job(comm, data, shared_tmp / str(comm.size))
        with pytest.MonkeyPatch.context() as patch:
            for rank, named, ended in wrong_gradients(job, 1, patch):
                suspected = [rank] if comm.size > 2 else [0, 1]
                assert named == [suspected] * mpidp.training.step.ATTEMPTS, (rank, named)
                assert f"memory of one of the ranks {suspected} is faulty" in ended

    for n in sizes(2, 3, 4):
        at(n, audit)


def test_nobody_is_suspected_of_nothing(shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(shared_folder)
    named: list[Any] = []
    monkeypatch.setattr(mpidp.training.step, "report_finding", lambda job, step, finding, action: named.append(finding))

    def audit(comm: MPI.Intracomm) -> None:
        for kind in ("even", "steal"):
            job = audited_job(comm, data, shared_tmp / f"{comm.size}{kind}", train={"balance": kind}, model={"dropout": 0.1})
            for number in range(2, 10):
                learn(job, number)
                job.strategy.step(0.01, 256)
                assert job.audit.weights() is None
        assert not named

    for n in sizes(1, 2, 3, 4):
        at(n, audit)
