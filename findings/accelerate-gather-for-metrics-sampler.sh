#!/bin/sh
# accelerate's gather_for_metrics drops samples if the sampler does not visit the whole dataset, also in one process.
#
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: gather_for_metrics removes the samples that accelerate added to fill the last batch. In one process,
# accelerate adds none, so gather_for_metrics returns its input.
#
# Behaviour: in the last batch, gather_for_metrics keeps len(dataset) % (batch size * processes) samples. It computes this from the
# dataset and not from the sampler. A SubsetRandomSampler, a WeightedRandomSampler with num_samples, or a batch sampler with
# drop_last=True visits another number of samples, so correct samples of the last batch are dropped. accelerate's pull request 2048
# repaired this only for DataLoader(drop_last=True).
#
# Consequence: validation metrics on a sampled part of a dataset miss samples, without an error or a warning. A Subset of the dataset, in
# place of the sampler, is right.
#
# Output seen:
#   accelerate 1.15.0, 1 process, 10 samples, batches of 4
#   all 10 samples:                 10 samples in the batches, 10 gathered
#   Subset of 8:                    8 samples in the batches, 8 gathered
#   SubsetRandomSampler of 8:       8 samples in the batches, 6 gathered
#   WeightedRandomSampler, 8 draws: 8 samples in the batches, 6 gathered
#   BatchSampler with drop_last:    8 samples in the batches, 6 gathered
# Exit status: 0 if samples are still dropped, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import sys

import accelerate
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset, SubsetRandomSampler, WeightedRandomSampler

data, chosen = list(range(10)), list(range(8))
LOADERS = {
    "all 10 samples": DataLoader(data, batch_size=4),
    "Subset of 8": DataLoader(Subset(data, chosen), batch_size=4),
    "SubsetRandomSampler of 8": DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(chosen)),
    "WeightedRandomSampler, 8 draws": DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 8)),
    "BatchSampler with drop_last": DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, drop_last=True)),
}
accelerator = accelerate.Accelerator(cpu=True)
print(f"accelerate {accelerate.__version__}, {accelerator.num_processes} process, 10 samples, batches of 4")
right = {}
for name, loader in LOADERS.items():
    seen, gathered = 0, 0
    for batch in accelerator.prepare(loader):
        seen += len(batch)
        gathered += len(accelerator.gather_for_metrics(batch))
    right[name] = seen == gathered
    print(f"{name + ':':31} {seen} samples in the batches, {gathered} gathered")
if list(right.values()) != [True, True, False, False, False]:
    sys.exit("changed: gather_for_metrics counts otherwise")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
