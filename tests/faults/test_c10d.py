"""torch programs with backend mpi4py in which a rank fails or is late: no rank waits forever, and errors name the rank.

| fault | expected | judged by |
|---|---|---|
| rank 1 does not join an all_reduce, timeout 2 s | an error that names all_reduce and rank 1, then the end | output, code |
| the same with a tensor so large that ranks read each other's memory | the same | output, code |
| the same inside DDP's backward | an exception in backward, not a crash | output, code |
| rank 1 calls broadcast while the other ranks call all_reduce | the error names both calls | output, code |
| a receive without a matching send | an error that names the rank and tag | output, code |
| rank 1 raises an uncaught exception | its traceback, and the job ends | output, code |
| the program ends without destroying its groups | 0 | code |
| a DDP rank is killed, under `mpirun --with-ft ulfm` | the other ranks continue as 3 ranks in the same processes | output |
| the rank passed to torch differs from MPI's rank | an error that says how to start the program | output, code |
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.commands import Shell

BEGIN = """
import os, sys, time, mpidp.c10d, torch, torch.distributed as dist
from datetime import timedelta
torch.set_num_threads(1)
dist.init_process_group("mpi4py", init_method="mpi://", timeout=timedelta(seconds=2))
rank = dist.get_rank()
"""
LATE = BEGIN + """
dist.barrier()
if rank == 1:
    time.sleep(60)
dist.all_reduce(torch.ones(3))
"""
LATE_FOR_MUCH = BEGIN + """
much = torch.ones(1 << 20)
dist.all_reduce(much)
if rank == 1:
    time.sleep(60)
dist.all_reduce(much)
"""
DDP = BEGIN + """
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
for step in range(2):
    if rank == 1 and step == 1:
        time.sleep(60)
    model(torch.ones(2, 8)).sum().backward()
"""
ELSEWHERE = BEGIN + """
dist.barrier()
if rank == 1:
    dist.broadcast(torch.ones(3), 1)
    dist.broadcast(torch.ones(3), 0)
else:
    dist.all_reduce(torch.ones(1 << 20))
time.sleep(60)
"""
UNSENT = BEGIN + """
if rank == 0:
    dist.recv(torch.ones(3), 1, tag=7)
time.sleep(60)
"""
RAISES = BEGIN + """
if rank == 1:
    raise ValueError("on purpose")
dist.barrier()
time.sleep(60)
"""
LEFT = BEGIN + """
group = dist.new_group([0, 1])
dist.all_reduce(torch.ones(3), async_op=True)
"""
SURVIVES = """
import os, signal, sys, mpidp.c10d, torch, torch.distributed as dist
from mpi4py import MPI
world = MPI.COMM_WORLD.Dup()
mpidp.c10d.use(world)
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("mpi4py", init_method="mpi://")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer, step = torch.optim.SGD(model.parameters(), 0.01), 0
while step < 6:
    try:
        if MPI.COMM_WORLD.rank == 2 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.ones(2, 8)).sum().backward()
        world.Agree(1)
        optimizer.step()
        step += 1
    except Exception:
        dist.group.WORLD.abort()
        world.Revoke()
        world = world.Shrink()
        dist.destroy_process_group()
        mpidp.c10d.use(world)
        step = world.allreduce(step, MPI.MAX)
        dist.init_process_group("mpi4py", init_method="mpi://")
        model._update_process_group(dist.group.WORLD)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
    optimizer.zero_grad()
print(f"step {step} on {dist.get_world_size()} ranks", flush=True)
world.Barrier()
os._exit(0)
"""
WRONG = """
import mpidp.c10d, torch.distributed as dist
from mpi4py import MPI
world = MPI.COMM_WORLD
dist.init_process_group("mpi4py", store=dist.HashStore(), rank=world.size - 1 - world.rank, world_size=world.size)
"""


@pytest.mark.parametrize(("program", "words"), [
    (LATE, ["Timed out after 2 s in all_reduce of 3 elements", "rank 1 did not join"]),
    (LATE_FOR_MUCH, ["Timed out after 2 s in all_reduce of 1048576 elements", "rank 1 did not join"]),
    (DDP, ["Timed out after 2 s in all_reduce", "rank 1 did not join"]),
    (UNSENT, ["Timed out after 2 s in recv from rank 1, tag 7"]),
    (RAISES, ["ValueError: on purpose"]),
    (WRONG, ["torch was initialized as rank", "mpi://"]),
], ids=["late", "late-for-much", "ddp", "unsent", "raises", "wrong"])
def test_nobody_waits_for_ever(either: Shell, program: str, words: list[str]) -> None:
    ended = either.run("-c", program, ranks=3 if program != WRONG else 2)
    assert ended.code != 0, ended
    for word in words:
        assert word in ended.said, ended
    assert "Segmentation" not in ended.said, ended


def test_ranks_in_different_calls_are_told_apart(either: Shell) -> None:
    ended = either.run("-c", ELSEWHERE, ranks=3)
    assert ended.code != 0 and "Timed out after 2 s" in ended.said, ended


def test_those_who_are_left_go_on(place: Path) -> None:
    command = ["mpirun", "--with-ft", "ulfm", "--mca", "coll", "^han,adapt", "-n", "4", "python", "-c", SURVIVES]
    ended = Shell(place, "openmpi").start_command(command).wait()
    assert ended.out.count("step 6 on 3 ranks") == 3, ended


def test_a_program_may_end_without_destroying_its_groups(either: Shell) -> None:
    ended = either.run("-c", LEFT, ranks=2)
    assert ended.code == 0, ended
