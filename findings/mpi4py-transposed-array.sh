#!/bin/sh
# mpi4py sends a transposed array in the order of its memory: Bcast of x.T gives other ranks a scrambled matrix, without an error.
#
# Versions: mpi4py 4.1.2, mpich 5.0.2 (wheel), numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: mpi4py rejects arrays that are not contiguous (x[:, ::2] raises an error), so it rejects x.T, too,
# or sends the elements in the order of the indices.
#
# Behaviour: an array in Fortran order counts as contiguous. Its memory is sent as it is, and received in the order of the receiver's
# memory. If the receiver's array has C order, as from numpy.empty(shape), elements are at wrong places. The lower-case bcast(),
# which uses pickle, is right. CPU tensors of torch behave in the same way.
#
# Consequence: if one rank loads or computes a matrix in Fortran order (x.T, numpy.asfortranarray) and sends it, the
# other ranks train with other weights. A check of shape, type and sum does not find this.
#
# Output seen:
#   mpi4py 4.1.2, 2 ranks: x.T is [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   Bcast(x.T): rank 1 has [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   bcast(x.T): rank 1 has [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
#   Bcast(x[:, ::2]): error
# Exit status: 0 if the order is still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet mpi4py==4.1.2 mpich==5.0.2 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import mpi4py
import numpy as np
from mpi4py import MPI

world = MPI.COMM_WORLD
right = np.arange(6.0).reshape(2, 3).T
buffer = right if world.rank == 0 else np.empty(right.shape)
world.Bcast(buffer)
copied = world.bcast(right if world.rank == 0 else None)
try:
    world.Bcast(np.zeros((4, 4))[:, ::2])
    strided = "no error"
except (BufferError, ValueError):  # raised on all ranks, before anything is sent
    strided = "error"
if world.rank == 1:
    print(f"mpi4py {mpi4py.__version__}, {world.size} ranks: x.T is {right.tolist()}")
    print(f"Bcast(x.T): rank 1 has {buffer.tolist()}")
    print(f"bcast(x.T): rank 1 has {copied.tolist()}")
    print(f"Bcast(x[:, ::2]): {strided}")
    if np.array_equal(buffer, right) or not np.array_equal(copied, right) or strided != "error":
        sys.exit("changed: another set of calls is right")
PROGRAM
"$folder/env/bin/mpirun" -n 2 "$folder/env/bin/python" "$folder/program.py"
