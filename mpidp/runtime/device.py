"""Chooses the threads, the device and the precision of a rank."""

from __future__ import annotations

import os
import shutil

import torch

from mpidp.errors import UsageError
from mpidp.runtime.topology import Topology


def resolve_threads(wanted: int, mesh: Topology) -> int:
    """Return the number of CPU threads of a rank: `wanted`, or, if `wanted` is 0, the number of cores of this node divided by
    the number of ranks on this node. Independent."""
    return wanted or max(1, mesh.cores // mesh.local_size)


def resolve_device(wanted: str, mesh: Topology) -> torch.device:
    """Return the device of this rank: the CPU, or GPU number local_rank % device_count. `wanted`: cpu, cuda or auto. Raises
    UsageError for cuda if there is no GPU. Independent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"train.device=cuda, but torch finds no CUDA device on {mesh.host}. Check that the job requests a GPU, and that "
            f"torch {torch.__version__} is a CUDA build. Or use train.device=cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", mesh.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products. `wanted`: float32, bfloat16 or auto. With auto, the dtype is bfloat16 if the GPU
    supports it, else float32. Independent."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def is_bfloat16_slow(device: torch.device) -> bool:
    """Return whether `device` is a CPU that has no instructions for bfloat16. On such a CPU (without AVX-512), torch's matrix
    products in bfloat16 take 20 to 50 times as long as those in float32. Pure."""
    try:
        return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return device.type == "cpu"


def check_compiler(wanted: bool, device: torch.device) -> None:
    """Raise UsageError if `wanted` is true, the device is the CPU, and there is no C++ compiler for torch.compile.
    Independent."""
    compiler = os.environ.get("CXX", "g++")
    if wanted and device.type == "cpu" and shutil.which(compiler) is None:
        raise UsageError(
            f"train.compile=true on a CPU needs a C++ compiler, but {compiler} is not on PATH. Install g++, set the environment "
            "variable CXX to another compiler, or use train.compile=false"
        )


def set_determinism(device: torch.device, wanted: bool) -> None:
    """On CUDA, use only deterministic kernels if `wanted` is true. Call this before the first cuBLAS call. Independent."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)
