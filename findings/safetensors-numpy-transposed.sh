#!/bin/sh
# safetensors.numpy saves a transposed array in the order of its memory: the loaded matrix is scrambled, without an error.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11. safetensors 0.7.0 is right.
#
# What a good engineer would guess: the documentation says that tensors need to be contiguous, so save() and save_file() raise an error
# for weight.T, as safetensors.torch does, or save the elements in the order of the indices, as version 0.7.0 does.
#
# Behaviour: version 0.8.0 writes the memory of the array with the shape of the array. For an array in Fortran order (weight.T,
# numpy.asfortranarray, many results of scipy and scikit-learn), the values are at other positions after loading. This is
# safetensors/safetensors issue 825, which is open.
#
# Consequence: a script that converts weights between (in, out) and (out, in), as between GPT-2's Conv1D and Linear, writes a
# file with the right names and shapes. The values of each matrix are in a wrong order, so the model predicts nonsense.
#
# Output seen:
#   numpy.arange(6).reshape(2, 3).T is [[0, 3], [1, 4], [2, 5]]
#   safetensors 0.7.0: loaded [[0, 3], [1, 4], [2, 5]]
#   safetensors 0.8.0: loaded [[0, 1], [2, 3], [4, 5]]
# Exit status: 0 if version 0.8.0 still scrambles the array, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import numpy
import safetensors
from safetensors.numpy import load, save

weight = numpy.arange(6).reshape(2, 3).T
loaded = load(save({"weight": weight}))["weight"]
print(f"safetensors {safetensors.__version__}: loaded {loaded.tolist()}")
scrambled = loaded.ravel().tolist() == [0, 1, 2, 3, 4, 5]
if scrambled != (safetensors.__version__ == "0.8.0") or not (scrambled or (loaded == weight).all()):
    sys.exit("changed: another version, or none, scrambles the array")
PROGRAM
echo "numpy.arange(6).reshape(2, 3).T is [[0, 3], [1, 4], [2, 5]]"
for version in 0.7.0 0.8.0; do
    "$folder/env/bin/pip" install --quiet "safetensors==$version"
    "$folder/env/bin/python" "$folder/program.py"
done
