#!/bin/sh
# streaming: StreamingDataLoader counts the length of the first tensor of a batch as samples, so packed batches resume at a wrong sample.
#
# Versions: mosaicml-streaming 0.13.0, torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11.
#
# What a good engineer would guess: the loader knows its batch size and counts the samples that it took from the data set. The result of
# collate_fn does not matter.
#
# Behaviour: state_dict() contains the sum of len() of the first value of each batch. If collate_fn packs the samples into one row of
# shape (1, tokens), each batch counts as 1 sample. If it concatenates them to the shape (tokens,), each token counts as a sample. The
# order of the keys decides: with the lengths of the documents as the first value, the count is right. There is no warning.
#
# Consequence: with packing, a resumed run trains on old samples again, or skips samples that it never saw. The loss curve looks normal.
#
# Output seen:
#   mosaicml-streaming 0.13.0, first sample after 3 batches of 2 samples (right: 6)
#   lengths_first: 6
#   one_row: 3
#   flat: 12
# Exit status: 0 if the count is still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 pillow==13.0.0 requests==2.34.2 xxhash==4.1.0 \
    zstd==1.5.7.2 brotli==1.2.1 python-snappy==0.7.3 catalogue==2.0.10 filelock==4.2.11 tqdm==4.70.1
"$folder/env/bin/pip" install --quiet --no-deps mosaicml-streaming==0.13.0  # its other requirements are not used here
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import shutil
import sys
import types

import torch
import transformers.feature_extraction_utils  # noqa: F401 (before the empty torchvision)

for name, inside in (
    ("torchvision", {}), ("torchvision.datasets", {"VisionDataset": object}), ("torchvision.transforms", {}),
    ("torchvision.transforms.functional", {"to_tensor": None}),
):  # streaming imports torchvision for data sets of images, which are not used here
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(inside)

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402

with MDSWriter(out="data", columns={"number": "int"}) as writer:
    for number in range(24):
        writer.write({"number": number})


def tokens(samples):
    """Return two tokens for each sample."""
    return torch.tensor([sample["number"] for sample in samples]).repeat_interleave(2)


def lengths(samples):
    return torch.full((len(samples),), 2)


def one_row(samples):
    return {"tokens": tokens(samples)[None], "lengths": lengths(samples)}


def flat(samples):
    return {"tokens": tokens(samples), "lengths": lengths(samples)}


def lengths_first(samples):
    return {"lengths": lengths(samples), "tokens": tokens(samples)}


def resumed(collate):
    """Read 3 batches of 2 samples; return the first sample of a second loader that loads the state."""
    loaders = []
    for name in (f"{collate.__name__}-1", f"{collate.__name__}-2"):
        shutil.copytree("data", name)
        loaders.append(StreamingDataLoader(StreamingDataset(local=name, batch_size=2), batch_size=2, collate_fn=collate))
    batches = iter(loaders[0])
    for _ in range(3):
        next(batches)
    loaders[1].load_state_dict(loaders[0].state_dict())
    return next(iter(loaders[1]))["tokens"].flatten()[0].item()


print(f"mosaicml-streaming {importlib.metadata.version('mosaicml-streaming')}, first sample after 3 batches of 2 samples (right: 6)")
found = {collate.__name__: resumed(collate) for collate in (lengths_first, one_row, flat)}
for name, sample in found.items():
    print(f"{name}: {sample}")
if list(found.values()) != [6, 3, 12]:
    sys.exit("changed: the loaders resume at another sample")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
