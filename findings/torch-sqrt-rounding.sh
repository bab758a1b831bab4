#!/bin/sh
# torch.sqrt on the CPU is not correctly rounded, even for float64.
#
# Version: torch 2.13.0 (+cpu build, x86-64, with MKL), Python 3.11.7. Seen on an AMD EPYC with AVX-512.
#
# What a good engineer would guess: IEEE 754 requires that sqrt is correctly rounded, and x86 has instructions that round correctly
# (sqrtsd, vsqrtpd). So torch.sqrt, math.sqrt and numpy.sqrt return the same bits for every float32 and float64.
#
# Behaviour: for about 1.3% of float64 values and 17% of float32 values between 0.001 and 3, the result of torch.sqrt is not the
# nearest float. The result of numpy.sqrt was always the nearest float; this was checked with exact fractions. math.sqrt was right for
# the one value below. In a separate check, the result for a value depended neither on its position in the tensor nor on alignment.
# ATEN_CPU_CAPABILITY=default, avx2 and avx512 gave the same counts. The probable cause, which is not proven, is that torch calls MKL's
# vector math library. This library guarantees an error below one unit in the last place, but not correct rounding. We do not know
# whether the same happens on other CPUs.
#
# Consequence: if a program computes the same root with torch.sqrt and with math.sqrt, the bits can differ.
#
# Output seen:
#   torch 2.13.0+cpu MKL True AVX512
#   value 1.400332652719972
#   torch.sqrt 1.1833565197014686
#   math.sqrt  1.1833565197014684
#   torch.float64 of 20000 roots not nearest: torch.sqrt 266  numpy.sqrt 0
#   torch.float32 of 20000 roots not nearest: torch.sqrt 3366  numpy.sqrt 0
# Exit status: 0 if torch.sqrt still differs, 1 if the behaviour changed or if the CPU does not show it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import math
import sys
from fractions import Fraction

import numpy as np
import torch


def is_nearest(root, value, below, above):
    """Whether root is the float nearest to sqrt(value); below, above: its neighbours. Exact rational arithmetic."""
    low, high = (Fraction(root) + Fraction(below)) / 2, (Fraction(root) + Fraction(above)) / 2
    return low * low <= Fraction(value) <= high * high


def wrong(roots, values):
    """Count the roots that are not the nearest float; 1-d numpy arrays."""
    kind = roots.dtype.type
    return sum(
        not is_nearest(float(r), float(v), float(np.nextafter(r, kind(0))), float(np.nextafter(r, kind(np.inf))))
        for r, v in zip(roots, values)
    )


print("torch", torch.__version__, "MKL", torch.backends.mkl.is_available(), torch.backends.cpu.get_cpu_capability())
x = 1.400332652719972
print("value", x)
print("torch.sqrt", float(torch.tensor(x, dtype=torch.float64).sqrt()))
print("math.sqrt ", math.sqrt(x))
differ = {}
for dtype in (torch.float64, torch.float32):
    values = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3 + 1e-3
    differ[dtype] = wrong(values.sqrt().numpy(), values.numpy())
    by_numpy = wrong(np.sqrt(values.numpy()), values.numpy())
    print(dtype, "of 20000 roots not nearest: torch.sqrt", differ[dtype], " numpy.sqrt", by_numpy)
if not all(differ.values()):
    sys.exit("changed: torch.sqrt is correctly rounded here")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
