"""The Newton-Schulz iteration of Muon, which approximates the nearest semi-orthogonal matrix (Jordan 2024; as in
torch.optim.Muon)."""

from __future__ import annotations

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # the coefficients of torch.optim.Muon
STEPS, EPS = 5, 1e-7
TOGETHER = 1 << 20  # number of elements; for larger matrices a batched product is not faster


def _cpu_dtype() -> torch.dtype:
    """Return bfloat16 if this CPU multiplies matrices in bfloat16 fast, else float32. On a CPU without AVX-512, torch's products
    in bfloat16 take 20 to 50 times as long as those in float32. Pure."""
    try:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        fast = False
    return torch.bfloat16 if fast else torch.float32


CPU_DTYPE = _cpu_dtype()  # the dtype of the iteration on this machine's CPU; on CUDA it is always bfloat16


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Return U f(S) V^T for each matrix U S V^T (singular value decomposition). The values f(S) are near 1. `matrices`: 2-D
    tensors, which may have different shapes. The dtype of the results is bfloat16 on CUDA, and CPU_DTYPE on the CPU.

    In bfloat16 on the CPU, matrices of equal shape are multiplied as a batch, which is up to 6 times as fast. The bits of a
    result do not depend on the other matrices in the batch. On CUDA and in float32, the bits would depend on the batch. In
    these cases, each matrix is multiplied alone. Independent."""
    found: list[Tensor] = [torch.empty(0)] * len(matrices)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, one in enumerate(matrices):
        alike.setdefault((one.shape[0], one.shape[1]), []).append(i)
    on_cpu = bool(matrices) and matrices[0].device.type == "cpu"
    dtype = CPU_DTYPE if on_cpu else torch.bfloat16
    for (m, n), members in alike.items():
        count = max(1, TOGETHER // (m * n)) if on_cpu and dtype == torch.bfloat16 else 1
        for first in range(0, len(members), count):
            batch = members[first : first + count]
            for i, one in zip(batch, _iterated([matrices[i].to(dtype) for i in batch]), strict=True):
                found[i] = one
    return found


def _iterated(matrices: list[Tensor]) -> list[Tensor]:
    """Return the results of orthogonalized() for `matrices`, which have equal shapes. The results have the dtype of
    `matrices`."""
    tall = matrices[0].shape[0] > matrices[0].shape[1]
    wide = [one.T if tall else one for one in matrices]
    x = torch.stack([one / one.norm().clamp(min=EPS) for one in wide])  # the spectral norm is then at most 1
    if len(x) == 1:
        y = x[0]
        for _ in range(STEPS):
            gram = y @ y.T
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=B, alpha=C), y, beta=A)
        return [y.T if tall else y]
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return [one.T if tall else one for one in x]
