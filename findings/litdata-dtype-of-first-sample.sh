#!/bin/sh
# litdata: optimize() stores 1-dimensional tensors without their dtype. All samples are read with the dtype of the first sample.
#
# Versions: litdata 0.2.76, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: a tensor is read with the dtype with which it was written, as litdata does for tensors of 2 dimensions,
# or optimize() rejects a sample whose dtype differs from that of the first sample.
#
# Behaviour: the first sample determines the dtype in index.json. The writer appends the bytes of later samples without a comparison. The
# reader interprets these bytes with the dtype of the first sample. The documentation asks for samples of the same types, but an empty
# list is enough to break this: torch.tensor([]) is float32, while torch.tensor([5]) is int64. NumPy arrays behave in the same way.
#
# Consequence: if the first document has no labels, the labels of all other documents are read as twice as many tiny float32 values, without
# an error message. If another document comes first, the same data set is right. So a small test may pass and the full data set be wrong.
#
# Output seen:
#   litdata 0.2.76, torch 2.13.0+cpu, labels [[], [5, 6, 7], [8]]
#   first_empty: float32 [] float32 [7e-45 0 8.4e-45 0 9.8e-45 0] float32 [1.1e-44 0]
#   first_full: int64 [8] int64 [5 6 7] int64 []
#   matrix: float32 [] int64 [5 6 7] int64 [8]
# Exit status: 0 if the values are still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning-utilities==0.15.3 requests==2.34.2 tifffile==2026.3.3 \
    obstore==0.12.1 boto3==1.43.117
"$folder/env/bin/pip" install --quiet --no-deps litdata==0.2.76  # its other requirement, torchvision, is not used here
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

import litdata
import torch

LABELS = [[], [5, 6, 7], [8]]


def first_empty(row):
    return {"row": row, "labels": torch.tensor(LABELS[row])}


def first_full(row):
    return {"row": row, "labels": torch.tensor(LABELS[2 - row])}


def matrix(row):
    return {"row": row, "labels": torch.tensor([LABELS[row]])}


def labels(function):
    """Write three samples and read their labels."""
    litdata.optimize(function, inputs=[0, 1, 2], output_dir=function.__name__, num_workers=1, chunk_size=8, keep_data_ordered=True)
    return [sample["labels"] for sample in litdata.StreamingDataset(function.__name__)]


if __name__ == "__main__":
    found = {function.__name__: labels(function) for function in (first_empty, first_full, matrix)}
    with open("result.txt", "w") as file:
        print(f"litdata {importlib.metadata.version('litdata')}, torch {torch.__version__}, labels {LABELS}", file=file)
        for name, tensors in found.items():
            texts = [" ".join(f"{value:.2g}" for value in one.flatten()) for one in tensors]
            print(f"{name}:", *(f"{str(one.dtype)[6:]} [{text}]" for one, text in zip(tensors, texts)), file=file)
    wrong, right, shaped = found["first_empty"][1], found["first_full"][1], found["matrix"][1]
    if wrong.dtype != torch.float32 or wrong.numel() != 6 or right.tolist() != [5, 6, 7] or shaped.tolist() != [[5, 6, 7]]:
        sys.exit("changed: the labels are read with another dtype")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py > log 2>&1 || { tail -5 log; exit 1; }
cat result.txt
