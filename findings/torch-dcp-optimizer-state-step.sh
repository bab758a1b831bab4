#!/bin/sh
# torch.distributed.checkpoint: reading the state of a new AdamW optimizer counts as one step, so the first update is 26% smaller.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11. One process, without torch.distributed.init_process_group.
#
# What a good engineer would guess: get_optimizer_state_dict only reads. A program that writes a checkpoint before the first step
# trains as a program that does not write it.
#
# Behaviour: if the optimizer has no state yet, the function makes a step with gradients of zero and a learning rate of zero, to create
# the state. The parameters stay the same, but Adam's counter `step` is 1 afterwards, in the optimizer and in the returned state. The
# first update then uses the bias correction of step 2. For SGD with momentum and dampening, the first gradient is dampened, too.
# This is pytorch/pytorch issue 164929. pytorch/torchtitan's pull request 4382 describes the same for its own copy of the function.
#
# Consequence: a checkpoint at step 0 changes every later weight of the run. Two runs with the same seed differ if only one of them
# writes such a checkpoint, or loads one.
#
# Output seen:
#   torch 2.13.0+cpu, AdamW, learning rate 0.01, gradient 1: changes of the weight in the first three steps
#   nothing read:                    0.01000 0.01000 0.01000, counter 3
#   state read before the first step: 0.00744 0.00858 0.00910, counter 4
#   state read after the first step:  0.01000 0.01000 0.01000, counter 3
# Exit status: 0 if reading the state still changes the updates, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def train(read_at):
    """Return the change of the weight in each of three steps, and the final counter."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    weights = [model.weight.item()]
    for step in range(3):
        if step == read_at:
            get_optimizer_state_dict(model, optimizer)
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        weights.append(model.weight.item())
    return [before - after for before, after in zip(weights, weights[1:])], int(optimizer.state[model.weight]["step"])


print(f"torch {torch.__version__}, AdamW, learning rate 0.01, gradient 1: changes of the weight in the first three steps")
found = {}
for name, read_at in (("nothing read:", None), ("state read before the first step:", 0), ("state read after the first step:", 1)):
    found[read_at] = train(read_at)
    print(f"{name:<33}", " ".join(f"{change:.5f}" for change in found[read_at][0]) + f", counter {found[read_at][1]}")
if [found[key][1] for key in (None, 0, 1)] != [3, 4, 3] or abs(found[0][0][0] - 0.00744) > 0.0001:
    sys.exit("changed: reading the state does not count as a step")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
