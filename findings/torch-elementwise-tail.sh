#!/bin/sh
# On the CPU, the bits of silu, sigmoid, softplus and the fused AdamW step depend on the position of a value in its tensor.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11. Seen on an AMD EPYC with AVX-512.
#
# What a good engineer would guess: an elementwise operation gives the same bits for the same value, at any position, in a tensor of
# any length, and with any number of threads. This is true for torch.exp, torch.tanh and the default AdamW (foreach).
#
# Behaviour: a kernel computes whole vectors with vector instructions, and the remaining elements with scalar code. The two round
# differently. Each thread has its own remaining elements, so elements in the middle of a long tensor depend on the number of threads.
# gelu's gradient, mish, elu and exp2 behave in the same way, and rsqrt of bfloat16. With ATEN_CPU_CAPABILITY=default, which uses no
# AVX, all results were equal. A change is proposed in pytorch/pytorch pull request 197018.
#
# Consequence: if a flat tensor of parameters or activations is divided among ranks, the bits of the results depend on the number of
# ranks, although nothing is summed. With pieces whose length is a multiple of 32, the results were equal.
#
# Output seen:
#   torch 2.13.0+cpu AVX512, 131072 elements: number of elements that differ if computed in pieces
#   silu: pieces of 1007: 87, pieces of 1024: 0
#   sigmoid: pieces of 1007: 84, pieces of 1024: 0
#   softplus: pieces of 1007: 298, pieces of 1024: 0
#   exp: pieces of 1007: 0, pieces of 1024: 0
#   tanh: pieces of 1007: 0, pieces of 1024: 0
#   AdamW, fused: pieces of 1007: 2, pieces of 1024: 0
#   AdamW, foreach: pieces of 1007: 0, pieces of 1024: 0
#   softplus of 384093 elements, 1 and 3 threads: 8 differ
# Exit status: 0 if results still depend on the position, 1 if the behaviour changed or if the CPU does not show it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
values, gradients = torch.randn(131072, generator=generator), torch.randn(3, 131072, generator=generator)


def adamw(pieces, **kind):
    """Return the parameters after three steps, if they are divided into pieces of this length."""
    parameters = [torch.nn.Parameter(piece.clone()) for piece in values.split(pieces)]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, **kind)
    for gradient in gradients:
        for parameter, piece in zip(parameters, gradient.split(pieces)):
            parameter.grad = piece.clone()
        optimizer.step()
    return torch.cat([parameter.detach() for parameter in parameters])


print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability() + ", 131072 elements: number of elements that differ if computed in pieces")
ways = {one.__name__: (lambda n, one=one: torch.cat([one(piece.clone()) for piece in values.split(n)]))
        for one in (F.silu, torch.sigmoid, F.softplus, torch.exp, torch.tanh)}
ways |= {"AdamW, " + kind: (lambda n, kind=kind: adamw(n, **{kind: True})) for kind in ("fused", "foreach")}
differ = {}
for name, way in ways.items():
    whole = way(131072)
    differ[name], even = (int((way(length) != whole).sum()) for length in (1007, 1024))
    print(f"{name}: pieces of 1007: {differ[name]}, pieces of 1024: {even}")
    if even:
        sys.exit("changed: pieces of 1024 elements give other results")
long = torch.randn(384093, generator=generator)
alone = F.softplus(long)
torch.set_num_threads(3)
by_threads = int((F.softplus(long) != alone).sum())
print(f"softplus of 384093 elements, 1 and 3 threads: {by_threads} differ")
if not (differ["silu"] and differ["AdamW, fused"] and by_threads) or differ["exp"] or differ["AdamW, foreach"]:
    sys.exit("changed: another set of operations depends on the position")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
