"""From what a config leaves open to plain values: threads, device, precision, steps; and what the bits depend on."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict
from typing import Any

import h5py
import mpi4py
import numpy as np
import torch
from mpi4py import MPI

import mpidp
from mpidp import methods
from mpidp.comm.mesh import Mesh
from mpidp.config import Config, fields_of
from mpidp.entry import tolerant
from mpidp.errors import UsageError
from mpidp.lanes import Lanes
from mpidp.model import own
from mpidp.model.shape import LSTMShape, Shape, TransformerShape, default_hidden_dim


def resolve_threads(wanted: int, mesh: Mesh) -> int:
    """CPU threads a rank: as wanted, else the cores that the ranks of this node may use / their number. Independent."""
    return wanted or max(1, mesh.cores // mesh.local_size)


def resolve_device(wanted: str, mesh: Mesh) -> torch.device:
    """cuda:{local_rank % device_count}, else cpu. UsageError for a cuda that is not there. Independent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"train.device=cuda, but torch sees no CUDA device on {mesh.host}: use train.device=cpu, or install a CUDA build of "
            f"torch (this one is {torch.__version__}) and check the job's GPU request"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", mesh.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on CUDA that has it, else float32. Independent."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def check_compiler(wanted: bool, device: torch.device) -> None:
    """UsageError when torch.compile is asked for on the CPU and there is no C++ compiler. Independent."""
    if wanted and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UsageError(
            "train.compile=true needs a C++ compiler on the CPU, and g++ is not on the PATH: install it, name another one in the "
            "environment variable CXX, or leave train.compile=false"
        )


def check_shards(level: int) -> None:
    """UsageError where ranks may die and the others are to go on: what a dead rank alone held is gone. Independent."""
    if level and tolerant():
        raise UsageError(
            f"mesh.shard={level} under mpirun --with-ft ulfm: a rank that dies takes its shard of the state with it, and the "
            "others could not go on. Start without --with-ft (the same command goes on from the last checkpoint), or set "
            "mesh.shard=0"
        )


def resolve_reducer(config: Config) -> str:
    """auto depends on the config alone, never on ranks, memory or host: the tree for synchronous without compression. Pure."""
    if config.comm.reducer != "auto":
        return config.comm.reducer
    plain = kind_of(config) == "synchronous" and config.comm.compress == "none" and config.mesh.shard < 2  # there MPI sums
    return "tree" if plain else "allreduce"


def kind_of(config: Config) -> str:
    """The method that section strategy asks for. Pure."""
    return methods.kind(config.strategy.name, config.strategy.quorum)


def workers(config: Config, size: int) -> int:
    """How many of so many ranks compute gradients: all but those that serve. UsageError when none is left. Pure."""
    serving = (config.strategy.servers or 1) if config.strategy.name == "server" else 0
    if serving >= size:
        raise UsageError(
            f"strategy.servers={serving} of {size} rank{'s' * (size > 1)}: no rank is left to compute gradients; start more "
            "ranks than servers"
        )
    return size - serving


def model_shape(config: Config, vocab_size: int) -> Shape:
    """The model's shape with its defaults filled in; vocab_size: of the tokenizer. A user's own model is made and tried.
    UsageError where the model has fewer tokens, and for one that cannot be trained. Independent."""
    m = config.model
    if m.vocab_size and m.vocab_size < vocab_size:
        raise UsageError(
            f"model.vocab_size={m.vocab_size}, but the tokenizer of {config.data.path} has {vocab_size} tokens: some would have "
            "no row in the embedding. Prepare the text with the model's own tokenizer, or leave model.vocab_size out"
        )
    vocab_size = m.vocab_size or vocab_size
    if m.kind == "lstm":
        return LSTMShape(vocab_size, m.num_layers, m.model_dim, m.seq_len, m.dropout, m.tie_embeddings)
    if m.kind != "transformer":
        plain, settings = asdict(Config().model), asdict(m)
        return own.shape_of(m.kind, settings, {k: v for k, v in settings.items() if v != plain[k]}, vocab_size, config.train.seed)
    return TransformerShape(
        vocab_size, m.num_layers, m.num_heads, m.num_kv_heads or m.num_heads, m.model_dim,
        m.hidden_dim or default_hidden_dim(m.model_dim), m.seq_len, m.dropout, m.tie_embeddings, m.rope_theta,
        m.norm_eps, m.head_dim, m.rope_scaling,
    )


