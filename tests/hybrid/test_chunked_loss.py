"""Law: the loss in chunks is the same on every mesh, and evaluation after training computes the loss of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpidp.evaluate
from mpidp.data.loader import MicroBatch
from mpidp.model import loss_chunks
from mpidp.training.model import make_model
from tests.hybrid.test_meshes import assert_close, on, with_mesh
from tests.tiny import DEVICE, WORLD, at, corpus, job_at

pytestmark = pytest.mark.mpi


def test_every_mesh_computes_the_loss_in_chunks(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary in two parts with and without sequence parallelism, stages, replicas and sharding; three chunks."""
    monkeypatch.setattr(loss_chunks, "CHUNK_LOGITS", 0)  # chunks of 64 positions
    data, train = corpus(shared_folder), {"loss": "chunked", "steps": 5, "micro_batch": 8, "eval_every": 5, "eval_tokens": 0}
    alone = on((1, 1, 1), with_mesh(data, shared_tmp / "alone", (1, 1, 1), train=train))
    whole = on((1, 1, 1), with_mesh(data, shared_tmp / "whole", (1, 1, 1), train=train | {"loss": "whole"}))
    assert_close(alone, whole, "all logits")
    assert alone.sha256 != whole.sha256  # or nothing was chunked
    run = str(shared_tmp / "alone")
    evaluated = at(1, lambda comm: mpidp.evaluate.evaluate(run, str(data), comm, device=DEVICE, threads=1))[0]
    assert evaluated["loss"] == alone.learned[-1]["val_loss"]
    for sections in ({"tp": 2}, {"tp": 2, "sequence": True}, {"pp": 2}, {"dp": 2}, {"dp": 2, "shard": 2}, {"dp": 2, "shard": 3}):
        if WORLD.size < 2:
            pytest.skip("needs 2 ranks")
        mesh = (sections.get("dp", 1), sections.get("pp", 1), sections.get("tp", 1))
        run = on(mesh, with_mesh(data, shared_tmp / "-".join(f"{k}{v}" for k, v in sections.items()), mesh, train=train,
                                 mesh={key: value for key, value in sections.items() if key in ("sequence", "shard")}))
        assert_close(run, alone, str(sections))
        if "tp" not in sections:
            assert run.sha256 == alone.sha256, sections


@pytest.mark.parametrize("sequence", [False, True])
def test_the_next_job_after_a_failure_computes_the_same_gradients(
    shared_folder: Path, shared_tmp: Path, sequence: bool
) -> None:
    """It uses the model of the failed job again."""
    if WORLD.size < 2:
        pytest.skip("needs 2 ranks")
    data, cut = corpus(shared_folder), {"sequence": sequence}
    config = with_mesh(data, shared_tmp / "run", (1, 1, 2), train={"loss": "chunked"}, mesh=cut)

    def are_equal(comm: MPI.Intracomm) -> list[bool]:
        job = job_at(comm, config)
        engine, mb = job.engine, MicroBatch.of(0, np.arange(18).reshape(2, 9), None, None).to(job.plan.device)
        gradients = []
        for _ in range(2):
            gradients.append(torch.autograd.grad(engine.loss_sum(mb, None), list(engine.model.parameters())))
            losses = make_model(job.plan, job.transport, engine.model).token_losses
            assert losses is not None
            engine.token_losses = losses
        return [one.equal(other) for one, other in zip(*gradients, strict=True)]

    for found in at(2, are_equal):
        assert all(found), found
