#!/bin/sh
# accelerate: an evaluation that does not exhaust its loader changes after which batches the training updates the weights.
#
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: accumulate() counts the batches of the training. An evaluation on the first k batches of another
# prepared loader, between two training batches, does not change it.
#
# Behaviour: accumulate() asks whether the loader in use is at its end, and a loader stays "in use" until its generator is exhausted. So
# after `break`, or after itertools.islice, the evaluation loader counts as the loader in use until the end of the training epoch. If
# islice took exactly all batches, this loader is "at its end", so each training batch becomes an update of its own: accumulation is
# off. If fewer batches were taken, the end of the training loader is not seen: the last, shorter group is not an update, and its
# gradient goes into the next epoch. gather_for_metrics uses the same state.
#
# Consequence: evaluation during an epoch (zip(range(k), loader), islice, break) changes the number of updates, the size of their batches
# and the steps of the learning rate schedule, without an error or a warning.
#
# Output seen:
#   accelerate 1.15.0, accumulation over 4 of 10 batches, evaluation after batch 2: updates after batches
#   no evaluation:               [4, 8, 10]
#   all 3 batches, with for:     [4, 8, 10]
#   1 batch, with break:         [4, 8]
#   2 batches, with islice:      [4, 8]
#   all 3 batches, with islice:  [3, 4, 5, 6, 7, 8, 9, 10]
# Exit status: 0 if the evaluation still changes the updates, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import itertools
import sys

import accelerate
import torch
from torch.utils.data import DataLoader

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)


def updates(evaluate):
    """Return the numbers of the training batches after which the weight changed, in one epoch of 10 batches."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train, validation = DataLoader(torch.ones(10, 1)), DataLoader(torch.ones(3, 1))
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)
    accelerator.step, found = 0, []
    for number, batch in enumerate(train, 1):
        before = model.weight.item()
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
        if model.weight.item() != before:
            found.append(number)
        if number == 2:
            evaluate(validation)
    return found


def one_batch(loader):
    for _ in loader:
        break


WAYS = {
    "no evaluation": lambda loader: None,
    "all 3 batches, with for": lambda loader: [None for _ in loader],
    "1 batch, with break": one_batch,
    "2 batches, with islice": lambda loader: list(itertools.islice(loader, 2)),
    "all 3 batches, with islice": lambda loader: list(itertools.islice(loader, 3)),
}
print(f"accelerate {accelerate.__version__}, accumulation over 4 of 10 batches, evaluation after batch 2: updates after batches")
found = {}
for name, evaluate in WAYS.items():
    found[name] = updates(evaluate)
    print(f"{name + ':':28}", found[name])
if list(found.values()) != [[4, 8, 10], [4, 8, 10], [4, 8], [4, 8], list(range(3, 11))]:
    sys.exit("changed: other batches are updates")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
