"""What a sum of gradients over all ranks sends, and how long a cluster's link takes for it. Pure.

With P ranks, n bytes of gradients, a link of latency a and bandwidth B, one node of k ranks behind each:

| what | seconds |
|---|---|
| reducer allreduce | 2 (P-1)/P n / B + 2 (P-1) a a message: a ring, one flow out of each node (Patarasuk & Yuan 2009) |
| reducer tree | the same over nodes that share memory, else over ranks; on one node (P-1)/P n / B, which is read from memory |
| comm.compress | the bytes that a node's ranks send to other nodes / B + 2 (P-1) a an exchange; powersgd makes two a bucket |
| numbers that all tell each other | 2 ceil(log2 P) a |

Making and reading codes is not counted.
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
from mpidp.config.schema import Config, fields_of
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model.part import whole
from mpidp.model.starting import trained_on_paper
from mpidp.reducers import tree_order
from mpidp.reducers.buckets import Bucket, FlatLayout
from mpidp.reducers.compression.compressed import method_of, trimmed


@dataclass(frozen=True)
class Cluster:
    """Ranks and the slowest link between two of them."""

    ranks: int
    nodes: int
    latency_seconds: float
    bandwidth_bytes_per_second: float

    @property
    def ranks_a_node(self) -> int:
        return -(-self.ranks // self.nodes)

    @property
    def tell_seconds(self) -> float:
        """For a few numbers of every rank to reach all."""
        return 2 * math.ceil(math.log2(self.ranks)) * self.latency_seconds


def cluster_of(said: Mapping[str, Any], ranks: int, where: str) -> Cluster:
    """From what the doctor wrote; ranks: 0 for as many as it saw. UsageError where it measured no link. Pure."""
    try:
        seen = int(said["ranks"])
        latency, bandwidth = float(said["latency_seconds"]), float(said["bandwidth_bytes_per_second"])
        a_node = max(1, *map(int, said["ranks_per_node"]))
        if not (latency >= 0 and 0 < bandwidth < math.inf):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{where} has no link between ranks: run `mpirun -np N python -m mpidp.doctor` on the job's nodes, or give --link"
        ) from error
    ranks = ranks or seen
    return Cluster(ranks, -(-ranks // a_node), latency, bandwidth)


def link_of(words: str, ranks: int) -> Cluster:
    """--link=MBIT,MS: bandwidth of each node and delay one way, one rank a node. UsageError. Pure."""
    try:
        mbit, ms = map(float, words.split(","))
        if not (0 < mbit < math.inf and 0 <= ms < math.inf):
            raise ValueError
    except ValueError as error:
        raise UsageError(f"--link={words}: give Mbit/s and ms one way with a comma between them, as --link=1000,0.1") from error
    return Cluster(ranks, ranks, ms / 1e3, mbit * 1e6 / 8)


def lanes_of(config: Config) -> Lanes:
    """The cut of a batch. Pure."""
    return Lanes(config.train.global_batch, config.train.micro_batch, config.train.lanes)


@dataclass(frozen=True)
class Sizes:
    """Of the gradient."""

    num_elements: int
    buckets: list[Bucket]

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_elements


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """Without the memory of a model. Independent."""
    shape, settings = model_shape(config, vocab_size), {key: value for key, _, value in fields_of(config)}
    layout = FlatLayout(trained_on_paper(settings, shape, whole(shape)))
    return Sizes(layout.num_elements, layout.cut(int(config.comm.bucket_mb * 2**20)))


@dataclass(frozen=True)
class Sum:
    """One sum of all buckets over all ranks."""

    sent_bytes: int  # by rank 0, as metrics.jsonl counts them
    link_bytes: float  # through a node's link, each way
    messages: int  # one after the other

    def seconds(self, cluster: Cluster) -> float:
        """Pure."""
        return self.link_bytes / cluster.bandwidth_bytes_per_second + self.messages * cluster.latency_seconds


def one_sum(config: Config, sizes: Sizes, cluster: Cluster) -> Sum:
    """By the config's reducer and compression. Pure."""
    c, size = config.comm, cluster.ranks
    if size == 1:
        return Sum(0, 0.0, 0)
    if c.compress != "none":
        share = ratio({key: value for key, _, value in fields_of(config)})
        method = method_of(c.compress, share, 0, c.rank, config.train.seed)
        sent = sum(method.bytes_sent(trimmed(bucket), 0, 0, size) for bucket in sizes.buckets)
        return Sum(sent, sent * _away(cluster), 2 * (size - 1) * len(sizes.buckets) * (1 + (c.compress == "powersgd")))
    reducer = resolve_reducer(config)
    if reducer == "tree":
        return _by_tree(config, sizes, cluster)
    if reducer == "root":
        sent = 4 * sum(shape.numel() for bucket in sizes.buckets for shape in bucket.shapes)
        return Sum(sent, float((size + 1) * sent), 2 * len(sizes.buckets))  # gathered; sent back in two halves of a ring
    if reducer == "naive":
        spans = [(o, o + shape.numel()) for bucket in sizes.buckets
                 for shape, o in zip(bucket.shapes, bucket.offsets, strict=True)]
    else:
        spans = [(bucket.start, bucket.stop) for bucket in sizes.buckets]
    parts = [4 * (stop - start) for span in spans for start, stop in pieces(*span)]
    sent = sum(2 * part * (size - 1) // size for part in parts)
    return Sum(sent, float(sent), 2 * (size - 1) * len(parts))


def _by_tree(config: Config, sizes: Sizes, cluster: Cluster) -> Sum:
    """Owners of a slice in each node that shares memory send each other the nodes of the tree that theirs is left with."""
    lanes = lanes_of(config)
    shared = 1 if config.comm.transport == "messages" else cluster.ranks_a_node
    groups, count = -(-cluster.ranks // shared), lanes.num_lanes
    if groups == 1:
        return Sum(0, sizes.num_bytes * (cluster.ranks - 1) / cluster.ranks, 0)
    mine = range(shared * count // cluster.ranks)
    left = len(tree_order.fold([((0, lane), lane) for lane in mine], count)[1])
    whole = config.comm.overlap in ("auto", "none")
    spans = [(0, sizes.num_elements)] if whole else [(bucket.start, bucket.stop) for bucket in sizes.buckets]
    away = shared if shared > 1 else _away(cluster)
    sent, link_bytes, messages = 0, 0.0, 0
    for start, stop in spans:
        each = 4 * (stop - start) / shared
        link_bytes += each * (left + 1) * (groups - 1) / groups * away
        messages += 2 * (groups - 1) * math.ceil(each / PIECE_BYTES)
        for low, high in pieces(0, slice_bounds(stop - start, shared, NORM_BLOCK if whole else ALIGN)[1]):
            own = slice_bounds(high - low, groups)[1]
            sent += 4 * (left * (high - low - own) + own * (groups - 1))
    return Sum(sent, link_bytes, messages)


def _away(cluster: Cluster) -> float:
    """What every rank of a node sends to others of its node and away alike, through the node's link, in what one sends."""
    k = cluster.ranks_a_node
    return k * (cluster.ranks - k) / (cluster.ranks - 1) if cluster.nodes > 1 else 1.0
