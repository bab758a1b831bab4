"""Codes encode float32 values in fewer bytes, and decode them. They use only torch, on the device of the values.

| code | bytes per value | encoded value |
|---|---|---|
| plain | 4 | the value |
| bf16 | 2 | the value, rounded to 8 bits of significand |
| fp16 | 2 | a float16 multiple of a power of two, which the block stores once (11 bits of significand) |
| int8, int4 | 1, 1/2 | a multiple of 1/127 (1/7) of the block's largest size, stochastically rounded (QSGD, Alistarh 2017) |
| int2 | 1/4 | 0, or the sign times the mean absolute value of the block's large values (ternary weight networks, Li 2016) |
| onebit | 1/8 | the sign times the block's mean absolute value (Seide 2014; Karimireddy 2019, section 5) |

A block is BLOCK consecutive values. Its largest size is its largest absolute value. All codes except plain and bf16 also store
a scale per block, in 4 bytes. The error of a code is the sum of squares of x - decoded, divided by the sum of squares of x.
The expected error must be below 1. Otherwise error feedback would make residuals grow without bound (Karimireddy 2019,
assumption A). If n values are rounded stochastically to multiples of 1/k of their largest size, the expected error is at most
(sqrt(1 + (n - 1) / k^2) - 1) / 2. For a block of 256 values, this bound is 0.75 with int4 (k = 7). With int2 (k = 1), it would
be 7.5. Therefore int2 does not round stochastically. The error of int2 is 1 - m s^2 / sum(x^2), where s is the mean absolute
value of the m large values. For normally distributed values, the error of int2 is 0.19 and the error of onebit is 0.36. These
statements hold for all absolute values from the smallest normal float32 to the largest float32. Every decoded value is finite.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149  # the smallest float32 above 0, which is denormal


def seed_of(*numbers: int) -> int:
    """Return a random seed that depends only on the numbers and their order. Pure."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def uniform(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Return uniform random numbers in [0, 1). They depend only on `seed`, `shape` and the type of device. Independent."""
    return torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def pack(values: Tensor, bits: int) -> Tensor:
    """Return the values packed into bytes, uint8 (ceil(n * bits / 8),). values: uint8 (n,), each below 2^bits. bits: 1, 2, 4 or
    8. Pure."""
    rows = F.pad(values, (0, -values.numel() % (8 // bits))).view(8 // bits, -1)  # values of one byte are far apart
    packed = rows[0].clone()
    for i, row in enumerate(rows[1:], 1):
        packed |= row << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the values that were packed by pack(), uint8 (n,). Pure."""
    if bits == 8:
        return packed
    return torch.stack([(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]).view(-1)[:n]


def blocks(x: Tensor) -> Tensor:
    """Return `x`, (n,), as rows of BLOCK values. The result is (ceil(n / BLOCK), BLOCK). The last row is padded with zeros.
    Pure."""
    return (F.pad(x, (0, -x.numel() % BLOCK)) if x.numel() % BLOCK else x).view(-1, BLOCK)


def mean_size(rows: Tensor) -> Tensor:
    """Return the mean absolute value of each row, (rows, 1). It does not overflow for finite values. Pure."""
    return (rows.abs() / rows.shape[1]).sum(1, keepdim=True)


class Code:
    """Base class of codes. The class itself is the code `plain`."""

    keeps_zeros = True  # whether 0 is decoded as 0

    def num_bytes(self, n: int) -> int:
        """Return the number of bytes that n encoded values take. Pure."""
        return 4 * n

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        """Encode `x` into `wire`. x: float32 (n,), n > 0, all values finite. wire: uint8 (num_bytes(n),), aligned to 4 bytes.
        seed: the seed of stochastic rounding. Independent."""
        wire.view(torch.float32).copy_(x)

    def decode(self, wire: Tensor, n: int) -> Tensor:
        """Return the n values encoded in `wire`, float32 (n,). Independent."""
        return wire.view(torch.float32).clone()


class BFloat16(Code):
    """Rounds values to the nearest bfloat16. |x - decoded| is at most the larger of 2^-8 |x| and half the smallest bfloat16 above
    0."""

    def num_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        largest = torch.finfo(torch.bfloat16).max
        wire.view(torch.bfloat16).copy_(x.clamp(-largest, largest))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        return wire.view(torch.bfloat16).float()


class Scaled(Code):
    """Base class of codes that store one scale per block, and each value as a multiple of the scale."""

    bits: int

    def num_bytes(self, n: int) -> int:
        return 4 * -(-n // BLOCK) + -(-n * self.bits // 8)

    def parts(self, wire: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return two views of `wire`: the scales, float32 (ceil(n / BLOCK), 1), and the encoded values, uint8. Pure."""
        cut = 4 * -(-n // BLOCK)
        return wire[:cut].view(torch.float32).view(-1, 1), wire[cut:]


class Float16(Scaled):
    """Stores values as float16 multiples of the scale. The scale is a power of two near m / 2^15, where m is the block's largest
    absolute value. No multiple overflows. |x - decoded| is at most the larger of 2^-11 |x| and 2^-39 m."""

    bits = 16
    largest = (2.0**15 - 2.0**4) * 2.0**113  # the largest float32 that is a float16 multiple of its scale

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x).clamp(-self.largest, self.largest)
        exponents = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent - 15
        scales.copy_(torch.ldexp(torch.ones_like(scales), exponents.clamp(min=-126)))
        rest.view(torch.float16).copy_((rows / scales).view(-1)[: x.numel()])

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(rest.view(torch.float16).float()).mul_(scales).view(-1)[:n]


class Integer(Scaled):
    """Rounds values to integer multiples of the scale, from -levels to levels. The rounding is stochastic and without bias. |x -
    decoded| <= scale."""

    def __init__(self, bits: int) -> None:
        """bits: the number of bits per value, 8 or 4."""
        self.bits = bits
        self.levels = 2 ** (bits - 1) - 1

    def scale(self, rows: Tensor) -> Tensor:
        """Return the scale of each block, (blocks, 1). rows: (blocks, BLOCK). No multiple of a scale overflows. Pure."""
        most = rows.abs().amax(1, keepdim=True)
        scales = (most / self.levels).clamp(SMALLEST, LARGEST / self.levels * (1 - 2.0**-23))
        return torch.where(most > 0, scales, 1.0)  # blocks of zeros get a normal scale, because computing with denormals is slow

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x)
        scales.copy_(self.scale(rows))
        steps = (rows / scales).add_(uniform(rows.shape, seed, x.device)).floor_().clamp_(-self.levels, self.levels)
        values = steps.view(-1)[: x.numel()].add_(2 ** (self.bits - 1)).to(torch.uint8)
        rest.copy_(pack(values, self.bits))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        steps = unpack(rest, self.bits, n).float().sub_(2 ** (self.bits - 1))
        return blocks(steps).mul_(scales).view(-1)[:n]


class Ternary(Scaled):
    """Encodes values as -s, 0 or s. A value is large if its absolute value is above 3/4 of the block's mean absolute value. Large
    values become -s or s, where s is the mean absolute value of the large values. Other values become 0."""

    bits = 2

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        rows = blocks(x)
        sizes = rows.abs()
        large = sizes > 0.75 * mean_size(rows)
        means = (sizes * large / large.sum(1, keepdim=True).clamp(min=1)).sum(1, keepdim=True)
        scales.copy_(means.clamp(max=LARGEST))
        rest.copy_(pack((rows.sign() * large + 1).view(-1)[: x.numel()].to(torch.uint8), 2))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(unpack(rest, 2, n).float().sub_(1)).mul_(scales).view(-1)[:n]


class OneBit(Scaled):
    """Encodes values as their signs. The sign of 0 is positive. A sign is decoded as plus or minus the mean absolute value of the
    block. In a block of n values, the sum of (x - decoded)^2 is sum(x^2) - n mean(|x|)^2."""

    bits = 1
    keeps_zeros = False

    def encode(self, x: Tensor, wire: Tensor, seed: int) -> None:
        scales, rest = self.parts(wire, x.numel())
        scales.copy_(mean_size(blocks(x)))
        if x.numel() % BLOCK:
            scales[-1] *= BLOCK / (x.numel() % BLOCK)
        scales.clamp_(max=LARGEST)
        rest.copy_(pack((x >= 0).to(torch.uint8), 1))

    def decode(self, wire: Tensor, n: int) -> Tensor:
        scales, rest = self.parts(wire, n)
        return blocks(unpack(rest, 1, n).float().mul_(2).sub_(1)).mul_(scales).view(-1)[:n]


PLAIN = Code()
CODES: dict[str, Code] = {
    "bf16": BFloat16(), "fp16": Float16(), "int8": Integer(8), "int4": Integer(4), "int2": Ternary(), "onebit": OneBit(),
}
