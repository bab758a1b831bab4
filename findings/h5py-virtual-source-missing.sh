#!/bin/sh
# h5py reads zeros from a virtual dataset whose source file is missing, without an error.
#
# Versions: h5py 3.16.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: reading data whose file does not exist raises an error, as it does through an external link.
#
# Behaviour: the part of a missing file is filled with the fill value, 0 by default. HDF5's introduction to virtual datasets says so in
# one sentence. (A source file that exists, but is too short, raises OSError.)
#
# Consequence: if token shards are joined as a virtual dataset, and a shard is moved, or is on a file system that is not mounted on
# one node, training uses token 0 in its place. A fill value that is no valid token makes the gaps visible.
#
# Output seen:
#   h5py 3.16.0, two files of 3 tokens
#   all files: virtual dataset [1, 2, 3, 4, 5, 6]
#   second file missing: virtual dataset [1, 2, 3, 0, 0, 0], external link: KeyError
# Exit status: 0 if zeros are still read, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet h5py==3.16.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys
from pathlib import Path

import h5py
import numpy as np

folder = Path(sys.argv[1])


def write(name, tokens):
    with h5py.File(folder / name, "w") as file:
        file["tokens"] = np.array(tokens, np.uint16)


def read(name):
    with h5py.File(folder / "all.h5") as file:
        try:
            return file[name][:].tolist()
        except KeyError:
            return "KeyError"


write("first.h5", [1, 2, 3])
write("second.h5", [4, 5, 6])
layout = h5py.VirtualLayout((6,), np.uint16)
layout[:3], layout[3:] = (h5py.VirtualSource(f"{name}.h5", "tokens", (3,)) for name in ("first", "second"))
with h5py.File(folder / "all.h5", "w") as file:
    file.create_virtual_dataset("tokens", layout)
    file["link"] = h5py.ExternalLink("second.h5", "tokens")
seen = [read("tokens")]
(folder / "second.h5").unlink()
seen += [read("tokens"), read("link")]
print(f"h5py {h5py.__version__}, two files of 3 tokens")
print(f"all files: virtual dataset {seen[0]}")
print(f"second file missing: virtual dataset {seen[1]}, external link: {seen[2]}")
if seen != [[1, 2, 3, 4, 5, 6], [1, 2, 3, 0, 0, 0], "KeyError"]:
    sys.exit("changed: other values")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder"
