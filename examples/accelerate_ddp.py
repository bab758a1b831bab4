"""Train a classifier of handwritten digits with Hugging Face Accelerate over MPI. Only the two lines that end in # concern MPI.

    mpirun -np 2 python -m mpi4py examples/accelerate_ddp.py

Accelerate uses the existing process group. Accelerator(cpu=True) detects several ranks from the environment variables that
mpirun sets. The attribute accelerator.state.backend is always "gloo", but no gloo group is created.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpidp.c10d  # noqa: F401  #

EPOCHS, BATCH, HELD_OUT = 8, 64, 297


def main() -> None:
    """Train, and print how many held-out digits are classified correctly."""
    try:
        from accelerate import Accelerator
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"examples/accelerate_ddp.py: {error}; python -m pip install accelerate scikit-learn")
    dist.init_process_group("mpi4py", init_method="mpi://")  #
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    loaded = load_digits()
    images, labels = torch.tensor(loaded.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(loaded.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    training = TensorDataset(images[HELD_OUT:], labels[HELD_OUT:])
    loader = DataLoader(training, BATCH // accelerator.num_processes, shuffle=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader, held_out = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), 3e-3), loader,
        DataLoader(TensorDataset(images[:HELD_OUT], labels[:HELD_OUT]), BATCH),
    )
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
    right = 0
    with torch.no_grad():
        for x, y in held_out:
            right += int(accelerator.gather_for_metrics(model(x).argmax(1) == y).sum())
    mean = accelerator.reduce(loss.detach(), "mean").item()
    weights = accelerator.unwrap_model(model)[0].weight.detach()
    same = all(torch.equal(weights, other) for other in accelerator.gather(weights.unsqueeze(0)))
    accelerator.print(
        f"{right} of {HELD_OUT} held-out digits are right on {accelerator.num_processes} ranks over {dist.get_backend()}, last "
        f"loss {mean:.4f}, replicas {'equal' if same else 'DIFFER'}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
