#!/bin/sh
# DistributedDataParallel averages only the first of two backward passes that follow two forward passes, without an error.
#
# Version: torch 2.13.0 (+cpu build, x86-64, gloo), Python 3.11.
#
# What a good engineer would guess: backward() averages the gradients over the ranks, unless it runs under no_sync(). So two losses can
# be computed first and get their backward passes afterwards, as in contrastive training or with two tasks. Or DDP raises an error.
#
# Behaviour: the forward pass prepares the next backward pass. The first backward pass uses this up, so the second one adds the rank's own
# gradient without communication. This is also true for a second backward pass of the same loss (retain_graph=True). The gradients, and
# after the optimizer's step the weights, differ between the ranks. pytorch/pytorch issue 47260 reports this and is open.
#
# Consequence: model replicas diverge silently. One backward pass of the sum of the losses, or forward and backward in turn, is right.
#
# Output seen:
#   torch 2.13.0+cpu, DDP on 2 ranks: gradient of one weight. Inputs are 1 and 10 on rank 0, 3 and 30 on rank 1
#   forward, backward, forward, backward:      rank 0: 22.0, rank 1: 22.0
#   forward, forward, one backward of the sum: rank 0: 22.0, rank 1: 22.0
#   forward, forward, backward, backward:      rank 0: 12.0, rank 1: 32.0
#   forward, backward twice (retain_graph):    rank 0: 33.0, rank 1: 55.0
# Exit status: 0 if the gradients still differ, 1 if the behaviour changed.
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


def turns(model, x, y):
    model(x).sum().backward()
    model(y).sum().backward()


def one_sum(model, x, y):
    (model(x).sum() + model(y).sum()).backward()


def two_losses(model, x, y):
    first, second = model(x).sum(), model(y).sum()
    first.backward()
    second.backward()


def same_loss(model, x, y):
    loss = model(x).sum() + model(y).sum()
    loss.backward(retain_graph=True)
    loss.backward()


WAYS = {
    "forward, backward, forward, backward": turns, "forward, forward, one backward of the sum": one_sum,
    "forward, forward, backward, backward": two_losses, "forward, backward twice (retain_graph)": same_loss,
}


def run(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    x, y = torch.full((1, 2), 1.0 + 2 * rank), torch.full((1, 2), 10.0 + 20 * rank)
    for name, way in WAYS.items():
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1, bias=False)))
        torch.nn.init.ones_(model.module[1].weight)
        way(model, x, y)
        results[name, rank] = model.module[0].weight.grad[0, 0].item()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    print(f"torch {torch.__version__}, DDP on 2 ranks: gradient of one weight. Inputs are 1 and 10 on rank 0, 3 and 30 on rank 1")
    equal = []
    for name in WAYS:
        first, second = results[name, 0], results[name, 1]
        equal.append(first == second)
        print(f"{name + ':':42} rank 0: {first}, rank 1: {second}")
    if equal != [True, True, False, False]:
        sys.exit("changed: other ways are averaged")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder"
