#!/bin/sh
# webdataset: shardshuffle and shuffle(seed=...) give the same order in every epoch.
#
# Versions: webdataset 1.0.2, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: each iteration over a shuffled dataset has another order, as with torch's DataLoader. A seed makes the
# sequence of orders repeatable between runs, but not the epochs equal.
#
# Behaviour: shardshuffle=N draws one seed when the dataset is made, and starts from this seed in each iteration, also if the user gave no
# seed. So the shards have the same order in all epochs. shuffle(N, seed=...) does the same for the samples. With detshuffle=True or
# shuffle(N, rng=...), the orders differ. webdataset pull request 502, which is open, describes this for shardshuffle without a seed.
#
# Consequence: a model that is trained for several epochs sees the same documents in the same neighbourhood and order each time. If an
# epoch is cut by a number of steps, the same shards are never read.
#
# Output seen:
#   webdataset 1.0.2, 8 shards of 2 samples: different orders in 4 epochs
#   shardshuffle=8: 1
#   shardshuffle=8, detshuffle=True: 4
#   shuffle(16, seed=0): 1
#   shuffle(16, rng=random.Random(0)): 4
# Exit status: 0 if the epochs still have the same order, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet webdataset==1.0.2 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import random
import sys

from webdataset import TarWriter, WebDataset

SHARDS = [f"shard{number}.tar" for number in range(8)]
for shard in SHARDS:
    with TarWriter(shard) as writer:
        for number in range(2):
            writer.write({"__key__": f"{shard[:-4]}-{number}", "txt": "text"})


def orders(dataset):
    return len({tuple(sample["__key__"] for sample in dataset) for _ in range(4)})


print(f"webdataset {importlib.metadata.version('webdataset')}, 8 shards of 2 samples: different orders in 4 epochs")
found = {
    "shardshuffle=8": orders(WebDataset(SHARDS, shardshuffle=8)),
    "shardshuffle=8, detshuffle=True": orders(WebDataset(SHARDS, shardshuffle=8, detshuffle=True)),
    "shuffle(16, seed=0)": orders(WebDataset(SHARDS, shardshuffle=False).shuffle(16, seed=0)),
    "shuffle(16, rng=random.Random(0))": orders(WebDataset(SHARDS, shardshuffle=False).shuffle(16, rng=random.Random(0))),
}
for name, count in found.items():
    print(f"{name}: {count}")
if list(found.values()) != [1, 4, 1, 4]:
    sys.exit("changed: other datasets have another order in each epoch")
PROGRAM
cd "$folder"
"$folder/env/bin/python" program.py
