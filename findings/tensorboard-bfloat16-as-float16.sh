#!/bin/sh
# torch.utils.tensorboard: a bfloat16 scalar is converted to float16, so a value above 65504 is logged as inf, and a small one as 0.
#
# Versions: torch 2.13.0 (CPU), tensorboard 2.21.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: add_scalar(name, tensor) logs the value that tensor.item() returns, in the float32 of the event file. A
# bfloat16 value fits into float32 without a rounding.
#
# Behaviour: numpy has no bfloat16, so SummaryWriter converts such tensors to float16 first. float16 has a smaller range: values above 65504
# become inf, values below about 3e-8 become 0, and values below 6e-5 lose digits. There is no warning. add_scalar(name, tensor.item())
# is right. add_histogram() and the other functions use the same conversion.
#
# Consequence: with a model in bfloat16, a norm of the gradients, a sum of losses, or a logit above 65504 is shown as inf, although training
# is healthy. A gradient norm of 1e-8, which is a sign of trouble, is shown as 0.
#
# Output seen:
#   torch 2.13.0+cpu, tensorboard 2.21.0, bfloat16 values 2.5 7.014e+04 1.001e-08
#   add_scalar of tensor: 2.5 inf 0
#   add_scalar of tensor.float(): 2.5 7.014e+04 1.001e-08
#   add_scalar of tensor.item(): 2.5 7.014e+04 1.001e-08
# Exit status: 0 if the values are still converted to float16, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 tensorboard==2.21.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import tensorboard
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

VALUES = torch.tensor([2.5, 70144.0, 1e-8], dtype=torch.bfloat16)
WAYS = {"tensor": lambda value: value, "tensor.float()": lambda value: value.float(), "tensor.item()": lambda value: value.item()}

with SummaryWriter("events") as writer:
    for name, convert in WAYS.items():
        for step, value in enumerate(VALUES):
            writer.add_scalar(name, convert(value), step)
events = EventAccumulator("events")
events.Reload()
found = {name: [event.value for event in events.Scalars(name)] for name in WAYS}
right = VALUES.tolist()
print(f"torch {torch.__version__}, tensorboard {tensorboard.__version__}, bfloat16 values", *(f"{value:.4g}" for value in right))
for name, values in found.items():
    print(f"add_scalar of {name}:", *(f"{value:.4g}" for value in values))
if found != {"tensor": [2.5, float("inf"), 0.0], "tensor.float()": right, "tensor.item()": right}:
    sys.exit("changed: other values are in the event file")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
