"""Sends a small fraction of the values: those with the largest absolute values (topk), or those at random places (randomk). The
random places are the same on all ranks.

Sources: Aji & Heafield 2017; Stich 2018, who proves convergence with error feedback. The warm-up of the ratio, and the
momentum in compressed.py, are from Deep Gradient Compression (Lin 2018). With topk, the owner of a slice (the rank that adds
it) also sends only k values of the slice's sum, those with the largest absolute values (gTop-k, Shi 2019). The owner keeps the
other values as a residual.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpidp.reducers.buckets import Bucket
from mpidp.reducers.compression.codes import PLAIN, Code, seed_of, uniform
from mpidp.reducers.compression.exchange import CompressionMethod, Exchange, Summed, all_finite, bytes_sent

CHUNK, LARGE_CHUNK = 1 << 12, 1 << 16  # values per group, of which the largest are sent; LARGE_CHUNK: for small ratios


def ratio_at(ratio: float, warmup: int, number: int) -> float:
    """Return the fraction of values that are sent in round `number`, counted from 0. The fraction falls exponentially to `ratio`
    in `warmup` rounds. For example, with ratio 0.001 and warmup 4 the fractions are 0.25, 0.06, 0.016, 0.004, then 0.001 (Lin
    2018, section 3.4). Pure."""
    return float(ratio ** ((number + 1) / (warmup + 1))) if number < warmup else ratio


def count(ratio: float, n: int) -> int:
    """Return how many of n values are sent: about ratio * n, but at least one. Pure."""
    return min(n, max(1, round(ratio * n)))


class TopK(Code):
    """Encodes a group of consecutive values by the k values with the largest absolute values. These k values are stored as
    float32, and their places in the group in 2 bytes each (DeMo, Peng 2024, section 3; SparseLoCo, Sarfi 2025, section 3). A
    group has CHUNK values, or LARGE_CHUNK if the ratio is small."""

    def __init__(self, ratio: float) -> None:
        self.ratio, self.chunk = ratio, CHUNK if ratio * CHUNK >= 16 else LARGE_CHUNK

    def _rows(self, n: int) -> list[tuple[int, int, int]]:
        """Return a list of (number of groups, values per group, values sent per group). It has one entry for the full groups and
        one for the rest of the n values. An entry without values is left out. Pure."""
        whole, rest = divmod(n, self.chunk)
        return [(rows, width, count(self.ratio, width)) for rows, width in ((whole, self.chunk), (1, rest)) if rows and width]

    def num_bytes(self, n: int) -> int:
        return 6 * sum(rows * k for rows, _, k in self._rows(n))

    def _parts(self, wire: Tensor, n: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """For each entry of _rows(), yield (index of its first value, values per group, sent values, their places). The last two
        are views of `wire`: float32 (groups, k) and int16 (groups, k). Pure."""
        at, start = 0, 0
        cut = 4 * sum(rows * k for rows, _, k in self._rows(n))
        values, places = wire[:cut].view(torch.float32), wire[cut:].view(torch.int16)
        for rows, width, k in self._rows(n):
            mine = slice(at, at + rows * k)
            yield start, width, values[mine].view(rows, k), places[mine].view(rows, k)
            at, start = at + rows * k, start + rows * width

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        for start, width, values, places in self._parts(wire, x.numel()):
            rows = x[start : start + len(values) * width].view(-1, width)
            found = rows.abs().topk(values.shape[1], 1, sorted=False).indices.sort(1).values
            values.copy_(rows.gather(1, found))
            places.copy_(found)

    def decode(self, wire: Tensor, n: int) -> Tensor:
        found = torch.zeros(n, device=wire.device)
        for start, width, values, places in self._parts(wire, n):
            found[start : start + len(values) * width].view(-1, width).scatter_(1, places.long() & 0xFFFF, values)
        return found


class TopKMethod(CompressionMethod):
    """Implements comm.compress=topk."""

    def __init__(self, ratio: float, warmup: int) -> None:
        super().__init__(TopK(ratio))
        self._ratio, self._warmup = ratio, warmup

    def code(self, number: int) -> Code:
        return TopK(ratio_at(self._ratio, self._warmup, number))


class RandomKMethod(CompressionMethod):
    """Implements comm.compress=randomk. The values are cut into ranges of about 1 / ratio values, and one value of each range
    is sent. In each round, all ranks draw the places of these values with the same seed. Therefore places need not be sent.
    The sent values are summed in float32, without encoding."""

    def __init__(self, ratio: float, warmup: int) -> None:
        super().__init__(PLAIN)
        self._ratio, self._warmup = ratio, warmup

    def places(self, bucket: Bucket, number: int, seed: int) -> Tensor:
        """Return the places in the bucket of the values that are sent in round `number`, int64 (k,), in ascending order. They do
        not depend on the device, because they are computed on the CPU. Pure."""
        k = self._count(bucket, number)
        edges = torch.arange(k + 1) * (bucket.stop - bucket.start) // k
        widths = edges[1:] - edges[:-1]
        offsets = (uniform(widths.shape, seed_of(seed, number, bucket.index), torch.device("cpu")) * widths).long()
        return edges[:-1] + torch.minimum(offsets, widths - 1)

    def sum(self, x: Tensor, bucket: Bucket, number: int, exchange: Exchange) -> Summed:
        places = self.places(bucket, number, exchange.seed).to(x.device)
        found = exchange.sum(x[places], PLAIN, (number, bucket.index), all_finite(x))
        total, unsent = torch.zeros_like(x), x.clone()
        total[places] = found.total
        unsent[places] = 0.0
        return Summed(total, unsent, found.late[:0], slice(0, 0), found.finite)

    def bytes_sent(self, bucket: Bucket, number: int, rank: int, size: int) -> int:
        return bytes_sent(PLAIN, self._count(bucket, number), rank, size)

    def _count(self, bucket: Bucket, number: int) -> int:
        return count(ratio_at(self._ratio, self._warmup, number), bucket.stop - bucket.start)
