#!/bin/sh
# On the CPU, the bfloat16 gradient of an embedding stops growing: 1000 gradients of 1 for one token have the sum 256.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.
#
# What a good engineer would guess: torch adds bfloat16 values in float32 and rounds the sum once, as sum() and matrix products do.
# So the sum of 1000 ones is 1000.
#
# Behaviour: the backward pass of embedding adds each gradient to the bfloat16 row of the weight. At 256, adding 1 changes nothing,
# because the next bfloat16 is 258. The gradients of x[index] and of layer_norm's bias behave in the same way (with 1 thread).
# scatter_add_ on the same values gives 1000. With float16, the sum stops at 2048.
#
# Consequence: the gradient of a frequent token can be too small, and the error grows with the number of tokens in the batch. An
# embedding whose weight is float32 has the right gradient.
#
# Output seen:
#   torch 2.13.0+cpu: 1000 gradients of 1 in bfloat16
#   sum: 1000
#   linear, bias: 1000
#   scatter_add_: 1000
#   embedding: 256
#   x[index]: 256
#   layer_norm, bias: 256
# Exit status: 0 if the sums are still wrong, 1 if the behaviour changed.
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
COUNT, WIDTH = 1000, 8
same = torch.zeros(COUNT, dtype=torch.long)


def gradient(compute, *size):
    """Return one element of the gradient of sum(compute(x)) for x of zeros."""
    x = torch.zeros(size, dtype=torch.bfloat16, requires_grad=True)
    output = compute(x)
    output.backward(torch.ones_like(output))
    return x.grad.flatten()[0].item()


ones = torch.ones(COUNT, WIDTH, dtype=torch.bfloat16)
found = {
    "sum": ones[:, 0].sum().item(),
    "linear, bias": gradient(lambda bias: F.linear(ones, torch.zeros(4, WIDTH, dtype=torch.bfloat16), bias), 4),
    "scatter_add_": torch.zeros(4, dtype=torch.bfloat16).scatter_add_(0, same, ones[:, 0])[0].item(),
    "embedding": gradient(lambda weight: F.embedding(same, weight), 4, WIDTH),
    "x[index]": gradient(lambda x: x[same], 4),
    "layer_norm, bias": gradient(lambda bias: F.layer_norm(ones, (WIDTH,), None, bias), WIDTH),
}
print(f"torch {torch.__version__}: {COUNT} gradients of 1 in bfloat16")
for name, value in found.items():
    print(f"{name}: {value:.0f}")
if list(found.values()) != [1000.0] * 3 + [256.0] * 3:
    sys.exit("changed: other sums are right")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
