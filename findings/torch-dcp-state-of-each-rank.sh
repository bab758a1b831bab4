#!/bin/sh
# torch.distributed.checkpoint: if an object has another state on each rank, the checkpoint contains a mixture of these states.
#
# Version: torch 2.13.0 (+cpu build, x86-64), Python 3.11.
#
# What a good engineer would guess: there is at least one file for each rank, so each rank gets its own state again. Or the state of rank 0
# is used for all ranks, or save() reports that the values differ.
#
# Behaviour: tensors that are not DTensors, and other values, count as copies if they have the same key on several ranks. One copy of each
# entry is saved: that of the rank with the fewest bytes to write so far. So the entries of one object come from several ranks, and which
# ones depends on the sizes of all other entries. All ranks load this mixture. There is no warning. The documentation does not say which
# rank saves an entry. pytorch/pytorch issues 120356 and 146566 describe that only one rank is saved.
#
# Consequence: a data loader, or a generator of random numbers, that is saved under the same key on each rank resumes with the position of
# one rank and the generator of another, the same on all ranks. The ranks then train on the same samples, and with a state that no rank
# ever had. A key with the number of the rank avoids this.
#
# Output seen:
#   torch 2.13.0+cpu, gloo, 3 ranks: each saves and loads a data loader under the same key
#   rank 0: position of rank 1, generator of rank 2
#   rank 1: position of rank 1, generator of rank 2
#   rank 2: position of rank 1, generator of rank 2
# Exit status: 0 if the entries still come from several ranks, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


class Loader:
    """A data loader whose position and generator differ between the ranks."""

    def __init__(self, rank):
        self.position, self.generator = 100 * rank, torch.Generator().manual_seed(rank)

    def state_dict(self):
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.generator.set_state(state["generator"])


def run(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=3)
    dcp.save({"weight": torch.ones(100), "loader": Loader(rank)}, checkpoint_id=f"{path}/checkpoint")
    loader = Loader(rank)
    dcp.load({"weight": torch.zeros(100), "loader": loader}, checkpoint_id=f"{path}/checkpoint")
    results[rank] = (loader.position // 100, loader.generator.initial_seed())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(run, (sys.argv[1], results), nprocs=3)
    print(f"torch {torch.__version__}, gloo, 3 ranks: each saves and loads a data loader under the same key")
    for rank in range(3):
        print(f"rank {rank}: position of rank {results[rank][0]}, generator of rank {results[rank][1]}")
    if len(set(results.values())) != 1 or results[0][0] == results[0][1]:
        sys.exit("changed: the entries come from one rank")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/python" "$folder/program.py" "$folder" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
