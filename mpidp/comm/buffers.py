"""Describes tensors to mpi4py. For example, buf(tensor) returns the buffer specification that mpi4py's communication methods
take. Tensors that MPI cannot add, or would misread, are rejected."""

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
    """Return the tensor's memory as an object that mpi4py accepts. Raises ValueError if the tensor is not contiguous.
    Independent.

    CUDA tensors need a CUDA-aware MPI. Before the MPI call, synchronize the CUDA stream that writes the tensor. Otherwise MPI
    silently sends old values.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"MPI needs a contiguous tensor, but got strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    return MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)


def datatype(tensor: torch.Tensor) -> Any:
    """Return the MPI datatype of a tensor's elements. Raises TypeError if not every MPI library can sum this dtype. Examples are
    bfloat16 and float16."""
    if tensor.dtype not in _DATATYPES:
        raise TypeError(f"MPI has no portable sum for {tensor.dtype}. Convert to float32, or send bytes and add with torch")
    return _DATATYPES[tensor.dtype]


def buf(tensor: torch.Tensor) -> list[Any]:
    """Return the buffer specification of a tensor. An example of its use is `comm.Allreduce(MPI.IN_PLACE, buf(t))`.
    Independent."""
    return [memory(tensor), tensor.numel(), datatype(tensor)]


def bufv(tensor: torch.Tensor, counts: Sequence[int], offsets: Sequence[int]) -> list[Any]:
    """Return the buffer specification of a tensor for collectives with one range of elements per rank, such as Alltoallv.
    `counts`: the number of elements of each range. `offsets`: the first element of each range. Independent."""
    return [memory(tensor), (list(counts), list(offsets)), datatype(tensor)]
