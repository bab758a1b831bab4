#!/bin/sh
# On the CPU, fully_shard (FSDP2) and reset_parameters() give every rank the same shard: rows of a weight repeat.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.
#
# What a good engineer would guess: a DTensor behaves as one tensor. So initialization with the same seed on all ranks gives different
# rows on different ranks, or raises an error if a device is not supported.
#
# Behaviour: DTensor has a generator for distributed random numbers only on devices such as GPUs. On the CPU, each rank draws its
# shard from its own default generator. After torch.manual_seed(0) on all ranks, all shards of a parameter are equal. Dropout of a
# DTensor uses equal masks. There is a warning: "DTensor random operators may not have complete support on cpu device mesh". (With
# CPUOffloadPolicy on GPUs, pytorch/pytorch issue 196562 reports equal values without a warning.)
#
# Consequence: a model starts with repeated rows, so its matrices have a lower rank. Shapes, means and standard deviations are as
# usual, so a summary of the weights does not show the error. It does not occur with another seed on each rank.
#
# Output seen:
#   torch 2.13.0+cpu, 2 ranks, Linear(3, 4) after fully_shard, to_empty, manual_seed(0) and reset_parameters
#   rank of the weight: 2, rows 0 and 1 equal rows 2 and 3: True
#   the same layer without fully_shard: rank of the weight: 3
#   dropout mask of a tensor of ones, rows 0 and 1 equal rows 2 and 3: True
# Exit status: 0 if the rows still repeat, 1 if the behaviour changed.
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh


def run(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 4)
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    weight = layer.weight.full_tensor().detach()
    torch.manual_seed(0)
    mask = torch.nn.functional.dropout(distribute_tensor(torch.ones(4, 64), mesh, [Shard(0)])).full_tensor()
    if rank == 0:
        results.update(weight=weight.tolist(), mask=mask.tolist())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    weight, mask = torch.tensor(results["weight"]), torch.tensor(results["mask"])
    torch.manual_seed(0)
    alone = torch.nn.Linear(3, 4).weight.detach()
    same = [torch.equal(one[:2], one[2:]) for one in (weight, mask)]
    ranks = [int(torch.linalg.matrix_rank(one)) for one in (weight, alone)]
    print(f"torch {torch.__version__}, 2 ranks, Linear(3, 4) after fully_shard, to_empty, manual_seed(0) and reset_parameters")
    print(f"rank of the weight: {ranks[0]}, rows 0 and 1 equal rows 2 and 3: {same[0]}")
    print(f"the same layer without fully_shard: rank of the weight: {ranks[1]}")
    print(f"dropout mask of a tensor of ones, rows 0 and 1 equal rows 2 and 3: {same[1]}")
    if same != [True, True] or ranks != [2, 3]:
        sys.exit("changed: the shards are different")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
