"""Every setting, by section: frozen dataclasses, each field with a sentence, a unit and a default with which the command runs.

Which go together is config.py's business. Nothing here imports torch or MPI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIXED = "fixed"  # on resume: a change is refused
FREE = "free"  # on resume: a change is taken


def setting(
    default: Any, text: str, unit: str = "", choices: Sequence[str] = (), low: float | None = None, high: float | None = None,
    resume: str = FREE,
) -> Any:
    """A field with what --help says of it, its limits, and whether it may change on resume."""
    about = {"text": text, "unit": unit, "choices": tuple(choices), "low": low, "high": high, "resume": resume}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class DataSettings:
    """What is trained on."""

    path: str = setting("shards/stdlib", "folder of shards; the default one is prepared when it is not there", "path")
    verify: bool = setting(False, "check every checksum before step 1, not only existence, size and header", "bool")
    order: str = setting("shuffled", "order of training windows", "", ("shuffled", "sequential"), resume=FIXED)
    resident: str = setting("auto", "keep this rank's tokens on the GPU", "", ("auto", "true", "false"))
    documents: str = setting(
        "auto", "apart: attention stays inside each document; auto: apart in shards whose rows were packed, else joined", "",
        ("auto", "joined", "apart"), resume=FIXED,
    )


@dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

    kind: str = setting("transformer", "transformer, lstm, or your own: MODULE:FACTORY (docs/library.md)", resume=FIXED)
    options: str = setting("", "your own model's further arguments: NAME=VALUE,...", resume=FIXED)
    num_layers: int = setting(4, "blocks", "layers", low=1, resume=FIXED)
    num_heads: int = setting(4, "attention heads; must divide model_dim", "heads", low=1, resume=FIXED)
    num_kv_heads: int = setting(0, "key-value heads; must divide num_heads; 0: num_heads", "heads", low=0, resume=FIXED)
    model_dim: int = setting(128, "width", "channels", low=2, resume=FIXED)
    hidden_dim: int = setting(0, "width of the SwiGLU; 0: 8/3 model_dim, rounded up to 64", "channels", low=0, resume=FIXED)
    seq_len: int = setting(128, "context", "tokens", low=1, resume=FIXED)
    dropout: float = setting(0.0, "share dropped of embeddings and branches", "", low=0.0, high=0.99, resume=FIXED)
    tie_embeddings: bool = setting(False, "one matrix for embedding and head", "bool", resume=FIXED)
    rope_theta: float = setting(10000.0, "base of the rotary angles", "", low=1.0, resume=FIXED)
    rope_scaling: str = setting("", "llama3:FACTOR,LOW,HIGH,ORIGINAL: slower rotations for longer contexts", "", resume=FIXED)
    norm_eps: float = setting(1e-5, "added to the mean square in norms", "", low=0.0, resume=FIXED)
    head_dim: int = setting(0, "width of a head; 0: model_dim / num_heads", "channels", low=0, resume=FIXED)
    vocab_size: int = setting(0, "rows of embedding and head; 0: as many as the tokenizer has", "tokens", low=0, resume=FIXED)
    lora_rank: int = setting(0, "train low-rank adapters of this rank, and nothing else; 0: off", "", low=0, resume=FIXED)
    lora_alpha: float = setting(16.0, "what an adapter adds is multiplied by this / lora_rank", "", low=0.0, resume=FIXED)
    lora_targets: str = setting("q,k,v,o,gate,up,down", "the layers that have adapters", "names", resume=FIXED)


@dataclass(frozen=True)
class TrainSettings:
    """How long, in which pieces, on what."""

    init_from: str = setting(
        "", "start with the weights of a run or of a Hugging Face folder, and have its model (docs/huggingface.md)", "path",
        resume=FIXED,
    )
    steps: int = setting(0, "parameter updates; 0: by tokens or epochs, else 300", "steps", low=0)
    tokens: int = setting(0, "stop after this many instead of steps; 0: off", "tokens", low=0)
    epochs: float = setting(0.0, "stop after this many passes over the data instead of steps; 0: off", "epochs", low=0.0)
    target_loss: float = setting(0.0, "stop when val_loss is at most this; 0: off", "nats/token", low=0.0)
    patience: int = setting(0, "stop after this many evaluations without a better val_loss; 0: off", "evaluations", low=0)
    global_batch: int = setting(16, "sequences a step, over all ranks", "sequences", low=1, resume=FIXED)
    micro_batch: int = setting(2, "sequences a forward pass", "sequences", low=1, resume=FIXED)
    lanes: int = setting(0, "units that ranks share out; 0: one a micro-batch, up to 64", "lanes", low=0, resume=FIXED)
    seed: int = setting(1337, "of initial weights, data order and dropout", "", low=0, resume=FIXED)
    device: str = setting("auto", "auto: cuda where there is one", "", ("auto", "cpu", "cuda"))
    dtype: str = setting("auto", "of matrix products; auto: bfloat16 on CUDA that has it", "", ("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "torch.compile each block (needs a C++ compiler)", "bool")
    recompute: bool = setting(False, "keep only what goes into a block, and compute the rest again in backward", "bool")
    deterministic: bool = setting(True, "on CUDA, only kernels that repeat their bits", "bool")
    threads: int = setting(0, "CPU threads a rank; 0: cores / ranks of the node", "threads", low=0)
    eval_every: int = setting(100, "between evaluations on the validation split; 0: at the end alone", "steps", low=0)
    eval_tokens: int = setting(65536, "of the validation split each time; 0: all", "tokens", low=0)
    save_every: int = setting(100, "between checkpoints; 0: at the end alone; -1: by their cost", "steps", low=-1)
    balance: str = setting("even", "how ranks share out the lanes", "", ("even", "measured", "steal"))
    audit_every: int = setting(0, "between comparisons of replicas and of lanes computed twice; 0: off", "steps", low=0)
    noise_every: int = setting(0, "between measurements of the gradient noise scale; 0: off", "steps", low=0)
    spike: float = setting(0.0, "skip a batch whose gradient norm is so many times the usual (median of 32); 0: off", "", low=0.0)
    max_skipped: int = setting(20, "skipped steps in a row that take the run back to its last checkpoint", "steps", low=1)


@dataclass(frozen=True)
class OptimizerSettings:
    """How gradients become updates."""

    name: str = setting("adamw", "torch's own", "", ("adamw", "adam", "sgd", "muon"), resume=FIXED)
    schedule: str = setting("cosine", "of the learning rate after warm-up", "", ("cosine", "linear", "constant", "wsd"))
    lr: float = setting(3e-3, "largest learning rate", "", low=0.0)
    min_lr: float = setting(0.0, "learning rate at the last step", "", low=0.0)
    warmup_steps: int = setting(-1, "linear warm-up; -1: min(100, steps / 10)", "steps", low=-1)
    weight_decay: float = setting(0.1, "of matrices (adamw, adam, muon: torch's meaning)", "", low=0.0)
    beta1: float = setting(0.9, "first moment; momentum of sgd", "", low=0.0, high=0.9999999)
    beta2: float = setting(0.99, "second moment", "", low=0.0, high=0.9999999)
    clip: float = setting(1.0, "largest norm of the gradient; 0: off", "", low=0.0)
    freeze: str = setting("", "parameters that stay as they are: embedding.*,blocks.0.*", "patterns", resume=FIXED)


@dataclass(frozen=True)
class StrategySettings:
    """How ranks learn together."""

    name: str = setting(
        "synchronous", "how ranks learn together (docs/methods.md)", "", ("synchronous", "delayed", "local", "server"),
        resume=FIXED,
    )
    quorum: float = setting(
        1.0, "synchronous: a step goes on when this share has arrived, the rest joins a later one", "of the lanes", low=0.0,
        high=1.0, resume=FIXED,
    )
    sync_every: int = setting(0, "local: between averages; 0: 50, or 1 in a partial group", "steps", low=0, resume=FIXED)
    meet_every: int = setting(
        0, "where ranks do not meet at every step: between meetings; 0: automatic", "steps", low=0, resume=FIXED,
    )
    staleness: int = setting(
        1, "delayed, quorum: how late a gradient is applied, at most; server, mode=ssp: how far ahead a worker may be", "steps",
        low=0, resume=FIXED,
    )
    compensation: float = setting(0.0, "delayed: lambda of delay compensation; 0: off", "", low=0.0, resume=FIXED)
    group: str = setting(
        "all", "local: who averages with whom", "", ("all", "node", "rotating", "pairs", "exponential"), resume=FIXED,
    )
    group_size: int = setting(2, "local, group=rotating", "ranks", low=2, resume=FIXED)
    outer_lr: float = setting(
        -1.0, "local, group=all: of the outer step; 1 with outer_momentum=0: plain averaging; -1: by what is sent", "", low=-1.0,
    )
    outer_momentum: float = setting(
        -1.0, "local, group=all: Nesterov momentum of the outer step; -1: by what is sent", "", low=-1.0, high=0.9999999,
    )
    overlap: bool = setting(False, "local, group=all: begin an average, and apply it a round later", "bool", resume=FIXED)
    servers: int = setting(0, "server: ranks that serve, the last of the job; 0: one", "ranks", low=0)
    mode: str = setting("async", "server: what it waits for", "", ("sync", "async", "ssp"), resume=FIXED)
    replay: str = setting("", "server, quorum: metrics.jsonl of a run whose order of arrivals is repeated", "path")
    fragments: int = setting(1, "local, group=all: parts of the model that are averaged in turn", "", low=1, resume=FIXED)


@dataclass(frozen=True)
class CommSettings:
    """How gradients travel."""

    reducer: str = setting(
        "auto", "how gradients are added; auto: tree, the same bits at any number of ranks; allreduce with compression", "",
        ("auto", "tree", "allreduce", "naive", "root"),
    )
    compress: str = setting(
        "none", "what is sent of gradients; the rest comes later (error feedback)", "",
        ("none", "bf16", "fp16", "int8", "int4", "int2", "onebit", "topk", "randomk", "powersgd"),
    )
    ratio: float = setting(0.0, "sent by topk and randomk; 0: 0.01 (local: 0.03) and 0.1", "of all values", low=0.0, high=1.0)
    ratio_warmup: int = setting(0, "in which the ratio falls from 1 to that", "steps", low=0)
    momentum: float = setting(0.0, "of topk and randomk, on each rank, in place of sgd's; 0: off", "", low=0.0, high=0.9999999)
    rank: int = setting(4, "of powersgd's matrices", "", low=1)
    transport: str = setting("auto", "on a node; auto: window where there is room", "", ("auto", "window", "messages"))
    copies: str = setting("auto", "of weights and optimizer state; node: in the window", "", ("auto", "node", "rank"))
    overlap: str = setting("auto", "reduce during backward; auto: measured at start", "", ("auto", "thread", "poll", "none"))
    bucket_mb: float = setting(4.0, "gradient bucket", "MiB", low=0.001)
    gpu: str = setting(
        "auto", "how CUDA gradients reach MPI, auto: by a probe; nccl: between GPUs without it (run on one alone)", "",
        ("auto", "device", "staged", "nccl"),
    )


@dataclass(frozen=True)
class MeshSettings:
    """How the ranks share one model: dp x pp x tp of them (docs/parallel.md)."""

    tp: int = setting(1, "ranks that compute every layer together, each a part of it (tensor parallelism)", "ranks", low=1)
    pp: int = setting(1, "stages of whole layers, one after the other (pipeline parallelism)", "stages", low=1)
    dp: int = setting(0, "replicas, of pp x tp ranks each; 0: as many as there are ranks for", "replicas", low=0)
    interleave: int = setting(1, "times that each stage comes, with fewer layers each time: a smaller bubble", "chunks", low=1)
    sequence: bool = setting(False, "share out positions over the tp ranks, too, between branches: less memory")
    shard: int = setting(
        0, "what replicas hold a part of: 1: optimizer state; 2: and gradients; 3: and parameters", "level", low=0, high=3,
    )


@dataclass(frozen=True)
class RunSettings:
    """Where the run lives."""

    dir: str = setting("runs/default", "where config, metrics and checkpoints go", "path")
    resume: str = setting("auto", "go on from the newest valid checkpoint", "", ("auto", "never", "must"))
    keep: int = setting(3, "checkpoints kept", "", low=1)
    hang_seconds: float = setting(60.0, "longer than this, and than 20 steps, is a hang: the job ends (6); 0: off", "s", low=0.0)
    tries: int = setting(3, "starts in a row from the same step before the next is refused", "", low=1)
    stop_early_seconds: float = setting(120.0, "before the job's time limit: checkpoint, then exit 75; 0: off", "s", low=0.0)


@dataclass(frozen=True)
class FaultSettings:
    """What a run does about failures."""

    min_ranks: int = setting(1, "where the job can go on without dead ranks (ULFM): the fewest to go on with", "ranks", low=1)
    respawn: bool = setting(False, "new ranks take the place of dead ones, where the launcher can start them", "bool")


@dataclass(frozen=True)
class MetricsSettings:
    """What is recorded besides a line a step (docs/report.md)."""

    timeline: str = setting("", "steps FIRST:LAST whose spans on all ranks go to RUN/timeline.json; empty: none", "steps")
    kernels: bool = setting(False, "of these steps also torch.profiler's kernels, a file a rank", "bool")
    tensorboard: bool = setting(False, "scalars to RUN/tensorboard too (pip install 'mpidp[tensorboard]')", "bool")
    energy: bool = setting(True, "read the energy counters of CPUs (RAPL) and GPUs (NVML), where they can be read", "bool")


@dataclass(frozen=True)
class EnergySettings:
    """What joules and hours stand for; only you know."""

    grams_per_kwh: float = setting(0.0, "CO2e of your electricity, for mpidp.report; 0: not said", "g/kWh", low=0.0)
    price_per_node_hour: float = setting(0.0, "for mpidp.report, in your currency; 0: not said", "", low=0.0)
