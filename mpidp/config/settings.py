"""All settings, as one frozen dataclass per section. Each field has a default, a description, a unit and limits.

The section `model` is defined in model_settings.py. rules.py and schema.py check which settings can be combined. This module
imports neither torch nor MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIXED = "fixed"  # when a run resumes, a change is rejected
FREE = "free"  # when a run resumes, a change is accepted


def setting(
    default: Any, text: str, unit: str = "", choices: Sequence[str] = (), low: float | None = None, high: float | None = None,
    resume: str = FREE, methods: Sequence[str] = (), auto: bool = False,
) -> Any:
    """Return a dataclass field whose metadata contain the setting's limits and its description for --help.

    `low`, `high`: limits of the value, both included. `resume`: FIXED if the setting must not change when a run resumes, else
    FREE. `methods`: for the settings strategy.*, the training methods that use the setting. "quorum" means
    strategy.name=synchronous with strategy.quorum below 1. `auto`: whether the value 0 may be written as auto.
    """
    about = {
        "text": text, "unit": unit, "choices": tuple(choices), "low": low, "high": high, "resume": resume,
        "methods": tuple(methods), "auto": auto,
    }
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class DataSettings:
    """Settings data.*: the training data."""

    path: str = setting(
        "shards/stdlib", "folder of shards, or s3://bucket/prefix; the default corpus is prepared if shards/stdlib is missing",
        "path",
    )
    cache_dir: str = setting("", "local folder that caches parts of remote shards; empty: in the temporary folder", "path")
    cache_gb: float = setting(10.0, "largest size of cache_dir on each node", "10^9 bytes", low=0.05)
    retry_seconds: float = setting(300.0, "how long to retry a failed request to a server", "s", low=0.0)
    verify: str = setting(
        "auto", "check the shards' checksums before training, not only sizes and headers; auto: if this takes under a second", "",
        ("auto", "true", "false"),
    )
    order: str = setting("shuffled", "order of the training windows", "", ("shuffled", "sequential"), resume=FIXED)
    resident: str = setting("auto", "keep this rank's tokens in GPU memory; auto: if they fit", "", ("auto", "true", "false"))
    documents: str = setting(
        "auto", "joined: attention crosses the ends of documents; apart: attention stays within a document; auto: apart if the "
        "shards contain packed rows, else joined", "",
        ("auto", "joined", "apart"), resume=FIXED,
    )


@dataclass(frozen=True)
class TrainSettings:
    """Settings train.*: length of training, batch, device, evaluation and checkpoints."""

    init_from: str = setting(
        "", "take model and initial weights from a run or a Hugging Face folder (docs/huggingface.md)", "path", resume=FIXED,
    )
    steps: int = setting(0, "number of parameter updates; 0: computed from tokens or epochs, or 300 if both are 0", "steps",
                         low=0)
    tokens: int = setting(0, "train for this many tokens instead of steps; 0: off", "tokens", low=0)
    epochs: float = setting(0.0, "train for this many passes over the data instead of steps; 0: off", "epochs", low=0.0)
    target_loss: float = setting(0.0, "stop when val_loss is at most this value; 0: off", "nats/token", low=0.0)
    patience: int = setting(0, "stop after this many evaluations without a better val_loss; 0: off", "evaluations", low=0)
    global_batch: int = setting(16, "sequences per step, over all ranks", "sequences", low=1, resume=FIXED)
    micro_batch: int = setting(2, "sequences per forward pass; auto (or 0): chosen by a short measurement when the run begins",
                               "sequences", low=0, resume=FIXED, auto=True)
    lanes: int = setting(0, "number of lanes, the sequences of micro-batches that are divided among ranks; 0: one lane per "
                         "micro-batch, at most 64", "lanes", low=0, resume=FIXED)
    seed: int = setting(
        1337, "random seed for initial weights, data order and dropout", "", low=0, high=2**63 - 1, resume=FIXED
    )
    device: str = setting("auto", "device; auto: cuda if available", "", ("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto", "precision of matrix products; auto: bfloat16 if the GPU supports it, else float32", "",
        ("auto", "float32", "bfloat16"),
    )
    compile: bool = setting(False, "compile each block with torch.compile (needs a C++ compiler)", "bool")
    recompute: bool = setting(False, "activation checkpointing: store only each block's input and recompute the rest", "bool")
    loss: str = setting(
        "auto", "whole: compute the loss from all logits at once; chunked: from the logits of some positions at a time, with "
                "less memory; auto: chunked if the logits are large", "", ("auto", "whole", "chunked"), resume=FIXED,
    )
    deterministic: bool = setting(True, "on CUDA, use only deterministic kernels", "bool")
    threads: int = setting(0, "CPU threads per rank; 0: the cores of the node, divided by its ranks", "threads", low=0)
    eval_every: int = setting(100, "steps between evaluations on the validation split; 0: only at the end", "steps", low=0)
    eval_tokens: int = setting(65536, "tokens of the validation split per evaluation; 0: all", "tokens", low=0)
    eval_tasks: str = setting("", "tasks of lm-eval for each evaluation, for example arc_easy,hellaswag (docs/use.md)", "names")
    eval_tasks_dir: str = setting("", "folder with task files (.yaml) for eval_tasks", "path")
    eval_tasks_limit: int = setting(0, "number of items to evaluate in each task of eval_tasks; 0: all", "items", low=0)
    save_every: int = setting(100, "steps between checkpoints; 0: only at the end; -1: chosen by measured cost",
                              "steps", low=-1)
    balance: str = setting(
        "even", "how lanes (sequences of micro-batches) are divided among ranks: evenly, by measured speed, or by work stealing",
        "", ("even", "measured", "steal"),
    )
    audit_every: int = setting(0, "steps between checks for silent errors (compare replicas, recompute some gradients); 0: off",
                               "steps", low=0)
    noise_every: int = setting(0, "steps between measurements of the gradient noise scale; 0: off", "steps", low=0)
    spike: float = setting(
        0.0, "skip a batch whose gradient norm exceeds this multiple of the median of the last 32 norms; 0: off", "", low=0.0,
    )
    max_skipped: int = setting(20, "return to the last checkpoint after this many skipped batches in a row", "steps", low=1)


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings optim.*: the optimizer and its schedule."""

    name: str = setting(
        "adamw", "optimizer, as in torch.optim; normuon: Muon with a second moment per row", "",
        ("adamw", "adam", "sgd", "muon", "normuon"), resume=FIXED,
    )
    schedule: str = setting("cosine", "learning rate schedule after warmup", "", ("cosine", "linear", "constant", "wsd"))
    lr: float = setting(3e-3, "peak learning rate", "", low=0.0)
    min_lr: float = setting(0.0, "learning rate at the end of the schedule, after the last step", "", low=0.0)
    warmup_steps: int = setting(-1, "steps of linear warmup; -1: min(100, steps / 10)", "steps", low=-1)
    weight_decay: float = setting(0.1, "weight decay of matrices, as in torch.optim (adamw, adam, muon, normuon)", "", low=0.0)
    beta1: float = setting(0.9, "decay of the first moment; momentum of sgd", "", low=0.0, high=0.9999999)
    beta2: float = setting(0.99, "decay of the second moment", "", low=0.0, high=0.9999999)
    clip: float = setting(1.0, "maximum gradient norm (clipping); 0: off", "", low=0.0)
    cautious_decay: bool = setting(
        False, "apply weight decay only to elements that the update moves towards 0 (adamw, muon, normuon)", "bool",
    )
    momentum_warmup: int = setting(
        0, "muon, normuon: steps over which the momentum rises from 0.85 to 0.95; 0: it is always 0.95", "steps", low=0,
    )
    freeze: str = setting("", "parameters that are not trained, for example embedding.*,blocks.0.*", "patterns", resume=FIXED)


