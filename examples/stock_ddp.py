"""Train a classifier of scikit-learn's handwritten digits with plain DistributedDataParallel over MPI.

    mpirun -np 2 python examples/stock_ddp.py

With torchrun and gloo, the program would be the same, except for `import mpidp.c10d` and the two arguments of init_process_group.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpidp.c10d  # noqa: F401  # registers the backend "mpi4py" and "mpi://" with torch.distributed

EPOCHS, BATCH, HELD_OUT = 20, 64, 297


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (1797, 1, 8, 8) in [0, 1] and their labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"examples/stock_ddp.py needs scikit-learn for its 1,797 images ({error}): python -m pip install scikit-learn")
    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(loaded.target)


def main() -> None:
    """Train, and print how many held-out digits are classified correctly."""
    images, labels = digits()
    dist.init_process_group("mpi4py", init_method="mpi://")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    ))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    num_train = len(images) - HELD_OUT
    for epoch in range(EPOCHS):
        order = torch.randperm(num_train, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            mine = batch[rank::ranks]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[mine]), labels[mine])
            loss.backward()
            optimizer.step()
        dist.all_reduce(loss := loss.detach(), dist.ReduceOp.AVG)
        if rank == 0 and epoch % 5 == 4:
            print(f"epoch {epoch + 1:2d}  loss {loss.item():.4f}")
    with torch.no_grad():
        right = (model(images[num_train + rank :: ranks]).argmax(1) == labels[num_train + rank :: ranks]).sum()
    dist.all_reduce(right)
    if rank == 0:
        print(f"{right.item()} of {HELD_OUT} held-out digits are right ({100 * right.item() / HELD_OUT:.1f}%) on {ranks} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
