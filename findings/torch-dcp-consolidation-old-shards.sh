#!/bin/sh
# torch.distributed.checkpoint: the consolidated file of HuggingFaceStorageWriter contains old weights from an earlier save to the folder.
#
# Versions: torch 2.13.0 (+cpu build, x86-64), safetensors 0.8.0, Python 3.11.
#
# What a good engineer would guess: a save to the same folder replaces the earlier one, as with the other writers of
# torch.distributed.checkpoint, which read only the files that their metadata name.
#
# Behaviour: the consolidation reads all *.safetensors files in the folder `sharded`. If the second save writes other file names, because
# fqn_to_index_mapping or the number of ranks changed, the files of the first save stay there. Each tensor is then taken from the new and
# from the old file, and the one that the file system lists last wins. There is no error and no warning.
#
# Consequence: a final export to the folder of an earlier export contains weights of another step. Which tensors are old depends on the file
# system. The model loads and generates text. The folder must be emptied before each save.
#
# Output seen:
#   torch 2.13.0+cpu, safetensors 0.8.0: steps whose weights are in the last export
#   saves with (1, 1) files: steps [2]
#   saves with (16, 1) files: steps [1, 2]
#   saves with (1, 16, 1) files: steps [2, 3]
# Exit status: 0 if old weights still come back, 1 if the behaviour changed.
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

NAMES = [f"layers.{number}.weight" for number in range(16)]


def save(folder, step, files):
    """Save 16 tensors with the value `step`, distributed over this many files."""
    mapping = {name: 1 + number % files for number, name in enumerate(NAMES)}
    writer = dcp.HuggingFaceStorageWriter(folder, mapping, save_distributed=True, enable_consolidation=True)
    dcp.save({name: torch.full((2, 2), float(step)) for name in NAMES}, storage_writer=writer, no_dist=True)


def export(folder, numbers_of_files):
    """Save steps 1, 2, ... with these numbers of files, then return the steps in the consolidated file of the last one."""
    for step, files in enumerate(numbers_of_files, 1):
        save(folder, step, files)
    last = load_file(f"{folder}/model-00001-of-{numbers_of_files[-1]:05}.safetensors")
    return sorted({int(last[name][0, 0]) for name in last})


print(f"torch {torch.__version__}, safetensors {importlib.metadata.version('safetensors')}: steps whose weights are in the last export")
found = {files: export("-".join(map(str, files)), files) for files in ((1, 1), (16, 1), (1, 16, 1))}
for files, steps in found.items():
    print(f"saves with {files} files: steps {steps}")
if found[1, 1] != [2] or (found[16, 1] == [2] and found[1, 16, 1] == [3]):  # the file system decides which of the two is wrong
    sys.exit("changed: old weights do not come back")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
