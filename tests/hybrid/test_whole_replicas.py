"""Laws of audits, replay and packed documents when a replica consists of several ranks."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

import mpidp.replay
import mpidp.training.step
from mpidp.data.loader import Batch
from mpidp.errors import MpidpError
from mpidp.faults.inject import InjectedFaults, parse
from mpidp.training.job import Job
from mpidp.training.step import compute
from tests.tiny import WORLD, at, corpus, job_at, tiny, train_at

pytestmark = pytest.mark.mpi
Mesh = tuple[int, int, int]  # dp, pp, tp
MESHES: list[tuple[Mesh, bool]] = [((1, 1, 2), True), ((1, 2, 1), False), ((2, 1, 2), True), ((1, 2, 2), False)]
meshes = pytest.mark.parametrize(
    ("mesh", "sequence"), [one for one in MESHES if one[0][0] * one[0][1] * one[0][2] <= WORLD.size] or [((1, 1, 1), False)],
    ids=str,
)


def config_of(data: Path, run: Path, mesh: Mesh, sequence: bool, /, **train: Any) -> Any:
    return tiny(
        data, run, mesh={"dp": mesh[0], "pp": mesh[1], "tp": mesh[2], "sequence": sequence}, model={"dropout": 0.1},
        train=train, optim={"clip": 0.5},
    )


def learn(job: Job, number: int) -> None:
    """Compute a batch's gradients and update. Collective over job.comm."""
    loader = job.open_loader(number)
    batch = next(loader)
    loader.close()
    job.position.step = number
    compute(job, batch)
    job.strategy.step(0.01, 256)


@meshes
def test_whatever_differs_is_found_by_all(shared_folder: Path, shared_tmp: Path, mesh: Mesh, sequence: bool) -> None:
    """A norm gain is compared between replicas and within its stage, a part of a matrix between replicas. Nothing else is
    reported, and every rank gets the findings."""
    data, ranks = corpus(shared_folder), mesh[0] * mesh[1] * mesh[2]

    def audit(comm: MPI.Intracomm) -> None:
        job = job_at(comm, config_of(data, shared_tmp / "run", mesh, sequence, audit_every=1))
        for number in range(3):
            learn(job, number)
            assert job.audit.weights() is None
        named = dict(job.engine.model.named_parameters())
        wrong = ranks - 1
        for name, alone in ((next(n for n in named if n.endswith("norm.weight")), False),
                            (next(n for n in named if n.endswith("q.weight")), mesh[0] == 1)):
            before = named[name].detach().clone()
            with torch.no_grad():
                if comm.rank == wrong:
                    named[name].view(-1)[0].mul_(1.001)
            found = job.audit.weights()
            nobody = alone or (mesh[0] == 1 and mesh[2] == 1)  # no other rank has the same
            assert nobody == (found is None), name
            if found is not None:
                others = {wrong, *((wrong - mesh[1] * mesh[2],) if mesh[0] > 1 else ())}
                if job.parts.part.size > 1 and not job.parts.part.is_cut(name):
                    others |= {wrong - 1}
                assert "differs between" in found.what and not found.repaired and found.ranks == sorted(others), found
            with torch.no_grad():
                named[name].copy_(before)
        assert job.audit.weights() is None

    at(ranks, audit)


