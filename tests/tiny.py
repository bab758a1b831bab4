"""Toy corpora, configurations and trainings shared by the tests.

Many trainings run within one mpirun: `train_at(n, config)` trains on the first n ranks while the others sleep, and gives every
rank the same record. Tests then compare data that all ranks hold, so that they fail on all ranks or on none.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

import mpidp.train
from data_tools.prepare import prepare
from mpidp.config.schema import Config, checked
from mpidp.data.index import FileRecord, SplitRecord, read_index
from mpidp.data.shard_writer import write_shard
from mpidp.data.shards import TokenStream
from mpidp.errors import MpidpError
from mpidp.faults.inject import InjectedFaults
from mpidp.parallel.grid import make_grid
from mpidp.parallel.schedule import one_f_one_b
from mpidp.reducers.base import Reducer
from mpidp.runtime.world import polite_barrier
from mpidp.training.build import build
from mpidp.training.job import Job
from mpidp.training.loop import close
from mpidp.training.run_plan import plan
from tests.saves import no_thread_is_left

WORLD = MPI.COMM_WORLD
SEQ_LEN = 16
DEVICE = os.environ.get("MPIDP_TEST_DEVICE", "cpu")  # cuda: `make gpu` runs the laws on a GPU
# fields, with *_seconds, that may differ between equal runs
MEASURED = ("tokens_per_second", "mfu", "comm_bytes", "slowest_rank", "seconds", "gpu_peak_bytes", "energy_joules")
OF_RANKS = ("start", "balance", "saved", "save_skipped", "save_failed")  # events about ranks and disks, not about training
SENTENCE = "the rank of a tree adds its lanes in order so that no one can tell who was there when it was done"


def text(length: int) -> str:
    """Return `length` characters of learnable text: words in a fixed, irregular order."""
    words, said, state = SENTENCE.split(), [], 1
    while sum(map(len, said)) < length:
        state = (state * 48271) % (2**31 - 1)
        said.append(words[state % len(words)] + (".\n" if state % 7 == 0 else " "))
    return "".join(said)[:length]


def corpus(folder: Path, tokens: int = 2000, shards: int = 2, val_fraction: float = 0.2) -> Path:
    """Return shards of `tokens` byte tokens at folder/shards_<tokens>_<shards>, created once by rank 0. Collective over WORLD."""
    out = folder / f"shards_{tokens}_{shards}"
    if WORLD.rank == 0 and not out.exists():
        source = folder / f"text_{tokens}.txt"
        source.write_text(text(tokens - 1))  # plus the end-of-document token
        prepare(str(source), "byte", out, shards=shards, val_fraction=val_fraction, verbose=False)
    polite_barrier(WORLD)
    return out


def masked_corpus(folder: Path, tokens: int = 2000, keep: Callable[[np.ndarray], np.ndarray] | None = None) -> Path:
    """The corpus with a loss mask: targets are at the places (counted in the split) where keep is true; by default a varying
    share, from a third to all. Created once by rank 0. Collective over WORLD."""
    plain, out = corpus(folder, tokens), folder / f"masked_{tokens}_{keep.__name__ if keep else 'some'}"
    if WORLD.rank == 0 and not out.exists():
        out.mkdir()
        shutil.copy(plain / "tokenizer.json", out)
        index = read_index(plain)
        files, splits = [], {}
        for split, totals in index.splits.items():
            stream = TokenStream(plain, split)
            ids, places = stream.read(0, stream.num_tokens), np.arange(stream.num_tokens)
            mask = keep(places) if keep else (places * places // 7) % 5 < 1 + places % 200 // 40
            about: dict[str, int | str] = {
                "split": split, "vocab_size": index.vocab_size, "tokenizer_sha256": index.tokenizer_sha256,
            }
            starts = np.array([0] if totals.documents else [], dtype=np.uint64)
            said = write_shard(out / f"{split}.h5", [ids], len(ids), starts, about, [mask.astype(np.uint8)])
            files.append(FileRecord(f"{split}.h5", split, len(ids), len(starts), 0, *said))
            splits[split] = SplitRecord(len(ids), len(starts), 0, loss_mask=True)
        (out / "index.json").write_text(replace(index, files=files, splits=splits).to_json())
    polite_barrier(WORLD)
    return out


def tiny(shards: Path, run_dir: Path, /, **sections: dict[str, Any]) -> Config:
    """Return the config of a run that takes milliseconds per step. sections change it: tiny(shards, run, train={"lanes": 8})."""
    config = Config().with_values(
        data={"path": str(shards)},
        model={"num_layers": 2, "num_heads": 4, "model_dim": 32, "hidden_dim": 64, "seq_len": SEQ_LEN},
        train={
            "steps": 6, "global_batch": 16, "micro_batch": 2, "threads": 1, "device": DEVICE, "eval_every": 3,
            "eval_tokens": 200, "save_every": 0, "dtype": "float32",
        },
        comm={"gpu": "auto" if DEVICE == "cpu" else "staged"},  # a probe in each run would take seconds
        optim={"lr": 1e-2, "warmup_steps": 2},
        run={"dir": str(run_dir), "hang_seconds": 0.0},
    )
    return checked(config.with_values(**sections))


OPEN: list[Job] = []  # jobs made by the current work


@lru_cache
def first_ranks(n: int) -> MPI.Intracomm:
    """Return a communicator of the first n ranks, COMM_NULL on the others; cached. Collective over WORLD."""
    return WORLD.Split(0 if n > WORLD.rank else MPI.UNDEFINED, WORLD.rank)


def sizes(*wanted: int) -> list[int]:
    """Return those of the given numbers for which this mpirun has enough ranks."""
    return [n for n in wanted if n <= WORLD.size]


def at(n: int, work: Callable[[MPI.Intracomm], Any]) -> list[Any]:
    """Run work(comm) on the first n ranks while the others sleep. Every rank gets the list of their results, and jobs made
    meanwhile are closed. An exception on any rank is raised on all: an MpidpError as it is, others as FailedElsewhere. Collective
    over WORLD."""
    comm = first_ranks(n)
    OPEN.clear()
    found: Any = None
    mine: Exception | None = None
    if comm != MPI.COMM_NULL:
        try:
            found = work(comm)
        except Exception as error:
            mine = error
            traceback.print_exc()  # shown if the other ranks hang and the time limit ends the test
    polite_barrier(WORLD)
    said = WORLD.allgather((None if mine is None else _portable(mine), found))
    errors = [error for error, _ in said if error is not None]
    if errors:
        no_thread_is_left()  # as after the end of a process; pending saves are on the disk now
        polite_barrier(WORLD)
        raise errors[0] from mine
    while OPEN:
        close(OPEN.pop())
    return [result for _, result in said[:n]]


class FailedElsewhere(AssertionError):
    """An exception of another rank."""


def _portable(error: Exception) -> Exception:
    if isinstance(error, MpidpError):
        return error
    return FailedElsewhere(f"rank {WORLD.rank}: {type(error).__name__}: {error}")


def everywhere(ok: bool, what: str) -> None:
    """Assert on all ranks together; names the ranks on which it does not hold. Collective over WORLD."""
    held = WORLD.allgather(bool(ok))
    assert all(held), f"{what}: not so on ranks {[rank for rank, one in enumerate(held) if not one]}"


@dataclass
class Ran:
    """The result of a training; the same on every rank of the world."""

    end: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, in order, without measured values
    of_ranks: list[dict[str, Any]]  # events about ranks, which `lines` does not contain

    @property
    def sha256(self) -> str:
        return self.end["weights_sha256"]

    @property
    def losses(self) -> list[float]:
        """Return the train_loss of every step."""
        return [line["train_loss"] for line in self.lines if "train_loss" in line]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines + self.of_ranks if line.get("event") == name]

    @property
    def learned(self) -> list[dict[str, Any]]:
        """Return the lines of steps and evaluations, which no restart may change."""
        return [line for line in self.lines if "event" not in line]


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without values that may differ between equal runs. Collective over WORLD."""
    lines: list[dict[str, Any]] = []
    path = Path(run_dir) / "metrics.jsonl"
    if WORLD.rank == 0 and path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in MEASURED and not k.endswith("_seconds")} for line in WORLD.bcast(lines)
    ]


