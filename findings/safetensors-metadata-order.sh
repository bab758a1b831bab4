#!/bin/sh
# safetensors writes the keys of the metadata in a random order: two files with the same content have different hashes.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: the tensors are sorted, and the format has no time stamps. So the same tensors and the same metadata
# give the same bytes. This is true for a file with no or one key of metadata, as transformers writes it ({"format": "pt"}).
#
# Behaviour: with two or more keys, the order of the keys in the header changes from call to call, also in the same process. This is
# safetensors/safetensors issue 584, which is open.
#
# Consequence: a program that adds the step or the seed to the metadata, and compares checkpoints by their checksum, finds differences
# between equal checkpoints. A store that keeps equal files once keeps them several times. A hash of the tensors' bytes is stable.
#
# Output seen:
#   safetensors 0.8.0: different results of 32 calls of save() with the same tensor
#   0 keys of metadata: 1
#   1 key of metadata: 1
#   5 keys of metadata: more than 1, the tensor's bytes are the same: True
# Exit status: 0 if the files still differ, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import numpy
import safetensors
from safetensors.numpy import save

METADATA = {"format": "np", "step": "1000", "seed": "0", "tokens": "65536", "model": "llama"}
tensors = {"weight": numpy.arange(4, dtype=numpy.float32)}


def results(keys):
    metadata = {key: METADATA[key] for key in list(METADATA)[:keys]} or None
    return {save(tensors, metadata=metadata) for _ in range(32)}


print(f"safetensors {safetensors.__version__}: different results of 32 calls of save() with the same tensor")
print(f"0 keys of metadata: {len(results(0))}")
print(f"1 key of metadata: {len(results(1))}")
many = results(5)
same = all(result.endswith(tensors["weight"].tobytes()) for result in many)
print(f"5 keys of metadata: {'more than 1' if len(many) > 1 else 1}, the tensor's bytes are the same: {same}")
if (len(results(0)), len(results(1)), len(many) > 1, same) != (1, 1, True, True):
    sys.exit("changed: the same content gives the same bytes")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
