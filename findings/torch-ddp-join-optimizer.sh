#!/bin/sh
# DistributedDataParallel.join: after an epoch with uneven inputs, ranks train different weights, because optimizer states differ.
#
# Version: torch 2.13.0 (+cpu build, x86-64, gloo), Python 3.11.
#
# What a good engineer would guess: join() is made for ranks with different numbers of batches. Its documentation says that no further
# changes are needed, and that the model is the same on all ranks afterwards. So training can go on with the next epoch.
#
# Behaviour: join() broadcasts the parameters and the buffers at the end, but not the state of the optimizer. A rank that ran out of
# batches made fewer steps, so its momentum (SGD), or its moments and step counter (AdamW), differ from those of the other ranks. In the
# next epoch, each rank updates its own weights with the same gradient, but with another state. Weights differ from the first step on.
#
# Consequence: from the second epoch on, a rank computes its gradient for other weights than the other ranks. At the end of each epoch,
# one rank's weights replace all others, so a check after the epoch finds equal weights. SGD without momentum has no state and is right.
#
# Output seen:
#   torch 2.13.0+cpu, DDP on 2 ranks with 3 and 6 batches an epoch: largest difference of the weights between the ranks
#   SGD:               epoch 1, steps 1 to 3: 0.0000, after epoch 1: 0.0000, epoch 2, steps 1 to 3: 0.0000, after epoch 2: 0.0000
#   SGD with momentum: epoch 1, steps 1 to 3: 0.0000, after epoch 1: 0.0000, epoch 2, steps 1 to 3: 0.0153, after epoch 2: 0.0000
#   AdamW:             epoch 1, steps 1 to 3: 0.0000, after epoch 1: 0.0000, epoch 2, steps 1 to 3: 0.0220, after epoch 2: 0.0000
# Exit status: 0 if the weights still differ, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def run(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(4, 1))
        optimizer, weights = make(model.parameters()), []
        data = torch.Generator().manual_seed(rank)
        for epoch in range(2):
            with model.join():
                for _ in range(3 + 3 * rank):
                    optimizer.zero_grad()
                    model(torch.randn(8, 4, generator=data)).square().mean().backward()
                    optimizer.step()
                    weights.append((epoch, model.module.weight.detach().clone()))
            weights.append(("end of", epoch, model.module.weight.detach().clone()))
        results[name, rank] = [(*where, weight.tolist()) for *where, weight in weights]
    dist.barrier()
    dist.destroy_process_group()


def differences(first, second):
    """Return the largest difference of the weights: in the first 3 steps of both epochs, and after both epochs."""
    found = {}
    for key in ((0,), (1,), ("end of", 0), ("end of", 1)):
        pairs = zip(*[[torch.tensor(one[-1]) for one in rank if tuple(one[:-1]) == key][:3] for rank in (first, second)])
        found[key] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    print(f"torch {torch.__version__}, DDP on 2 ranks with 3 and 6 batches an epoch: largest difference of the weights between the ranks")
    right = {}
    for name in OPTIMIZERS:
        found = differences(results[name, 0], results[name, 1])
        right[name] = found[(1,)] == 0
        print(f"{name + ':':18} epoch 1, steps 1 to 3: {found[(0,)]:.4f}, after epoch 1: {found['end of', 0]:.4f}, "
              f"epoch 2, steps 1 to 3: {found[(1,)]:.4f}, after epoch 2: {found['end of', 1]:.4f}")
        if found[(0,)] or found["end of", 0] or found["end of", 1]:
            sys.exit("changed: weights differ elsewhere")
    if not right["SGD"] or right["SGD with momentum"] or right["AdamW"]:
        sys.exit("changed: join() treats the optimizers otherwise")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder"
