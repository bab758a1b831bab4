"""Seconds and bytes of a step on a mesh, from what a rank computes a second and what links carry. Pure; no torch, no MPI.

Ranks lie in the order pp, dp, tp: a layer's tp ranks beside each other, stages far apart. With g members of a group, n bytes and
M micro-batches a replica:

| what | seconds |
|---|---|
| computing | operations / flops + bytes that pass by memory / memory's bandwidth; a stage's micro-batch takes c |
| tp | float32; a block: 2 allreduces of (B, T, D) forward, 2 backward, 2 with recompute; 1 for the embedding, 1 for the head |
| tp, sequence | as many reduce_scatters, float32; 6 allgathers a block and 2 for the head, of w bytes; gains of norms |
| pp | a float32 message of (B, T, D) each way (1 / tp of it with sequence), m; a micro-batch takes max c + 2 m (pp - 1) / pp |
| pipeline | (M - 1) of these, and all stages' c + 2 m (pp - 1): with equal stages, a bubble of (pp - 1) / (M + pp - 1) |
| dp, shard 0 | an allreduce of 4 p, behind 2/3 of a micro-batch (its backward) |
| dp, shard 1 | a reduce_scatter of 4 p and an allgather of 4 p, behind a micro-batch |
| dp, shard 2 | a reduce_scatter of 4 p a micro-batch and an allgather of 4 p, behind all micro-batches |
| dp, shard 3 | a reduce_scatter of 4 p and two allgathers of w p a micro-batch, behind all micro-batches (Zhao 2023) |
| dp, shard 2 and 3 | `gather_seconds` for each of these of each block, too: the host's, which nothing hides |
| update | 28 bytes a parameter that a rank updates / memory's bandwidth |

An allgather or reduce_scatter takes (g - 1)/g n / B + ceil(log2 g) a, an allreduce twice that. A group whose members fill nodes
makes as many rings through a node's network as it has of its ranks elsewhere. `overlap` is the share of "behind" that is had.
Where ranks share devices, nothing is faster than all work of a node over its devices: then others fill a bubble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpidp.planning.mesh.memory import (
    MASTER,
    Model,
    Shape,
    Work,
    kept_of_block,
    layers_of,
    logits_bytes,
    parameters_of,
    stages_of,
)

BACKWARD = 2 / 3  # of computing
PASSES = 4  # each byte that is kept is written and read, and so is its gradient
ACCUMULATE = 12  # bytes a parameter and micro-batch: read, add, write
CAST = 6  # bytes a parameter and micro-batch, where products are 16-bit
UPDATE = 28  # bytes a parameter: AdamW reads four numbers and writes three


@dataclass(frozen=True)
class Link:
    """One way."""

    latency_seconds: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """What ranks compute on and talk over."""

    flops: float  # of products, a second, of a rank with a device of its own
    memory_bytes_per_second: float  # of a device's memory
    inside: Link  # between two ranks of a node
    between: Link  # the network of a node, which its ranks share
    ranks_a_node: int
    devices_a_node: int
    overlap: float = 1.0  # of data parallel traffic with computing, where there is something to hide behind
    gather_seconds: float = 0.0  # of a rank for each gather or scatter of one sharded block, beside its bytes: copies, hooks


@dataclass(frozen=True)
class Traffic:
    """Of one group, a rank's part."""

    sent_bytes: float = 0.0
    seconds: float = 0.0
    between: bool = False  # leaves the node

    def times(self, count: float) -> Traffic:
        return Traffic(count * self.sent_bytes, count * self.seconds, self.between)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes + other.sent_bytes, self.seconds + other.seconds, self.between or other.between)


