"""The gradients of one batch on a mesh, each with its box in the whole model, and their comparison with those of one rank."""

from __future__ import annotations

import hashlib

import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.config.schema import Config
from mpidp.model.shape import shapes_of
from mpidp.training.job import Job
from mpidp.training.step import compute
from tests.tiny import at, job_at

Box = tuple[slice, ...]
Found = tuple[dict[str, tuple[Box, Tensor]], float]  # (box and gradient by name in the whole model, the norm)


@torch.no_grad()
def disturb(job: Job, scale: float) -> None:
    """Add noise to all parameters, equal on every mesh, so that biases are not zero and gains not one. Independent."""
    part, sizes = job.parts.part, job.parts.sizes
    held = {part.global_name(name): p for name, p in job.engine.model.named_parameters()}
    for name, p in held.items():
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        noise = torch.randn(sizes[name], generator=torch.Generator().manual_seed(seed))
        p.add_(scale * noise[part.box(name, sizes[name])].to(p.device))


def gradients_at(comm: MPI.Intracomm, config: Config, noise: float = 0.0) -> Found:
    """Return the gradients of this rank's part for the first batch. Collective over comm."""
    job = job_at(comm, config)
    disturb(job, noise)
    loader = job.open_loader(0)
    compute(job, next(loader))
    loader.close()
    reducer = job.strategy.reducer
    reducer.finish()
    job.parts.tie(reducer.buffer, reducer.group, reducer.transport)
    layout, part, whole = reducer.buffer.layout, job.parts.part, shapes_of(job.parts.shape)
    views = zip(layout.placed(), layout.views(reducer.buffer.total), strict=True)
    found = {}
    for (_, name, _), view in views:
        name = part.global_name(name)
        found[name] = part.box(name, whole[name]), view.clone()
    return found, reducer.norm()


def assert_gradients(alone: Config, config: Config, close: float, noise: float = 0.0) -> None:
    """Compare every parameter, each in its box, and the norm over the whole model. Collective over WORLD."""
    ranks = config.mesh.dp * config.mesh.pp * config.mesh.tp
    wanted, norm = at(1, lambda comm: gradients_at(comm, alone, noise))[0]
    seen = set()
    for found, its_norm in at(ranks, lambda comm: gradients_at(comm, config, noise)):
        assert abs(its_norm - norm) <= close * norm
        for name, (box, gradient) in found.items():
            right = wanted[name][1]
            near = close * max(float(right.norm()), 0.01 * norm)  # without rotary positions, the gradient of k.bias is 0
            assert float((gradient - right[box]).norm()) <= near, name
            seen.add(name)
    assert seen == set(wanted)
