#!/bin/sh
# streaming: load_state_dict() is ignored if the data loader was already started in this process.
#
# Versions: mosaicml-streaming 0.13.0, torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11.
#
# What a good engineer would guess: after load_state_dict(), the next iteration starts at the saved position, whatever was read before,
# as with torchdata's StatefulDataLoader. Otherwise load_state_dict() raises an error.
#
# Behaviour: the start of an iteration increments a counter of epochs, which is kept in shared memory. A loaded state whose epoch is smaller
# than this counter is taken for an old one, and is ignored without a warning. So a state of epoch 0 has no effect after one batch was read.
# The iteration then returns all samples of epoch 1.
#
# Consequence: a program that reads one batch to determine the shapes, and then loads a checkpoint of the first epoch, trains on the first
# samples again and skips none. If a program goes back to a checkpoint of the same epoch in the same process, for example after a loss
# of NaN, the data do not go back: the rest of the epoch is lost.
#
# Output seen:
#   mosaicml-streaming 0.13.0, state: epoch 0, sample 4
#   new loader: 4 5 6 7 8 9 10 11
#   loader that read one batch before: 0 1 2 3 4 5 6 7 8 9 10 11
#   the loader itself, two batches later: 0 1 2 3 4 5 6 7 8 9 10 11
# Exit status: 0 if the state is still ignored, 1 if the behaviour changed.
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

import transformers.feature_extraction_utils  # noqa: F401 (before the empty torchvision)

for name, inside in (
    ("torchvision", {}), ("torchvision.datasets", {"VisionDataset": object}), ("torchvision.transforms", {}),
    ("torchvision.transforms.functional", {"to_tensor": None}),
):  # streaming imports torchvision for data sets of images, which are not used here
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(inside)

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402

with MDSWriter(out="data", columns={"number": "int"}) as writer:
    for number in range(12):
        writer.write({"number": number})


def loader(name):
    """Return a loader of batches of 2 for a copy of the data."""
    shutil.copytree("data", name)
    return StreamingDataLoader(StreamingDataset(local=name, batch_size=2), batch_size=2)


def numbers(one):
    return [number for batch in one for number in batch["number"].tolist()]


first = loader("first")
batches = iter(first)
next(batches), next(batches)
state = first.state_dict()
next(batches)
found = {}
fresh = loader("fresh")
fresh.load_state_dict(state)
found["new loader"] = numbers(fresh)
peeked = loader("peeked")
next(iter(peeked))
peeked.load_state_dict(state)
found["loader that read one batch before"] = numbers(peeked)
first.load_state_dict(state)
found["the loader itself, two batches later"] = numbers(first)
version = importlib.metadata.version("mosaicml-streaming")
print(f"mosaicml-streaming {version}, state: epoch {state['epoch']}, sample {state['sample_in_epoch']}")
for name, read in found.items():
    print(f"{name}:", *read)
if list(found.values()) != [list(range(4, 12)), list(range(12)), list(range(12))]:
    sys.exit("changed: the loaders start at another sample")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
