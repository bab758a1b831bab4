#!/bin/sh
# zarr 3: an assignment to one field of a structured array overwrites all fields with the same values.
#
# Versions: zarr 3.1.6, h5py 3.16.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: array["loss"] = values changes this field only, as in numpy, h5py and zarr 2. The documentation of
# set_basic_selection() says that the parameter `fields` selects the fields that are set.
#
# Behaviour: zarr 3 checks that the field exists, and then ignores its name. It converts the values to the structured type, so that
# each field gets the value, and writes the complete rows. set_basic_selection(..., fields="loss") does the same. There is no error and
# no warning.
#
# Consequence: a table with the number of the document, the number of tokens and the loss of each sample loses the first two columns when
# the losses are written. The old values cannot be restored.
#
# Output seen:
#   zarr 3.1.6, h5py 3.16.0, numpy 2.4.6: rows after array['loss'] = [0.5, 1.5, 2.5]
#   numpy: (11, 0.5) (12, 1.5) (13, 2.5)
#   zarr, format 2: (0, 0.5) (1, 1.5) (2, 2.5)
#   zarr, format 3: (0, 0.5) (1, 1.5) (2, 2.5)
#   h5py: (11, 0.5) (12, 1.5) (13, 2.5)
# Exit status: 0 if the other fields are still overwritten, 1 if the behaviour changed.
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

ROWS = numpy.array([(11, 5.0), (12, 6.0), (13, 7.0)], [("document", "i4"), ("loss", "f4")])
LOSSES = numpy.array([0.5, 1.5, 2.5], "f4")

print(f"zarr {zarr.__version__}, h5py {h5py.__version__}, numpy {numpy.__version__}: rows after array['loss'] = {LOSSES.tolist()}")
arrays = {"numpy": ROWS.copy()}
for zarr_format in (2, 3):
    name = f"zarr, format {zarr_format}"
    arrays[name] = zarr.create_array(f"{zarr_format}.zarr", shape=(3,), dtype=ROWS.dtype, zarr_format=zarr_format)
    arrays[name][:] = ROWS
found = {}
with h5py.File("file.h5", "w") as file:
    arrays["h5py"] = file.create_dataset("x", data=ROWS)
    for name, array in arrays.items():
        if name == "zarr, format 3":
            array.set_basic_selection(slice(None), LOSSES, fields="loss")
        else:
            array["loss"] = LOSSES
        found[name] = array[:].tolist()
        print(f"{name}:", *found[name])
right = [(11, 0.5), (12, 1.5), (13, 2.5)]
wrong = [(0, 0.5), (1, 1.5), (2, 2.5)]
if found != {"numpy": right, "zarr, format 2": wrong, "zarr, format 3": wrong, "h5py": right}:
    sys.exit("changed: other fields are written")
PROGRAM
cd "$folder"
"$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
