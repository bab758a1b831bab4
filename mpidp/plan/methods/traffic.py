"""Computes the traffic of a sum of gradients over all ranks, and its time on a cluster. Pure.

There are P ranks, n bytes of gradients, and k ranks per node. Each node has a link of latency a and bandwidth B. Gradients are
summed in pieces of at most 4 MiB (transport.PIECE_BYTES).

| what | seconds |
|---|---|
| reducer allreduce | 2 (P-1)/P n / B + 2 (P-1) a per piece, for a ring that leaves each node once (Patarasuk & Yuan 2009) |
| reducer tree | as allreduce; if ranks share memory, P is the number of nodes |
| reducer tree on one node | (P-1)/P n / B, because ranks read gradients from memory |
| comm.compress | (bytes from a node to other nodes) / B + 2 (P-1) a per exchange; powersgd has two exchanges per bucket |
| allgather of a few numbers | 2 ceil(log2 P) a |

The time to compress and decompress is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpidp.comm.slices import ALIGN, NORM_BLOCK, slice_bounds
from mpidp.comm.transport import PIECE_BYTES, pieces
from mpidp.config.defaults import ratio
from mpidp.config.resolve import model_shape, resolve_reducer
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model.part import whole
from mpidp.model.starting import trained_on_meta
from mpidp.reducers import tree_order
from mpidp.reducers.buckets import Bucket, FlatLayout
from mpidp.reducers.compression.compressed import method_of, trimmed


@dataclass(frozen=True)
class Cluster:
    """The number of ranks and nodes, and the slowest link between two ranks."""

    ranks: int
    nodes: int
    latency_seconds: float
    bandwidth_bytes_per_second: float

    @property
    def ranks_a_node(self) -> int:
        """The number of ranks per node, rounded up."""
        return -(-self.ranks // self.nodes)

    @property
    def small_exchange_seconds(self) -> float:
        """The time of an allgather of a few numbers, in seconds."""
        return 2 * math.ceil(math.log2(self.ranks)) * self.latency_seconds


def cluster_of(content: Mapping[str, Any], ranks: int, where: str) -> Cluster:
    """Return the cluster that mpidp.doctor measured. content: the content of cluster.json. ranks: number of ranks, or 0 for the
    number in the file. where: name of the file in error messages. Raises UsageError if the file has no measured link. Pure."""
    try:
        seen = int(content["ranks"])
        latency, bandwidth = float(content["latency_seconds"]), float(content["bandwidth_bytes_per_second"])
        a_node = max(1, *map(int, content["ranks_per_node"]))
        if not (latency >= 0 and 0 < bandwidth < math.inf):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{where} has no measurement of a link between ranks. Run `mpirun -np N python -m mpidp.doctor` on the nodes of the "
            "job, or give --link"
        ) from error
    ranks = ranks or seen
    return Cluster(ranks, -(-ranks // a_node), latency, bandwidth)


def link_of(given: str, ranks: int) -> Cluster:
    """Return a cluster of `ranks` nodes with one rank each. given: the value MBIT,MS of --link. MBIT is the bandwidth of each
    node in Mbit/s. MS is the one-way delay in ms. Raises UsageError if the value is not valid. Pure."""
    try:
        mbit, ms = map(float, given.split(","))
        if not (0 < mbit < math.inf and 0 <= ms < math.inf):
            raise ValueError
    except ValueError as error:
        raise UsageError(f"--link={given}: give the bandwidth in Mbit/s and the one-way delay in ms, separated by a comma, for "
                         "example --link=1000,0.1") from error
    return Cluster(ranks, ranks, ms / 1e3, mbit * 1e6 / 8)


def lanes_of(config: Config) -> Lanes:
    """Return the lanes (fixed sequences of micro-batches) of a global batch. Pure."""
    return Lanes(config.train.global_batch, config.train.micro_batch, config.train.lanes)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the gradient and of its buckets."""

    num_elements: int
    buckets: list[Bucket]

    @property
    def num_bytes(self) -> int:
        """The size of the gradient in bytes (float32)."""
        return 4 * self.num_elements


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """Return the sizes of the gradient and of its buckets, without allocating the model. Independent."""
    shape, settings = model_shape(config, vocab_size), config.flat()
    layout = FlatLayout(trained_on_meta(settings, shape, whole(shape)))
    return Sizes(layout.num_elements, layout.cut(int(config.comm.bucket_mb * 2**20)))


