"""Makes the model of a job: this rank's part of the model, with initial weights and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.transport import Messages
from mpidp.model.frozen import trained
from mpidp.model.loss_chunks import chunk_rows
from mpidp.model.shape import CustomShape
from mpidp.model.starting import adapters, base_weights, prepared
from mpidp.parallel.chunked_loss import defer_head
from mpidp.parallel.model_part import ModelPartition
from mpidp.parallel.sliced_layers import slice_layers, sliced_loss
from mpidp.parallel.tensor import loss_over, share_layers
from mpidp.parallel.tensor_comm import TensorComm
from mpidp.parallel.tree_comm import TreeComm
from mpidp.runtime.agreement import check_agreement, parameter_facts
from mpidp.runtime.log import log
from mpidp.runtime.world import raise_together
from mpidp.training.initial_weights import Origin
from mpidp.training.run_plan import RunPlan


@dataclass(frozen=True)
class TrainedModel:
    """A model on its device, with the list of its trained parameters and the origin of its weights."""

    module: Any
    named: list[tuple[str, torch.nn.Parameter]]  # trained parameters
    parts: ModelPartition
    token_losses: Callable[[Tensor, Tensor], Tensor] | None  # computes the loss if ranks or chunks divide the vocabulary
    origin: Origin | None  # source of the initial weights; None: they are random


def make_model(plan: RunPlan, transport: Messages, module: Any = None) -> TrainedModel:
    """Return the model of a job. `module`: an existing model to use again, or None to make a new one. Collective over
    plan.world."""
    config, grid = plan.config, plan.grid
    cut = config.mesh.sequence, config.mesh.interleave, config.model.slices
    partition = partial(ModelPartition, grid, plan.shape, *cut)
    origin = None
    if module is None:
        module, origin = _new(plan, partition())
    parts = partition(adapters=adapters(config.flat(), plan.shape))
    token_losses, first = None, parts.part.own_range(plan.shape.vocab_size).start
    positions, dtype = config.train.micro_batch * config.model.seq_len, getattr(torch, config.train.dtype)
    rows = chunk_rows(config.train.loss, plan.shape, positions)
    if (slices := config.model.slices) > 1:
        tree = TreeComm(grid, transport, config.mesh.sequence)
        token_losses = sliced_loss(module, slices, rows or positions, dtype, tree)
        slice_layers(module, slices, tree, parts.sizes)
        return TrainedModel(module, trained(module), parts, token_losses, origin)
    ring: TensorComm | None = getattr(module, "tensor_comm", None)  # an existing model already uses it
    shared = ring is not None
    if ring is not None:
        ring.use(grid, transport)
    elif grid.tp.size > 1:
        ring = TensorComm(grid, transport, config.mesh.sequence)
    if rows:
        token_losses = defer_head(module, plan.shape, rows, dtype, first, ring)
    elif ring is not None:
        token_losses = loss_over(ring, first)
    if ring is not None and not shared:
        share_layers(module, ring)
    return TrainedModel(module, trained(module), parts, token_losses, origin)


def _new(plan: RunPlan, parts: ModelPartition) -> tuple[Any, Origin | None]:
    """Return a new model, and the origin of its weights. The initial weights are equal on all replicas."""
    config, shape, world, origin = plan.config, plan.shape, plan.world, plan.origin
    settings = config.flat()
    base = base_weights(settings, shape, parts.part)
    if origin is not None and origin.weights is not None:
        origin = origin.load(parts, base)
    with raise_together(world):
        module: Any = prepared(base, settings, shape, parts.part)
    if config.mesh.shard < 3:  # else the strategy moves one block at a time, so no device ever holds the whole model
        module.to(plan.device)
    module.recompute = config.train.recompute
    check_agreement(plan.mesh.dp, parameter_facts(trained(module)) | (module.facts() if isinstance(shape, CustomShape) else {}))
    if isinstance(shape, CustomShape):
        _begin_alike(module, parts, world)
    if config.train.compile:
        module.compile_blocks()
    return module, origin


def _begin_alike(module: Any, parts: ModelPartition, world: MPI.Intracomm) -> None:
    """Give every rank the initial weights of rank 0. Warn if the user's factory made different weights on some ranks. Collective
    over world."""
    others = parts.broadcast_parameters(module)
    if others and world.rank == 0:
        log.warning(
            f"warning: the model factory draws different initial weights on ranks {others} than on rank 0. All ranks use the "
            "weights of rank 0, but a second run may differ. Draw the weights with torch's generator, which is seeded with "
            "train.seed"
        )
