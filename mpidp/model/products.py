"""Matrix products of linear layers in training on CPUs. Pure torch, no MPI.

On AMD CPUs with AVX-512, large float32 products are computed by oneDNN, in about half the time of torch's default library MKL.
The bits of these products depend neither on the number of threads nor on the number of rows (tests/unit/test_products.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1 << 20  # fewest multiplications for oneDNN, because a call of oneDNN takes 10 microseconds longer than a call of MKL
LONGEST = 1 << 14  # most terms of a sum; oneDNN divides longer sums among threads, so their bits depend on the thread count


def _kind() -> str:
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        amd = False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if amd and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise") else "torch"


KIND = _kind()  # the library that computes large float32 products in training on this machine


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, (..., outputs). x: (..., inputs). weight: W, (outputs, inputs). Pure."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T with the same bits as linear() in training. Use it in code that computes its gradients itself. Pure."""
    return _product(x, weight) if _suits_onednn(x, weight) else F.linear(x, weight)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return KIND == "onednn" and float32 and x.numel() * len(weight) >= SMALLEST


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[-1] > LONGEST:
        found = _product(x[..., :LONGEST], weight[:, :LONGEST], bias)
        for start in range(LONGEST, x.shape[-1], LONGEST):
            found += _product(x[..., start : start + LONGEST], weight[:, start : start + LONGEST])
        return found
    whole: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return whole


# torch's compiler accepts oneDNN's operator only with constant weights. Compiled code calls mpidp::product instead.
_LIBRARY = torch.library.Library("mpidp", "DEF")
_LIBRARY.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("product", _product, "CPU")


@torch.library.register_fake("mpidp::product", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """A matrix product computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return (torch.ops.mpidp.product if torch.compiler.is_compiling() else _product)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        multiply: Any = _product
        if torch.compiler.is_compiling():
            multiply = torch.ops.mpidp.product
        elif torch.is_grad_enabled():  # for gradients of gradients
            multiply = F.linear
        of_x = None if weight is None else multiply(grad, weight.t(), None)
        of_weight = None if x is None else multiply(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """torch's linear layer, computed by linear()."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias."""
        return linear(x, self.weight, self.bias)