@dataclass(frozen=True)
class Sum:
    """The traffic of one sum of all buckets over all ranks."""

    sent_bytes: int  # bytes that rank 0 sends, as counted in metrics.jsonl
    link_bytes: float  # bytes that pass the link of a node in each direction
    messages: int  # number of messages that are sent one after the other

    def seconds(self, cluster: Cluster) -> float:
        """Return the time of the sum in seconds. Pure."""
        return self.link_bytes / cluster.bandwidth_bytes_per_second + self.messages * cluster.latency_seconds


def one_sum(config: Config, sizes: Sizes, cluster: Cluster) -> Sum:
    """Return the traffic of one sum with the reducer and the compression of `config`. Pure."""
    c, size = config.comm, cluster.ranks
    if size == 1:
        return Sum(0, 0.0, 0)
    if c.compress != "none":
        share = ratio(config.flat())
        method = method_of(c.compress, share, 0, c.rank, config.train.seed)
        sent = sum(method.bytes_sent(trimmed(bucket), 0, 0, size) for bucket in sizes.buckets)
        return Sum(sent, sent * _outgoing_share(cluster), 2 * (size - 1) * len(sizes.buckets) * (1 + (c.compress == "powersgd")))
    reducer = resolve_reducer(config)
    if reducer == "tree":
        return _by_tree(config, sizes, cluster)
    if reducer == "root":
        sent = 4 * sum(shape.numel() for bucket in sizes.buckets for shape in bucket.shapes)
        return Sum(sent, float((size + 1) * sent), 2 * len(sizes.buckets))  # gather, then broadcast by scatter and ring allgather
    if reducer == "naive":
        spans = [(o, o + shape.numel()) for bucket in sizes.buckets
                 for shape, o in zip(bucket.shapes, bucket.offsets, strict=True)]
    else:
        spans = [(bucket.start, bucket.stop) for bucket in sizes.buckets]
    parts = [4 * (stop - start) for span in spans for start, stop in pieces(*span)]
    sent = sum(2 * part * (size - 1) // size for part in parts)
    return Sum(sent, float(sent), 2 * (size - 1) * len(parts))


def _by_tree(config: Config, sizes: Sizes, cluster: Cluster) -> Sum:
    """Return the traffic of one sum with the reducer `tree`. The ranks of a node add the gradients of their lanes in shared
    memory. Then the ranks that add the same slice (index range of the gradient), one on each node, exchange their partial
    sums. With comm.transport=messages, each rank counts as a node."""
    lanes = lanes_of(config)
    shared = 1 if config.comm.transport == "messages" else cluster.ranks_a_node
    groups, count = -(-cluster.ranks // shared), lanes.num_lanes
    if groups == 1:
        return Sum(0, sizes.num_bytes * (cluster.ranks - 1) / cluster.ranks, 0)
    own_lanes = range(shared * count // cluster.ranks)
    left = len(tree_order.fold([((0, lane), lane) for lane in own_lanes], count)[1])
    whole = config.comm.overlap in ("auto", "none")
    spans = [(0, sizes.num_elements)] if whole else [(bucket.start, bucket.stop) for bucket in sizes.buckets]
    outgoing = shared if shared > 1 else _outgoing_share(cluster)
    sent, link_bytes, messages = 0, 0.0, 0
    for start, stop in spans:
        each = 4 * (stop - start) / shared
        link_bytes += each * (left + 1) * (groups - 1) / groups * outgoing
        messages += 2 * (groups - 1) * math.ceil(each / PIECE_BYTES)
        for low, high in pieces(0, slice_bounds(stop - start, shared, NORM_BLOCK if whole else ALIGN)[1]):
            own = slice_bounds(high - low, groups)[1]
            sent += 4 * (left * (high - low - own) + own * (groups - 1))
    return Sum(sent, link_bytes, messages)


def _outgoing_share(cluster: Cluster) -> float:
    """Return how many bytes leave a node if each rank sends one byte in total, divided equally among all other ranks. On one
    node, return 1."""
    k = cluster.ranks_a_node
    return k * (cluster.ranks - k) / (cluster.ranks - 1) if cluster.nodes > 1 else 1.0
