"""Tensor parallelism: several ranks compute each layer together. This module adds the communication between these ranks to a part
of the model.

The method is that of Megatron-LM (Shoeybi 2019, section 3). The attention and the MLP of a Transformer block are called its
branches. At the start of a branch, all ranks have the same input. In backward, the function f sums the gradient of this input
over the ranks. At the end of a branch, the function g sums the ranks' partial results in forward. In backward, g passes on the
gradient of this sum. This gradient is the same on all ranks. The vocabulary is also divided among the ranks. A rank's embedding
returns zero for tokens whose rows are on other ranks, and g adds the results. The loss is computed from the logits of all ranks.
For each position, only a maximum, a sum and the target's logit are communicated (section 3, "parallel cross-entropy"). Sums are
computed in float32 in any training precision.

With sequence parallelism (Korthikanti 2022, section 4.2.2), a rank has only its own positions between branches. f gathers
positions in forward and reduce-scatters their gradients in backward. g reduce-scatters partial results in forward and gathers
gradients in backward. Autograd saves only this rank's positions of the input of a branch. Backward gathers the other positions
again.

A replicated parameter is one that all ranks of a stage have in full. If a rank applies it to only some positions or heads, the
rank computes only one term of the parameter's gradient. These terms are summed over the ranks for each micro-batch. This sum is
always needed for the norms of single heads (model.qk_norm=head), and for the replicated factors of adapters (lora.py). With
sequence parallelism, it is also needed for the other replicated parameters: the gains and biases of all other norms, the
biases of the linear layers `o` (attention) and `down` (feed-forward), the learned positions, and the factors of `InputMix`
layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor, nn

from mpidp.model.adapter_sizes import A, B
from mpidp.model.input_mix import mixed
from mpidp.model.norms import Norm
from mpidp.model.part import Part
from mpidp.model.shape import TransformerShape
from mpidp.parallel.tensor_comm import SumInBackward, TensorComm, enter_branch, leave_branch, sum_both_ways


class VocabEmbedding(nn.Module):
    """An embedding whose rows are divided among the ranks. first: the first row of this rank's range."""

    def __init__(self, embedding: nn.Embedding, first: int, tp: TensorComm) -> None:
        super().__init__()
        self.weight, self.first, self._tp = embedding.weight, first, tp

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of `tokens`, (B, T). With sequence parallelism, return only this rank's positions.
        Collective over tp.comm."""
        local = tokens - self.first
        here = (local >= 0) & (local < len(self.weight))
        found = F.embedding(local.where(here, 0), self.weight) * here.unsqueeze(-1)
        return leave_branch(found, self._tp)


class _Loss(torch.autograd.Function):
    """The sum of -log softmax(logits)[target] over positions. Each rank has the logits of its own range of token ids."""

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
    """Return a function loss(logits, targets). It returns the sum of the token losses, which is the same on every rank of a
    stage. The function loss() is collective over tp.comm. logits: (N, n), for this rank's n token ids. first: the first of these
    ids. targets: (N,). Targets of -100 are ignored. Independent."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = _Loss.apply(logits, targets, first, tp)  # type: ignore[no-untyped-call]
        return found

    return loss


class Regather:
    """Autograd's saved-tensor hooks for the input of a branch. The hooks save only this rank's positions. Backward gathers all
    positions once, even if several operations use them."""

    def __init__(self, part: Tensor, whole: Tensor, tp: TensorComm) -> None:
        """part: this rank's positions, (B, t, D). whole: the gathered positions, (B, T, D)."""
        self.part, self._tp, self._length = part.detach(), tp, whole.shape[1]
        self._place, self._numel = whole.data_ptr(), whole.numel()
        self._kept = self._left = 0  # number of times the tensor was saved, and number of times it must still be unpacked
        self._whole: Tensor | None = None

    def pack(self, x: Tensor) -> Any:
        """Return what autograd saves for `x`: only the shape if `x` is the gathered input of the branch, else `x` itself. Call
        pack() while the gathered input exists. Independent."""
        if x.data_ptr() != self._place or x.numel() != self._numel or not x.is_contiguous():
            return x
        self._kept += 1
        return x.shape

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor for which pack() returned `packed`. If pack() saved only a shape, gather the positions of the
        branch's input again. Backward must call unpack() in the same order on all ranks. Collective over tp.comm."""
        if isinstance(packed, Tensor):
            return packed
        if self._whole is None:
            self._whole, self._left = self._tp.gather(self.part, self._length), self._kept
        whole, self._left = self._whole, self._left - 1
        if not self._left:
            self._whole = None
        return whole.view(packed)


