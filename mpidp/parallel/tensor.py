"""What tensor parallelism adds to a part of the model, from outside: sums over the ranks that share its layers.

Megatron-LM (Shoeybi 2019, section 3): where a branch begins its input is everybody's, and its gradient is summed in backward (f);
where it ends what each rank has of it is summed in forward, and its gradient is everybody's (g). The vocabulary is cut too: rows
of the embedding that are elsewhere add zero, and the loss is computed from each rank's own logits (section 3, "parallel
cross-entropy"): a maximum, a sum and the target's logit are all that is sent. Sums are float32, whatever the layers compute in.

Sequence parallelism (Korthikanti 2022, section 4.2.2): between branches a rank has its positions alone. f gathers them, and adds
and shares out their gradients in backward; g adds and shares out, and gathers gradients. Products keep this rank's positions,
and gather them anew in backward. Norms see a part of the positions: their gains pass through the first f, which adds what
each rank has of their gradients, micro-batch by micro-batch, so that they are equal for all that comes after: lanes, replicas,
optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn

from mpidp.parallel.tensor_comm import SumInBackward, TensorComm, enter_branch, leave_branch


class SequenceNorm(nn.Module):
    """An RMSNorm of this rank's positions."""

    def __init__(self, norm: nn.RMSNorm, tp: TensorComm) -> None:
        super().__init__()
        self.weight, self.eps, self._tp = norm.weight, norm.eps, tp

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) -> (B, t, D)."""
        gain = SumInBackward.apply(self.weight, self._tp)  # type: ignore[no-untyped-call]
        return F.rms_norm(x, self.weight.shape, gain, self.eps)


class VocabEmbedding(nn.Module):
    """An embedding of which this rank has the rows from `first` on."""

    def __init__(self, embedding: nn.Embedding, first: int, tp: TensorComm) -> None:
        super().__init__()
        self.weight, self.first, self._tp = embedding.weight, first, tp

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        local = tokens - self.first
        here = (local >= 0) & (local < len(self.weight))
        found = F.embedding(local.where(here, 0), self.weight) * here.unsqueeze(-1)
        return leave_branch(found, self._tp)


class _Loss(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over rows whose logits lie in slices on the ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, tp: TensorComm) -> Tensor:
        largest = tp.sum(logits.max(dim=-1).values, MPI.MAX)
        exponents = (logits - largest.unsqueeze(-1)).exp()
        local = targets - first
        here = (local >= 0) & (local < logits.shape[-1])
        place = local.where(here, 0).unsqueeze(-1)
        of_target = (logits.gather(-1, place).squeeze(-1) - largest).where(here, 0.0)
        total, of_target = tp.sum(torch.stack([exponents.sum(-1), of_target]))
        counts = targets != -100
        ctx.save_for_backward(exponents, total, place, here, counts)
        return (total.log() - of_target).where(counts, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        exponents, total, place, here, counts = ctx.saved_tensors
        grad = exponents / total.unsqueeze(-1)
        grad.scatter_add_(-1, place, -here.to(grad.dtype).unsqueeze(-1))
        return grad * (counts.unsqueeze(-1) * grads[0]), None, None, None


def loss_over(tp: TensorComm, first: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of token losses from this rank's logits (N, V of this rank), whose first column is id `first`, and targets (N,), of
    which -100 does not count. The same on every rank of a stage."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = _Loss.apply(logits, targets, first, tp)  # type: ignore[no-untyped-call]
        return found

    return loss


class Regather:
    """What products keep of gathered positions for backward: this rank's, of which the whole is gathered again, once for all."""

    def __init__(self, part: Tensor, whole: Tensor, tp: TensorComm) -> None:
        """part: (B, t, D), of which whole (B, T, D) was gathered."""
        self.part, self._tp, self._length = part.detach(), tp, whole.shape[1]
        self._place, self._numel = whole.data_ptr(), whole.numel()
        self._kept = self._left = 0  # how often it is kept, and not yet asked for again
        self._whole: Tensor | None = None

    def pack(self, x: Tensor) -> Any:
        """Of saved_tensors_hooks, while the whole lives."""
        if x.data_ptr() != self._place or x.numel() != self._numel or not x.is_contiguous():
            return x
        self._kept += 1
        return x.shape

    def unpack(self, packed: Any) -> Tensor:
        """Collective over tp.comm: backward runs in the same order on all ranks."""
        if isinstance(packed, Tensor):
            return packed
        if self._whole is None:
            self._whole, self._left = self._tp.gather(self.part, self._length), self._kept
        whole, self._left = self._whole, self._left - 1
        if not self._left:
            self._whole = None
        return whole.view(packed)


def _between(module: Any, tp: TensorComm, keep: bool, ends: bool = True) -> None:
    """Put f before a module and, if it ends a branch, g after it. keep: the whole of what f gathered, for backward."""
    inner = module.forward

    def forward(x: Tensor, *args: Any) -> Tensor:
        if tp.sequence and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the products would: half as much to send and to keep
        whole = enter_branch(x, tp)
        if keep:
            y = inner(whole, *args)
        else:
            regather = Regather(x, whole, tp)
            with torch.autograd.graph.saved_tensors_hooks(regather.pack, regather.unpack):
                y = inner(whole, *args)
        return leave_branch(y, tp) if ends else y

    module.forward = forward


def share_layers(model: Any, tp: TensorComm) -> None:
    """Make a part of a Transformer compute its share of every layer together with the other ranks of its stage. Independent."""
    keep = not tp.sequence

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        tp.length = args[1].shape[-2]  # of the rotary table: x may have a part of the positions

    for block in model.blocks.values():
        block.register_forward_pre_hook(enter)
        for branch in (block.attention, block.feed_forward):
            _between(branch, tp, keep or model.recompute)  # a block that is computed again gathers again
        if tp.sequence:
            block.attention_norm = SequenceNorm(block.attention_norm, tp)
            block.feed_forward_norm = SequenceNorm(block.feed_forward_norm, tp)
    if model.embedding is not None:
        model.embedding = VocabEmbedding(model.embedding, model.part.share(model.shape.vocab_size).start, tp)
    if model.head is not None:
        if tp.sequence:
            model.norm = SequenceNorm(model.norm, tp)
        _between(model.head, tp, keep, ends=False)
