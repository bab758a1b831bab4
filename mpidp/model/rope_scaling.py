"""Parses model.rope_scaling, a scaling of rotary positions for contexts longer than those of the original training. Pure,
without torch.

| text | frequency of a pair of dimensions |
|---|---|
| linear:FACTOR | divided by FACTOR (position interpolation, Chen 2023) |
| llama3:FACTOR,LOW,HIGH,ORIGINAL | if low, divided by FACTOR; if high, kept; else interpolated (Llama 3.1) |
| yarn:FACTOR,ORIGINAL,FAST,SLOW,ATTENTION,TRUNCATE | if low, divided by FACTOR; if high, kept; else interpolated (Peng 2023) |
| longrope:ORIGINAL,ATTENTION,S1,...,Sn,L1,...,Ln | pair i is divided by Si, or by Li if seq_len > ORIGINAL (Ding 2024) |

ORIGINAL is the context length of the original training. In llama3, a frequency is low if its wavelength is above ORIGINAL /
LOW, and high if its wavelength is below ORIGINAL / HIGH. In yarn, these limits are ORIGINAL / SLOW and ORIGINAL / FAST.
TRUNCATE=1 rounds the limits to whole dimensions. The last four numbers of yarn may be omitted. Their defaults are FAST=32,
SLOW=1, ATTENTION=0 and TRUNCATE=1. ATTENTION=0 stands for 0.1 ln(FACTOR) + 1. In yarn and longrope, cos and sin are multiplied
by ATTENTION. In longrope, n is half the number of rotated dimensions. mpidp chooses between S and L by model.seq_len. The
library transformers chooses by the length of each input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FORMS = (
    "of the form 'linear:FACTOR', 'llama3:FACTOR,LOW,HIGH,ORIGINAL', 'yarn:FACTOR,ORIGINAL[,FAST,SLOW,ATTENTION,TRUNCATE]' or "
    "'longrope:ORIGINAL,ATTENTION,S1,...,Sn,L1,...,Ln'. An example is 'llama3:8,1,4,8192'"
)
COUNTS = {"linear": (1, 1), "llama3": (4, 4), "yarn": (2, 6), "longrope": (4, 2**16)}  # fewest and most numbers of each kind


class RopeScaling(NamedTuple):
    """A rotary scaling. Fields that its kind does not use have their defaults."""

    kind: str
    factor: float = 1.0
    low: float = 1.0  # llama3: low frequencies have wavelengths above original / low. yarn: SLOW
    high: float = 32.0  # llama3: high frequencies have wavelengths below original / high. yarn: FAST
    original: float = 1.0  # context length of the original training
    attention: float = 1.0  # cos and sin are multiplied by this factor
    truncate: bool = True  # yarn: TRUNCATE
    short: tuple[float, ...] = ()  # longrope: S1, ..., Sn
    long: tuple[float, ...] = ()  # longrope: L1, ..., Ln


def rope_scaling(text: str) -> RopeScaling | None:
    """Return the scaling that `text` describes. The table at the beginning of this file has the forms of `text`. Return None for
    "". Raises ValueError if the text is invalid. Pure."""
    if not text:
        return None
    kind, _, rest = text.partition(":")
    fewest, most = COUNTS.get(kind, (0, 0))
    try:
        numbers = tuple(map(float, rest.split(",")))
        if not fewest <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
            raise ValueError
        found = _made(kind, numbers)
    except ValueError:
        raise ValueError(f"{text!r} must be {FORMS}") from None
    return found


def _made(kind: str, numbers: tuple[float, ...]) -> RopeScaling:
    """Return a scaling of this kind. numbers: the numbers of its text, in order. Raises ValueError if a number is outside its
    limits."""
    if kind == "linear":
        found, fits = RopeScaling(kind, numbers[0]), True
    elif kind == "llama3":
        found = RopeScaling(kind, numbers[0], numbers[1], numbers[2], numbers[3])
        fits = 0 < found.low < found.high
    elif kind == "yarn":
        factor, original, fast, slow, attention, truncate = (*numbers, *(32.0, 1.0, 0.0, 1.0)[len(numbers) - 2 :])
        attention = attention or 0.1 * math.log(max(1.0, factor)) + 1.0
        found = RopeScaling(kind, factor, slow, fast, original, attention, truncate != 0)
        fits = 0 < slow < fast and truncate in (0, 1)
    else:
        half = (len(numbers) - 2) // 2
        short, long = numbers[2 : 2 + half], numbers[2 + half :]
        found = RopeScaling(kind, original=numbers[0], attention=numbers[1], short=short, long=long)
        fits = len(numbers) % 2 == 0 and min(numbers) > 0
    if not fits or found.factor < 1 or found.original < 1 or found.attention <= 0:
        raise ValueError
    return found