def _between(module: Any, tp: TensorComm, keep: bool, ends: bool = True) -> None:
    """Make `module` apply f (enter_branch) to its input. If `ends`, also make it apply g (leave_branch) to its output. keep:
    whether to save the whole input for backward. If `keep` is False, only this rank's positions are saved, and backward gathers
    the other positions again."""
    inner = module.forward

    def forward(x: Tensor, *args: Any) -> Tensor:
        if tp.sequence and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # cast before communication, so that messages are half as long
        whole = enter_branch(x, tp)
        if keep:
            y = inner(whole, *args)
        else:
            regather = Regather(x, whole, tp)
            with torch.autograd.graph.saved_tensors_hooks(regather.pack, regather.unpack):
                y = inner(whole, *args)
        return leave_branch(y, tp) if ends else y

    module.forward = forward


def _summed(p: Tensor | None, tp: TensorComm) -> Any:
    """Return `p` unchanged. Backward sums its gradient over the ranks."""
    return None if p is None else SumInBackward.apply(p, tp)  # type: ignore[no-untyped-call]


def _sum_norm(norm: Any, tp: TensorComm) -> None:
    """Change a normalization layer so that its gradients are summed over the ranks. Do not change an Identity."""
    if isinstance(norm, Norm):
        norm.forward = lambda x: norm.normalized(x, _summed(norm.weight, tp), _summed(norm.bias, tp))  # type: ignore[method-assign]


def _sum_mix(mix: Any, tp: TensorComm) -> None:
    """Change an `InputMix` layer so that the gradients of its factors are summed over the ranks."""
    mix.forward = lambda x, x0: mixed(x, x0, _summed(mix.weight, tp))


def _sum_bias(output: Any, tp: TensorComm) -> None:
    """Change an `OutputLinear` layer so that the gradient of its bias is summed over the ranks."""
    if output.bias is not None:
        output.add_bias = lambda y: y + _summed(output.bias, tp).to(y.dtype)


def _normalize_all_heads(norm: Any, width: int, tp: TensorComm) -> None:
    """Change an RMSNorm so that it normalizes over the heads of all ranks, not only of this rank. width: number of channels of
    all heads."""

    def forward(x: Tensor) -> Tensor:
        x = x.to(norm.weight.dtype)
        squares = sum_both_ways(x.square().sum(-1, keepdim=True), tp)
        return x * torch.rsqrt(squares / width + norm.eps) * norm.gain(norm.weight)  # type: ignore[no-any-return]

    norm.forward = forward


def _share_attention(attention: Any, shape: TransformerShape, tp: TensorComm) -> None:
    """Change the normalization layers of queries and keys so that they compute the same results as without tensor
    parallelism."""
    for norm, heads in ((attention.q_norm, shape.num_heads), (attention.k_norm, shape.num_kv_heads)):
        if norm is not None and attention.norm_heads:
            _sum_norm(norm, tp)
        elif norm is not None:
            _normalize_all_heads(norm, heads * shape.head_dim, tp)


def _sum_factors(name: str, layer: Any, part: Part, tp: TensorComm) -> None:
    """If `layer` has an adapter, sum the gradients of those factors of the adapter that are not divided among the ranks. name:
    the name of the layer in the model."""
    if hasattr(layer, "adapter"):
        held = [(p, part.is_cut(name + key)) for p, key in ((layer.lora_a, A), (layer.lora_b, B))]
        layer.adapter.factors = lambda layer: [p if cut else _summed(p, tp) for p, cut in held]


def share_layers(model: Any, tp: TensorComm) -> None:
    """Change `model`, a part of a Transformer, so that the ranks of its stage compute every layer together. Independent."""
    keep, model.tensor_comm = not tp.sequence, tp

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        tp.length = args[1].shape[-2]  # from the rotary table, because x may have only this rank's positions

    for block in model.blocks.values():
        block.register_forward_pre_hook(enter)
        _share_attention(block.attention, model.shape, tp)
        for branch in (block.attention, block.feed_forward):
            _between(branch, tp, keep or model.recompute)  # recomputing a block gathers the positions again anyway
        if tp.sequence:
            for norm in block.children():
                _sum_norm(norm, tp)
            if block.input_mix is not None:
                _sum_mix(block.input_mix, tp)
            _sum_bias(block.attention.o, tp)
            _sum_bias(block.feed_forward.down, tp)
    for name, layer in model.named_modules():
        _sum_factors(name, layer, model.part, tp)
    if model.embedding is not None:
        model.embedding = VocabEmbedding(model.embedding, model.part.own_range(model.shape.vocab_size).start, tp)
    if model.positions is not None and tp.sequence:
        table = model.positions
        table.forward = lambda places: F.embedding(places, _summed(table.weight, tp))
    if model.head is not None:
        if tp.sequence:
            _sum_norm(model.norm, tp)
        _between(model.head, tp, keep, ends=False)