@contextmanager
def pretended(nodes: int) -> Iterator[None]:
    """Treat the ranks of this machine as those of `nodes` nodes (0: no change). Independent, but all ranks must do so."""
    before = os.environ.get("MPIDP_PRETEND_NODES")
    os.environ["MPIDP_PRETEND_NODES"] = str(max(1, nodes))
    try:
        yield
    finally:
        del os.environ["MPIDP_PRETEND_NODES"]
        if before is not None:
            os.environ["MPIDP_PRETEND_NODES"] = before


@contextmanager
def small_blocks(elements: int = 256) -> Iterator[None]:
    """Use smaller norm blocks, so that all owners of a small model have something to do: owners own whole blocks. Independent,
    but all ranks must do so."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("mpidp.") and hasattr(module, "NORM_BLOCK"):
                patch.setattr(module, "NORM_BLOCK", elements)
        yield


def job_at(comm: MPI.Intracomm, config: Config, faults: InjectedFaults | None = None) -> Job:
    """Build a training up to its first step; closed when the work of `at` is done. Collective over comm."""
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    OPEN.append(build(plan(config, make_grid(comm, config.mesh.tp, config.mesh.pp, config.mesh.dp)), faults))
    return OPEN[-1]


def micro_batches_of(job: Job) -> list[int]:
    """Return the micro-batches that this rank computes."""
    return [v for lane in job.lanes.of_rank(job.comm.rank, job.comm.size) for v in job.lanes.micro_batches(lane)]


def gradients_of(job: Job, batch: int = 0) -> dict[str, torch.Tensor]:
    """Return the gradient of batch number `batch` by parameter: sums of token losses divided by the nominal number of tokens,
    added over all ranks (with the reducer `root` valid only on rank 0). Collective over job.comm."""
    loader = job.open_loader(batch)
    found = next(loader)
    loader.close()
    job.engine.run(one_f_one_b(micro_batches_of(job)), found, job.strategy)
    return summed(job.strategy.reducer)


def summed(reducer: Reducer) -> dict[str, torch.Tensor]:
    """Return the sum over all ranks by parameter. Collective over all ranks."""
    reducer.finish()
    layout = reducer.buffer.layout
    found = {name: view.clone() for (_, name, _), view in zip(layout.placed(), layout.views(reducer.buffer.total), strict=True)}
    reducer.group.fence()  # as in an update: the memory is not reused before all ranks have read it
    return found


def train_at(n: int, config: Config) -> Ran:
    """Train on the first n ranks while the others sleep. Collective over WORLD."""
    end = at(n, lambda comm: mpidp.train.run(config, comm))[0]
    lines = read_metrics(config.run.dir)
    return Ran(
        end, [line for line in lines if line.get("event") not in OF_RANKS],
        [line for line in lines if line.get("event") in OF_RANKS],
    )
