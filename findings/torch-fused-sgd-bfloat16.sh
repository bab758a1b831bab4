#!/bin/sh
# On the CPU, torch.optim.SGD with fused=True does not update most elements of a bfloat16 or float16 parameter.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11. Seen on an AMD EPYC with AVX-512.
#
# What a good engineer would guess: fused=True changes the speed and the rounding, but not the update. PyTorch's documentation lists
# bfloat16 and float16 as supported by the fused implementations.
#
# Behaviour: the kernel does not write the parameter for the elements that fill a whole vector (16 elements with AVX-512). Only the
# rest at the end of the tensor is updated. There is no error and no warning. float32 is right. This is pytorch/pytorch issue 191763,
# which was closed after version 2.13.0 by pull request 192545.
#
# Consequence: a model with bfloat16 weights does not learn, except for the last elements of some tensors.
#
# Output seen:
#   torch 2.13.0+cpu: elements of 1000 that one step changed
#   torch.float32: fused 1000, not fused 1000
#   torch.bfloat16: fused 8, not fused 1000
#   torch.float16: fused 8, not fused 1000
# Exit status: 0 if elements are still not updated, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch


def changed(dtype, fused):
    """Return how many of 1000 ones a step of size 0.5 along a gradient of ones changed."""
    parameter = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.5, fused=fused, foreach=False).step()
    return int((parameter != 1).sum())


print(f"torch {torch.__version__}: elements of 1000 that one step changed")
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    found[dtype] = changed(dtype, True), changed(dtype, False)
    print(f"{dtype}: fused {found[dtype][0]}, not fused {found[dtype][1]}")
if found[torch.float32] != (1000, 1000) or any(found[dtype][0] > 100 or found[dtype][1] != 1000 for dtype in (torch.bfloat16, torch.float16)):
    sys.exit("changed: all elements are updated")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
