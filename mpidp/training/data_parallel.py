"""Data parallelism in a job. Decides which lanes (sequences of micro-batches) each rank computes, and which ranks share
memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from mpi4py import MPI

from mpidp.comm.group import Group, make_group, regroup
from mpidp.comm.slices import ALIGN, NORM_BLOCK
from mpidp.comm.transport import Messages
from mpidp.comm.work_stealing import Tickets, steals_freely
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.parallel.model_part import ModelPartition
from mpidp.reducers.base import Reducer
from mpidp.reducers.compression.compressed import Compressed, method_of
from mpidp.reducers.rounds import plan_rounds, slots_of
from mpidp.reducers.tree import REDUCERS, slots_needed
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.log import log
from mpidp.runtime.observers import NO_OBSERVERS, StepObservers
from mpidp.runtime.topology import Topology
from mpidp.training.balance import BALANCES, Balance, Terms


class MemoryRequest(Protocol):
    """The type of the first argument of share_memory(). RunPlan and library.SharingPlan implement this protocol."""

    @property
    def config(self) -> Config:
        """The resolved configuration."""

    @property
    def mesh(self) -> Topology:
        """The ranks that hold the same part of the model, one rank of each replica."""

    @property
    def world(self) -> MPI.Intracomm:
        """All ranks."""

    @property
    def lanes(self) -> Lanes:
        """The lanes (sequences of micro-batches) of a global batch."""

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    @property
    def shape(self) -> Any:
        """The model's shape. Each of the model's `num_layers` layers begins at a multiple of NORM_BLOCK elements in the flat
        gradient."""


HELD = (  # messages by mesh.shard: what a rank holds of parameters and optimizer state
    "{}", "{} (parameters), divided among the copies (optimizer state)",
    "one copy of the parameters and a slice of the state per rank", "a slice per rank",
)


@dataclass(frozen=True)
class DataParallelMemory:
    """The ranks that share memory, the lanes (sequences of micro-batches) of each rank, and the reducer."""

    group: Group
    balance: Balance
    reducer: Reducer
    one_copy: bool  # whether ranks that share memory use one copy of parameters and optimizer state
    replicas: list[range]  # the ranks that hold each copy
    level: int  # mesh.shard, or 0 if there is only one copy, because a single copy is not divided

    def micro_batches(self, rank: int) -> list[int]:
        """Return the micro-batches that rank `rank` computes, in order. With train.balance=steal, other ranks may take some of
        them during the step. With mesh.shard=2|3, rank r of P ranks computes the micro-batches r, r + P, r + 2 P and so on.
        Independent."""
        lanes = self.reducer.lanes
        if self.level >= 2:
            return list(range(rank, lanes.num_micro_batches, len(self.balance.ranges)))
        return [v for lane in self.balance.ranges[rank] for v in lanes.micro_batches(lane)]


def gradient_slots(config: Config, lanes: Lanes, rank: int, size: int, looked_at: bool = False) -> tuple[int, int]:
    """Return (number of gradient buffers that rank `rank` needs, largest number of lanes that this rank may get). A lane is a
    sequence of micro-batches. The second number is 0 if the rank's lanes never change. `size`: number of replicas.
    `looked_at`: as in share_memory(). Independent."""
    mine = lanes.of_rank(rank, size)
    kind, most = config.train.balance if size > 1 else "even", 0
    if kind == "measured":  # at most three times as many as with even ranges; memory grows with the logarithm of `most`
        most = min(lanes.num_lanes - size + 1, 3 * -(-lanes.num_lanes // size))
    if config.comm.reducer != "tree":
        return 1, most
    if config.mesh.shard >= 2 and size > 1:
        return slots_of(plan_rounds(lanes, size)), 0
    kept_apart = looked_at or config.train.audit_every > 0 or config.train.noise_every > 0
    return slots_needed(lanes, mine, most, kind != "steal", kept_apart), most


def held_buffers(config: Config) -> int:
    """Return how many buffers of the size of a gradient comm.compress needs. They hold the residual (the compression error,
    which is added to the next gradient) and its previous value. With momentum, they also hold the velocity and its previous
    value. Pure."""
    return 2 * (1 + (config.comm.momentum > 0)) if config.comm.compress != "none" else 0


def held_floats(config: Config, slots: int, size: int) -> float:
    """Return how many float32 values a rank stores between steps per parameter of the model. These values are the parameter, two
    moments and the gradient buffers. `slots`: number of gradient buffers. `size`: number of replicas. Pure."""
    return (3 + slots, 1 + 2 / size + slots, 1 + (2 + slots) / size, (3 + slots) / size)[config.mesh.shard]


def _can_steal(mesh: Topology) -> bool:
    """Return whether, on every node, a rank can take lanes (sequences of micro-batches) from another rank. Collective over
    mesh.dp."""
    node = cast(MPI.Intracomm, mesh.dp.Split(mesh.node_index, mesh.dp.rank))
    free = bool(mesh.dp.allreduce(mesh.local_size == 1 or steals_freely(node), op=MPI.LAND))
    node.Free()
    return free


def share_memory(
    plan: MemoryRequest, transport: Messages, num_parameters: int, observers: StepObservers = NO_OBSERVERS,
    parts: ModelPartition | None = None, looked_at: bool = False, before: tuple[Group, bool] | None = None,
) -> DataParallelMemory:
    """Make, from the configuration, this rank's group (the ranks that share memory), balance (which distributes the lanes) and
    reducer (which sums gradients). Rank 0 logs what was chosen.

    `parts`: this rank's part of the model. `looked_at`: whether injected faults need the gradients of single lanes (sequences
    of micro-batches). `before`: None, or after a failure (the group before the failure, whether its ranks shared one copy).
    The surviving ranks keep the memory of this group. Raises UsageError if the configuration is not possible with this launch.
    Collective over plan.mesh.dp."""
    mesh, c, lanes = plan.mesh, plan.config, plan.lanes
    world = mesh.dp
    if c.comm.compress == "powersgd" and world.size == 1 and before is None:
        raise UsageError("comm.compress=powersgd on one rank: there is nothing to send. Start more ranks, or omit comm.compress")
    tree = c.comm.reducer == "tree"
    kind, note = c.train.balance if world.size > 1 else "even", ""
    if kind == "steal" and not launched_with_ulfm() and not _can_steal(mesh):
        kind, c = "measured", c.with_values(train={"balance": "measured"})
        note = "; train.balance=measured, because with this MPI library a rank cannot take work from a rank that is computing"
    slots, max_lanes = gradient_slots(c, lanes, world.rank, world.size, looked_at)
    audited = c.train.audit_every > 0
    # An audit compares replicas, so on one node each rank must have a replica of its own.
    by_node = c.comm.copies == "node" or (c.comm.copies == "auto" and not (audited and mesh.num_nodes == 1))
    copies = 3 if by_node and mesh.local_rank == 0 else 0  # parameters and two moments
    elements = num_parameters + (plan.shape.num_layers + 4) * (NORM_BLOCK + 16 * ALIGN)  # with padding
    wanted = c.comm.transport if tree and c.mesh.shard < 2 else "messages"
    if before is not None:
        group, how, by_node = regroup(mesh, before[0]), "as before", before[1]
    else:
        group, how = make_group(mesh, wanted, 4 * elements * (slots + audited + copies), plan.device)
    windowed = len(group.members) < world.size  # equal on all ranks, also on a rank that is alone on its node
    if wanted == "window" and not windowed and world.size > 1 and before is None:
        raise UsageError.on_every_rank(f"comm.transport=window is not possible here, only {how}. Use comm.transport=auto")
    tickets = None
    if kind == "steal":
        if launched_with_ulfm():
            kind, how = "even", f"{how}; train.balance=even, because the memory for work stealing is lost if a rank fails"
        elif windowed or mesh.num_nodes == world.size:
            tickets = Tickets(group.node)
        else:
            kind, how = "even", f"{how}; train.balance=even, because work stealing needs shared memory"
    reducer: Reducer
    balance = BALANCES[kind](Terms(
        lanes.num_lanes, world.size, world.rank, max_lanes, tickets, group.members[group.index].start,
        lambda: reducer.has_free_slot(), c.strategy.servers,
    ))
    seen: dict[str, Any] = {
        "observers": observers, "norm_over_parts": parts.norm if parts is not None and not parts.plain_norm else None,
    }
    if c.comm.compress == "none":
        reducer = REDUCERS[c.comm.reducer](group, lanes, transport, balance, slots, **seen)
    else:
        method = method_of(c.comm.compress, c.comm.ratio, c.comm.ratio_warmup, c.comm.rank, c.train.seed)
        reducer = Compressed(group, lanes, transport, balance, slots, method, c.train.seed, c.comm.momentum, **seen)
    one_copy = by_node and windowed
    how += note + (f", {transport.mode}" if transport.mode != "host" else "")
    if plan.world.rank == 0:
        held = HELD[c.mesh.shard].format(f"one copy per {'node' if one_copy else 'rank'}")
        log.info(f"transport {how}; parameters and optimizer state: {held}")
    replicas = group.members if one_copy else [range(rank, rank + 1) for rank in range(world.size)]
    level = c.mesh.shard if len(replicas) > 1 else 0
    return DataParallelMemory(group, balance, reducer, one_copy, replicas, level)