@dataclass(frozen=True)
class StrategySettings:
    """Settings strategy.*: how ranks synchronize. The argument `methods` names the methods that use a setting."""

    name: str = setting(
        "synchronous", "training strategy (docs/methods.md)", "", ("synchronous", "delayed", "local", "server"), resume=FIXED,
    )
    quorum: float = setting(
        1.0, "synchronous: update when the gradients of this share of the lanes (sequences of micro-batches) have arrived; late "
        "gradients are added later", "of the lanes", low=0.0, high=1.0, resume=FIXED, methods=("synchronous",),
    )
    sync_every: int = setting(
        0, "local: steps between averages; 0: automatic (50 with group=all, otherwise 1)", "steps", low=0, resume=FIXED,
        methods=("local",),
    )
    meet_every: int = setting(
        0, "all methods but synchronous: steps between synchronizations of all ranks; 0: automatic", "steps", low=0, resume=FIXED,
        methods=("delayed", "local", "server", "quorum"),
    )
    staleness: int = setting(
        1, "delayed, quorum: maximum delay of a gradient; server with mode=ssp: maximum lead of a worker", "steps", low=0,
        resume=FIXED, methods=("delayed", "server", "quorum"),
    )
    compensation: float = setting(
        0.0, "delayed: factor of delay compensation (docs/equations.md); 0: off", "", low=0.0, resume=FIXED, methods=("delayed",),
    )
    group: str = setting(
        "all", "local: ranks that average with each other", "", ("all", "node", "rotating", "pairs", "exponential"), resume=FIXED,
        methods=("local",),
    )
    group_size: int = setting(2, "local with group=rotating: size of a group", "ranks", low=2, resume=FIXED, methods=("local",))
    outer_lr: float = setting(
        -1.0, "local with group=all: outer learning rate (1 with outer_momentum=0 is plain averaging); -1: automatic (1 with "
        "topk or randomk, else 0.7)", "", low=-1.0, methods=("local",),
    )
    outer_momentum: float = setting(
        -1.0, "local with group=all: outer Nesterov momentum; -1: automatic (0 with topk or randomk, else 0.5 with overlap, else "
        "0.7)", "", low=-1.0, high=0.9999999, methods=("local",),
    )
    overlap: bool = setting(
        False, "local with group=all: overlap each average with training and apply it at the next average", "bool", resume=FIXED,
        methods=("local",),
    )
    servers: int = setting(0, "server: number of servers, which are the last ranks; 0: one server", "ranks", low=0,
                           methods=("server",))
    mode: str = setting(
        "async", "server: how servers wait for workers", "", ("sync", "async", "ssp"), resume=FIXED, methods=("server",),
    )
    replay: str = setting(
        "", "server, quorum: apply gradients in the order recorded in this metrics.jsonl", "path", methods=("server", "quorum"),
    )
    fragments: int = setting(
        1, "local with group=all: number of parts of the model, which are averaged in turn", "", low=1, resume=FIXED,
        methods=("local",),
    )