@meshes
def test_a_rank_that_computes_wrongly_is_found(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, sequence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks repeat the step, and the weights are those of a run without the error."""
    data, ranks = corpus(shared_folder), mesh[0] * mesh[1] * mesh[2]
    named: list[list[int]] = []
    monkeypatch.setattr(mpidp.training.step, "report_finding", lambda job, step, finding, action: named.append(finding.ranks))

    def glitch(comm: MPI.Intracomm, fault: str) -> str:
        job = job_at(comm, config_of(data, shared_tmp / "run", mesh, sequence, audit_every=1))
        job.services.faults = parse(fault, comm.rank) if fault else InjectedFaults()
        for number in range(2):
            learn(job, number)
        return job.parts.sha256(job.engine.model)

    right = at(ranks, lambda comm: glitch(comm, ""))
    assert not named
    assert at(ranks, lambda comm: glitch(comm, f"wrong:{ranks - 1}:2")) == right
    if WORLD.rank < ranks:
        assert len(named) == 1 and ranks - 1 in named[0]
    if mesh[0] == 1:
        return  # no other rank has this part, and a rank with a permanent fault agrees with itself
    with pytest.raises(MpidpError, match=rf"memory of one of the ranks \[.*{ranks - 1}\] is faulty"):
        at(ranks, lambda comm: glitch(comm, f"wrong:{ranks - 1}:2,until=3"))


def test_a_spoilt_gain_sends_the_run_back_to_its_checkpoint(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the weights of an undisturbed run."""
    if WORLD.size < 2:
        pytest.skip("needs two ranks")
    data = corpus(shared_folder)
    right = train_at(2, config_of(data, shared_tmp / "right", (1, 1, 2), True, save_every=2))
    named = list(at(1, lambda comm: [name for name, _ in job_at(
        comm, config_of(data, shared_tmp / "one", (1, 1, 1), False)).engine.model.named_parameters()])[0])
    place = named.index("blocks.1.attention_norm.weight")
    monkeypatch.setenv("MPIDP_FAULT", f"flip:1:3,tensor={place},bit=20")
    run = train_at(2, config_of(data, shared_tmp / "run", (1, 1, 2), True, save_every=2, audit_every=3))
    (back,) = run.events("went_back")
    assert back["step"] == 2 and run.sha256 == right.sha256
    assert back["why"] == "step 3: ranks [0, 1]: blocks.1.attention_norm.weight differs between the ranks of a stage"


class Packed:
    """A batch whose windows contain two documents each."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self._inner = batch.batch, batch

    def __getitem__(self, v: int) -> Any:
        mb = self._inner[v]
        b, t = mb.tokens.shape
        places = torch.arange(t).expand(b, t)
        ids = (places >= t // 3).long()
        return replace(mb, positions=places - ids * (t // 3), doc_ids=ids)


@meshes
def test_documents_that_share_a_window_do_not_see_each_other(
    shared_folder: Path, shared_tmp: Path, mesh: Mesh, sequence: bool
) -> None:
    """The losses equal those of one rank, and differ from those with attention across documents."""
    data = corpus(shared_folder)

    def losses(comm: MPI.Intracomm, mesh: Mesh, sequence: bool, packed: bool) -> dict[int, float]:
        job = job_at(comm, config_of(data, shared_tmp / "run", mesh, sequence))
        loader = job.open_loader(0)
        batch: Any = next(loader)
        done = compute(job, Packed(batch) if packed else batch)
        loader.close()
        return dict(zip(done.micro_batches, done.losses, strict=True))

    wanted = at(1, lambda comm: losses(comm, (1, 1, 1), False, True))[0]
    assert wanted != pytest.approx(at(1, lambda comm: losses(comm, (1, 1, 1), False, False))[0], rel=1e-4)
    for found in at(mesh[0] * mesh[1] * mesh[2], lambda comm: losses(comm, mesh, sequence, True)):
        assert found == pytest.approx({v: wanted[v] for v in found}, rel=1e-5)


@meshes
def test_a_run_of_a_mesh_is_replayed_on_one_rank(shared_folder: Path, shared_tmp: Path, mesh: Mesh, sequence: bool) -> None:
    """Bit for bit with pipeline parallelism alone, else up to rounding; alterations are found."""
    run, cut = shared_tmp / "run", mesh[2] > 1
    train_at(mesh[0] * mesh[1] * mesh[2], config_of(corpus(shared_folder), run, mesh, sequence, steps=4))
    words = Namespace(run=str(run), step=None, against=None, data=None, device="cpu", threads=1, model_kind="", base="")
    (found,) = at(1, lambda comm: mpidp.replay.inspect_step(words, comm))
    assert found["same"] and f"are {'close to' if cut else 'the same as'} the record (" in found["verdict"], found
    if WORLD.rank == 0:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (third,) = [line for line in lines if line.get("step") == 3 and "lr" in line]
        third["train_loss"] *= 1.001
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = at(1, lambda comm: mpidp.replay.inspect_step(words, comm))
    assert not found["same"] and len(found["differences"]) == 1 and "step 3: train_loss" in found["verdict"], found
