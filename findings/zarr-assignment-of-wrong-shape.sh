#!/bin/sh
# zarr 3 accepts values of the wrong shape: extra rows are dropped, and a single missing row is filled by repetition, without an error.
#
# Versions: zarr 3.1.6, h5py 3.16.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: array[4:8] = values raises an error if values has not 4 rows, as numpy, h5py and zarr 2 do.
#
# Behaviour: zarr 3 does not compare the shapes for slices and integers. Each chunk takes the rows at its place from the values. If there
# are too many rows, the last ones are not stored. If a chunk finds one row only, numpy repeats this row in the whole chunk. If a chunk
# finds none, or several but too few, there is an error. So the result depends on the size of the chunks. For lists of indices, zarr
# compares the shapes since pull request 2512.
#
# Consequence: a rank that computes 6 results and writes them to a range of 4 rows loses two of them, and nobody finds the error in the
# range. A shard of 5 samples in a range of 8 looks complete, with three more copies of the last sample.
#
# Output seen:
#   zarr 3.1.6, h5py 3.16.0, numpy 2.4.6: 8 rows, chunks of 4 rows
#   6 values to [0:4]: numpy ValueError, h5py TypeError, zarr [1, 2, 3, 4, 0, 0, 0, 0]
#   5 values to [0:8]: numpy ValueError, h5py TypeError, zarr [1, 2, 3, 4, 5, 5, 5, 5]
#   6 values to [0:8]: numpy ValueError, h5py TypeError, zarr ValueError
# Exit status: 0 if wrong shapes are still accepted, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet zarr==3.1.6 h5py==3.16.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import h5py
import numpy
import zarr

CASES = {"6 values to [0:4]": (slice(0, 4), 6), "5 values to [0:8]": (slice(0, 8), 5), "6 values to [0:8]": (slice(0, 8), 6)}


def assign(array, rows, count):
    """Assign 1, 2, ... to these rows; return what the array contains, or the name of the error."""
    try:
        array[rows] = numpy.arange(1, 1 + count)
    except (TypeError, ValueError) as error:
        return type(error).__name__
    return array[:].tolist()


print(f"zarr {zarr.__version__}, h5py {h5py.__version__}, numpy {numpy.__version__}: 8 rows, chunks of 4 rows")
found = {}
with h5py.File("file.h5", "w") as file:
    for number, (case, (rows, count)) in enumerate(CASES.items()):
        arrays = {
            "numpy": numpy.zeros(8, int),
            "h5py": file.create_dataset(str(number), (8,), int, chunks=(4,)),
            "zarr": zarr.create_array(f"{number}.zarr", shape=(8,), chunks=(4,), dtype=int),
        }
        found[case] = {name: assign(array, rows, count) for name, array in arrays.items()}
        print(f"{case}:", ", ".join(f"{name} {result}" for name, result in found[case].items()))
right = [[1, 2, 3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 5, 5, 5], "ValueError"]
if [one["zarr"] for one in found.values()] != right or {one[name] for one in found.values() for name in ("numpy", "h5py")} != {
    "ValueError", "TypeError"
}:
    sys.exit("changed: other shapes are accepted")
PROGRAM
cd "$folder"
"$folder/env/bin/python" program.py