@dataclass(frozen=True)
class CommSettings:
    """Settings comm.*: how gradients are reduced, compressed and sent."""

    reducer: str = setting(
        "auto", "gradient reduction; auto: tree (bit-identical on any number of ranks) for synchronous training without "
        "compression, else allreduce", "",
        ("auto", "tree", "allreduce", "naive", "root"),
    )
    compress: str = setting(
        "none", "gradient compression, with error feedback", "",
        ("none", "bf16", "fp16", "int8", "int4", "int2", "onebit", "topk", "randomk", "powersgd"),
    )
    ratio: float = setting(
        0.0, "share of values that topk and randomk send; 0: automatic (0.01 for topk, or 0.03 with local; 0.1 for randomk)",
        "of all values", low=0.0, high=1.0,
    )
    ratio_warmup: int = setting(0, "steps (local: averages) in which the ratio decreases from 1 to comm.ratio", "steps", low=0)
    momentum: float = setting(
        0.0, "topk, randomk: momentum on each rank before compression, instead of the momentum of sgd; 0: off", "", low=0.0,
        high=0.9999999,
    )
    rank: int = setting(4, "powersgd: rank of the approximation", "", low=1)
    transport: str = setting(
        "auto", "use a shared memory window or MPI messages within a node; auto: window if shared memory has enough space", "",
        ("auto", "window", "messages"),
    )
    copies: str = setting(
        "auto", "copies of weights and optimizer state: one per rank, or one per node in the shared memory window", "",
        ("auto", "node", "rank"),
    )
    overlap: str = setting(
        "auto", "how gradients are reduced during backward; auto: the fastest, measured at the start", "",
        ("auto", "thread", "poll", "none"),
    )
    bucket_mb: float = setting(4.0, "size of a gradient bucket", "MiB", low=0.001)
    gpu: str = setting(
        "auto", "how CUDA gradients are reduced; device: by GPU-aware MPI; staged: by MPI, through host memory; nccl: by NCCL; "
        "auto: device if a test succeeds, else staged", "", ("auto", "device", "staged", "nccl"),
    )


