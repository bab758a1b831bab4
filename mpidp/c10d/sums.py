"""The MPI datatypes and operations for torch's dtypes and reductions. MPI cannot reduce bfloat16 and float16, so torch reduces
tensors of these dtypes."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from torch.distributed import ReduceOp

HALVES = (torch.bfloat16, torch.float16)
DATATYPES = {
    torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE, torch.bool: MPI.UINT8_T,
    torch.int8: MPI.INT8_T, torch.int16: MPI.INT16_T, torch.int32: MPI.INT32_T, torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T, torch.uint16: MPI.UINT16_T, torch.uint32: MPI.UINT32_T, torch.uint64: MPI.UINT64_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
OPS = {
    "SUM": MPI.SUM, "AVG": MPI.SUM, "PRODUCT": MPI.PROD, "MIN": MPI.MIN, "MAX": MPI.MAX,
    "BAND": MPI.BAND, "BOR": MPI.BOR, "BXOR": MPI.BXOR,
}
OF_BOOLS = {
    "SUM": MPI.LOR, "MAX": MPI.LOR, "BOR": MPI.LOR, "PRODUCT": MPI.LAND, "MIN": MPI.LAND, "BAND": MPI.LAND, "BXOR": MPI.LXOR,
}
ADDERS: dict[str, Any] = {
    "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
}
ADDED = (  # dtypes that shared_memory.py reduces with torch; MPI reduces bool and larger unsigned integers
    torch.float32, torch.float64, *HALVES, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.complex64, torch.complex128,
)
_KINDS = {name: getattr(ReduceOp, name) for name in OPS}
_BITS = ("BAND", "BOR", "BXOR")


def kind_of(op: Any, dtype: torch.dtype) -> str:
    """Return the name of the reduction `op`, for example "SUM". Raises ValueError if `op` is not supported, and TypeError if it
    is not defined for `dtype`. Pure."""
    name = next((name for name, known in _KINDS.items() if op == known), None)
    if name is None:
        raise ValueError(f"mpi4py: reduction {op} is not supported. Use one of {', '.join(OPS)}")
    if dtype not in DATATYPES and dtype not in HALVES:
        raise TypeError(f"mpi4py: reductions of {dtype} are not supported. Convert the tensor, or gather it and reduce locally")
    whole = not (dtype.is_floating_point or dtype.is_complex)
    if name in _BITS and not whole:
        raise TypeError(f"mpi4py: {name} needs an integer dtype, not {dtype}")
    if dtype.is_complex and name in ("MIN", "MAX") or dtype == torch.bool and name == "AVG":
        raise TypeError(f"mpi4py: {name} is not defined for {dtype}")
    return name


def mpi_op(kind: str, dtype: torch.dtype) -> MPI.Op:
    """Return MPI's operation for a reduction. For dtype bool, it is a logical operation, for example LOR for SUM. Pure."""
    return OF_BOOLS[kind] if dtype == torch.bool else OPS[kind]


def average(tensor: torch.Tensor, ranks: int) -> None:
    """Divide a sum over ranks by the number of ranks, in place. Integer results are rounded toward zero. Independent."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.div_(ranks)
    else:
        tensor.div_(ranks, rounding_mode="trunc")


def fold(blocks: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Reduce `blocks` (ranks, n) over the ranks in float32. Round the result once to the dtype of `out` (n,), and store it there.
    Independent."""
    blocks = blocks.float()
    if kind in ("SUM", "AVG"):
        done = blocks.sum(0)
        if kind == "AVG":
            done /= len(blocks)
    elif kind == "PRODUCT":
        done = blocks.prod(0)
    else:
        done = blocks.amin(0) if kind == "MIN" else blocks.amax(0)
    out.copy_(done)
