#!/bin/sh
# pyarrow's ParquetFile.iter_batches holds a whole row group in memory, even if the batches and the buffer are small.
#
# Versions: pyarrow 26.0.1, numpy 2.4.6, Python 3.11 on Linux x86-64.
#
# What a good engineer would guess: iter_batches(batch_size=256) reads the file in parts of about 256 rows. If the parts need too much
# memory, buffer_size=1 MB ("an integer greater than 0 turns on read buffering") limits the memory.
#
# Behaviour: ParquetFile has pre_buffer=True by default. With this default, all column chunks of a row group are read before the first
# batch, and buffer_size has no effect. Only pre_buffer=False together with buffer_size limits the memory.
#
# Consequence: many programs write files with one large row group. A program that reads such a file in batches still needs memory for
# the whole row group.
#
# Output seen:
#   pyarrow 26.0.1, a row group of 190 MB, peak memory above that before reading:
#   defaults 211 MB, buffer_size 211 MB, buffer_size and pre_buffer=False 23 MB
# Exit status: 0 if this is still so, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

ROWS, LENGTH = 50_000, 1000


def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def measure(path, options):
    before = peak()
    with pyarrow.parquet.ParquetFile(path, **options) as file:
        assert sum(batch.num_rows for batch in file.iter_batches(batch_size=256)) == ROWS
    print(peak() - before)


if len(sys.argv) > 2:
    measure(sys.argv[1], eval(sys.argv[2], {}))
    sys.exit()
path = sys.argv[1]
ends = np.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=np.int32)
ids = pyarrow.array(np.random.default_rng(0).integers(0, 50_000, ROWS * LENGTH, dtype=np.int32))
table = pyarrow.table({"ids": pyarrow.ListArray.from_arrays(ends, ids)})
pyarrow.parquet.write_table(table, path, row_group_size=ROWS, use_dictionary=False, compression=None)
found = [int(subprocess.run([sys.executable, __file__, path, options], capture_output=True, check=True).stdout)
         for options in ("{}", "{'buffer_size': 2**20}", "{'buffer_size': 2**20, 'pre_buffer': False}")]
print(f"pyarrow {pyarrow.__version__}, a row group of {ROWS * LENGTH * 4 >> 20} MB, peak memory above that before reading:")
print("defaults {} MB, buffer_size {} MB, buffer_size and pre_buffer=False {} MB".format(*found))
if min(found[:2]) < 100 or found[2] > 60:
    sys.exit("changed: the memory is another one")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/a.parquet"
