#!/bin/sh
# h5py stores an integer that does not fit the dataset as the nearest limit, as another number, or raises: it depends on the input's type.
#
# Versions: h5py 3.16.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: h5py uses numpy's rules. So 70000 written to a uint16 dataset raises OverflowError, or becomes 4464
# (70000 modulo 65536), the same for every form of the input.
#
# Behaviour: for an array, HDF5 converts the values and replaces them by the nearest limit, 65535 or 0. (HDF5's
# document on the conversion of data types describes this.) For an object with __array__, such as a CPU tensor of torch, numpy
# converts the values, modulo 65536. For a list, numpy raises OverflowError. Attributes differ again: attrs.create(..., dtype=) takes
# the value modulo 65536, attrs.modify() the nearest limit. Reading gives the limit, too: dataset.astype("uint16") gives 65535.
#
# Consequence: if a tokenizer has more than 65536 tokens, a uint16 shard contains valid token ids that are wrong, and nothing is
# reported. A test that writes a list gets an error, as if h5py checked the range.
#
# Output seen:
#   h5py 3.16.0: [70000, -1, 5] in a uint16 dataset
#   array: [65535, 0, 5]
#   create_dataset(data=array, dtype=): [65535, 0, 5]
#   object with __array__: [4464, 65535, 5]
#   list: OverflowError
#   attrs.create(array, dtype=): [4464, 65535, 5]
#   attrs.modify(array): [65535, 0, 5]
#   int64 dataset read as uint16: [65535, 0, 5]
# Exit status: 0 if the results are still these, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet h5py==3.16.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import h5py
import numpy as np

VALUES = np.array([70000, -1, 5])


class Tensor:
    """As torch.Tensor: it has __array__, but is no numpy array."""

    shape, dtype = VALUES.shape, VALUES.dtype

    def __array__(self, dtype=None, copy=None):
        return VALUES if dtype is None else VALUES.astype(dtype)

    def __len__(self):
        return len(VALUES)


def write(value):
    dataset[:] = 0
    try:
        dataset[:] = value
    except OverflowError:
        return "OverflowError"
    return dataset[:].tolist()


with h5py.File(sys.argv[1], "w") as file:
    dataset = file.create_dataset("ids", (3,), dtype="uint16")
    found = {
        "array": write(VALUES),
        "create_dataset(data=array, dtype=)": file.create_dataset("other", data=VALUES, dtype="uint16")[:].tolist(),
        "object with __array__": write(Tensor()),
        "list": write(VALUES.tolist()),
    }
    file.attrs.create("ids", VALUES, dtype="uint16")
    found["attrs.create(array, dtype=)"] = file.attrs["ids"].tolist()
    file.attrs.modify("ids", VALUES)
    found["attrs.modify(array)"] = file.attrs["ids"].tolist()
    found["int64 dataset read as uint16"] = file.create_dataset("wide", data=VALUES).astype("uint16")[:].tolist()
print(f"h5py {h5py.__version__}: {VALUES.tolist()} in a uint16 dataset")
for name, value in found.items():
    print(f"{name}: {value}")
limit, modulo = [65535, 0, 5], [4464, 65535, 5]
if list(found.values()) != [limit, limit, modulo, "OverflowError", modulo, limit, limit]:
    sys.exit("changed: other results")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/file.h5"
