"""Implements train.micro_batch=auto: measures, when a run starts, how many sequences per forward pass are fastest.

Candidates are divisors of the global batch. All ranks measure a candidate at the same time. They run a forward and a backward
pass on the first tokens of the data. The time of the slowest rank counts, so all ranks choose the same value. The value is stored
in config.toml and in checkpoints, so a run that resumes does not measure again.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from mpidp.checkpoint.mirrored import settings_on
from mpidp.config.command_line import read_run_config
from mpidp.config.resolve import workers
from mpidp.config.schema import Config
from mpidp.data.loader import MicroBatch
from mpidp.errors import UsageError
from mpidp.model.loss_chunks import chunk_rows
from mpidp.model.starting import base_weights, prepared
from mpidp.parallel.chunked_loss import defer_head
from mpidp.parallel.engine import Engine, dropout_key
from mpidp.parallel.grid import Grid
from mpidp.runtime.log import log
from mpidp.runtime.world import polite_barrier, raise_together
from mpidp.training.run_plan import RunPlan, plan

GROWTH = 1.4  # smallest ratio of a candidate to the previous candidate
ENOUGH = 0.97  # the smallest candidate with this share of the highest throughput is chosen: small sizes allow more ranks
SECONDS = 0.3  # least duration of a candidate's measurement, in seconds
MEMORY_SHARE = 0.8  # the part of the free memory that may be used
STATE_BYTES = 24  # bytes per parameter for several gradient buffers and the moments of the optimizer


def with_micro_batch(config: Config, grid: Grid) -> Config:
    """Return the config with a number in place of train.micro_batch=auto (stored as 0). If the run resumes, it keeps its
    earlier number. Otherwise the number is measured. Raises the errors of run_plan.plan(). Collective over grid.world."""
    if config.train.micro_batch:
        return config
    size, found = 0, ""
    with raise_together(grid.world):
        if grid.world.rank == 0:
            size = recorded(Path(config.run.dir), config.run.mirror) if config.run.resume != "never" else 0
    if not (size := grid.world.bcast(size)):
        rates = measured(plan(config.with_values(train={"micro_batch": 1}), grid), config.train.lanes)
        size = chosen(rates)
        found = " (" + ", ".join(f"{one}: {rate:,.0f} tokens/s per rank" for one, rate in rates.items()) + ")"
    if grid.world.rank == 0:
        log.info(f"train.micro_batch={size}{found or ', as when the run began'}")
    return config.with_values(train={"micro_batch": size})


def recorded(run_dir: Path, mirror: str = "") -> int:
    """Return train.micro_batch of an earlier start of the run, or 0 if there is no checkpoint. The value is read from config.toml
    in `run_dir` if there is a checkpoint, else from config.toml on the mirror. `mirror`: the value of run.mirror. Raises
    DataError if the mirror's server fails. Independent."""
    if any((run_dir / "checkpoints").glob("*/manifest.json")) and (run_dir / "config.toml").is_file():
        return int(read_run_config(run_dir / "config.toml").get("train.micro_batch", 0))
    return int(settings_on(mirror).get("train", {}).get("micro_batch", 0)) if mirror else 0


