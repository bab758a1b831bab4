"""Computes the time of a step on a mesh and the bytes sent, from the compute speed of a rank and the speed of links. Pure.

Ranks are numbered by replica, then by stage, then by tensor-parallel index, as in parallel/grid.py. In the table, a block is a
Transformer block, g is the number of ranks of a group, and n is a number of bytes. p is the number of parameters of a rank,
and q is the number of its trained parameters. With LoRA, only the adapters are trained, so the gradients of the frozen
matrices are not computed. w is the number of bytes per number in matrix products. M is the number of micro-batches per
replica.

| what | seconds |
|---|---|
| compute | operations / flops + bytes read and written / memory bandwidth; c is this time for one micro-batch on one stage |
| tp | float32 allreduces of (B, T, D): 4 per block (half of them in forward), 2 more with recompute, 2 for embedding and head |
| tp, sequence | instead: as many float32 reduce_scatters; 6 allgathers per block and 2 for the head, w bytes per number |
| tp, sequence | also float32 allreduces of the gradients of the trained parameters that tp does not divide |
| tp, LoRA | float32 allreduces of the gradients of the adapters' factors that tp does not divide |
| pp | m is the time of a float32 message of (B, T, D); mesh.sequence divides the size of the message by tp |
| micro-batch | max c over the stages + 2 m (pp - 1) / pp |
| pipeline | M - 1 micro-batches + sum of c over stages + 2 m (pp - 1); equal stages have a bubble of (pp - 1) / (M + pp - 1) |
| dp, shard 0 | an allreduce of 4 q, which overlaps with 2/3 of a micro-batch (its backward) |
| dp, shard 1 | a reduce_scatter of 4 q and an allgather of 4 q, which overlap with a micro-batch |
| dp, shard 2 | a reduce_scatter of 4 q per micro-batch and an allgather of 4 q, which overlap with all micro-batches |
| dp, shard 3 | a reduce_scatter of 4 q and two allgathers of w p per micro-batch, which overlap with all of them (Zhao 2023) |
| dp, shard 2 and 3 | with model.slices above 1: also a gather of 4 q / dp, for the norm of the gradient |
| dp, shard 2 and 3 | also `gather_seconds` (host time that does not overlap) for each of these exchanges of each block |
| update | 28 bytes per parameter that a rank updates / memory bandwidth |

An allgather or reduce_scatter takes (g - 1)/g n / b + ceil(log2 g) a, where b is the bandwidth and a the latency of a link. An
allreduce takes twice as long. If a group extends over several nodes, each node's network is shared by (ranks per node) /
(members of the group in a node) groups. Machine.overlap is the fraction of the possible overlap that is achieved. If ranks
share devices, the other ranks of a device compute during a rank's bubble. A step then takes at least the time in which the
devices of a node compute the work of all ranks of this node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpidp.plan.mesh.activations import kept_of_block, logits_bytes
from mpidp.plan.mesh.memory import MASTER, layers_of, parameters_of, stages_of, trained_of
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work

BACKWARD = 2 / 3  # fraction of the compute time that backward takes
PASSES = 4  # an activation is written and read, and so is its gradient
ACCUMULATE = 12  # bytes per parameter and micro-batch to accumulate gradients: two reads and a write
HEAD_GAINS = ("q_norm.weight", "k_norm.weight")  # every rank holds these gains, and applies them to its own heads
CAST = 6  # bytes per parameter and micro-batch to convert weights for 16-bit products
UPDATE = 28  # bytes per parameter: AdamW reads four numbers and writes three


@dataclass(frozen=True)
class LinkSpeed:
    """The speed of a link in one direction."""

    latency_seconds: float
    bandwidth_bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """The compute speed of the ranks and the speed of their links."""

    flops: float  # FLOP/s of matrix products, for a rank with its own device
    memory_bytes_per_second: float  # memory bandwidth of a device
    inside: LinkSpeed  # link between two ranks of a node
    between: LinkSpeed  # network of a node, shared by its ranks
    ranks_a_node: int
    devices_a_node: int
    overlap: float = 1.0  # fraction of the possible overlap of dp traffic with compute that is achieved
    gather_seconds: float = 0.0  # host time per gather or scatter of a sharded block (copies, hooks)


@dataclass(frozen=True)
class Traffic:
    """The bytes that one rank sends in exchanges of a group of ranks, and the time of these exchanges."""

    sent_bytes: float = 0.0
    seconds: float = 0.0
    between: bool = False  # whether a part of this traffic is between nodes

    def times(self, count: float) -> Traffic:
        """Return the traffic of `count` such exchanges. Pure."""
        return Traffic(count * self.sent_bytes, count * self.seconds, self.between)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes + other.sent_bytes, self.seconds + other.seconds, self.between or other.between)


def half_allreduce(machine: Machine, size: int, stride: int, num_bytes: float) -> Traffic:
    """Return the traffic of an allgather or reduce_scatter of num_bytes over `size` ranks. The numbers of these ranks are
    i, i + stride, i + 2 stride, and so on. Pure."""
    if size == 1:
        return Traffic()
    sent = num_bytes * (size - 1) / size
    k = machine.ranks_a_node
    members = max(1, min(size, k // stride))  # number of members of the group in one node
    hops = math.ceil(math.log2(size))
    inside = sent / machine.inside.bandwidth_bytes_per_second if members > 1 else 0.0
    if members == size:
        return Traffic(sent, inside + hops * machine.inside.latency_seconds)
    outside = sent * (k / members) / machine.between.bandwidth_bytes_per_second
    return Traffic(sent, max(inside, outside) + hops * machine.between.latency_seconds, True)


def message(machine: Machine, shape: Shape, num_bytes: float) -> Traffic:
    """Return the traffic of one rank when every rank of a stage sends num_bytes to the next stage. Pure."""
    stride, k = shape.tp, machine.ranks_a_node
    if stride * shape.pp <= k:
        return Traffic(num_bytes, num_bytes / machine.inside.bandwidth_bytes_per_second + machine.inside.latency_seconds)
    outside = num_bytes * min(stride, k) / machine.between.bandwidth_bytes_per_second
    return Traffic(num_bytes, outside + machine.between.latency_seconds, True)


@dataclass(frozen=True)
class Flow:
    """What one micro-batch needs on one rank: floating-point operations in matrix products, bytes of memory traffic, and tp
    traffic."""

    flops: float = 0.0
    num_bytes: float = 0.0
    tp: Traffic = Traffic()

    def seconds(self, machine: Machine) -> float:
        """Return the compute time in seconds, without tp traffic. Pure."""
        return self.flops / machine.flops + self.num_bytes / machine.memory_bytes_per_second

    def times(self, count: float) -> Flow:
        """Return this Flow, multiplied by `count`. Pure."""
        return Flow(count * self.flops, count * self.num_bytes, self.tp.times(count))

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.flops + other.flops, self.num_bytes + other.num_bytes, self.tp + other.tp)


def _forward_flops(model: ModelSizes, shape: Shape, work: Work) -> float:
    """Return the floating-point operations of one Transformer block in the forward pass of one micro-batch on one rank."""
    products = (model.matrices + 2 * model.attended * model.num_heads * model.shape.head_dim) / shape.tp
    return 2 * work.micro_batch * model.seq_len * (products + model.adapters_per_rank(shape.tp))


def _parts(model: ModelSizes, shape: Shape, work: Work, machine: Machine) -> tuple[Flow, Flow, Flow]:
    """Return what the forward and the backward pass of one micro-batch need on one rank, as (Flow of one block, Flow of the
    embedding, Flow of the final norm and the head). No gradient of a frozen matrix is computed or accumulated."""
    tokens, again, trains = work.micro_batch * model.seq_len, work.recompute, not model.lora_rank
    cast = CAST if work.number_bytes == 2 else 0
    weights, adapters = ACCUMULATE * trains + cast, (ACCUMULATE + cast) * model.adapters_per_rank(shape.tp)
    wire = half_allreduce(machine, shape.tp, 1, float(tokens * model.model_dim * work.wire_bytes)).times(2)
    numbers = half_allreduce(machine, shape.tp, 1, 4.0 * tokens).times(2 * 3)  # for the loss: maximum, sum, target's logit
    flops = (3 + again) * _forward_flops(model, shape, work) - (not trains) * 2 * tokens * model.matrices / shape.tp
    kept = (PASSES + 2 * again) * tokens * kept_of_block(model, shape, work)
    block_wire, head_wire, embedding_wire = wire.times(4 + 2 * again), wire, wire

    def gradients(*elements: int) -> Traffic:
        """Return the traffic to sum the gradients of replicated parameters. elements: the number of elements of each of these
        parameters."""
        return sum((half_allreduce(machine, shape.tp, 1, 4.0 * n).times(2) for n in elements if n), Traffic())

    if work.sequence:
        size = tokens * model.model_dim
        gather = half_allreduce(machine, shape.tp, 1, float(size * min(work.number_bytes, work.wire_bytes)))
        scatter = half_allreduce(machine, shape.tp, 1, float(size * work.wire_bytes))
        block_wire, head_wire = gather.times(6) + scatter.times(4 + 2 * again), gather.times(2) + scatter
        head_wire += gradients(*[model.model_dim] * (trains * model.norm // model.model_dim))
        embedding_wire += gradients(trains * model.positions)
    summed = (n for name, n in model.replicated.items() if trains and (work.sequence or name.endswith(HEAD_GAINS)))
    block_wire += gradients(*summed, *model.whole_adapters.values())
    if model.options.qk_norm == "layer":
        squares = half_allreduce(machine, shape.tp, 1, 4.0 * tokens).times(2)
        block_wire += squares.times(2 * (2 + again))
    block = Flow(flops, kept + weights * model.block / shape.tp + adapters, block_wire)
    embedding = Flow(0.0, 3 * 4.0 * tokens * model.model_dim + weights * model.table / shape.tp, embedding_wire)
    logits = PASSES / 2 * tokens * logits_bytes(model, shape, work.number_bytes)  # logits_bytes includes gradients
    products = (4 + 2 * trains) * tokens * model.table / shape.tp
    head = Flow(products, logits + weights * model.table / shape.tp, head_wire + numbers)
    return block, embedding, head


@dataclass(frozen=True)
class Step:
    """The predicted times of one step on one mesh, and the bytes that a rank of the busiest stage sends."""

    compute_seconds: float  # compute time of the busiest stage, for all micro-batches
    tp_seconds: float  # time of the tp traffic of the busiest stage, for all micro-batches
    pipeline_seconds: float  # time of waiting in the bubble, for messages between stages, and for a shared device
    dp_seconds: float  # data-parallel traffic that is not overlapped
    update_seconds: float
    tp_bytes: float
    pp_bytes: float
    dp_bytes: float
    between_bytes: float  # the part of tp_bytes, pp_bytes and dp_bytes that leaves the node
    flops: float  # operations per rank without recomputation, as a mean over the stages

    @property
    def seconds(self) -> float:
        """The time of the step in seconds."""
        return self.compute_seconds + self.tp_seconds + self.pipeline_seconds + self.dp_seconds + self.update_seconds


def data_parallel(model: ModelSizes, shape: Shape, work: Work, machine: Machine) -> tuple[Traffic, float]:
    """Predict the data-parallel exchanges of one step, for the stage with the most parameters. Return (Traffic of a rank, host
    seconds of a rank for gathers and scatters). Pure."""
    p, stage = max((parameters_of(model, shape, stage), stage) for stage in stages_of(model, shape))
    m, units = work.micro_batches(shape), layers_of(model, shape, stage) + 1
    gradients = MASTER * max(trained_of(model, shape, one) for one in stages_of(model, shape))

    def half(num_bytes: float, count: int, pieces: int = units) -> Traffic:
        return half_allreduce(machine, shape.dp, shape.tp * shape.pp, num_bytes / pieces).times(count * pieces)

    if shape.shard < 2:
        return half(gradients, 2, 1), 0.0
    scatters, gathers = m, 2 * m if shape.shard == 3 else 1
    each = machine.gather_seconds * (shape.dp > 1)
    traffic = half(gradients, scatters) + half(work.number_bytes * p if shape.shard == 3 else gradients, gathers)
    if work.slices > 1:  # for the norm, each element is sent to one rank (strategies/sharded_norm.py)
        traffic += half(gradients / shape.dp, 1)
    return traffic, each * units * (scatters + gathers)


def step_of(model: ModelSizes, shape: Shape, work: Work, machine: Machine) -> Step:
    """Return the predicted times and bytes of one step. Pure."""
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
    crowd = max(1.0, min(machine.ranks_a_node, shape.ranks) / machine.devices_a_node)  # ranks per device
    shared = m * (crowd * whole.seconds(machine) + whole.tp.seconds) / pp
    path = max(path, shared)
    dp, hosts = data_parallel(model, shape, work, machine)
    behind = {0: BACKWARD, 1: 1.0}.get(shape.shard, float(m)) * slowest.seconds(machine)
    q = max(trained_of(model, shape, stage) for stage in stages_of(model, shape))
    update = crowd * UPDATE * q / shape.over_dp(1) / machine.memory_bytes_per_second
    tp_bytes, pp_bytes = m * slowest.tp.sent_bytes, m * between.sent_bytes * (2 if pp > 2 else 1)
    return Step(
        compute, m * slowest.tp.seconds, path - m * one, max(0.0, dp.seconds - machine.overlap * behind) + hosts, update,
        tp_bytes,
        pp_bytes, dp.sent_bytes,
        tp_bytes * slowest.tp.between + pp_bytes * between.between + dp.sent_bytes * dp.between,
        m * (whole.flops - work.recompute * _forward_flops(model, shape, work) * model.num_layers) / pp,
    )


def measured_machine(
    model: ModelSizes, micro_batch: int, compute_seconds: float, update_seconds: float, micro_batches: int, number_bytes: int,
) -> tuple[float, float]:
    """Return (FLOP/s, memory bytes/s), computed from times that were measured on one rank. The memory bandwidth follows from
    `update_seconds`, the time of the update. The time of matrix products is `compute_seconds`, the compute time of a step,
    minus the time of memory traffic. micro_batches: the number of micro-batches in a step. number_bytes: bytes per number in
    matrix products. Pure."""
    alone, work = Shape(1, 1, 1), Work(micro_batches * micro_batch, micro_batch, number_bytes=number_bytes)
    memory = UPDATE * trained_of(model, alone, 0) / update_seconds
    nothing = LinkSpeed(0.0, math.inf)
    block, embedding, head = _parts(model, alone, work, Machine(1.0, memory, nothing, nothing, 1, 1))
    whole = block.times(model.num_layers) + embedding + head
    rest = compute_seconds / micro_batches - whole.num_bytes / memory
    rest = max(rest, 0.25 * compute_seconds / micro_batches)  # the time of memory traffic may be overestimated
    return whole.flops / rest, memory
