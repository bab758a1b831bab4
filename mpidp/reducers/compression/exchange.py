"""A sum over ranks of which only codes travel, to the same bits on all ranks; and the family of methods that use it.

Every rank encodes its vector slice by slice and sends each slice to its owner, who decodes all and adds them in rank order in
float32, encodes the sum again and sends that to all. What either code did not say is known where it was said, so nothing is lost
(DoubleSqueeze, Tang 2019): over all ranks, the sum of x is total + the sum of unsent + the sum of late.

A slice on the wire is 4 bytes that say whether it is finite, then its code, filled up to a multiple of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.comm.buffers import bufv
from mpidp.comm.slices import slice_bounds
from mpidp.comm.transport import Messages
from mpidp.reducers.buckets import Bucket
from mpidp.reducers.compression.codes import Code, seed_of

HEADER = 4  # bytes


def wire_bytes(code: Code, n: int) -> int:
    """Of a slice of n values. Pure."""
    return HEADER + -(-code.num_bytes(n) // 4) * 4 if n else 0


def slice_bytes(code: Code, n: int, size: int) -> list[int]:
    """Of each of the slices into which n values are cut for size ranks. Pure."""
    bounds = slice_bounds(n, size)
    return [wire_bytes(code, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]


def bytes_sent(code: Code, n: int, rank: int, size: int) -> int:
    """By this rank for a sum of n values over size ranks: the others' slices, and its own to the others. Pure."""
    sizes = slice_bytes(code, n, size)
    return sum(sizes) - sizes[rank] + sizes[rank] * (size - 1)


def all_finite(x: Tensor) -> bool:
    """Independent."""
    return not x.numel() or all(bool(end.isfinite()) for end in torch.aminmax(x))


@dataclass
class Summed:
    """A sum of n values, as one rank sees it."""

    total: Tensor  # (n,), the same bits on all ranks
    unsent: Tensor  # (n,), of this rank's values, what it did not say
    late: Tensor  # of the sum that this rank made, what it did not say
    own: slice  # where that lies
    finite: bool  # the same on all ranks; if not, the tensors mean nothing


class Exchange:
    """Sums over the ranks of comm."""

    def __init__(self, comm: MPI.Intracomm, transport: Messages, wait: Callable[[MPI.Request], None], seed: int) -> None:
        """wait: for a request, as long as it takes. Independent."""
        self.comm, self.transport, self.wait, self.seed = comm, transport, wait, seed

    def sum(self, x: Tensor, code: Code, key: tuple[int, ...], finite: bool = True) -> Summed:
        """x: float32 (n,), n > 0, of each rank. key: of this sum, never the same again. finite: whether all is on which the worth
        of the sum depends. Collective over comm."""
        comm, transport = self.comm, self.transport
        rank, size = comm.rank, comm.size
        bounds = slice_bounds(x.numel(), size)
        spans = [slice(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
        sizes = slice_bytes(code, x.numel(), size)
        starts = [0, *accumulate(sizes)]
        own, mine = spans[rank], sizes[rank]
        n = own.stop - own.start

        finite = all_finite(x) and finite
        sent, unsent = self._bytes("sent", starts[-1], x.device), x.clone()
        for to, span in enumerate(spans):
            part = sent[starts[to] : starts[to + 1]]
            write(code, x[span], part, seed_of(self.seed, *key, 0, rank, to), finite)
            unsent[span] -= read(code, part, span.stop - span.start)[0]
        wire, taken = transport.load(sent, "sent"), transport.scratch("taken", size * mine, torch.uint8)
        sends = [0 if to == rank else length for to, length in enumerate(sizes)]
        takes = [0 if of == rank else mine for of in range(size)]
        self.wait(comm.Ialltoallv(bufv(wire, sends, starts[:-1]), bufv(taken, takes, [of * mine for of in range(size)])))
        transport.sent_bytes += sum(sends)

        parts = list(taken.to(x.device).view(size, mine))
        parts[rank] = sent[starts[rank] : starts[rank + 1]]
        made, finite = torch.zeros(n, device=x.device), True
        for part in parts:
            values, ok = read(code, part, n)
            made += values
            finite = finite and ok
        finite = finite and all_finite(made)

        told = self._bytes("told", starts[-1], x.device)
        part = told[starts[rank] : starts[rank + 1]]
        write(code, made, part, seed_of(self.seed, *key, 1, rank), finite)
        late = made - read(code, part, n)[0]
        wire = transport.load(told, "told")
        self.wait(comm.Iallgatherv(MPI.IN_PLACE, bufv(wire, sizes, starts[:-1])))
        transport.sent_bytes += mine * (size - 1)
        transport.store(wire, told)
        said = [read(code, told[starts[of] : starts[of + 1]], span.stop - span.start) for of, span in enumerate(spans)]
        return Summed(torch.cat([values for values, _ in said]), unsent, late, own, all(ok for _, ok in said))

    def _bytes(self, key: str, n: int, device: torch.device) -> Tensor:
        """uint8 (n,) where the values are; MPI's own memory where that is the same."""
        if device.type == "cpu":
            return self.transport.scratch(key, n, torch.uint8)
        return torch.empty(n, dtype=torch.uint8, device=device)


def write(code: Code, x: Tensor, wire: Tensor, seed: int, finite: bool) -> None:
    """A slice as it travels; where something is not finite, that and nothing else. Independent."""
    wire.zero_()
    if x.numel() and finite:
        wire[:HEADER].view(torch.int32).fill_(1)
        code.encode(x, wire[HEADER : HEADER + code.num_bytes(x.numel())], seed)


def read(code: Code, wire: Tensor, n: int) -> tuple[Tensor, bool]:
    """(its values (n,), is all finite?); zeros where not. Independent."""
    if n and bool(wire[:HEADER].view(torch.int32)):
        return code.decode(wire[HEADER : HEADER + code.num_bytes(n)], n), True
    return torch.zeros(n, device=wire.device), not n


class CompressionMethod:
    """How a bucket's sum is made of exchanges; this base: of one, by one code."""

    keeps_zeros = True  # is 0 on all ranks 0 in the sum?

    def __init__(self, code: Code) -> None:
        self._code = code
        self.keeps_zeros = code.keeps_zeros

    def code(self, number: int) -> Code:
        """For round number `number`, from 0. Pure."""
        return self._code

    def sum(self, x: Tensor, bucket: Bucket, number: int, exchange: Exchange) -> Summed:
        """x: float32 (n,), what this rank holds of the bucket, in round `number`. Collective over exchange.comm."""
        return exchange.sum(x, self.code(number), (number, bucket.index))

    def bytes_sent(self, bucket: Bucket, number: int, rank: int, size: int) -> int:
        """By this rank for one sum of the bucket. Pure."""
        return bytes_sent(self.code(number), bucket.stop - bucket.start, rank, size)

    def end_round(self, applied: bool) -> None:
        """What it learned in this round holds from here on, or is forgotten. Independent."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it goes on with, the same on all ranks; not to be changed by it later. Independent."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with that; from the beginning without. Independent."""
