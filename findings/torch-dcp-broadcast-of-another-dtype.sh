#!/bin/sh
# torch.distributed.checkpoint: BroadcastingTorchSaveReader loads a float16 file wrongly into a bfloat16 model on all ranks but rank 0.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.
#
# What a good engineer would guess: the values are converted to the dtype of the model on all ranks, as load_state_dict() and the other
# readers do, or the reader reports that the dtypes differ.
#
# Behaviour: rank 0 reads the file and sends the tensor in the dtype of the file. The other ranks receive it into a tensor of the dtype of
# the model. So they interpret the bits of float16 numbers as bfloat16. Only rank 0 converts the values. Both dtypes have 2 bytes, so
# there is no error message.
#
# Consequence: a model that was saved in float16 and is trained on in bfloat16 has the right weights on rank 0 only. 1.0 becomes
# 0.0078125 on the other ranks. Programs that print or evaluate on rank 0 show nothing. The replicas differ from the first step.
#
# Output seen:
#   torch 2.13.0+cpu, gloo, 2 ranks: file of torch.float16 with [1.0, -0.5, 3.0]
#   rank 0, model of torch.float16: [1.0, -0.5, 3.0]
#   rank 0, model of torch.bfloat16: [1.0, -0.5, 3.0]
#   rank 1, model of torch.float16: [1.0, -0.5, 3.0]
#   rank 1, model of torch.bfloat16: [0.0078125, -3.0517578125e-05, 32.0]
# Exit status: 0 if the other ranks still have wrong values, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.format_utils import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner

VALUES = [1.0, -0.5, 3.0]


def run(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        state = {"weight": torch.zeros(3, dtype=dtype)}
        reader, planner = BroadcastingTorchSaveReader(), DynamicMetaLoadPlanner()
        dcp.load(state, checkpoint_id=f"{path}/model.pt", storage_reader=reader, planner=planner)
        found[str(dtype)] = state["weight"].tolist()
    results[rank] = found
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.save({"weight": torch.tensor(VALUES, dtype=torch.float16)}, f"{sys.argv[1]}/model.pt")
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=2)
    print(f"torch {torch.__version__}, gloo, 2 ranks: file of torch.float16 with {VALUES}")
    for rank in range(2):
        for dtype, values in results[rank].items():
            print(f"rank {rank}, model of {dtype}: {values}")
    bits = torch.tensor(VALUES, dtype=torch.float16).view(torch.bfloat16).tolist()
    right = {"torch.float16": VALUES, "torch.bfloat16": VALUES}
    if results[0] != right or results[1] != {**right, "torch.bfloat16": bits}:
        sys.exit("changed: the ranks have other values")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
