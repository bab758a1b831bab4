#!/bin/sh
# On a CPU without AVX-512, a step of torch.optim.Muon takes tens of times as long as the same arithmetic in float32.
#
# Versions: torch 2.13.0 (CPU), Python 3.11, x86-64. DNNL_MAX_CPU_ISA=AVX2 makes a CPU with AVX-512 behave like one without.
#
# What a good engineer would guess: torch.optim.Muon iterates in bfloat16, because this is fast. A CPU that cannot multiply in
# bfloat16 converts the numbers to float32, so the step costs at most about twice as much as in float32.
#
# Behaviour: oneDNN multiplies bfloat16 matrices only on CPUs with AVX-512. On all others torch uses a loop of its own, which is not
# a blocked matrix product: a product of two 512 x 512 matrices takes about 25 times as long as in float32. torch does not report this.
#
# Consequence: on many laptops and on servers with AVX2 only, nearly all the time of a training step with Muon is spent in its
# update, although the matrices are small. The same five iterations in float32 give nearly the same update.
#
# Output seen (AMD EPYC with AVX2, one thread, beside other work):
#   product 512 x 512: float32 24.8 ms, bfloat16 656 ms; addmm: float32 14.3 ms, bfloat16 631 ms
#   torch.optim.Muon, one step, one 512 x 512 matrix: 7090 ms; the same iterations in float32: 259 ms
# Exit status: 0 if Muon's step takes more than 5 times as long as the iterations in float32, 1 if not, 2 on another kind of CPU.
set -eu
[ "$(uname -m)" = x86_64 ] || { echo "skipped: not an x86-64 CPU"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import statistics
import sys
import time

import torch

torch.set_num_threads(1)
SIZE, STEPS, A, B, C = 512, 5, 3.4445, -4.7750, 2.0315


def milliseconds(work, repeats):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def iterate(x):
    x = x / x.norm()
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


x = torch.randn(SIZE, SIZE)
half = x.bfloat16()
mm, mm16 = (milliseconds(lambda a=a: a @ a, 5) for a in (x, half))
addmm, addmm16 = (milliseconds(lambda a=a: torch.addmm(a, a, a, beta=B), 3) for a in (x, half))
print(f"product {SIZE} x {SIZE}: float32 {mm:.1f} ms, bfloat16 {mm16:.0f} ms; addmm: float32 {addmm:.1f} ms, bfloat16 {addmm16:.0f} ms")
parameter = torch.nn.Parameter(x.clone())
parameter.grad = torch.randn(SIZE, SIZE)
muon = torch.optim.Muon([parameter])
step = milliseconds(muon.step, 3)
plain = milliseconds(lambda: iterate(x), 3)
print(f"torch.optim.Muon, one step, one {SIZE} x {SIZE} matrix: {step:.0f} ms; the same iterations in float32: {plain:.0f} ms")
if step < 5 * plain:
    sys.exit("changed: Muon's step is not much slower than float32")
PROGRAM
DNNL_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 "$folder/env/bin/python" "$folder/program.py"
