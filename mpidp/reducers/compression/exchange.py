"""Sums encoded values over ranks, with the same bits on all ranks. This module also has the base class of compression methods.

Every rank encodes its vector slice by slice and sends each slice to the slice's owner. The owner decodes the slices that it
received, adds them in rank order in float32, encodes the sum and sends it to all ranks. Each rank keeps the errors of its own
encodings, so no part of the sum is lost (DoubleSqueeze, Tang 2019). Between the vectors and the fields of Summed, this
equation holds: (sum over ranks of the vectors) = total + (sum over ranks of `unsent` and `late`).

The wire format of a slice begins with a 4-byte integer, which is 1 if all values are finite, else 0. The encoded values follow.
They are padded to a multiple of 4 bytes.
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

HEADER = 4  # size in bytes of the integer before the encoded values


def wire_bytes(code: Code, n: int) -> int:
    """Return the number of bytes of a slice of n values in the wire format. Pure."""
    return HEADER + -(-code.num_bytes(n) // 4) * 4 if n else 0


def slice_bytes(code: Code, n: int, size: int) -> list[int]:
    """Return the number of bytes of each slice in the wire format, if n values are cut into one slice for each of `size` ranks.
    Pure."""
    bounds = slice_bounds(n, size)
    return [wire_bytes(code, high - low) for low, high in zip(bounds, bounds[1:], strict=False)]


def bytes_sent(code: Code, n: int, rank: int, size: int) -> int:
    """Return the number of bytes that `rank` sends for a sum of n values over `size` ranks. A rank sends slices to their owners,
    and the sum of its own slice to all other ranks. Pure."""
    sizes = slice_bytes(code, n, size)
    return sum(sizes) - sizes[rank] + sizes[rank] * (size - 1)


def all_finite(x: Tensor) -> bool:
    """Return whether all values of `x` are finite. Independent."""
    return not x.numel() or all(bool(end.isfinite()) for end in torch.aminmax(x))


@dataclass
class Summed:
    """The result of a sum on one rank. Every rank contributed a vector of n values."""

    total: Tensor  # (n,), the same bits on all ranks
    unsent: Tensor  # (n,), the encoding error of this rank's values
    late: Tensor  # the encoding error of the sum of this rank's slice
    own: slice  # the slice that this rank sums
    finite: bool  # whether all values are finite, the same on all ranks; if False, the tensors are meaningless


class Exchange:
    """Sums encoded vectors over the ranks of comm."""

    def __init__(self, comm: MPI.Intracomm, transport: Messages, wait: Callable[[MPI.Request], None], seed: int) -> None:
        """wait: a function that waits for an MPI request. seed: the seed of the random numbers of the codes. Independent."""
        self.comm, self.transport, self.wait, self.seed = comm, transport, wait, seed

    def sum(self, x: Tensor, code: Code, key: tuple[int, ...], finite: bool = True) -> Summed:
        """Sum `x` over the ranks. x: float32 (n,), n > 0. key: integers that identify this sum among all sums. They determine the
        random seeds. finite: False if `x` was computed from values that were not finite. Collective over comm."""
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
        wire, received = transport.load(sent, "sent"), transport.scratch("received", size * mine, torch.uint8)
        sends = [0 if to == rank else length for to, length in enumerate(sizes)]
        receives = [0 if of == rank else mine for of in range(size)]
        self.wait(comm.Ialltoallv(bufv(wire, sends, starts[:-1]), bufv(received, receives, [of * mine for of in range(size)])))
        transport.sent_bytes += sum(sends)

        parts = list(received.to(x.device).view(size, mine))
        parts[rank] = sent[starts[rank] : starts[rank + 1]]
        made, finite = torch.zeros(n, device=x.device), True
        for part in parts:
            values, ok = read(code, part, n)
            made += values
            finite = finite and ok
        finite = finite and all_finite(made)

        sums = self._bytes("sums", starts[-1], x.device)
        part = sums[starts[rank] : starts[rank + 1]]
        write(code, made, part, seed_of(self.seed, *key, 1, rank), finite)
        late = made - read(code, part, n)[0]
        wire = transport.load(sums, "sums")
        self.wait(comm.Iallgatherv(MPI.IN_PLACE, bufv(wire, sizes, starts[:-1])))
        transport.sent_bytes += mine * (size - 1)
        transport.store(wire, sums)
        decoded = [read(code, sums[starts[of] : starts[of + 1]], span.stop - span.start) for of, span in enumerate(spans)]
        return Summed(torch.cat([values for values, _ in decoded]), unsent, late, own, all(ok for _, ok in decoded))

    def _bytes(self, key: str, n: int, device: torch.device) -> Tensor:
        """Return an uninitialized uint8 tensor (n,) on `device`. On the CPU, it is the transport's buffer `key`, which MPI can
        send."""
        if device.type == "cpu":
            return self.transport.scratch(key, n, torch.uint8)
        return torch.empty(n, dtype=torch.uint8, device=device)


def write(code: Code, x: Tensor, wire: Tensor, seed: int, finite: bool) -> None:
    """Encode `x`, the values of a slice, into `wire`, in the wire format. If `finite` is False, fill `wire` with zeros.
    Independent."""
    wire.zero_()
    if x.numel() and finite:
        wire[:HEADER].view(torch.int32).fill_(1)
        code.encode(x, wire[HEADER : HEADER + code.num_bytes(x.numel())], seed)


def read(code: Code, wire: Tensor, n: int) -> tuple[Tensor, bool]:
    """Decode a slice of n values from the wire format. Return (values, of shape (n,); whether the values were finite before they
    were encoded). If they were not finite, the returned values are zeros. Independent."""
    if n and bool(wire[:HEADER].view(torch.int32)):
        return code.decode(wire[HEADER : HEADER + code.num_bytes(n)], n), True
    return torch.zeros(n, device=wire.device), not n


class CompressionMethod:
    """A method of comm.compress. It sums a bucket with one or more exchanges. This base class uses one exchange with one code."""

    keeps_zeros = True  # whether a value that is 0 on all ranks is 0 in the sum

    def __init__(self, code: Code) -> None:
        self._code = code
        self.keeps_zeros = code.keeps_zeros

    def code(self, number: int) -> Code:
        """Return the code (encoding) for round `number`, counted from 0. Pure."""
        return self._code

    def sum(self, x: Tensor, bucket: Bucket, number: int, exchange: Exchange) -> Summed:
        """Sum a bucket over the ranks in round `number`, counted from 0. x: this rank's values of the bucket, float32 (n,).
        Collective over exchange.comm."""
        return exchange.sum(x, self.code(number), (number, bucket.index))

    def bytes_sent(self, bucket: Bucket, number: int, rank: int, size: int) -> int:
        """Return the number of bytes that `rank` sends for the sum of the bucket in round `number` over `size` ranks. Pure."""
        return bytes_sent(self.code(number), bucket.stop - bucket.start, rank, size)

    def end_round(self, applied: bool) -> None:
        """End a round. applied: whether an update used the sums of the round. If not, restore the state from before the round.
        Independent."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors. They are the same on all ranks. Later rounds do not modify the returned tensors.
        Independent."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state that state_dict() returned. An empty state resets the method. Independent."""
