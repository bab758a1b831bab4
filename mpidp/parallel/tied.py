"""Adds the two gradients of a tied embedding in the same order on every mesh (model.slices with model.tie_embeddings).

On one stage, autograd adds the gradients of the head and of the embedding for each micro-batch. With several stages, the last
stage computes the gradient of the head. For each micro-batch, it sends this gradient to the first stage, and replaces its own
copy by zeros. The first stage adds the received gradient to the gradient of the embedding. At the end of a step, the two
stages exchange their gradients, as without slices (ModelPartition.tie).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mpidp.parallel.pipeline import FORWARD, Stages


def tie_micro_batch(weight: Tensor, stages: Stages, v: int) -> RemovableHandle:
    """Make the backward pass of micro-batch `v` add the two gradients of `weight` in the same order as on one stage. Return a
    context manager in which this backward pass must run. weight: the embedding or head of the first or last stage.
    Independent. Backward is collective over the first and the last stage."""

    # The message is addressed to chunk number `chunks` of the first stage, which does not exist. Its tag is the forward tag of
    # chunk 0 and the next micro-batch. That tag is free, because chunk 0 of the first stage receives no hidden states.
    def send(grad: Tensor) -> Tensor:
        stages.send(FORWARD, v, grad, stages.chunks - 1)
        return torch.zeros_like(grad)

    def add(grad: Tensor) -> Tensor:
        return grad + stages.receive(FORWARD, v, tuple(grad.shape), stages.chunks)

    return weight.register_hook(add if stages.first else send)
