"""From a configuration to a job: open the data, resolve what was left open, agree over the ranks, make the parts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from mpidp import resolve
from mpidp.arrivals import Order, read_arrivals
from mpidp.audit import Audit
from mpidp.board import open_board
from mpidp.checkpoint import Reader, readable
from mpidp.checkup.findings import numbers
from mpidp.comm import overlap
from mpidp.comm.mesh import Mesh, together
from mpidp.comm.nccl import check_nccl, open_transport
from mpidp.config import Config, fields_of, to_toml
from mpidp.data.loader import Loader
from mpidp.data.sampler import Sampler
from mpidp.data.shards import TokenStream
from mpidp.engine import Engine
from mpidp.errors import DataError, UsageError
from mpidp.files import write_file
from mpidp.inject import Faults
from mpidp.job import Job
from mpidp.lanes import Lanes
from mpidp.metrics import MetricsFile, Progress, peak_flops
from mpidp.model.transformer import MODELS, TransformerShape, flops_per_token, num_parameters
from mpidp.optim import Optimizer, Schedule
from mpidp.rundir import refuse_changes
from mpidp.saver import Saver
from mpidp.sharing import SAID, gradient_slots, held_buffers, held_floats, share_memory
from mpidp.strategies import strategy_of
from mpidp.strategies.protocol import Options
from mpidp.watchdog import Watchdog


def prepare_default_corpus(config: Config, world: MPI.Intracomm, corpus: Mapping[str, Any]) -> None:
    """Shards of the embedded corpus when data.path is the default and holds none: rank 0 makes them, the others sleep.
    Collective over world."""
    path = Path(config.data.path)
    if config.data.path != Config().data.path:
        return
    missing = world.bcast(not (path / "index.json").exists() if world.rank == 0 else None, root=0)
    if not missing:
        return
    with together(world):
        if world.rank == 0:
            from data_tools.prepare import prepare

            print(f"no shards in {path}: preparing them from the source of Python's standard library", flush=True)
            prepare(**corpus, out=str(path))


@dataclass(frozen=True)
class Plan:
    """A resolved run, before anything large is made."""

    config: Config  # nothing left open
    asked_threads: int  # as the user gave it; 0: automatic
    mesh: Mesh
    device: torch.device
    training: TokenStream
    validation: TokenStream | None
    sampler: Sampler
    lanes: Lanes
    shape: TransformerShape
    arrivals: Order  # at parameter servers or in a quorum, to be repeated

    @property
    def world(self) -> MPI.Intracomm:
        return self.mesh.dp

    def say_what_runs(self) -> None:
        """Configuration, model and ranks, on rank 0. Collective over world."""
        lanes = self.lanes.of_rank(self.world.rank, self.world.size - self.config.strategy.servers)
        device = f"{self.device} {torch.cuda.get_device_name(self.device)}" if self.device.type == "cuda" else "cpu"
        cores = numbers(sorted(os.sched_getaffinity(0)))
        rows = self.world.gather((self.mesh.host, cores, device, self.config.train.threads, len(lanes)), root=0)
        if rows is None:
            return
        count = num_parameters(self.shape)
        slots = gradient_slots(self.config, self.lanes, 0, self.world.size)[0] + held_buffers(self.config)
        c, t = self.config, self.config.train
        print(to_toml(c))
        print(f"{'rank':>5}  {'host':<20} {'cores':<12} {'device':<24} {'threads':>7} {'lanes':>6}")
        for rank, (host, bound, where, threads, num_lanes) in enumerate(rows):
            print(f"{rank:>5}  {host:<20} {bound:<12} {where:<24} {threads:>7} {num_lanes:>6}")
        print(
            f"\n{count:,} parameters; {held_floats(c, slots, self.mesh.dp.size) * count / 2**18:,.0f} MiB a rank for weights, "
            f"optimizer state ({SAID[c.mesh.shard > 0]}) and {slots} gradient buffer{'s' * (slots > 1)}, "
            f"{12 * count / self.mesh.num_nodes / 2**20:,.0f} on the first of a node for the copy that is saved; "
            f"{t.global_batch} sequences x {c.model.seq_len} = {t.global_batch * c.model.seq_len:,} tokens a step in "
            f"{self.lanes.num_micro_batches} micro-batches, {t.lanes} lanes; {t.steps} steps, "
            f"{t.steps / self.sampler.steps_per_epoch:.2f} epochs of {self.training.num_tokens:,} tokens; "
            f"reducer {c.comm.reducer}, compress {c.comm.compress}, strategy {c.strategy.name}\n",
            flush=True,
        )

    def adopt(self, reader: Reader | None, notes: list[str]) -> Plan:
        """The plan as the checkpoint it goes on from demands: its number of threads unless one was asked for. UsageError
        when a setting that must not change has changed. Collective over world."""
        plan = self
        if reader is not None:
            with together(self.world), readable(reader.path):
                saved = reader.meta["fingerprint"]
                if not self.asked_threads:
                    plan = replace(self, config=self.config.with_values(train={"threads": saved["threads"]}))
                refuse_changes(reader.meta["config"], plan.config)
                if reader.meta["data"] != self.training.index_sha256:
                    raise UsageError(f"data.path={self.config.data.path} holds other data than the run in {self.config.run.dir}")
            now = resolve.fingerprint(plan.config, self.device)
            changed = [f"{key} {saved.get(key)} -> {value}" for key, value in now.items() if saved.get(key) != value]
            notes = [*notes, f"resuming from {reader.path}"]
            if changed:
                notes.append(f"the bits from here on may differ from an uninterrupted run: {', '.join(changed)}")
        if self.world.rank == 0:
            for note in notes:
                print(note, flush=True)
        return plan

    def has_ended(self, reader: Reader) -> dict[str, Any] | None:
        """The end record when the run is over and nothing that decides its end has changed since. Independent."""
        with readable(reader.path):
            end: dict[str, Any] | None = reader.meta["end"]
            if end is None or end["step"] >= self.config.train.steps and end["reason"] == "steps":
                return end
            rules = ("train.steps", "train.target_loss", "train.patience")
            now = {key: value for key, _, value in fields_of(self.config)}
            return end if all(reader.meta["config"][key] == now[key] for key in rules) else None

    def say_ended(self, end: dict[str, Any]) -> None:
        """On rank 0; also mends a metrics file whose last line was lost. Independent."""
        if self.world.rank:
            return
        file = Path(self.config.run.dir) / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if not lines or '"event": "end"' not in lines[-1]:
            metrics = MetricsFile(file, end["step"], end["step"] + end["skipped"])
            metrics.write(end)
            metrics.close()
        print(
            f"the run in {self.config.run.dir} has ended at step {end['step']} ({end['reason']}), val_loss {end['val_loss']}, "
            f"weights_sha256 {end['weights_sha256']}: nothing to do. Raise train.steps to go on, choose another --run.dir, or "
            "start anew with --run.resume=never",
            flush=True,
        )


def _open(path: str, split: str) -> TokenStream | None:
    stream = TokenStream(path, split)
    return stream if stream.num_tokens > 1 else None


def plan(config: Config, mesh: Mesh) -> Plan:
    """Open and check the data, resolve the config, and have all ranks agree on it. UsageError, DataError. Collective over
    mesh.dp."""
    world = mesh.dp
    threads = resolve.resolve_threads(config.train.threads, mesh)
    torch.set_num_threads(threads)
    validation: TokenStream | None = None
    with together(world):
        device = resolve.resolve_device(config.train.device, mesh)
        dtype = resolve.resolve_dtype(config.train.dtype, device)
        resolve.check_compiler(config.train.compile, device)
        resolve.set_determinism(device, config.train.deterministic)
        training = TokenStream(config.data.path, "train")
        if "val" in training.index.splits:
            validation = _open(config.data.path, "val")
        for stream in (training, validation):
            if stream is not None:
                stream.check(range(world.rank, len(stream.files), world.size), contents=config.data.verify)
        if world.rank == 0:
            training.index.tokenizer_bytes(training.path)
        lanes = Lanes(config.train.global_batch, config.train.micro_batch, config.train.lanes)
        workers = resolve.workers(config, world.size)
        order = read_arrivals(config.strategy.replay, workers, world.size - workers, config.strategy.staleness)
        if workers > lanes.num_lanes:
            raise UsageError(
                f"{workers} ranks, but the global batch has {lanes.num_lanes} lanes, and a rank computes whole lanes: start "
                f"at most {lanes.num_lanes} ranks, or raise train.lanes or train.global_batch, or lower train.micro_batch"
            )
        if training.num_tokens <= config.model.seq_len:
            raise DataError(
                f"{config.data.path}: {training.num_tokens} training tokens are fewer than one window of model.seq_len + 1 = "
                f"{config.model.seq_len + 1}; prepare more text, or lower model.seq_len"
            )
        sampler = Sampler(
            training.num_tokens, config.model.seq_len, lanes, config.train.seed, config.data.order, training.token_bytes
        )
        resolved = resolve.resolve(config, sampler.steps_per_epoch, lanes, threads, device, dtype)
    check_nccl(config.comm.gpu, device, mesh)
    shape = resolve.model_shape(resolved, training.vocab_size)
    settings = {key: value for key, _, value in fields_of(resolved) if key != "train.threads"}
    facts = {key: str(value) for key, value in settings.items()} | {"data index": training.index_sha256}
    resolve.agree(world, facts | resolve.versions())
    return Plan(resolved, config.train.threads, mesh, device, training, validation, sampler, lanes, shape, order)


def build(plan: Plan, faults: Faults | None = None, before: Job | None = None) -> Job:
    """The parts of the job, on the device, replicas equal. before: a job some of whose ranks have died; those who are left of it
    keep its model and memory. Collective over world."""
    config, mesh, world, device = plan.config, plan.mesh, plan.world, plan.device
    train, optim, faults = config.train, config.optim, faults or Faults()
    torch.set_num_threads(train.threads)
    nominal_tokens = train.global_batch * config.model.seq_len
    if before is None:
        model: torch.nn.Module = MODELS[config.model.kind](plan.shape, train.seed).to(device)
        named = list(model.named_parameters())
        shapes = json.dumps([(name, list(p.shape), str(p.dtype)) for name, p in named])
        resolve.agree(world, {"parameters": hashlib.sha256(shapes.encode()).hexdigest()})
        if train.compile:
            model.compile_blocks()  # type: ignore[operator]
    else:
        model, earlier = before.engine.model, before.strategy
        named = list(model.named_parameters())
        earlier.leave()
    transport = open_transport(config.comm.gpu, device, world)
    memory = share_memory(
        plan, transport, sum(p.numel() for _, p in named), looked_at=faults.spoil,
        before=None if before is None else (earlier.group, earlier.one_copy),
    )
    reducer, group = memory.reducer, memory.group
    strategy = strategy_of(config.strategy.name, config.strategy.quorum, memory.level, model)(
        mesh.dp, group, named, reducer, partial(Optimizer, optim.name, weight_decay=optim.weight_decay, beta1=optim.beta1,
        beta2=optim.beta2), optim.clip, nominal_tokens, int(config.comm.bucket_mb * 2**20), memory.one_copy,
        spare_slots=int(train.audit_every > 0), most_slots=2 * plan.lanes.num_lanes.bit_length() + 3,
        options=Options.of(asdict(config.strategy), train.steps, mesh.node_sizes, arrivals=plan.arrivals),
    )
    if before is None:
        strategy.start()
        said = overlap.choose(reducer, config.comm.overlap, world, memory.balance.settled)
    else:  # measuring would take a while
        overlap.use(reducer, said := earlier.reducer.way)
    if world.rank == 0 and world.size > 1:
        print(f"overlap {said}", flush=True)
    dtype = getattr(torch, train.dtype)
    run_dir = Path(config.run.dir)
    mine = [v for lane in memory.balance.ranges[world.rank] for v in plan.lanes.micro_batches(lane)]
    flops = flops_per_token(plan.shape, sum(p.numel() for _, p in named))
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    devices = len(set(world.allgather((plan.mesh.host, str(device)))))
    meta = {
        "config": {key: value for key, _, value in fields_of(config)},
        "fingerprint": resolve.fingerprint(config, device),
        "data": plan.training.index_sha256,
        "tokenizer": plan.training.tokenizer_sha256,
        "eod": plan.training.eod,
        "shape": asdict(plan.shape),
        "ranks": world.size,
    }
    if world.rank == 0 and before is None:
        write_file(run_dir / "config.toml", to_toml(config).encode())
        # beside the weights, so that the run can be used without its data
        write_file(run_dir / "tokenizer.json", plan.training.index.tokenizer_bytes(plan.training.path))
    engine = Engine(model, device, dtype, train.seed, plan.shape.dropout, nominal_tokens)
    engine.slowed, engine.fill = faults.slowed, getattr(strategy, "fill", engine.fill)
    hang_seconds = config.run.hang_seconds
    board = open_board(world, plan.mesh.host, run_dir) if hang_seconds else None
    watchdog = Watchdog(board, hang_seconds, first_times=10.0 if train.compile else 3.0)
    if world.size > 1:  # after a failure mpirun takes the last rank's abort for a success
        watchdog.abort = world.Abort
    engine.beat, reducer.tell = watchdog.beat, watchdog.reduces
    saver = Saver(
        world, run_dir, train.save_every, config.run.keep, (mesh.node_index, mesh.num_nodes) if mesh.local_rank == 0 else None,
        alone=any(entry.layout != "replicated" for entry in strategy.state_dict().values()),
    )
    job = Job(
        comm=world,
        mesh=mesh,
        engine=engine,
        strategy=strategy,
        saver=saver,
        open_loader=lambda batch: Loader(plan.training, plan.sampler, mine, device, batch, resident=config.data.resident),
        lanes=plan.lanes,
        balance=memory.balance,
        wait=group.wait,
        audit=Audit(world, train.audit_every, memory.replicas, strategy.buffer, strategy.flats()),
        noise_every=train.noise_every,
        faults=faults,
        schedule=Schedule(optim.schedule, optim.lr, optim.min_lr, optim.warmup_steps, train.steps),
        transport=transport,
        validation=plan.validation,
        run_dir=run_dir,
        meta=meta,
        seq_len=config.model.seq_len,
        eval_every=train.eval_every,
        eval_tokens=train.eval_tokens,
        target_loss=train.target_loss,
        patience=train.patience,
        spike=train.spike,
        max_skipped=train.max_skipped,
        progress=Progress(train.steps, world.rank == 0),
        stop_early_seconds=config.run.stop_early_seconds,
        min_ranks=config.faults.min_ranks,
        watchdog=watchdog,
        mfu=lambda tokens_per_second: tokens_per_second * flops / (peak * devices) if peak else None,
    )
    strategy.enter = job.enter
    saver.may_commit = lambda: job.lock is None or job.lock.held()
    return job