def half_allreduce(machine: Machine, size: int, stride: int, num_bytes: float) -> Traffic:
    """An allgather or a reduce_scatter of so many bytes over `size` ranks, each `stride` from the next. Pure."""
    if size == 1:
        return Traffic()
    sent = num_bytes * (size - 1) / size
    k = machine.ranks_a_node
    members = max(1, min(size, k // stride))  # in one node
    hops = math.ceil(math.log2(size))
    inside = sent / machine.inside.bandwidth_bytes_per_second if members > 1 else 0.0
    if members == size:
        return Traffic(sent, inside + hops * machine.inside.latency_seconds)
    outside = sent * (k / members) / machine.between.bandwidth_bytes_per_second
    return Traffic(sent, max(inside, outside) + hops * machine.between.latency_seconds, True)


def message(machine: Machine, shape: Shape, num_bytes: float) -> Traffic:
    """From every rank of a stage to the next stage. Pure."""
    stride, k = shape.tp * shape.dp, machine.ranks_a_node
    if shape.ranks <= k:
        return Traffic(num_bytes, num_bytes / machine.inside.bandwidth_bytes_per_second + machine.inside.latency_seconds)
    outside = num_bytes * min(stride, k) / machine.between.bandwidth_bytes_per_second
    return Traffic(num_bytes, outside + machine.between.latency_seconds, True)


@dataclass(frozen=True)
class Flow:
    """Operations of products and bytes through memory, of one micro-batch on one rank, and its tp traffic."""

    flops: float = 0.0
    num_bytes: float = 0.0
    tp: Traffic = Traffic()

    def seconds(self, machine: Machine) -> float:
        """Without the traffic."""
        return self.flops / machine.flops + self.num_bytes / machine.memory_bytes_per_second

    def times(self, count: float) -> Flow:
        return Flow(count * self.flops, count * self.num_bytes, self.tp.times(count))

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.flops + other.flops, self.num_bytes + other.num_bytes, self.tp + other.tp)


def _parts(model: Model, shape: Shape, work: Work, machine: Machine) -> tuple[Flow, Flow, Flow]:
    """(a block, the embedding, norm and head): forward and backward of a micro-batch."""
    tokens, again = work.micro_batch * model.seq_len, work.recompute
    weights = ACCUMULATE + (CAST if work.number_bytes == 2 else 0)
    wire = half_allreduce(machine, shape.tp, 1, float(tokens * model.model_dim * work.wire_bytes)).times(2)
    numbers = half_allreduce(machine, shape.tp, 1, 4.0 * tokens).times(2 * 3)  # the loss: largest, sum, target
    forward = tokens * (2 * model.matrices + 4 * model.seq_len * model.model_dim) / shape.tp
    kept = (PASSES + 2 * again) * tokens * kept_of_block(model, shape, work)
    block_wire, head_wire = wire.times(4 + 2 * again), wire
    if work.sequence:
        size = tokens * model.model_dim
        gather = half_allreduce(machine, shape.tp, 1, float(size * min(work.number_bytes, work.wire_bytes)))
        scatter = half_allreduce(machine, shape.tp, 1, float(size * work.wire_bytes))
        gains = half_allreduce(machine, shape.tp, 1, 4.0 * model.model_dim).times(2)
        block_wire, head_wire = gather.times(6) + scatter.times(4 + 2 * again) + gains.times(2), gather.times(2) + scatter + gains
    block = Flow((3 + again) * forward, kept + weights * model.block / shape.tp, block_wire)
    embedding = Flow(0.0, 3 * 4.0 * tokens * model.model_dim + weights * model.table / shape.tp, wire)
    logits = PASSES / 2 * tokens * logits_bytes(model, shape, work.number_bytes)  # counted with their gradients already
    head = Flow(6.0 * tokens * model.table / shape.tp, logits + weights * model.table / shape.tp, head_wire + numbers)
    return block, embedding, head


@dataclass(frozen=True)
class Step:
    """One step on one mesh: seconds of the job, bytes that a rank of the busiest stage sends."""

    compute_seconds: float  # of the busiest stage, all its micro-batches
    tp_seconds: float  # of the busiest stage
    pipeline_seconds: float  # waiting in the bubble and for messages between stages
    dp_seconds: float  # that is not hidden
    update_seconds: float
    tp_bytes: float
    pp_bytes: float
    dp_bytes: float
    between_bytes: float  # of these, how many leave the node
    flops: float  # that a rank computes, the mean over stages, without what is computed again

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.tp_seconds + self.pipeline_seconds + self.dp_seconds + self.update_seconds


def data_parallel(model: Model, shape: Shape, work: Work, machine: Machine) -> tuple[Traffic, float]:
    """Of a step, on the stage with most parameters; and the host's seconds beside it. Pure."""
    p, stage = max((parameters_of(model, shape, stage), stage) for stage in stages_of(model, shape))
    m, units = work.micro_batches(shape), layers_of(model, shape, stage) + 1

    def half(bytes_each: float, count: int, pieces: int = units) -> Traffic:
        return half_allreduce(machine, shape.dp, shape.tp, bytes_each * p / pieces).times(count * pieces)

    if shape.shard < 2:
        return half(MASTER, 2, 1), 0.0
    scatters, gathers = m, 2 * m if shape.shard == 3 else 1
    each = machine.gather_seconds * (shape.dp > 1)
    traffic = half(MASTER, scatters) + half(work.number_bytes if shape.shard == 3 else MASTER, gathers)
    return traffic, each * units * (scatters + gathers)


def step_of(model: Model, shape: Shape, work: Work, machine: Machine) -> Step:
    """Pure."""
    block, embedding, head = _parts(model, shape, work, machine)
    stages = {
        stage: block.times(layers_of(model, shape, stage)) + embedding.times(stage == 0) + head.times(stage == shape.pp - 1)
        for stage in stages_of(model, shape)
    }
    whole = block.times(model.num_layers) + embedding + head  # the sum over stages
    slowest = max(stages.values(), key=lambda flow: flow.seconds(machine) + flow.tp.seconds)
    m, pp = work.micro_batches(shape), shape.pp
    between = Traffic()
    if pp > 1:
        share = shape.tp if work.sequence else 1
        between = message(machine, shape, work.micro_batch * model.seq_len * model.model_dim * work.wire_bytes / share)
    compute, one = m * slowest.seconds(machine), slowest.seconds(machine) + slowest.tp.seconds
    path = (m - 1) * (one + 2 * between.seconds * (pp - 1) / pp)
    path += whole.seconds(machine) + whole.tp.seconds + 2 * (pp - 1) * between.seconds
    crowd = max(1.0, min(machine.ranks_a_node, shape.ranks) / machine.devices_a_node)  # ranks a device
    shared = m * (crowd * whole.seconds(machine) + whole.tp.seconds) / pp
    path = max(path, shared)
    dp, hosts = data_parallel(model, shape, work, machine)
    behind = {0: BACKWARD, 1: 1.0}.get(shape.shard, float(m)) * slowest.seconds(machine)
    p = max(parameters_of(model, shape, stage) for stage in stages_of(model, shape))
    update = crowd * UPDATE * p / shape.over_dp(1) / machine.memory_bytes_per_second
    tp_bytes, pp_bytes = m * slowest.tp.sent_bytes, m * between.sent_bytes * (2 if pp > 2 else 1)
    return Step(
        compute, m * slowest.tp.seconds, path - m * one, max(0.0, dp.seconds - machine.overlap * behind) + hosts, update,
        tp_bytes,
        pp_bytes, dp.sent_bytes,
        tp_bytes * slowest.tp.between + pp_bytes * between.between + dp.sent_bytes * dp.between,
        m * (whole.flops - work.recompute / (3 + work.recompute) * block.flops * model.num_layers) / pp,
    )


def measured_machine(
    model: Model, micro_batch: int, compute_seconds: float, update_seconds: float, micro_batches: int, number_bytes: int,
) -> tuple[float, float]:
    """(flops, memory's bytes a second) of a run on one rank: the update is memory alone, and what memory does not take of
    computing is products. Pure."""
    alone, work = Shape(1, 1, 1), Work(micro_batches * micro_batch, micro_batch, number_bytes=number_bytes)
    memory = UPDATE * model.parameters / update_seconds
    nothing = Link(0.0, math.inf)
    block, embedding, head = _parts(model, alone, work, Machine(1.0, memory, nothing, nothing, 1, 1))
    whole = block.times(model.num_layers) + embedding + head
    rest = compute_seconds / micro_batches - whole.num_bytes / memory
    rest = max(rest, 0.25 * compute_seconds / micro_batches)  # an update in the cache would say that memory takes it all
    return whole.flops / rest, memory
