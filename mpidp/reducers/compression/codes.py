"""Codes: a run of float32 values as fewer bytes, and back. Pure torch, on whatever device the values are.

| code | bytes a value | what is said of a value |
|---|---|---|
| plain | 4 | all |
| bf16 | 2 | its first 8 bits of significand |
| fp16 | 2 | its first 11, in units of a power of two a block |
| int8, int4 | 1, 1/2 | a multiple of a 127th, a 7th of the block's largest, rounded at random (QSGD, Alistarh 2017) |
| int2 | 1/4 | 0, or its sign and the mean of those that are large in the block (ternary weight networks, Li 2016) |
| onebit | 1/8 | its sign; the block's mean absolute value (Seide 2014; Karimireddy 2019, section 5) |

A scale is 4 bytes a block. What a code does not say of x has a smaller sum of squares than x itself (in the mean, where rounding
is random): else what is held back would grow without end under error feedback (Karimireddy 2019, assumption A). With the block's
largest of n values for the highest of k levels, it is at most (1 + sqrt(n)) / 2k - 1 of it: 0.21 for int4, but 7.5 for three
levels. So int2 does not round at random: it leaves 0.19 of the sum of squares of normal values, onebit 0.36, and less than all of
any: sum(x^2) - m s^2, where s is the mean of the m that are large.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
SMALL = 2.0**-126  # no scale is smaller: what is smaller than any of its multiples is not said


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of the numbers, and on their order. Pure."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def uniform(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) that repeat with the seed. Independent."""
    return torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def pack(values: Tensor, bits: int) -> Tensor:
    """uint8 values (n,) below 2^bits, 8 // bits a byte: (ceil(n bits / 8),). Pure."""
    rows = F.pad(values, (0, -values.numel() % (8 // bits))).view(8 // bits, -1)  # far neighbours share a byte: rows are long
    packed = rows[0].clone()
    for i, row in enumerate(rows[1:], 1):
        packed |= row << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """What pack was given: uint8 (n,). Pure."""
    if bits == 8:
        return packed
    return torch.stack([(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]).view(-1)[:n]


def blocks(x: Tensor) -> Tensor:
    """(n,) as rows of BLOCK, zeros at the end: (ceil(n / BLOCK), BLOCK). Pure."""
    return (F.pad(x, (0, -x.numel() % BLOCK)) if x.numel() % BLOCK else x).view(-1, BLOCK)


def mean_size(rows: Tensor) -> Tensor:
    """Mean absolute value of each row, (rows, 1), where a sum could overflow. Pure."""
    return (rows.abs() / rows.shape[1]).sum(1, keepdim=True)


class Code:
    """The family; this base is `plain`."""

    keeps_zeros = True  # is 0 said as it is?

    def num_bytes(self, n: int) -> int:
        """Of n values, whatever they are. Pure."""
        return 4 * n

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        """Say x, float32 (n,), n > 0, all finite, in wire, uint8 (num_bytes(n),) at a multiple of 4 bytes. seed: of what is
        random in it. Independent."""
        wire.view(torch.float32).copy_(x)

    def decode(self, wire: Tensor, n: int) -> Tensor:
        """What wire says: float32 (n,). Independent."""
        return wire.view(torch.float32).clone()


class BFloat16(Code):
    """Rounded to the nearest. |x - decoded| <= 2^-8 |x|, or half the smallest bfloat16."""

    def num_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        largest = torch.finfo(torch.bfloat16).max
        wire.view(torch.bfloat16).copy_(x.clamp(-largest, largest))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        return wire.view(torch.bfloat16).float()


class Scaled(Code):
    """A scale a block, then the block's values in its units."""

    bits: int

    def num_bytes(self, n: int) -> int:
        return 4 * -(-n // BLOCK) + -(-n * self.bits // 8)

    def parts(self, wire: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(scales, float32 (ceil(n / BLOCK), 1); the rest, uint8): views of wire. Pure."""
        cut = 4 * -(-n // BLOCK)
        return wire[:cut].view(torch.float32).view(-1, 1), wire[cut:]


class Float16(Scaled):
    """Units of a power of two near the block's largest / 2^15, so that nothing overflows: |x - decoded| <= 2^-11 |x|, or 2^-39
    of the block's largest."""

    bits = 16

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x)
        exponents = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent - 15
        scales.copy_(torch.ldexp(torch.ones_like(scales), exponents.clamp(min=-126)))
        rest.view(torch.float16).copy_((rows / scales).view(-1)[: x.numel()])

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(rest.view(torch.float16).float()).mul_(scales).view(-1)[:n]


class Integer(Scaled):
    """Multiples of the scale, from -levels to levels, rounded up or down at random with the mean of what is rounded.
    |x - decoded| <= scale."""

    def __init__(self, bits: int) -> None:
        """bits: 8 or 4."""
        self.bits = bits
        self.levels = 2 ** (bits - 1) - 1

    def scale(self, rows: Tensor) -> Tensor:
        """(blocks, BLOCK) -> (blocks, 1). Pure."""
        return rows.abs().amax(1, keepdim=True) / self.levels

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x)
        scales.copy_(self.scale(rows).clamp(min=SMALL))
        steps = (rows / scales).add_(uniform(rows.shape, seed, x.device)).floor_().clamp_(-self.levels, self.levels)
        values = steps.view(-1)[: x.numel()].add_(2 ** (self.bits - 1)).to(torch.uint8)
        rest.copy_(pack(values, self.bits))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        steps = unpack(rest, self.bits, n).float().sub_(2 ** (self.bits - 1))
        return blocks(steps).mul_(scales).view(-1)[:n]


class Ternary(Scaled):
    """-s, 0 or s: of those beyond 3/4 of the block's mean size (best for normal values) the sign, and their mean size s."""

    bits = 2

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x)
        sizes = rows.abs()
        large = sizes > 0.75 * mean_size(rows)
        scales.copy_((sizes * large / large.sum(1, keepdim=True).clamp(min=1)).sum(1, keepdim=True))
        rest.copy_(pack((rows.sign() * large + 1).view(-1)[: x.numel()].to(torch.uint8), 2))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(unpack(rest, 2, n).float().sub_(1)).mul_(scales).view(-1)[:n]


class OneBit(Scaled):
    """(|x - decoded|)^2 summed is sum(x^2) - n mean|x|^2, block by block. There is no 0: it is said as the mean."""

    bits = 1
    keeps_zeros = False

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        scales.copy_(mean_size(blocks(x)))
        if x.numel() % BLOCK:
            scales[-1] *= BLOCK / (x.numel() % BLOCK)
        rest.copy_(pack((x >= 0).to(torch.uint8), 1))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(unpack(rest, 1, n).float().mul_(2).sub_(1)).mul_(scales).view(-1)[:n]


PLAIN = Code()
CODES: dict[str, Code] = {
    "bf16": BFloat16(), "fp16": Float16(), "int8": Integer(8), "int4": Integer(4), "int2": Ternary(), "onebit": OneBit(),
}