def resolve(config: Config, steps_per_epoch: int, lanes: Lanes, threads: int, device: torch.device, dtype: torch.dtype) -> Config:
    """The config with nothing left open: what is printed, saved and compared on resume. UsageError. Pure."""
    check_shards(config.mesh.shard)
    t, m = config.train, config.model
    steps = t.steps or 300
    if t.tokens:
        steps = -(-t.tokens // (t.global_batch * m.seq_len))
    elif t.epochs:
        steps = max(1, round(t.epochs * steps_per_epoch))
    warmup = config.optim.warmup_steps
    settings = {key: value for key, _, value in fields_of(config)}
    outer_lr, outer_momentum = methods.outer(settings)
    try:
        every, meet = methods.rhythm(settings, steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config.with_values(
        strategy=methods.own(
            kind_of(config), sync_every=every, meet_every=meet, servers=config.strategy.servers or 1, outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        ),
        model={"num_kv_heads": m.num_kv_heads or m.num_heads, "hidden_dim": m.hidden_dim or default_hidden_dim(m.model_dim)}
        if m.kind == "transformer" else {},
        train={
            "steps": steps, "tokens": 0, "epochs": 0.0, "lanes": lanes.num_lanes, "threads": threads,
            "device": device.type, "dtype": str(dtype).removeprefix("torch."),
            "eval_every": -(-t.eval_every // meet) * meet,  # at a meeting
            "save_every": -(-t.save_every // meet) * meet if t.save_every > 0 else t.save_every,
        },
        optim={"warmup_steps": min(100, steps // 10) if warmup < 0 else warmup},
        comm={"reducer": resolve_reducer(config), "ratio": methods.ratio(settings)}
        # an overlap of its own: a thread that reduced during backward would sum what is not to be summed yet
        | ({"overlap": "none"} if kind_of(config) != "synchronous" or config.mesh.shard >= 2 else {}),
    )


def set_determinism(device: torch.device, wanted: bool) -> None:
    """On CUDA, choose kernels whose bits repeat. Must come before the first cuBLAS call. Independent."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)


def fingerprint(config: Config, device: torch.device) -> dict[str, Any]:
    """What the bits depend on besides data and settings: kept in every checkpoint, a change is said in one line. Independent."""
    return {
        "threads": config.train.threads,
        "dtype": config.train.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compile": config.train.compile,
        "deterministic": config.train.deterministic,
        "reducer": config.comm.reducer,
        "tp": config.mesh.tp,
        "sequence": config.mesh.sequence,
        "stages of tied embeddings": config.mesh.pp if config.model.tie_embeddings else 1,
        "compress": config.comm.compress,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "blas": os.environ.get("MKL_CBWR", ""),
    }


def versions() -> dict[str, str]:
    """What every rank must have the same of. Independent."""
    return {
        "mpidp": mpidp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "mpi4py": mpi4py.__version__,
        "MPI": MPI.Get_library_version().split("\n")[0].strip("\x00 "),
    }


def parameters_told(named: list[tuple[str, torch.nn.Parameter]]) -> dict[str, str]:
    """What every rank's parameters must have in common. Independent."""
    told = {f"parameter {i}": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(named)}
    return {"parameters": str(len(named)), **told}


def agree(comm: MPI.Intracomm, facts: dict[str, str]) -> None:
    """UsageError on every rank, naming what differs and where, unless all ranks hold the same facts. Collective over comm."""
    everyone = comm.allgather(facts)
    different = [
        f"{name}: rank 0 has {everyone[0].get(name)}, rank {rank} has {theirs.get(name)}"
        for name in everyone[0]
        for rank, theirs in enumerate(everyone)
        if theirs.get(name) != everyone[0].get(name)
    ]
    if different:
        raise UsageError.on_every_rank(
            "the ranks do not agree, so they would not train one model: "
            + "; ".join(different[:5])
            + ". Give all nodes the same environment, configuration and data (a shared folder, or the same copy)"
        )
