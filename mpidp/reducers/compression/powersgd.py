"""PowerSGD (Vogels 2019) approximates the sum of the ranks' matrices by a product of two thin matrices, with one power iteration.

Rank i has the matrix M_i, (rows, cols). All ranks have the same Q, (cols, r). Algorithm 1 of the paper, with sums instead of
means, first computes S = (sum over ranks of M_i Q). P is an orthonormal basis of the columns of S. The algorithm then computes Q'
= (sum over ranks of M_i^T P). P Q'^T approximates the sum of all M_i. The next round uses Q' as its Q (warm start, section 4.2).
The residual of rank i is M_i - P (M_i^T P)^T. The sum of the residuals is (sum of M_i) - P Q'^T. Vectors are sent uncompressed. A
matrix that is not larger than P and Q together is also sent uncompressed.

Every rank computes P itself, from the same S. If ranks run on different types of CPUs, the bits of their results can differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mpidp.reducers.buckets import Bucket
from mpidp.reducers.compression.codes import PLAIN, seed_of
from mpidp.reducers.compression.exchange import CompressionMethod, Exchange, Summed, all_finite, bytes_sent


class PowerSGD(CompressionMethod):
    """Implements comm.compress=powersgd. rank: number of columns of the thin matrices (comm.rank). seed: random seed of the Q in
    the first round."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__(PLAIN)
        self.rank, self.seed = rank, seed
        self._applied_q: dict[str, Tensor] = {}  # Q of each parameter, after the last applied round
        self._round_q: dict[str, Tensor] = {}  # Q' of each parameter in this round

    def thin(self, shape: torch.Size) -> tuple[int, int, int]:
        """Return (rows, cols, r) of a parameter with this shape. rows, cols: the size of the parameter as a matrix. r: the number
        of columns of its thin matrices, or 0 if the parameter is sent uncompressed. Pure."""
        rows = shape[0] if len(shape) > 1 else 1
        cols = shape.numel() // rows if rows else 0
        r = min(self.rank, rows, cols)
        return rows, cols, r if r * (rows + cols) < rows * cols else 0

    def _matrices(self, bucket: Bucket) -> Iterator[tuple[str, slice, int, int, int]]:
        """For each compressed matrix of the bucket, yield (name, place in the bucket, rows, cols, r). See thin()."""
        for name, shape, offset in zip(bucket.names, bucket.shapes, bucket.offsets, strict=True):
            rows, cols, r = self.thin(shape)
            if r:
                yield name, slice(offset - bucket.start, offset - bucket.start + rows * cols), rows, cols, r

    def _others(self, bucket: Bucket) -> list[slice]:
        """Return the places in the bucket at which the uncompressed parameters are."""
        return [
            slice(offset - bucket.start, offset - bucket.start + shape.numel())
            for shape, offset in zip(bucket.shapes, bucket.offsets, strict=True) if not self.thin(shape)[2]
        ]

    def _start(self, name: str, cols: int, r: int) -> Tensor:
        previous = self._applied_q.get(name)
        if previous is not None and previous.shape == (cols, r):
            return previous
        generator = torch.Generator().manual_seed(seed_of(self.seed, zlib.crc32(name.encode())))
        return torch.randn(cols, r, generator=generator)  # on the CPU, so that the values do not depend on the device

    def sum(self, x: Tensor, bucket: Bucket, number: int, exchange: Exchange) -> Summed:
        matrices, others = list(self._matrices(bucket)), self._others(bucket)
        views = [x[place].view(rows, cols) for _, place, rows, cols, _ in matrices]
        starts = [self._start(name, cols, r).to(x.device) for name, _, _, cols, r in matrices]
        left = [m @ q for m, q in zip(views, starts, strict=True)]
        total, unsent = torch.zeros_like(x), x.clone()
        made = Summed(total, unsent, x[:0], slice(0, 0), True)

        values = torch.cat([part.reshape(-1) for part in left] + [x[place] for place in others])
        found = exchange.sum(values, PLAIN, (number, bucket.index, 0), all_finite(x))
        if not found.finite:
            made.finite = False
            return made
        parts = list(found.total.split([p.numel() for p in left] + [place.stop - place.start for place in others]))
        for place, part in zip(others, parts[len(left) :], strict=True):
            total[place], unsent[place] = part, 0.0
        if not matrices:
            return made

        bases = [torch.linalg.qr(part.view_as(p)).Q for part, p in zip(parts, left, strict=False)]
        right = [m.T @ p for m, p in zip(views, bases, strict=True)]
        found = exchange.sum(torch.cat([q.reshape(-1) for q in right]), PLAIN, (number, bucket.index, 1))
        if not found.finite:
            made.finite = False
            return made
        sums = found.total.split([q.numel() for q in right])
        for (name, place, _, _, _), p, q, both in zip(matrices, bases, right, sums, strict=True):
            self._round_q[name] = both.view_as(q).clone()
            total[place] = (p @ self._round_q[name].T).view(-1)
            unsent[place] -= (p @ q.T).view(-1)
        return made

    def bytes_sent(self, bucket: Bucket, number: int, rank: int, size: int) -> int:
        shapes = [(rows, cols, r) for _, _, rows, cols, r in self._matrices(bucket)]
        plain = sum(place.stop - place.start for place in self._others(bucket))
        first = bytes_sent(PLAIN, plain + sum(rows * r for rows, _, r in shapes), rank, size)
        return first + bytes_sent(PLAIN, sum(cols * r for _, cols, r in shapes), rank, size)

    def end_round(self, applied: bool) -> None:
        if applied:
            self._applied_q = self._applied_q | self._round_q
        self._round_q = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self._applied_q | self._round_q

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._applied_q, self._round_q = dict(state), {}
