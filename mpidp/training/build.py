"""Builds a job from a plan, in this order: model, services, data-parallel memory, strategy, engine, saver, record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import cast

import torch
from mpi4py import MPI

from mpidp.checkpoint.mirror import Mirror
from mpidp.checkpoint.saver import Saver
from mpidp.comm.nccl import open_transport
from mpidp.comm.transport import Messages
from mpidp.config.defaults import kind
from mpidp.config.rules import RULES
from mpidp.faults.audit import Audit
from mpidp.faults.inject import InjectedFaults
from mpidp.faults.run_lock import RunLock
from mpidp.model.hidden import hidden_by_name, hidden_of_own
from mpidp.model.shape import CustomShape
from mpidp.parallel.engine import Engine, Tie
from mpidp.parallel.pipeline import Stages
from mpidp.parallel.tied import tie_micro_batch
from mpidp.parallel.whole_matrices import Hidden
from mpidp.reducers import overlap
from mpidp.reducers.tree import Tree
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.log import log
from mpidp.runtime.observers import StepObserver
from mpidp.strategies import strategy_of
from mpidp.strategies.muon import MATRIX_STATE
from mpidp.strategies.optimizer import UpdateRule
from mpidp.strategies.protocol import Strategy, StrategyOptions
from mpidp.training.data_parallel import DataParallelMemory, share_memory
from mpidp.training.job import Job
from mpidp.training.lr_schedule import schedule_of
from mpidp.training.model import TrainedModel, make_model
from mpidp.training.run_plan import RunPlan
from mpidp.training.run_record import make_run_record
from mpidp.training.services import Services, make_services
from mpidp.training.state import RunState
from mpidp.training.task_evaluation import TaskEvaluation, tasks_of


def build(
    plan: RunPlan, faults: InjectedFaults | None = None, before: Job | None = None, lock: RunLock | None = None,
    on_hang: Callable[[str], None] = lambda report: None, observers: Sequence[StepObserver] = (),
    mirror: Mirror | None = None,
) -> Job:
    """Build a job in which all replicas have equal parameters.

    `faults`: the faults to inject on this rank. `before`: None, or a job in which ranks have failed. The surviving ranks keep
    the model and the memory of `before`. `lock`: the lock of the run's folder, on rank 0. `on_hang`: a function that is called
    with the report if the job hangs. `observers`: observers of every step. `mirror`: copies checkpoints, on rank 0. Collective
    over plan.world."""
    torch.set_num_threads(plan.config.train.threads)
    state = RunState() if before is None else before.state.portable()
    tasks = tasks_of(plan, None if before is None else before.tasks)  # before the weights, because the tasks may be missing
    transport = open_transport(plan.config.comm.gpu, plan.device, plan.mesh.dp)
    model = make_model(plan, transport, None if before is None else before.engine.model)
    if before is not None:
        before.strategy.release()
    services = make_services(plan, state, faults or InjectedFaults(), lock, on_hang, observers, mirror)
    memory = share_memory(
        plan, transport, sum(p.numel() for _, p in model.named), services.observers, model.parts,
        services.faults.changes_gradients, None if before is None else (before.strategy.group, before.strategy.one_copy),
    )
    settings = plan.config.flat()
    unaudited = [f"{rule.one}: {rule.why}" for rule in RULES if rule.other == "train.audit_every" and rule.has_one(settings)]
    services.faults.check(memory.level >= 2 or isinstance(memory.reducer, Tree), *unaudited[:1])
    strategy = make_strategy(plan, model, memory, before)
    engine = make_engine(plan, model, transport, strategy, services)
    saver = make_saver(plan, model, strategy, lock)
    record = make_run_record(
        plan, model.module, model.origin, services.machines, state, None if before is None else before.record
    )
    train = plan.config.train
    audit = Audit(plan.grid, train.audit_every, memory.replicas, strategy.buffer, strategy.flats(), model.parts.part.is_cut)
    schedule = schedule_of(settings)
    evaluation = TaskEvaluation(plan, model.module, services.observers, tasks) if train.eval_tasks else None
    return Job(
        plan, model.parts, engine, strategy, memory, transport, audit, schedule, saver, services, record, state, evaluation
    )


def make_strategy(plan: RunPlan, model: TrainedModel, memory: DataParallelMemory, before: Job | None) -> Strategy:
    """Make the strategy, and choose how the reducer's communication overlaps with the backward pass. `before`: as in build().
    Collective over plan.mesh.dp."""
    config, grid, dp = plan.config, plan.grid, plan.mesh.dp
    optim, train, reducer = config.optim, config.train, memory.reducer
    nominal_tokens = train.global_batch * config.model.seq_len
    rule = UpdateRule(
        optim.name, optim.weight_decay, optim.beta1, optim.beta2, optim.cautious_decay, optim.momentum_warmup,
        make_hidden(plan, model, memory) if optim.name in MATRIX_STATE else Hidden(), config.model.slices > 1,
    )
    options = StrategyOptions.of(asdict(config.strategy), train.steps, plan.mesh.node_sizes, arrivals=plan.arrivals)
    strategy: Strategy = strategy_of(config.strategy.name, config.strategy.quorum, memory.level, model.module)(
        dp, memory.group, model.named, reducer, rule, optim.clip, nominal_tokens, int(config.comm.bucket_mb * 2**20),
        memory.one_copy, spare_slots=int(train.audit_every > 0), most_slots=2 * plan.lanes.num_lanes.bit_length() + 3,
        options=options, parts=model.parts if grid.parts > 1 or (memory.level >= 2 and not model.parts.plain_norm) else None,
    )
    if before is None:
        strategy.start()
        way = overlap.choose(reducer, config.comm.overlap if grid.parts == 1 else "none", dp, memory.balance.static)
    else:  # keep the mode, because a new measurement takes time
        overlap.use(reducer, way := before.memory.reducer.overlap_mode)
    if plan.world.rank == 0 and plan.world.size > 1:
        log.info(f"comm.overlap={way}")
    return strategy


def make_hidden(plan: RunPlan, model: TrainedModel, memory: DataParallelMemory) -> Hidden:
    """Return the hidden matrices (the matrices that Muon updates), and the ranks that update these matrices together.
    Collective over plan.world.

    With mesh.tp or mesh.shard=2|3, the ranks that hold rectangular blocks of the same matrices update these matrices together.
    Without these settings, each copy of the parameters computes the updates of some matrices, and sends them to the other
    copies. However, each copy computes all updates itself if the device is a GPU, if copies must be independent (strategies
    local and quorum, and audits), or if an update must not need other ranks (ULFM)."""
    config, grid, shape, dp = plan.config, plan.grid, plan.shape, plan.mesh.dp
    method, tp = kind(config.strategy.name, config.strategy.quorum), grid.tp.size > 1
    independent = method == "local" or config.train.audit_every > 0 or launched_with_ulfm()
    if memory.level >= 2 and not tp:
        comm = dp
    elif tp and not independent:
        comm = grid.world if grid.pp.size == 1 else cast(MPI.Intracomm, grid.world.Split(grid.pp.rank, grid.world.rank))
    elif tp:
        comm = grid.tp
    else:
        together = method in ("synchronous", "delayed") and not independent and memory.reducer.everyone_updates
        copies = memory.level == 0 and len(memory.replicas) > 1 and plan.device.type == "cpu"
        comm = dp if together and copies else MPI.COMM_SELF
    if isinstance(shape, CustomShape):
        names = hidden_of_own(model.module.own, shape.vocab_size)
        others = [name for name, p in model.named if p.dim() == 2 and name not in names]
        if plan.world.rank == 0:
            log.info(f"{config.optim.name} updates {len(names)} matrices. AdamW updates all other parameters"
                     + (f", including these matrices: {', '.join(others)}" if others else ""))
    else:
        names = hidden_by_name(model.named)
    return Hidden(names, comm, memory.reducer.transport, memory.group.wait, model.parts if grid.parts > 1 else None)


def make_engine(plan: RunPlan, model: TrainedModel, transport: Messages, strategy: Strategy, services: Services) -> Engine:
    """Make the engine, which runs forward and backward passes. Collective over plan.grid.pp."""
    config, grid, part = plan.config, plan.grid, model.parts.part
    stages = Stages(grid, transport, plan.device, config.mesh.interleave) if grid.pp.size > 1 else None
    tied = dict(model.named).get(model.parts.tied_name) if config.model.slices > 1 else None
    tie: Tie = nullcontext if tied is None or stages is None else partial(tie_micro_batch, tied, stages)
    return Engine(
        model.module, plan.device, getattr(torch, config.train.dtype), config.train.seed, plan.shape.dropout,
        config.train.global_batch * config.model.seq_len, stages, model.token_losses, part.has_head and grid.tp.rank == 0,
        services.observers, strategy.fill, tie,
    )


def make_saver(plan: RunPlan, model: TrainedModel, strategy: Strategy, lock: RunLock | None) -> Saver:
    """Make the saver of checkpoints. Collective over plan.world."""
    mesh, entries = plan.mesh, model.parts.entries(model.module, strategy.state_dict())
    return Saver(
        plan.world, plan.run_dir, plan.config.train.save_every, plan.config.run.keep,
        (mesh.node_index, mesh.num_nodes) if mesh.local_rank == 0 else None,
        alone=any(entry.layout != "replicated" for entry in entries.values()),
        may_commit=lambda: lock is None or lock.held(),
    )
