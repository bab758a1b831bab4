"""Law: exchanges without MPI give the same bits as exchanges with MPI. gloo on the CPU replaces NCCL, because no GPU was
available."""

from __future__ import annotations

import socket
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import distributed

import mpidp.train
import mpidp.training.build
import mpidp.training.run_plan
from mpidp.comm import nccl, store
from mpidp.comm.nccl import Nccl, check_nccl
from mpidp.data.lanes import Lanes
from mpidp.errors import MpidpError, UsageError
from mpidp.replay import inspect_step
from mpidp.runtime.topology import make_topology
from tests.mpi.test_reducers import CPU, CUTS, SHAPES, check_bits, exact, reduced
from tests.tiny import WORLD, at, corpus, everywhere, sizes, tiny, train_at

pytestmark = pytest.mark.mpi


def gloo(comm: MPI.Intracomm) -> Nccl:
    return Nccl(CPU, comm, "gloo")


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("bucket_bytes", [600, 10**9])
def test_the_tree_gives_the_bits_of_its_definition(cut: tuple[int, int, int], bucket_bytes: int) -> None:
    check_bits(cut, bucket_bytes=bucket_bytes, open_wire=gloo)


@pytest.mark.parametrize("kind", ["allreduce", "naive"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_others_are_close_to_the_exact_sum(kind: str, cut: tuple[int, int, int]) -> None:
    lanes = Lanes(*cut)
    for n in sizes(2, 3, 4):
        for sums in at(n, lambda comm: reduced(kind, comm, lanes, 600, open_wire=gloo)):
            for step, of_step in enumerate(sums):
                for name in SHAPES:
                    total, absolute = exact(lanes, step, name)
                    assert (np.abs(of_step[name] - total) <= 2 * lanes.num_micro_batches * 2.0**-24 * absolute).all()


def test_parts_of_any_length_go_where_they_belong_and_their_bytes_are_counted() -> None:
    """Rank r sends to rank s a range of length (r + 2 s) mod 4 that begins at 100 r + s. Some offsets are odd. Some ranges
    are empty."""

    def exchanged(comm: MPI.Intracomm) -> bool:
        def length(r: int, s: int) -> int:
            return 0 if r == s else (r + 2 * s) % 4

        wire, every, me = gloo(comm), range(comm.size), comm.rank
        source, target = torch.zeros(8 * comm.size), torch.full((8 * comm.size,), -1.0)
        places = [8 * s + 1 for s in every]
        wanted = target.clone()
        for s in every:
            source[places[s] : places[s] + length(me, s)] = 100 * me + s
            wanted[places[s] : places[s] + length(s, me)] = 100 * s + me
        sends, takes = [length(me, s) for s in every], [length(s, me) for s in every]
        wire.alltoallv(comm, lambda request: None, (source, sends, places), (target, takes, places))
        ok = torch.equal(target, wanted) and wire.pop_counts()[0] == 4 * sum(sends)
        lengths = [(r + 1) % 3 for r in every]
        whole, wanted = torch.full((8 * comm.size,), -1.0), torch.full((8 * comm.size,), -1.0)
        for r in every:
            wanted[places[r] : places[r] + lengths[r]] = r
        whole[places[me] : places[me] + lengths[me]] = me
        wire.allgatherv(comm, lambda request: None, (whole, lengths, places))
        ok = ok and torch.equal(whole, wanted) and wire.pop_counts()[0] == 4 * lengths[me] * (comm.size - 1)
        wire.close()
        return ok

    for n in sizes(1, 2, 3, 4):
        assert all(at(n, exchanged))


@pytest.mark.parametrize("kind", ["tree", "allreduce"])
def test_a_training_is_the_one_over_mpi(
    shared_folder: Path, shared_tmp: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, opened = corpus(shared_folder), []
    train = {"global_batch": 13, "save_every": 2}
    comms = {"reducer": kind, "transport": "messages"}
    alone = train_at(1, tiny(data, shared_tmp / "1", train=train, comm=comms))

    def open_transport(wanted: str, device: torch.device, comm: MPI.Intracomm) -> Nccl:
        opened.append(gloo(comm))
        return opened[-1]

    sections = {"train": train | {"device": "auto"}, "comm": comms | {"gpu": "nccl"}}
    for n in sizes(2, 3, 4):
        opened.clear()
        with monkeypatch.context() as patch:
            patch.setattr(mpidp.training.build, "open_transport", open_transport)
            patch.setattr(mpidp.training.run_plan, "check_nccl", lambda *of: None)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            run = train_at(n, tiny(data, shared_tmp / str(n), **sections))
        everywhere(len(opened) == (n > WORLD.rank), "the training opened it")
        everywhere(not distributed.is_initialized(), "it is closed with the training")
        assert run.losses == pytest.approx(alone.losses, rel=1e-5)
        if kind == "tree":
            assert run.sha256 == alone.sha256 and run.learned == alone.learned
            options = Namespace(
                run=str(shared_tmp / str(n)), step=5, data=None, device=None, threads=None, model_kind="", base=""
            )
            assert at(1, lambda comm, options=options: inspect_step(options, comm))[0]["same"]  # a replay works without it


@pytest.mark.check  # it waits for time-outs
def test_ranks_that_cannot_meet_say_where_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is given a port without a listener."""
    monkeypatch.setattr(nccl, "CONNECT_SECONDS", 2)
    real = store._connected
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = silent.getsockname()[1]
        monkeypatch.setattr(store, "_connected", lambda address, port, timeout: real(address, closed, timeout))
        for n in sizes(2, 3):
            with pytest.raises(MpidpError, match=r"could not connect \(.*port \d+.*NCCL_SOCKET_IFNAME.*comm.gpu=auto") as caught:
                at(n, gloo)
            assert caught.value.exit_code == 1
    everywhere(not distributed.is_initialized(), "nothing is left of it")


def test_where_it_cannot_be_had_no_run_begins(
    shared_folder: Path, shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny(corpus(shared_folder), shared_tmp / "run", train={"device": "auto"}, comm={"gpu": "nccl"})
    for dry in (False, True):
        with pytest.raises(UsageError, match="would train on the CPU"):
            at(WORLD.size, lambda comm, dry=dry: mpidp.train.run(config, comm, dry))
    everywhere(not (shared_tmp / "run").exists(), "nothing was written")


# Rejections, before anything is created -----------------------------------------------------------------------------------


def refused(device: torch.device = CPU) -> str:
    """Return the error of all ranks."""
    with pytest.raises(UsageError) as caught:
        at(WORLD.size, lambda comm: check_nccl("nccl", device, make_topology(comm)))
    return str(caught.value)


def test_where_it_is_not_asked_for_nothing_is_checked() -> None:
    for wanted in ("auto", "device", "staged"):
        at(WORLD.size, lambda comm, wanted=wanted: check_nccl(wanted, CPU, make_topology(comm)))


def test_a_rank_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "has_nccl", lambda: True)
    said = refused(CPU if WORLD.rank == WORLD.size - 1 else torch.device("cuda", 0))
    assert "would train on the CPU" in said and "comm.gpu=auto" in said
    assert WORLD.size == 1 or said.startswith(f"rank {WORLD.size - 1}: ")


def test_a_torch_without_nccl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "has_nccl", lambda: False)
    said = refused(torch.device("cuda", 0))
    assert f"torch {torch.__version__}" in said and "without NCCL" in said and "CUDA build" in said


def test_ranks_on_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "has_nccl", lambda: True)
    monkeypatch.setattr(nccl, "gpu_name", lambda device: f"GPU {WORLD.rank // 2}")
    if WORLD.size > 1:
        said = refused(torch.device("cuda", 0))
        assert f"ranks 0, 1 share GPU 0 on {socket.gethostname()}" in said and "one rank per GPU" in said
        assert ("ranks 2, 3 share GPU 1" in said) == (WORLD.size == 4) and "ranks 2 share" not in said
    monkeypatch.setattr(nccl, "gpu_name", lambda device: f"GPU {WORLD.rank}")
    at(WORLD.size, lambda comm: check_nccl("nccl", torch.device("cuda", 0), make_topology(comm)))


def test_a_job_that_outlives_its_ranks_is_told_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "launched_with_ulfm", lambda: True)
    said = refused(torch.device("cuda", 0))
    assert "does not support recovery" in said and "without --with-ft ulfm" in said
