#!/bin/sh
# FSDP2: zero_grad does not discard gradients that were accumulated without synchronization. They come back in the next backward pass.
#
# Version: torch 2.13.0 (+cpu build, x86-64, gloo), Python 3.11.
#
# What a good engineer would guess: after optimizer.zero_grad() or model.zero_grad(), no gradient of an earlier batch is left, as with
# DistributedDataParallel and no_sync(). So a program can drop a batch whose loss is nan, or the last, incomplete group of an epoch.
#
# Behaviour: with set_requires_gradient_sync(False), the gradient of a batch stays in the unsharded parameter inside FSDP. The
# parameters that the model and the optimizer know are the shards, whose .grad is None. zero_grad() sees only these. The next backward
# pass with synchronization adds the kept gradient.
#
# Consequence: a dropped batch is not dropped. If its gradient was nan, the gradient of the next step is nan, too, without an error or a
# warning.
#
# Output seen:
#   torch 2.13.0+cpu, 2 ranks: a dropped batch without synchronization, zero_grad(), then a batch of ones (right: 1)
#   DDP,   dropped batch of 100.0: .grad set before zero_grad(), gradient [1.0, 1.0, 1.0, 1.0]
#   DDP,   dropped batch of nan:   .grad set before zero_grad(), gradient [1.0, 1.0, 1.0, 1.0]
#   FSDP2, dropped batch of 100.0: .grad None before zero_grad(), gradient [101.0, 101.0, 101.0, 101.0]
#   FSDP2, dropped batch of nan:   .grad None before zero_grad(), gradient [nan, nan, nan, nan]
# Exit status: 0 if the gradient still comes back, 1 if the behaviour changed.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def gradient(kind, dropped):
    """Return the gradient of the weights after a dropped batch, zero_grad() and a batch of ones."""
    model = torch.nn.Linear(2, 2, bias=False)
    model = DistributedDataParallel(model) if kind == "DDP" else fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad, good = torch.full((1, 2), dropped), torch.ones(1, 2)
    if kind == "DDP":
        with model.no_sync():
            model(bad).sum().backward()
    else:
        model.set_requires_gradient_sync(False)
        model(bad).sum().backward()
        model.set_requires_gradient_sync(True)
    left = [parameter.grad is not None for parameter in model.parameters()]
    optimizer.zero_grad()
    model.zero_grad()
    model(good).sum().backward()
    found = next(model.parameters()).grad
    return any(left), (found.full_tensor() if kind == "FSDP2" else found).flatten().tolist()


def run(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    for kind in ("DDP", "FSDP2"):
        for dropped in (100.0, float("nan")):
            results[kind, str(dropped), rank] = gradient(kind, dropped)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    print(f"torch {torch.__version__}, 2 ranks: a dropped batch without synchronization, zero_grad(), then a batch of ones (right: 1)")
    for kind in ("DDP", "FSDP2"):
        for dropped in ("100.0", "nan"):
            seen, found = results[kind, dropped, 0]
            state = "set" if seen else "None"
            print(f"{kind + ',':6} dropped batch of {dropped + ':':6} .grad {state} before zero_grad(), gradient {found}")
    right = [results[kind, "100.0", 0][1] == [1.0] * 4 for kind in ("DDP", "FSDP2")]
    if right != [True, False]:
        sys.exit("changed: zero_grad() treats FSDP2 otherwise")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder"
