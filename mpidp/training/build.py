"""From a configuration to a job: open the data, resolve what was left open, agree over the ranks, make the parts."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpidp.checkpoint.resume import fingerprint
from mpidp.checkpoint.saver import Saver
from mpidp.comm.nccl import open_transport
from mpidp.config import rules
from mpidp.config.schema import to_toml
from mpidp.data.loader import Loader
from mpidp.faults.audit import Audit
from mpidp.faults.heartbeat import open_heartbeat_board
from mpidp.faults.inject import InjectedFaults
from mpidp.faults.watchdog import Watchdog
from mpidp.metrics.progress import Progress, peak_flops
from mpidp.metrics.tensorboard import Scalars
from mpidp.metrics.timeline import Timeline
from mpidp.model.frozen import trained
from mpidp.model.shape import CustomShape, flops_per_token, num_parameters
from mpidp.model.starting import base_weights, prepared
from mpidp.parallel.engine import Engine
from mpidp.parallel.model_part import ModelPartition
from mpidp.parallel.pipeline import Stages
from mpidp.parallel.tensor import loss_over, share_layers
from mpidp.parallel.tensor_comm import TensorComm
from mpidp.reducers import overlap
from mpidp.runtime.agreement import check_agreement, parameter_facts, versions
from mpidp.runtime.files import write_file
from mpidp.runtime.world import raise_together
from mpidp.strategies import strategy_of
from mpidp.strategies.optimizer import Optimizer
from mpidp.strategies.protocol import StrategyOptions
from mpidp.training.data_parallel import share_memory
from mpidp.training.job import Job
from mpidp.training.lr_schedule import Schedule
from mpidp.training.run_plan import Plan
from mpidp.training.services import watch_energy


def build(plan: Plan, faults: InjectedFaults | None = None, before: Job | None = None) -> Job:
    """The parts of the job, on the device, replicas equal. before: a job some of whose ranks have died; those who are left of it
    keep its model and memory. Collective over world."""
    config, mesh, world, device, grid = plan.config, plan.mesh, plan.world, plan.device, plan.grid
    parts = ModelPartition(grid, plan.shape, config.mesh.sequence, config.mesh.interleave)
    dp, origin = mesh.dp, plan.origin
    train, optim, faults = config.train, config.optim, faults or InjectedFaults()
    torch.set_num_threads(train.threads)
    nominal_tokens, settings = train.global_batch * config.model.seq_len, config.flat()
    if before is None:
        base = base_weights(settings, plan.shape, parts.part)
        if origin is not None and origin.weights is not None:
            origin = origin.load(parts, base)
        with raise_together(world):
            model: Any = prepared(base, settings, plan.shape, parts.part)
        if config.mesh.shard < 2:  # FSDP2 moves what it shards, a block at a time: no device ever holds the whole
            model.to(device)
        model.recompute = train.recompute
        named = trained(model)
        check_agreement(dp, parameter_facts(named) | (model.facts() if isinstance(plan.shape, CustomShape) else {}))
        if isinstance(plan.shape, CustomShape) and (others := parts.begin_alike(model)) and world.rank == 0:
            print(
                f"the factory gives other initial weights on ranks {others} than on rank 0, so a second run may differ, too: "
                "draw them by torch's generator, which is set to train.seed. All ranks begin with rank 0's", flush=True,
            )
        if train.compile:
            model.compile_blocks()
    else:
        model, earlier, origin = before.engine.model, before.strategy, None
        named = trained(model)
        earlier.release()
    transport = open_transport(config.comm.gpu, device, dp)
    losses = None
    if grid.tp.size > 1:
        tensor_comm = TensorComm(grid, transport, config.mesh.sequence)
        share_layers(model, tensor_comm)
        named, losses = trained(model), loss_over(tensor_comm, parts.part.own_range(plan.shape.vocab_size).start)
    memory = share_memory(
        plan, transport, sum(p.numel() for _, p in named), looked_at=faults.changes_gradients,
        before=None if before is None else (earlier.group, earlier.one_copy),
    )
    reducer, group = memory.reducer, memory.group
    strategy = strategy_of(config.strategy.name, config.strategy.quorum, memory.level, model)(
        dp, group, named, reducer, partial(Optimizer, optim.name, weight_decay=optim.weight_decay, beta1=optim.beta1,
        beta2=optim.beta2), optim.clip, nominal_tokens, int(config.comm.bucket_mb * 2**20), memory.one_copy,
        spare_slots=int(train.audit_every > 0), most_slots=2 * plan.lanes.num_lanes.bit_length() + 3,
        options=StrategyOptions.of(asdict(config.strategy), train.steps, mesh.node_sizes, arrivals=plan.arrivals),
    )
    if grid.parts > 1:
        strategy.share_model(parts)
    if before is None:
        strategy.start()
        said = overlap.choose(reducer, config.comm.overlap if grid.parts == 1 else "none", dp, memory.balance.static)
    else:  # measuring would take a while
        overlap.use(reducer, said := earlier.reducer.overlap_mode)
    if world.rank == 0 and world.size > 1:
        print(f"overlap {said}", flush=True)
    dtype = getattr(torch, train.dtype)
    run_dir = Path(config.run.dir)
    mine = [v for lane in memory.balance.ranges[dp.rank] for v in plan.lanes.micro_batches(lane)]
    flops = flops_per_token(plan.shape, num_parameters(plan.shape))
    flops -= 2.0 * sum(p.numel() for _, p in model.named_parameters() if p.dim() > 1 and not p.requires_grad)  # their gradients
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    meter, machines = watch_energy(config.metrics.energy, grid.everyone.host, device, world)
    meta = {
        "config": settings,
        "fingerprint": fingerprint(config, device),
        "data": plan.training.index_sha256,
        "tokenizer": plan.training.tokenizer_sha256,
        "eod": plan.training.eod,
        "shape": asdict(plan.shape),
        "ranks": world.size,
    }
    if origin is not None:
        meta["init_from"] = {"path": origin.path, "weights_sha256": origin.weights_sha256}
    elif before is not None and "init_from" in before.meta:
        meta["init_from"] = before.meta["init_from"]
    if world.rank == 0 and before is None:
        write_file(run_dir / "config.toml", to_toml(config).encode())
        # beside the weights, so that the run can be used without its data
        write_file(run_dir / "tokenizer.json", plan.training.index.tokenizer_bytes(plan.training.path))
        if origin is not None and origin.weights is not None:
            origin.keep(run_dir)
            print(f"weights from {origin.path}, weights_sha256 {origin.weights_sha256}", flush=True)
    stages = Stages(grid, transport, device, config.mesh.interleave) if grid.pp.size > 1 else None
    reports_loss = parts.part.has_head and grid.tp.rank == 0
    engine = Engine(model, device, dtype, train.seed, plan.shape.dropout, nominal_tokens, stages, losses, reports_loss)
    engine.slowed, engine.fill = faults.slowed, getattr(strategy, "fill", engine.fill)
    hang_seconds = config.run.hang_seconds
    board = open_heartbeat_board(world, grid.everyone.host, run_dir) if hang_seconds else None
    watchdog = Watchdog(board, hang_seconds, first_times=10.0 if train.compile else 3.0)
    if world.size > 1:  # after a failure mpirun takes the last rank's abort for a success
        watchdog.abort = world.Abort
    engine.beat, reducer.on_reduce = watchdog.beat, watchdog.reduces
    saver = Saver(
        world, run_dir, train.save_every, config.run.keep, (mesh.node_index, mesh.num_nodes) if mesh.local_rank == 0 else None,
        alone=any(entry.layout != "replicated" for entry in parts.entries(model, strategy.state_dict()).values()),
    )
    job = Job(
        comm=world,
        mesh=mesh,
        grid=grid,
        parts=parts,
        engine=engine,
        strategy=strategy,
        saver=saver,
        open_loader=lambda batch: Loader(plan.training, plan.sampler, mine, device, batch, resident=config.data.resident),
        lanes=plan.lanes,
        balance=memory.balance,
        wait=group.wait,
        audit=Audit(grid, train.audit_every, memory.replicas, strategy.buffer, strategy.flats(), parts.part.is_cut),
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
        mfu=lambda tokens_per_second: tokens_per_second * flops / (peak * machines["devices"]) if peak else None,
        meter=meter,
        facts=machines | {
            "nodes": dict(zip(grid.everyone.hosts, grid.everyone.node_sizes, strict=True)), "versions": versions(),
            "fingerprint": meta["fingerprint"], "parameters": num_parameters(plan.shape), "flops_per_token": flops,
            "peak_flops_per_second": peak and peak * machines["devices"],
            "data": {"path": config.data.path, "index_sha256": meta["data"], "train_tokens": plan.training.num_tokens,
                     "val_tokens": plan.validation.num_tokens if plan.validation else 0, "vocab_size": plan.training.vocab_size},
        },
        open_scalars=lambda step: Scalars(run_dir / "tensorboard", step) if config.metrics.tensorboard else None,
        timeline=Timeline(
            rules.steps_of(config.metrics.timeline), run_dir, grid.everyone.host.partition("#")[0], config.metrics.kernels
        ),
    )
    strategy.enter = job.enter
    saver.may_commit = lambda: job.lock is None or job.lock.held()
    return job
