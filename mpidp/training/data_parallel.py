"""Who shares what with whom in a job: lanes among ranks, memory within a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from mpi4py import MPI

from mpidp.comm.group import Group, make_group, regroup
from mpidp.comm.slices import ALIGN, NORM_BLOCK
from mpidp.comm.transport import Messages
from mpidp.comm.work_stealing import Tickets
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.reducers.base import Reducer
from mpidp.reducers.compression.compressed import Compressed, method_of
from mpidp.reducers.tree import REDUCERS, slots_needed
from mpidp.runtime.environment import launched_with_ulfm
from mpidp.runtime.topology import Topology
from mpidp.training.balance import BALANCES, Balance, Terms


class Asked(Protocol):
    """Who wants memory: a plan (planned.py), or a loop of the user's own (library.py)."""

    @property
    def config(self) -> Config:
        """Nothing left open."""

    @property
    def mesh(self) -> Topology:
        """The replicas."""

    @property
    def world(self) -> MPI.Intracomm:
        """Everybody."""

    @property
    def lanes(self) -> Lanes:
        """Of a batch."""

    @property
    def device(self) -> torch.device:
        """Of this rank."""

    @property
    def shape(self) -> Any:
        """Of the model: num_layers is how many units of it begin a block of the norm."""


SHARED = (  # by mesh.shard, what replicas hold; of one copy there is nothing to share out
    "{}", "{}, which has a slice of the state where there are several", "a shard a rank, and whole parameters in a step",
    "a shard a rank",
)


@dataclass
class Sharing:
    """The outcome."""

    group: Group
    balance: Balance
    reducer: Reducer
    one_copy: bool  # of parameters and optimizer state in a group
    replicas: list[range]  # ranks of each copy
    level: int  # mesh.shard; 0 where there is one copy alone, and nothing to deal out


def gradient_slots(config: Config, lanes: Lanes, rank: int, size: int, looked_at: bool = False) -> tuple[int, int]:
    """(gradient buffers that a rank needs, most lanes that it may get: 0 where it keeps what it begins with). Independent."""
    mine = lanes.of_rank(rank, size)
    kind, most = config.train.balance if size > 1 else "even", 0
    if kind == "measured":  # up to three times the even share: memory for gradients grows with its logarithm
        most = min(lanes.num_lanes - size + 1, 3 * -(-lanes.num_lanes // size))
    if config.comm.reducer != "tree":
        return 1, most
    kept_apart = looked_at or config.train.audit_every > 0 or config.train.noise_every > 0
    return slots_needed(lanes, mine, most, kind != "steal", kept_apart), most


def held_buffers(config: Config) -> int:
    """Buffers as large as a gradient that compression needs: what is held back, and what it was before. Pure."""
    return 2 * (1 + (config.comm.momentum > 0)) if config.comm.compress != "none" else 0


SAID = ("12 bytes a parameter, or once a node", "by mesh.shard a part of it")  # of optimizer state: whole; not


def held_floats(config: Config, slots: int, size: int) -> float:
    """A rank's float32 for each parameter, between steps: it, two moments, gradients; by mesh.shard on so many replicas. Pure."""
    return (3 + slots, 1 + 2 / size + slots, 4 / size, 4 / size)[config.mesh.shard]


def share_memory(
    plan: Asked, transport: Messages, num_parameters: int, looked_at: bool = False, before: tuple[Group, bool] | None = None
) -> Sharing:
    """Groups, balance and reducer as the config asks; rank 0 says what came of it. looked_at: lanes are looked at one by one for
    other reasons than the config says. before: the group in whose memory those who are left of it go on, and whether there was
    one copy in it. UsageError when what was asked for cannot be had. Collective over plan.mesh.dp."""
    mesh, c, lanes = plan.mesh, plan.config, plan.lanes
    world = mesh.dp
    if c.comm.compress == "powersgd" and world.size == 1 and before is None:
        raise UsageError("comm.compress=powersgd on one rank: there is nothing to send. Start more ranks, or leave it out")
    tree = c.comm.reducer == "tree"
    kind = c.train.balance if world.size > 1 else "even"
    slots, max_lanes = gradient_slots(c, lanes, world.rank, world.size, looked_at)
    audited = c.train.audit_every > 0
    # Replicas are what an audit compares: on one node there must be one a rank.
    by_node = c.comm.copies == "node" or (c.comm.copies == "auto" and not (audited and mesh.num_nodes == 1))
    copies = 3 if by_node and mesh.local_rank == 0 else 0  # parameters and two moments
    elements = num_parameters + (plan.shape.num_layers + 4) * (NORM_BLOCK + 16 * ALIGN)  # with what fills gaps
    wanted = c.comm.transport if tree else "messages"
    if before is not None:
        group, words, by_node = regroup(mesh, before[0]), "as before", before[1]
    else:
        group, words = make_group(mesh, wanted, 4 * elements * (slots + audited + copies), plan.device)
    windowed = len(group.members) < world.size  # for all alike, also for a rank that is alone on its node
    if wanted == "window" and not windowed and world.size > 1 and before is None:
        raise UsageError.on_every_rank(f"comm.transport=window, but it can only be {words}; comm.transport=auto goes on so")
    tickets = None
    if kind == "steal":
        if launched_with_ulfm():
            kind, words = "even", f"{words}; balance even: lanes are stolen through a window, which dies with any of its ranks"
        elif windowed or mesh.num_nodes == world.size:
            tickets = Tickets(group.node)
        else:
            kind, words = "even", f"{words}; balance even: lanes are stolen through a window"
    reducer: Reducer
    balance = BALANCES[kind](Terms(
        lanes.num_lanes, world.size, world.rank, max_lanes, tickets, group.members[group.index].start,
        lambda: reducer.has_free_slot(), c.strategy.servers,
    ))
    if c.comm.compress == "none":
        reducer = REDUCERS[c.comm.reducer](group, lanes, transport, balance, slots)
    else:
        method = method_of(c.comm.compress, c.comm.ratio, c.comm.ratio_warmup, c.comm.rank, c.train.seed)
        reducer = Compressed(group, lanes, transport, balance, slots, method, c.train.seed, c.comm.momentum)
    one_copy = by_node and windowed
    if transport.mode != "host":
        words = f"{words}, {transport.mode}"
    if plan.world.rank == 0:
        held = f"one copy a {'node' if one_copy else 'rank'}"
        print(f"transport {words}; parameters and optimizer state: {SHARED[c.mesh.shard].format(held)}", flush=True)
    replicas = group.members if one_copy else [range(rank, rank + 1) for rank in range(world.size)]
    level = c.mesh.shard if c.mesh.shard > 1 or len(replicas) > 1 else 0
    return Sharing(group, balance, reducer, one_copy, replicas, level)
