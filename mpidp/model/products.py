"""Matrix products of linear layers in training on CPUs. Pure torch, no MPI.

torch computes float32 products with MKL. On AMD CPUs, MKL uses only half the width of AVX-512. oneDNN, which is also part of torch,
uses all of it and needs about half the time. The bits of oneDNN's products depend neither on the number of threads nor on the
number of rows (tests/unit/test_products.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 1 << 18  # multiplications; torch's own product is faster for smaller products


@cache
def kind() -> str:
    """Return which library computes large float32 products in training on this machine: "onednn" or "torch". Independent."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        amd = False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if amd and wide and hasattr(torch.ops.mkldnn, "_linear_pointwise") else "torch"


def eager_float32(*tensors: Tensor) -> bool:
    """Return whether float32 tensors on the CPU are computed eagerly and without autocast. Pure."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, (..., outputs). x: (..., inputs). weight: (outputs, inputs). Pure."""
    if kind() == "torch" or not torch.is_grad_enabled() or not eager_float32(x, weight) or _work(x, weight) < SMALLEST:
        return F.linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _work(x: Tensor, weight: Tensor) -> int:
    """Return the number of multiplications."""
    return x.numel() * weight.shape[0]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    """The product by oneDNN. It saves what F.linear saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = None if weight is None else _product(grad, weight.t())
        of_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """torch's linear layer, with products that are fast on this CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias."""
        return linear(x, self.weight, self.bias)
