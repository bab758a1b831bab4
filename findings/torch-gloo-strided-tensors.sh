#!/bin/sh
# With the gloo backend, all_reduce and broadcast give wrong values for a tensor that is not contiguous, without an error.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.
#
# What a good engineer would guess: a collective operation rejects a tensor that is not contiguous, as the NCCL backend and gloo's
# send() do, or it gives the right values, as gloo's all_gather() does.
#
# Behaviour: all_reduce and broadcast use the first numel() elements in memory. For the columns 0, 2 and 4 of a matrix with 2 rows,
# they process all 6 columns of row 0 and nothing of row 1. So row 1 keeps its old values, and columns outside of the slice change.
# pytorch/pytorch issue 192920 reports this for broadcast, reduce and scatter.
#
# Consequence: if a rank sums a slice of a flat buffer with a stride, or broadcasts part of a matrix, training continues with wrong
# values. tensor.contiguous() makes a copy, which must be copied back after the operation.
#
# Output seen:
#   torch 2.13.0+cpu, gloo, 2 ranks, x[:, ::2] of a 2x6 matrix
#   all_reduce: [[3.0, 9.0, 15.0], [7.0, 9.0, 11.0]] (right: [[3.0, 9.0, 15.0], [21.0, 27.0, 33.0]])
#   broadcast on rank 1: [[1.0, 3.0, 5.0], [14.0, 18.0, 22.0]] (right: [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]])
#   all_gather: right
#   send: RuntimeError
# Exit status: 0 if the values are still wrong, 1 if the behaviour changed.
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

MATRIX = torch.arange(1.0, 13.0).reshape(2, 6)


def run(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    found = {}
    x = (MATRIX * (rank + 1))[:, ::2]
    dist.all_reduce(x)
    found["all_reduce"] = x.tolist()
    x = (MATRIX * (rank + 1))[:, ::2]
    dist.broadcast(x, src=0)
    found["broadcast"] = x.tolist()
    x = (MATRIX * (rank + 1))[:, ::2]
    gathered = [torch.zeros(2, 3) for _ in range(2)]
    dist.all_gather(gathered, x)
    found["all_gather"] = [one.tolist() for one in gathered]
    try:
        dist.send(x, 1 - rank)
        found["send"] = "sent"
    except RuntimeError:
        found["send"] = "RuntimeError"
    results[rank] = found
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    right = MATRIX[:, ::2]
    total, copied, gathered, sent = (
        results[0]["all_reduce"], results[1]["broadcast"], results[0]["all_gather"], results[0]["send"]
    )
    print(f"torch {torch.__version__}, gloo, 2 ranks, x[:, ::2] of a 2x6 matrix")
    print(f"all_reduce: {total} (right: {(3 * right).tolist()})")
    print(f"broadcast on rank 1: {copied} (right: {right.tolist()})")
    is_right = gathered == [right.tolist(), (2 * right).tolist()]
    print("all_gather:", "right" if is_right else gathered)
    print("send:", sent)
    if total == (3 * right).tolist() or copied == right.tolist() or not is_right or sent != "RuntimeError":
        sys.exit("changed: other operations are right")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder"
