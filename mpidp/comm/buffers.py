"""buf(tensor): a tensor as MPI sees it. Refuses what MPI cannot add or would misread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI

_DATATYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.uint8: MPI.UINT8_T,
}


def memory(tensor: torch.Tensor) -> Any:
    """The tensor's bytes, on the host or (for a CUDA-aware MPI) on the device. Independent.

    A CUDA caller must have synchronised the stream that writes the tensor: MPI does not, and nobody would notice.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"MPI needs contiguous memory, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    return MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)


def datatype(tensor: torch.Tensor) -> Any:
    """Its MPI datatype; TypeError for those MPI has no portable sum for (bfloat16, float16)."""
    if tensor.dtype not in _DATATYPES:
        raise TypeError(f"MPI has no portable sum for {tensor.dtype}: reduce in float32, or send bytes and add in torch")
    return _DATATYPES[tensor.dtype]


def buf(tensor: torch.Tensor) -> list[Any]:
    """`comm.Allreduce(MPI.IN_PLACE, buf(t))`. Independent."""
    return [memory(tensor), tensor.numel(), datatype(tensor)]


def bufv(tensor: torch.Tensor, counts: Sequence[int], offsets: Sequence[int]) -> list[Any]:
    """The vector form: counts and offsets in elements, one a rank. Independent."""
    return [memory(tensor), (list(counts), list(offsets)), datatype(tensor)]
