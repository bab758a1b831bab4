#!/bin/sh
# torch.distributed.checkpoint: in the consolidated safetensors files of HuggingFaceStorageWriter, parameters without dimensions are 0.
#
# Versions: torch 2.13.0 (+cpu build, x86-64), safetensors 0.8.0, Python 3.11.
#
# What a good engineer would guess: the consolidated files contain the same values as the files of the ranks, whatever the shapes.
#
# Behaviour: the consolidation treats an empty list of dimensions as an empty tensor, and writes nothing. The file was filled with zeros
# before. So each parameter of shape () is 0 in the consolidated file. Shape, dtype and name are right, and the file is valid. Parameters of
# shape (1,) are right. The files of the ranks in the folder `sharded` are right, too. There is no error and no warning.
#
# Consequence: CLIP and related models keep logit_scale as a parameter of shape (). After training, the exported model computes with
# exp(0) = 1 instead of about 100. Learned temperatures and gates are lost in the same way. A resume from the checkpoint of the ranks is
# right, so the error appears only in the exported model.
#
# Output seen:
#   torch 2.13.0+cpu, safetensors 0.8.0: logit_scale of shape (), gate of shape (1,)
#   file of the rank: logit_scale 4.5, gate 4.5, weight [0.5, 0.5, 0.5]
#   consolidated file: logit_scale 0.0, gate 4.5, weight [0.5, 0.5, 0.5]
# Exit status: 0 if the values are still 0, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

state = {"weight": torch.full((2, 3), 0.5), "logit_scale": torch.tensor(4.5), "gate": torch.tensor([4.5])}
writer = dcp.HuggingFaceStorageWriter("checkpoint", save_distributed=True, enable_consolidation=True)
dcp.save(state, storage_writer=writer, no_dist=True)
found = {
    "file of the rank": load_file("checkpoint/sharded/shard-00001-model-00001-of-00001.safetensors"),
    "consolidated file": load_file("checkpoint/model-00001-of-00001.safetensors"),
}
print(f"torch {torch.__version__}, safetensors {importlib.metadata.version('safetensors')}: logit_scale of shape (), gate of shape (1,)")
for name, tensors in found.items():
    print(f"{name}: logit_scale {tensors['logit_scale'].item()}, gate {tensors['gate'].item()}, weight {tensors['weight'][0].tolist()}")
wrong = {**state, "logit_scale": torch.tensor(0.0)}
if not all(
    torch.equal(tensors[name], right[name]) for tensors, right in zip(found.values(), (state, wrong)) for name in state
):
    sys.exit("changed: other values are in the files")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
