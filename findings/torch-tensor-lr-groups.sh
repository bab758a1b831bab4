#!/bin/sh
# torch: if the learning rate of an optimizer is a tensor, all parameter groups share this tensor, and schedulers set wrong rates.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11. torch.optim.AdamW with lr=torch.tensor(1.0) and two parameter groups.
#
# What a good engineer would guess: a tensor as learning rate changes no number. It avoids that torch.compile compiles the step again when
# the rate changes. Each parameter group has its own rate, as with a float.
#
# Behaviour: the optimizer puts the same tensor into each group. A scheduler writes the new rate of each group into the group's tensor,
# so the last group's rate holds for all groups: LambdaLR with one function per group, and OneCycleLR with one max_lr per group.
# ReduceLROnPlateau reads and writes the groups one after the other, so it reduces the rate once per group.
#
# Consequence: if only the embedding, or only the decayed weights, should have another rate, all parameters get the rate of the last
# group, without an error or a warning. A separate tensor in each group ({"params": ..., "lr": torch.tensor(1.0)}) avoids this.
#
# Output seen:
#   torch 2.13.0+cpu, AdamW, two groups: rates of the groups after each of 3 steps
#   LambdaLR, factors 1 and 0.1,      float:  [1.0, 0.1] [1.0, 0.1] [1.0, 0.1]
#   LambdaLR, factors 1 and 0.1,      tensor: [0.1, 0.1] [0.1, 0.1] [0.1, 0.1]
#   OneCycleLR, max_lr 1 and 0.1,     float:  [0.52, 0.052] [1.0, 0.1] [0.9505, 0.095]
#   OneCycleLR, max_lr 1 and 0.1,     tensor: [0.052, 0.052] [0.1, 0.1] [0.095, 0.095]
#   ReduceLROnPlateau, factor 0.1,    float:  [1.0, 1.0] [0.1, 0.1] [0.01, 0.01]
#   ReduceLROnPlateau, factor 0.1,    tensor: [1.0, 1.0] [0.01, 0.01] [0.0001, 0.0001]
# Exit status: 0 if the groups still share the tensor, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

SCHEDULERS = {
    "LambdaLR, factors 1 and 0.1,": lambda optimizer: LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.1]),
    "OneCycleLR, max_lr 1 and 0.1,": lambda optimizer: OneCycleLR(optimizer, [1.0, 0.1], total_steps=10),
    "ReduceLROnPlateau, factor 0.1,": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


def rates(make, lr):
    """Return the learning rates of both groups after each of three steps."""
    decayed, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [decayed]}, {"params": [other], "weight_decay": 0.0}], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(3):
        decayed.grad, other.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        found.append([round(float(group["lr"]), 4) for group in optimizer.param_groups])
    return found


print(f"torch {torch.__version__}, AdamW, two groups: rates of the groups after each of 3 steps")
same = []
for name, make in SCHEDULERS.items():
    found = {"float:": rates(make, 1.0), "tensor:": rates(make, torch.tensor(1.0))}
    for kind, one in found.items():
        print(f"{name:33} {kind:7}", *one)
    same.append(found["float:"] == found["tensor:"])
if any(same):
    sys.exit("changed: a scheduler sets the same rates for a tensor as for a float")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
