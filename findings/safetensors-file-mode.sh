#!/bin/sh
# safetensors 0.8.0 writes files that only their owner can read, whatever the umask is.
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11, Linux. safetensors 0.7.0 follows the umask.
#
# What a good engineer would guess: save_file creates files as open() does, so the umask decides who can read them. A file that replaces
# another one keeps the mode of the old file, as with version 0.7.0.
#
# Behaviour: save_file writes a temporary file of mode 600 and renames it. So the new file has mode 600, also if it replaces a file that a
# group could read. transformers and PEFT save through this function. Their config.json follows the umask. This is
# safetensors/safetensors issue 782, which is open.
#
# Consequence: on a cluster, a colleague or a service that runs as another user finds the folder and config.json, but cannot open the
# weights. A chmod of an earlier checkpoint file is lost when the file is written again.
#
# Output seen:
#   umask 022: open() gives mode 644
#   safetensors 0.7.0: new file 644, replaced file of mode 664: 664
#   safetensors 0.8.0: new file 600, replaced file of mode 664: 600
# Exit status: 0 if version 0.8.0 still ignores the umask, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import pathlib
import sys

import numpy
import safetensors
from safetensors.numpy import save_file

path = pathlib.Path(sys.argv[1], f"{safetensors.__version__}.safetensors")


def mode_after_saving():
    save_file({"weight": numpy.zeros(4)}, path)
    return f"{path.stat().st_mode & 0o777:o}"


new = mode_after_saving()
path.chmod(0o664)
replaced = mode_after_saving()
print(f"safetensors {safetensors.__version__}: new file {new}, replaced file of mode 664: {replaced}")
if (new, replaced) != (("600", "600") if safetensors.__version__ == "0.8.0" else ("644", "664")):
    sys.exit("changed: the mode follows the umask")
PROGRAM
umask 022
touch "$folder/plain"
echo "umask 022: open() gives mode $(stat -c %a "$folder/plain")"
for version in 0.7.0 0.8.0; do
    "$folder/env/bin/pip" install --quiet "safetensors==$version"
    "$folder/env/bin/python" "$folder/program.py" "$folder"
done
