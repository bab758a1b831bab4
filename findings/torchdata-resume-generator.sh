#!/bin/sh
# torchdata: after a resume, StatefulDataLoader without workers shuffles the next epoch in another order.
#
# Versions: torchdata 0.11.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: state_dict() and load_state_dict() are there for exact resumption. So a resumed loader gives the rest
# of the epoch and the same later epochs as a loader that was never stopped. The number of workers does not matter.
#
# Behaviour: with shuffle=True, a generator and num_workers=0, the rest of the epoch is right, but the next epochs have other orders. If
# the state is saved at the end of an epoch, the whole continuation differs. With 2 workers, or without a generator (then torch's
# global seed is used), the continuation is the same. The order of epoch 1 also depends on whether there are workers. In torch's own
# DataLoader, it does not.
#
# Consequence: a run that was interrupted once sees other batches than a run that was not, although every state was saved. The loss
# curves differ, and the run cannot be repeated.
#
# Output seen:
#   torchdata 0.11.0, 6 rows, the same generator seed; the loader is saved after 2 rows of epoch 2
#   without workers: rest of epoch 2 the same: True, epoch 3 the same: False
#   2 workers: rest of epoch 2 the same: True, epoch 3 the same: True
#   order of epoch 1 without workers and with 2 workers the same: False
# Exit status: 0 if the resumed loader still differs, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchdata==0.11.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys
import warnings

import torch

warnings.simplefilter("ignore")
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402


def loader(workers):
    return StatefulDataLoader(list(range(6)), shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(0))


def epoch(batches):
    return [int(batch) for batch in batches]


def compare(workers):
    """Return epoch 1, and whether a resumed loader gives the rest of epoch 2 and epoch 3 of one that was not stopped."""
    whole = loader(workers)
    epochs = [epoch(whole) for _ in range(3)]
    stopped = loader(workers)
    epoch(stopped)
    batches = iter(stopped)
    next(batches), next(batches)
    resumed = loader(workers)
    resumed.load_state_dict(stopped.state_dict())
    return epochs[0], epoch(resumed) == epochs[1][2:], epoch(resumed) == epochs[2]


if __name__ == "__main__":
    version = importlib.metadata.version("torchdata")
    print(f"torchdata {version}, 6 rows, the same generator seed; the loader is saved after 2 rows of epoch 2")
    found = {workers: compare(workers) for workers in (0, 2)}
    for workers, (_, rest, later) in found.items():
        print(f"{f'{workers} workers' if workers else 'without workers'}: rest of epoch 2 the same: {rest}, epoch 3 the same: {later}")
    same = found[0][0] == found[2][0]
    print(f"order of epoch 1 without workers and with 2 workers the same: {same}")
    if found[0][1:] + found[2][1:] + (same,) != (True, False, True, True, False):
        sys.exit("changed: another set of resumed loaders continues exactly")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