@dataclass(frozen=True)
class MeshSettings:
    """Settings mesh.*: the mesh of dp x pp x tp ranks that train one model (docs/parallel.md)."""

    tp: int = setting(1, "tensor parallelism: ranks that share each layer", "ranks", low=1)
    pp: int = setting(1, "pipeline parallelism: number of stages", "stages", low=1)
    dp: int = setting(0, "data parallelism: replicas of pp x tp ranks each; 0: ranks / (pp x tp)", "replicas", low=0)
    interleave: int = setting(1, "interleaved pipeline: chunks of layers per stage; more chunks make a smaller bubble", "chunks",
                              low=1)
    sequence: bool = setting(False, "sequence parallelism: divide the positions of norms and residuals among the tp ranks")
    shard: int = setting(
        0, "what is divided among replicas; 0: nothing; 1: optimizer state; 2: also gradients; 3: also parameters", "level",
        low=0, high=3,
    )


@dataclass(frozen=True)
class RunSettings:
    """Settings run.*: the folder of the run, resuming, hangs and the time limit."""

    dir: str = setting("runs/default", "folder of the run: config, metrics and checkpoints", "path")
    resume: str = setting(
        "auto", "auto: resume from the newest valid checkpoint, if any; must: fail if there is none; never: start a new run", "",
        ("auto", "never", "must"),
    )
    keep: int = setting(3, "number of checkpoints to keep", "", low=1)
    mirror: str = setting("", "address to which checkpoints are copied, for example s3://bucket/runs/NAME", "path")
    hang_seconds: float = setting(
        60.0, "end the job with exit code 6 if no rank makes progress for this time and for as long as 20 usual steps take; "
        "0: off", "s", low=0.0,
    )
    tries: int = setting(3, "maximum number of successive starts from the same checkpoint", "", low=1)
    stop_early_seconds: float = setting(
        120.0, "save a checkpoint and exit with code 75 this long before the job's time limit; 0: off", "s", low=0.0,
    )


@dataclass(frozen=True)
class FaultSettings:
    """Settings faults.*: recovery from failed ranks."""

    min_ranks: int = setting(1, "with ULFM: continue after failures if at least this many ranks remain", "ranks", low=1)
    respawn: bool = setting(False, "with ULFM: start new ranks to replace failed ranks, if the launcher supports it", "bool")


@dataclass(frozen=True)
class MetricsSettings:
    """Settings metrics.*: what is recorded in addition to metrics.jsonl (docs/report.md)."""

    timeline: str = setting("", "steps FIRST:LAST to trace on all ranks, written to RUN/timeline.json; empty: none", "steps")
    kernels: bool = setting(False, "also trace kernels with torch.profiler in the steps of timeline, one file per rank", "bool")
    track: str = setting("", "also send metrics to trackers: trackio,wandb,mlflow,tensorboard (docs/tracking.md)", "names")
    project: str = setting("mpidp", "project (mlflow: experiment) of the run in the trackers")
    tags: str = setting("", "tags of the run in the trackers", "names")
    tensorboard: bool = setting(False, "earlier spelling of metrics.track=tensorboard", "bool")
    energy: bool = setting(True, "read the energy counters of CPUs (RAPL) and GPUs (NVML), if available", "bool")


@dataclass(frozen=True)
class EnergySettings:
    """Settings energy.*: the carbon intensity of electricity and the price of a node-hour, for mpidp.report."""

    grams_per_kwh: float = setting(0.0, "carbon intensity of your electricity (CO2e), for mpidp.report; 0: unknown", "g/kWh",
                                   low=0.0)
    price_per_node_hour: float = setting(0.0, "price of a node-hour in your currency, for mpidp.report; 0: unknown", "", low=0.0)
