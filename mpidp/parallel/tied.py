"""Adds the two gradients of a tied embedding so that the bits of the sum do not depend on the mesh. A tied embedding is one
parameter that is used as the embedding and as the weight of the head (model.tie_embeddings). Used with model.slices.

On one stage, autograd adds the gradients of the head and of the embedding for each micro-batch. With several stages, the last
stage computes the gradient of the head. For each micro-batch, it sends this gradient to the first stage, and replaces its own
copy by zeros. The first stage adds the received gradient to the gradient of the embedding. At the end of a step,
ModelPartition.tie() adds the gradients of the two stages, with or without model.slices. Here the last stage's gradient is zero,
so both stages get the gradient of the first stage.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mpidp.parallel.pipeline import FORWARD, Stages


def tie_micro_batch(weight: Tensor, stages: Stages, v: int) -> RemovableHandle:
    """Make the backward pass of micro-batch `v` add the two gradients of `weight` in the same order as on one stage. Return a
    context manager in which this backward pass must run. weight: the embedding on the first stage, or the head's
    weight on the last stage. Independent. Backward is collective over the first and the last stage."""

    # The message is addressed to chunk number `chunks` of the first stage. No such chunk exists, because chunks are numbered
    # from 0. The message's tag is the forward tag of chunk 0 and the next micro-batch. That tag is free, because chunk 0 of the
    # first stage receives no hidden states.
    def send(grad: Tensor) -> Tensor:
        stages.send(FORWARD, v, grad, stages.chunks - 1)
        return torch.zeros_like(grad)

    def add(grad: Tensor) -> Tensor:
        return grad + stages.receive(FORWARD, v, tuple(grad.shape), stages.chunks)

    return weight.register_hook(add if stages.first else send)
