#!/bin/sh
# fastparquet reads large uint64 values of a list column as negative numbers as soon as pyarrow's dictionary for the column is full.
#
# Versions: fastparquet 2026.9.0, pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: a reader applies the type of the column, UINT_64, to all values, or rejects the file. If the first rows
# are right, the others are, too.
#
# Behaviour: fastparquet converts the dictionary of a list column to uint64, but not values that are stored without a dictionary. pyarrow
# stops using the dictionary when it exceeds 1 MiB, that is 131072 different values. So in the same column, the values of the first
# rows are right, and later values of 2**63 or more are negative. A column without lists is right. There is no warning.
#
# Consequence: MinHash signatures and hashes of documents are lists of uint64. With few documents, both libraries agree. With more, most
# signatures that fastparquet (or dask with this engine) reads are wrong, and duplicates are not found, or are compared as signed numbers.
#
# Output seen:
#   fastparquet 2026.9.0, pyarrow 26.0.1: rows read right
#   1000 rows of 128 hashes: fastparquet 1000, first wrong row [], pyarrow all
#   4000 rows of 128 hashes: fastparquet 1024, first wrong row [1024], pyarrow all
#   200000 rows of 1 hashes: fastparquet 200000, first wrong row [], pyarrow all
# Exit status: 0 if values are still negative, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet fastparquet==2026.9.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

import fastparquet
import numpy
import pyarrow
import pyarrow.parquet


def compare(rows, width):
    """Write rows of `width` random hashes; return how many rows fastparquet reads right, the first wrong row, and pyarrow's result."""
    hashes = numpy.random.default_rng(0).integers(0, 2**64, (rows, width), numpy.uint64)
    column = pyarrow.array(hashes[:, 0]) if width == 1 else pyarrow.array(hashes.tolist(), pyarrow.list_(pyarrow.uint64()))
    pyarrow.parquet.write_table(pyarrow.table({"hash": column}), "hashes.parquet")
    expected = hashes[:, 0].tolist() if width == 1 else hashes.tolist()
    read = fastparquet.ParquetFile("hashes.parquet").to_pandas()["hash"]
    found = [int(one) if width == 1 else [int(value) for value in one] for one in read]
    wrong = [row for row in range(rows) if found[row] != expected[row]]
    return rows - len(wrong), wrong[:1], pyarrow.parquet.read_table("hashes.parquet")["hash"].to_pylist() == expected


print(f"fastparquet {importlib.metadata.version('fastparquet')}, pyarrow {pyarrow.__version__}: rows read right")
results = {}
for rows, width in ((1000, 128), (4000, 128), (200000, 1)):
    right, wrong, same = results[rows] = compare(rows, width)
    print(f"{rows} rows of {width} hashes: fastparquet {right}, first wrong row {wrong}, pyarrow {'all' if same else 'not all'}")
if results[1000][0] != 1000 or results[4000][0] > 2000 or results[200000][0] != 200000 or not all(one[2] for one in results.values()):
    sys.exit("changed: other values are right")
PROGRAM
cd "$folder"
"$folder/env/bin/python" program.py