def candidates(global_batch: int, lanes: int) -> list[int]:
    """Return the micro-batch sizes to measure, in ascending order. They are divisors of the global batch. `lanes`: the
    smallest allowed number of micro-batches per step. Pure."""
    found: list[int] = []
    for size in range(1, global_batch // lanes + 1):
        if global_batch % size == 0 and (not found or size >= GROWTH * found[-1]):
            found.append(size)
    return found


def chosen(rates: dict[int, float]) -> int:
    """Return the smallest micro-batch size with nearly the highest throughput. `rates`: {size: throughput}. Pure."""
    return min(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


def measured(trial: RunPlan, lanes: int = 0) -> dict[int, float]:
    """Measure micro-batch sizes in ascending order, and return {size: tokens per second of a rank}. Stop before a size that
    would need too much memory, or after two sizes in a row without a higher throughput. `trial`: the plan of the run, with any
    value of train.micro_batch. `lanes`: the setting train.lanes. Raises UsageError if one sequence needs too much memory.
    Collective over trial.world."""
    config, world = trial.config, trial.world
    rates: dict[int, float] = {}
    with raise_together(world):
        measurement = Measurement(trial)
    slower = 0
    for size in candidates(config.train.global_batch, max(1, lanes, workers(config, world.size))):
        fits = measurement.fits(size)
        if not world.allreduce(fits, MPI.LAND) and rates:
            break
        polite_barrier(world)
        with raise_together(world):
            seconds = measurement.seconds(size)
        slowest = world.allreduce(seconds, MPI.MAX)
        rate = size * config.model.seq_len / slowest
        slower = slower + 1 if rates and rate < max(rates.values()) else 0
        if math.isfinite(slowest):
            rates[size] = rate
        if slower == 2 or not math.isfinite(slowest):
            break
    if not rates:
        raise UsageError.on_every_rank("one sequence does not fit into the memory of a rank. Lower model.seq_len, or divide the "
                                       "model with mesh.shard, mesh.tp or mesh.pp")
    return rates


class Measurement:
    """Measures forward and backward passes of this rank's part of the model. Independent."""

    def __init__(self, trial: RunPlan) -> None:
        config, shape, device = trial.config, trial.shape, trial.device
        settings, self._trial = config.flat(), trial
        self._model = prepared(base_weights(settings, shape, trial.part), settings, shape, trial.part)
        self._model.to(device).train()
        self._model.recompute = config.train.recompute
        if config.train.compile:
            self._model.compile_blocks()
        self._losses: Any = None
        trained = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        self._free = MEMORY_SHARE * (_free_bytes(device) / trial.grid.everyone.local_size) - STATE_BYTES * trained
        self._before, self._last = _peak_bytes(device), (0, 0)  # _last: the last micro-batch, and the bytes that it needed

    def fits(self, size: int) -> bool:
        """Return whether there is enough memory for `size` sequences. The estimate is based on the last measured micro-batch."""
        last, needed = self._last
        return not last or needed * size / last < self._free

    def seconds(self, size: int) -> float:
        """Return the seconds of one forward and backward pass with `size` sequences. Return inf if the device has too little
        memory."""
        trial, config = self._trial, self._trial.config
        rows = chunk_rows(config.train.loss, trial.shape, size * config.model.seq_len)
        if rows:  # the model keeps this change, because larger micro-batches need it, too
            self._losses = defer_head(self._model, trial.shape, rows, getattr(torch, config.train.dtype), 0, None)
        engine = Engine(self._model, trial.device, getattr(torch, config.train.dtype), config.train.seed, trial.shape.dropout,
                        1, token_losses=self._losses)
        mb = self._micro_batch(size).to(trial.device)
        key = torch.tensor(dropout_key(config.train.seed, 0, 0), device=trial.device) if trial.shape.dropout else None
        best, spent = math.inf, 0.0
        try:
            while best == math.inf or spent < SECONDS:
                began = time.perf_counter()
                engine.loss_sum(mb, key).backward()
                if trial.device.type == "cuda":
                    torch.cuda.synchronize(trial.device)
                taken = time.perf_counter() - began
                best, spent = min(best, taken), spent + taken
        except torch.cuda.OutOfMemoryError:
            return math.inf
        self._last = size, max(1, _peak_bytes(trial.device) - self._before)
        return best

    def _micro_batch(self, size: int) -> MicroBatch:
        stream, width = self._trial.training, self._trial.config.model.seq_len + 1
        count = min(size * width, stream.num_tokens)
        tokens = np.resize(stream.read(0, count).astype(np.int64), (size, width))
        starts = np.resize(stream.read_starts(0, count), (size, width)) if stream.apart else None
        return MicroBatch.of(0, tokens, None, starts)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
