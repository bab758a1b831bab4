"""The plan of a run. To make a plan, the data is opened and checked, and the configuration is resolved. This uses little
memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpidp.checkpoint.manifest import readable
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import fingerprint, reject_changed_settings
from mpidp.comm.nccl import check_nccl
from mpidp.config import resolve
from mpidp.config.schema import Config, checked, fields_of, stops_by_loss
from mpidp.data.lanes import Lanes
from mpidp.data.loader import check_targets
from mpidp.data.sampler import Sampler
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, UsageError
from mpidp.metrics.jsonl import MetricsFile, read_lines
from mpidp.metrics.track.table import check_trackers, trackers_of
from mpidp.model.part import Part, check_slices, check_split, part_of
from mpidp.model.shape import Shape, TransformerShape
from mpidp.model.starting import trained_sizes
from mpidp.parallel.grid import Grid
from mpidp.parallel.model_part import ModelPartition
from mpidp.runtime.agreement import check_agreement, versions
from mpidp.runtime.device import check_compiler, resolve_device, resolve_dtype, resolve_threads, set_determinism
from mpidp.runtime.log import log
from mpidp.runtime.topology import Topology
from mpidp.runtime.world import raise_together
from mpidp.storage.remote import CacheOptions
from mpidp.strategies.arrivals import Order, read_arrivals
from mpidp.training import lr_schedule
from mpidp.training.initial_weights import Origin, open_origin

MOST = {"train.threads": 1024, "optim.warmup_steps": 2**62}  # largest plausible values in a manifest
KEPT = {"train.threads": 0, "optim.warmup_steps": -1}  # the value that means automatic; resumed runs keep the checkpoint's value


@dataclass(frozen=True)
class RunPlan:
    """What is known before a run starts: resolved configuration, data, grid of ranks, and model shape. It holds no large
    memory."""

    config: Config  # resolved: without automatic values
    automatic: frozenset[str]  # the settings of KEPT that the user left automatic
    grid: Grid
    device: torch.device
    training: TokenStream
    validation: TokenStream | None
    sampler: Sampler
    lanes: Lanes
    shape: Shape
    arrivals: Order  # order of arrivals to replay, at parameter servers or in quorum rounds
    origin: Origin | None = None  # source of the initial weights; None: they are random

    @property
    def world(self) -> MPI.Intracomm:
        return self.grid.world

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def mesh(self) -> Topology:
        """The ranks that hold the same part of the model as this rank. If mesh.tp and mesh.pp are 1, every rank holds the whole
        model."""
        return self.grid.replicas

    @property
    def part(self) -> Part:
        grid = self.grid
        return part_of(self.shape, grid.pp.rank, grid.pp.size, grid.tp.rank, grid.tp.size, chunks=self.config.mesh.interleave)

    def adopt(self, reader: Reader | None, notes: list[str]) -> RunPlan:
        """Return the plan for resuming from the checkpoint `reader`. If `reader` is None, return the plan for a new run. Settings
        that the user left automatic get the checkpoint's values. `notes`: messages to log. Raises UsageError if the user changed
        a setting that must not change. Collective over world."""
        plan = self
        if reader is not None:
            with raise_together(self.world), readable(reader.path):
                settings = reader.meta["config"]
                saved = {**reader.meta, "micro_batch": settings["train.micro_batch"], **reader.meta["fingerprint"]}
                plan = replace(self, config=self._kept(settings))
                begun = reader.meta.get("init_from", {}).get("weights_sha256", "")
                reads_base = self.origin is not None and self.origin.weights is not None
                reject_changed_settings(settings, plan.config, checked_base=reads_base and bool(begun))
                scheduled = lr_schedule.change(settings, plan.config.flat(), reader.meta["step"])
                if reader.meta["data"] != self.training.index_sha256:
                    raise UsageError(
                        f"data.path={self.config.data.path} is not the data that the run in {self.config.run.dir} was trained "
                        "on. Give that data, or choose another run.dir"
                    )
            # The source is read again, as the base of adapters, or because train.init_from is not the path in RUN/init.json.
            if self.origin is not None and self.origin.weights is not None:
                plan = replace(plan, origin=replace(self.origin, wanted_sha256=begun))
            ranks = {"ranks": self.world.size} if plan.config.comm.reducer != "tree" else {}  # then the bits depend on the ranks
            now = fingerprint(plan.config, self.device) | ranks
            changed = [f"{key} {saved.get(key)} -> {value}" for key, value in now.items() if saved.get(key) != value]
            notes = [*notes, f"resuming from {reader.path}", *filter(None, [scheduled])]
            if changed:
                notes.append(f"the bits from here on may differ from an uninterrupted run: {', '.join(changed)}")
        if self.world.rank == 0:
            for note in notes:
                log.info("%s", note)
        return plan

    def _kept(self, saved: Mapping[str, Any]) -> Config:
        """Return the config, in which automatic settings have the values in `saved`. Raises ValueError if a saved value is not
        plausible."""
        values: dict[str, dict[str, Any]] = {}
        for key in self.automatic:
            section, _, name = key.partition(".")
            value = values.setdefault(section, {})[name] = saved[key]
            if type(value) is not int or not 0 <= value <= MOST[key]:
                raise ValueError(f"{key}={value!r} is not an integer from 0 to {MOST[key]}")
        if "optim" in values:
            values["optim"]["warmup_steps"] = min(values["optim"]["warmup_steps"], self.config.train.steps)
        return self.config.with_values(**values)

    def has_ended(self, reader: Reader) -> dict[str, Any] | None:
        """Return the content of the `end` line if the run is over. Return None if the run is not over, or if the user has changed
        a setting that decides when the run ends. Independent."""
        with readable(reader.path):
            end: dict[str, Any] | None = reader.meta["end"]
            if end is None or end["step"] >= self.config.train.steps and end["reason"] == "steps":
                return end
            rules = ("train.steps", "train.target_loss", "train.patience")
            now = self.config.flat()
            return end if all(reader.meta["config"][key] == now[key] for key in rules) else None

    def print_end(self, end: dict[str, Any]) -> None:
        """Print on rank 0 that the run is over. Add the `end` line to metrics.jsonl if it is missing. Independent."""
        if self.world.rank:
            return
        file = Path(self.config.run.dir) / "metrics.jsonl"
        lines = read_lines(file)
        if not lines or lines[-1].get("event") != "end":
            metrics = MetricsFile(file, end["step"], end["step"] + end["skipped"])
            metrics.write(end)
            metrics.close()
        print(
            f"the run in {self.config.run.dir} has ended at step {end['step']} ({end['reason']}), val_loss {end['val_loss']}, "
            f"weights_sha256 {end['weights_sha256']}. There is nothing to do. Raise train.steps to continue, choose another "
            "--run.dir, or start again with --run.resume=never",
            flush=True,
        )


def _open(path: str, split: str, cache: CacheOptions) -> TokenStream | None:
    stream = TokenStream(path, split, cache)
    return stream if stream.num_tokens > 1 else None


def plan(config: Config, grid: Grid) -> RunPlan:
    """Open and check the data, resolve the configuration, and check that all ranks have the same configuration. Raises DataError
    if the data is invalid. Raises UsageError if the configuration is invalid, or does not fit the number of ranks or the data.
    Collective over grid.world."""
    world, replicas = grid.world, grid.replicas.dp.size
    origin = open_origin(config, world)
    with raise_together(world):
        config = config if origin is None else checked(origin.completed(config))
    threads = resolve_threads(config.train.threads, grid.everyone)
    torch.set_num_threads(threads)
    validation: TokenStream | None = None
    with raise_together(world):
        device = resolve_device(config.train.device, grid.everyone)
        dtype = resolve_dtype(config.train.dtype, device)
        check_compiler(config.train.compile, device)
        trackers = trackers_of(config.metrics.track, config.metrics.tensorboard)
        if world.rank == 0:
            check_trackers(trackers)
            if config.metrics.tensorboard:
                log.info("metrics.tensorboard=true is the earlier spelling of metrics.track=tensorboard")
        set_determinism(device, config.train.deterministic)
        cache = CacheOptions(config.data.cache_dir, config.data.cache_gb, config.data.retry_seconds)
        training = TokenStream(config.data.path, "train", cache)
        if "val" in training.index.splits:
            validation = _open(config.data.path, "val", cache)
        for stream in (training, validation):
            if stream is not None:
                stream.keep_apart(config.data.documents, config.model.seq_len)
                own, verify = range(world.rank, len(stream.files), world.size), config.data.verify
                stream.check(own, contents=verify == "true" or verify == "auto" and stream.is_cheap(own))
        if validation is None and (stops := stops_by_loss(config)):
            raise UsageError(
                f"{' and '.join(stops)}: {config.data.path} has no validation split. Prepare the data with "
                "--val-fraction above 0, or set train.target_loss and train.patience to 0"
            )
        if world.rank == 0:
            check_targets(training, training.num_tokens)
            if validation is not None:
                evaluated = config.train.eval_tokens or validation.num_tokens
                check_targets(validation, max(config.model.seq_len, evaluated))
            used = training.index.tokenizer_bytes(training.folder)
            if origin is not None:
                origin.check_tokenizer(training.path, used)
        lanes = Lanes(config.train.global_batch, config.train.micro_batch, config.train.lanes)
        workers = resolve.workers(config, replicas)
        order = read_arrivals(config.strategy.replay, workers, replicas - workers, config.strategy.staleness)
        if workers > lanes.num_lanes:
            raise UsageError(
                f"{workers} {'ranks' if grid.parts == 1 else 'replicas'}, but the global batch has {lanes.num_lanes} lanes "
                f"(sequences of micro-batches), and a lane cannot be divided. Start at most {lanes.num_lanes * grid.parts} "
                "ranks, raise train.lanes or train.global_batch, or lower train.micro_batch"
            )
        if training.num_tokens <= config.model.seq_len:
            raise DataError(
                f"{config.data.path}: {training.num_tokens} training tokens are fewer than one training window (model.seq_len "
                f"+ 1 = {config.model.seq_len + 1} tokens). Prepare more text, or lower model.seq_len"
            )
        sampler = Sampler(
            training.num_tokens, config.model.seq_len, lanes, config.train.seed, config.data.order, training.token_bytes
        )
        if world.rank == 0:
            ahead = -(-lanes.num_lanes // grid.everyone.num_machines) * sampler.bytes_ahead
            training.storage.check_room(min(ahead, training.num_tokens * training.token_bytes))
        resolved = resolve.resolve(config, sampler.steps_per_epoch, lanes, threads, device, dtype)
    for stream in (training, validation):
        if stream is not None:
            found = world.allgather(stream.storage.versions)
            with raise_together(world):
                for files in found:
                    stream.storage.expect(files)
    check_nccl(config.comm.gpu, device, grid.replicas)
    with raise_together(world):
        shape = resolve.model_shape(resolved, training.vocab_size)
        if origin is not None:
            origin.check_shape(shape)
        check_split(shape, grid.tp.size, grid.pp.size, config.mesh.interleave)
        check_slices(shape, config.model.slices, grid.tp.size)
        if training.apart and not isinstance(shape, TransformerShape):
            raise UsageError(
                f"{config.data.path}: documents are kept apart (data.documents), but model.kind={config.model.kind} does not "
                "support document boundaries. Use model.kind=transformer, or data.documents=joined"
            )
    settings = {key: value for key, _, value in fields_of(resolved) if key != "train.threads"}
    with raise_together(world):
        trained_sizes(settings, shape, ModelPartition(grid, shape, chunks=config.mesh.interleave).part)
    facts = {key: str(value) for key, value in settings.items()} | {"data index": training.index_sha256}
    check_agreement(world, facts | versions())
    given = config.flat()
    automatic = frozenset(key for key, value in KEPT.items() if given[key] == value)
    return RunPlan(resolved, automatic, grid, device, training, validation, sampler, lanes, shape, order, origin)
