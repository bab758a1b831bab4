#!/bin/sh
# On an AMD CPU, the bits of a float32 matrix product of width 24 or 72 depend on the number of threads. Width 16, 32, 64 and 96 do not.
#
# Version: torch 2.13.0 (+cpu build, x86-64, with MKL), Python 3.11. Seen on an AMD EPYC with AVX-512 only. On a CPU of another vendor
# or without AVX-512, the script prints "skipped".
#
# What a good engineer would guess: MKL divides the rows or columns of the result among threads. So each element is one sum on one
# thread, and its bits do not depend on torch.set_num_threads.
#
# Behaviour: a 512x24 matrix times a 24x24 matrix gives other bits with 3 threads than with 1 or 2. With width 72, the bits change at 4
# threads. Intel's Developer Guide for oneMKL ("Reproducibility Conditions") asks for a fixed number of threads, or for strict mode,
# but does not say which sizes are affected. With MKL_CBWR=AVX2,STRICT or MKL_CBWR=COMPATIBLE, no product differed.
#
# Consequence: a test of reproducibility on a small model passes if its widths are powers of 2. A model with a width of 24 or 72 per
# head or per rank then gives other weights with another number of threads.
#
# Output seen:
#   torch 2.13.0+cpu, elements of a product (512 rows) that differ from 1 thread, with 2, 3 and 4 threads
#   width 16: 0 0 0
#   width 24: 0 2453 2453
#   width 32: 0 0 0
#   width 64: 0 0 0
#   width 72: 0 0 2893
#   width 96: 0 0 0
#   MKL_CBWR=AVX2,STRICT: no element differs
# Exit status: 0 if products of width 24 or 72 still depend on the threads, or if skipped; 1 if the behaviour changed.
set -eu
grep -q AuthenticAMD /proc/cpuinfo && grep -q avx512f /proc/cpuinfo || { echo "skipped: this CPU is not from AMD, or has no AVX-512"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch

if len(sys.argv) == 1:
    print(f"torch {torch.__version__}, elements of a product (512 rows) that differ from 1 thread, with 2, 3 and 4 threads")
generator, found = torch.Generator().manual_seed(0), {}
for width in (16, 24, 32, 64, 72, 96):
    left, right = (torch.randn(rows, width, generator=generator) for rows in (512, width))
    products = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        products.append(left @ right)
    found[width] = [int((product != products[0]).sum()) for product in products[1:]]
    if len(sys.argv) == 1:
        print(f"width {width}:", *found[width])
if len(sys.argv) > 1:
    sys.exit(int(any(map(any, found.values()))))
if not any(found[24] + found[72]) or any(found[16] + found[32] + found[64] + found[96]):
    sys.exit("changed: another set of widths depends on the threads")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
MKL_CBWR=AVX2,STRICT "$folder/env/bin/python" "$folder/program.py" strict || { echo "changed: products differ in strict mode, too"; exit 1; }
echo "MKL_CBWR=AVX2,STRICT: no element differs"
