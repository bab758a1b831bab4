#!/bin/sh
# litdata: optimize() replaces None, or a missing key, with 0, 0.0, False or "" if the sample also contains a tensor.
#
# Versions: litdata 0.2.76, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: None is read as None, or optimize() rejects it, because the format of the field is a number.
#
# Behaviour: for a sample of strings and numbers only, None is read as None. As soon as one field is a tensor or an array, the fields are
# stored in another format that has no missing values. There, None becomes the default of the type that the other samples have: 0 for an
# int, 0.0 for a float, False for a bool, "" for a string. A missing key has the same effect. There is no warning.
#
# Consequence: a document without a label gets label 0, a document without a score gets score 0.0, and a filter "is None" finds nothing. The
# result cannot be distinguished from real values. If tokens are added to an existing data set as a tensor, its missing values change.
#
# Output seen:
#   litdata 0.2.76, second and third of three samples
#   plain: {'label': None, 'score': None, 'language': None} {'label': None, 'score': None, 'language': None}
#   with_tensor: {'label': 0, 'score': 0.0, 'language': ''} {'label': 0, 'score': 0.0, 'language': ''}
# Exit status: 0 if None is still replaced, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pyarrow==26.0.1 lightning-utilities==0.15.3 requests==2.34.2 \
    tifffile==2026.3.3 obstore==0.12.1 boto3==1.43.117
"$folder/env/bin/pip" install --quiet --no-deps litdata==0.2.76  # its other requirement, torchvision, is not used here
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

import litdata
import torch

ROWS = [{"label": 3, "score": 0.5, "language": "en"}, {"label": None, "score": None, "language": None}, {}]


def plain(row):
    return dict(ROWS[row])


def with_tensor(row):
    return {"tokens": torch.arange(3), **ROWS[row]}


def rows(function):
    """Write three samples and read them without the tokens."""
    litdata.optimize(function, inputs=[0, 1, 2], output_dir=function.__name__, num_workers=1, chunk_size=8, keep_data_ordered=True)
    read = [dict(sample) for sample in litdata.StreamingDataset(function.__name__)]
    return [{key: value for key, value in sample.items() if key != "tokens"} for sample in read]


if __name__ == "__main__":
    found = {function.__name__: rows(function) for function in (plain, with_tensor)}
    with open("result.txt", "w") as file:
        print(f"litdata {importlib.metadata.version('litdata')}, second and third of three samples", file=file)
        for name, read in found.items():
            print(f"{name}:", *read[1:], file=file)
    missing, replaced = dict.fromkeys(ROWS[0]), {"label": 0, "score": 0.0, "language": ""}
    if found["plain"][1:] != [missing] * 2 or found["with_tensor"][1:] != [replaced] * 2:
        sys.exit("changed: missing values are read in another way")
PROGRAM
cd "$folder"
OMP_NUM_THREADS=1 "$folder/env/bin/python" program.py > log 2>&1 || { tail -5 log; exit 1; }
cat result.txt
