"""Every setting: frozen dataclasses, each field with a sentence, a unit and a default with which the command runs.

A TOML file comes first, then `--section.key=value`. An unknown key or value is an error that names the nearest right one,
before MPI starts. Nothing here imports torch or MPI.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpidp.errors import UsageError

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
class Data:
    """What is trained on."""

    path: str = setting("shards/stdlib", "folder of shards; the default one is prepared when it is not there", "path")
    verify: bool = setting(False, "check every checksum before step 1, not only existence, size and header", "bool")
    order: str = setting("shuffled", "order of training windows", "", ("shuffled", "sequential"), resume=FIXED)
    resident: str = setting("auto", "keep this rank's tokens on the GPU", "", ("auto", "true", "false"))


@dataclass(frozen=True)
class Model:
    """What is trained."""

    kind: str = setting("transformer", "architecture", "", ("transformer",), resume=FIXED)
    num_layers: int = setting(4, "blocks", "layers", low=1, resume=FIXED)
    num_heads: int = setting(4, "attention heads; must divide model_dim", "heads", low=1, resume=FIXED)
    num_kv_heads: int = setting(0, "key-value heads; must divide num_heads; 0: num_heads", "heads", low=0, resume=FIXED)
    model_dim: int = setting(128, "width", "channels", low=2, resume=FIXED)
    hidden_dim: int = setting(0, "width of the SwiGLU; 0: 8/3 model_dim, rounded up to 64", "channels", low=0, resume=FIXED)
    seq_len: int = setting(128, "context", "tokens", low=1, resume=FIXED)
    dropout: float = setting(0.0, "share dropped of embeddings and branches", "", low=0.0, high=0.99, resume=FIXED)
    tie_embeddings: bool = setting(False, "one matrix for embedding and head", "bool", resume=FIXED)
    rope_theta: float = setting(10000.0, "base of the rotary angles", "", low=1.0, resume=FIXED)


@dataclass(frozen=True)
class Train:
    """How long, in which pieces, on what."""

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
    deterministic: bool = setting(True, "on CUDA, only kernels that repeat their bits", "bool")
    threads: int = setting(0, "CPU threads a rank; 0: cores / ranks of the node", "threads", low=0)
    eval_every: int = setting(100, "between evaluations on the validation split; 0: at the end alone", "steps", low=0)
    eval_tokens: int = setting(65536, "of the validation split each time; 0: all", "tokens", low=0)
    save_every: int = setting(100, "between checkpoints; 0: at the end alone", "steps", low=0)
    balance: str = setting("even", "how ranks share out the lanes", "", ("even", "measured", "steal"))
    audit_every: int = setting(0, "between comparisons of replicas and of lanes computed twice; 0: off", "steps", low=0)
    noise_every: int = setting(0, "between measurements of the gradient noise scale; 0: off", "steps", low=0)
    max_skipped: int = setting(20, "skipped steps in a row (gradients not finite) that end the run", "steps", low=1)


@dataclass(frozen=True)
class Optim:
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


@dataclass(frozen=True)
class Strategy:
    """How ranks learn together."""

    name: str = setting("synchronous", "how ranks learn together", "", ("synchronous",), resume=FIXED)


@dataclass(frozen=True)
class Comm:
    """How gradients travel."""

    reducer: str = setting(
        "auto", "how gradients are added; auto: tree, the same bits at any number of ranks", "",
        ("auto", "tree", "allreduce", "naive", "root"),
    )
    transport: str = setting("auto", "on a node; auto: window where there is room", "", ("auto", "window", "messages"))
    copies: str = setting("auto", "of weights and optimizer state; node: in the window", "", ("auto", "node", "rank"))
    overlap: str = setting("auto", "reduce during backward; auto: measured at start", "", ("auto", "thread", "poll", "none"))
    bucket_mb: float = setting(4.0, "gradient bucket", "MiB", low=0.001)
    gpu: str = setting("auto", "how CUDA gradients reach MPI; auto: by a probe", "", ("auto", "device", "staged"))


@dataclass(frozen=True)
class Run:
    """Where the run lives."""

    dir: str = setting("runs/default", "where config, metrics and checkpoints go", "path")
    resume: str = setting("auto", "go on from the newest valid checkpoint", "", ("auto", "never", "must"))
    keep: int = setting(3, "checkpoints kept", "", low=1)
    hang_seconds: float = setting(600.0, "a rank that waits longer prints its stacks and ends the job (6); 0: off", "s", low=0.0)


@dataclass(frozen=True)
class Config:
    """All sections. `Config()` is a run of the embedded corpus."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    strategy: Strategy = field(default_factory=Strategy)
    comm: Comm = field(default_factory=Comm)
    run: Run = field(default_factory=Run)

    def with_values(self, **sections: Mapping[str, Any]) -> Config:
        """A copy: config.with_values(train={"lanes": 8}). Values are trusted; checks are from_args's."""
        return dataclasses.replace(self, **{s: dataclasses.replace(getattr(self, s), **v) for s, v in sections.items()})


def fields_of(config: Config | None = None) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(section.key, field, value) of every setting, in order."""
    config = config or Config()
    for section in dataclasses.fields(Config):
        part = getattr(config, section.name)
        for f in dataclasses.fields(part):
            yield f"{section.name}.{f.name}", f, getattr(part, f.name)


def _nearest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.0)[0]


def _convert(key: str, raw: Any, about: dataclasses.Field[Any], where: str) -> Any:
    """A command-line word or a TOML value as the field's type, within its choices and limits."""
    meta = about.metadata
    kind = {"int": int, "float": float, "bool": bool, "str": str}[str(about.type)]
    try:
        if not isinstance(raw, (str, int, float)):
            raise ValueError
        if kind is bool:
            value: Any = {"true": True, "false": False}[str(raw).lower()]
        elif kind is str:
            value = str(raw).lower() if isinstance(raw, bool) else str(raw)
        elif isinstance(raw, bool):
            raise ValueError
        elif kind is int:
            number = float(raw)
            value = int(raw) if isinstance(raw, int) or str(raw).lstrip("+-").replace("_", "").isdigit() else int(number)
            if value != number and abs(number) < 2**53:
                raise ValueError
        else:
            value = float(raw)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError
    except (ValueError, KeyError, OverflowError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]
        raise UsageError(f"{where}: {key}={raw!r} must be {wanted}") from error
    if meta["choices"] and value not in meta["choices"]:
        near = _nearest(value, meta["choices"])
        raise UsageError(f"{where}: {key}={value!r} is not one of {', '.join(meta['choices'])}; did you mean {near!r}?")
    if (meta["low"] is not None and value < meta["low"]) or (meta["high"] is not None and value > meta["high"]):
        limits = f"at least {meta['low']}" if meta["high"] is None else f"from {meta['low']} to {meta['high']}"
        raise UsageError(f"{where}: {key}={value} must be {limits}")
    return value


def _assign(chosen: dict[str, Any], key: str, raw: Any, where: str) -> None:
    known = {name: about for name, about, _ in fields_of()}
    if key not in known:
        raise UsageError(f"{where}: there is no setting {key!r}; did you mean {_nearest(key, list(known))!r}? (--help lists all)")
    chosen[key] = _convert(key, raw, known[key], where)


def read_toml(path: Path) -> dict[str, Any]:
    """A configuration file as {section.key: value}, unchecked. UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a configuration that can be read ({error})") from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section!r} stands outside a section; write [section] and key = value below it")
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    return flat


def from_args(arguments: Sequence[str]) -> Config:
    """CONFIG.toml (at most one), then --section.key=value or --section.key value. UsageError. Independent."""
    chosen: dict[str, Any] = {}
    words = list(arguments)
    files = 0
    overrides: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, raw = word[2:].partition("=")
            if not equals:
                if not words:
                    raise UsageError(f"command line: --{key} has no value; write --{key}=VALUE")
                raw = words.pop(0)
            overrides.append((key, raw))
        else:
            files += 1
            if files > 1:
                raise UsageError(f"command line: a second configuration file {word!r}; give one, then --section.key=value")
            for key, value in read_toml(Path(word)).items():
                _assign(chosen, key, value, word)
    for key, raw in overrides:
        _assign(chosen, key, raw, "command line")
    sections: dict[str, dict[str, Any]] = {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return checked(Config().with_values(**sections))


def checked(config: Config) -> Config:
    """The same config once no setting contradicts another. UsageError. Independent."""
    model, train, optim, comm = config.model, config.train, config.optim, config.comm
    problems = []
    if train.global_batch < train.micro_batch:
        problems.append(f"train.global_batch={train.global_batch} is smaller than train.micro_batch={train.micro_batch}")
    num_micro_batches = -(-train.global_batch // train.micro_batch)
    if train.lanes > num_micro_batches:
        problems.append(f"train.lanes={train.lanes} is more than the {num_micro_batches} micro-batches of a step")
    if model.model_dim % model.num_heads or model.model_dim // model.num_heads % 2:
        problems.append(f"model.model_dim={model.model_dim} must be an even multiple of model.num_heads={model.num_heads}")
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        problems.append(f"model.num_kv_heads={model.num_kv_heads} must divide model.num_heads={model.num_heads}")
    if sum(map(bool, (train.steps, train.tokens, train.epochs))) > 1:
        problems.append("train.steps, train.tokens and train.epochs: give one of them")
    plain = {"train.balance": "even", "train.audit_every": 0, "train.noise_every": 0}
    needs_tree = [f"{key}={value}" for key, _, value in fields_of(config) if value != plain.get(key, value)]
    needs_tree += ["comm.transport=window"] * (comm.transport == "window") + ["comm.copies=node"] * (comm.copies == "node")
    if needs_tree and comm.reducer not in ("auto", "tree"):
        problems.append(f"{', '.join(needs_tree)}: works with comm.reducer=tree, not with comm.reducer={comm.reducer}")
    if train.balance == "steal" and comm.transport == "messages":
        problems.append("train.balance=steal takes lanes through a shared window, and comm.transport=messages forbids one")
    if train.balance == "steal" and comm.overlap in ("thread", "poll"):
        problems.append("comm.overlap needs to know a rank's last lane, and with train.balance=steal nobody does")
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr={optim.min_lr} is more than optim.lr={optim.lr}")
    if train.steps and optim.warmup_steps > train.steps:
        problems.append(f"optim.warmup_steps={optim.warmup_steps} is more than train.steps={train.steps}")
    if problems:
        raise UsageError("; ".join(problems))
    return config


def to_toml(config: Config) -> str:
    """The config as a file that from_args reads back to the same config."""
    lines: list[str] = []
    section = ""
    for key, _, value in fields_of(config):
        name, _, key = key.partition(".")
        if name != section:
            lines += ([""] if lines else []) + [f"[{name}]"]
            section = name
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"


def help_text(usage: str) -> str:
    """Every key with default, unit and meaning."""
    lines = [usage, "", "settings (--section.key=value; `*`: cannot change on resume)"]
    for key, about, default in fields_of():
        meta = about.metadata
        star = "*" if meta["resume"] == FIXED else " "
        choices = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
        unit = f" [{meta['unit']}]" if meta["unit"] else ""
        lines.append(f" {star} {key:<22} {json.dumps(default):<16} {meta['text']}{choices}{unit}")
    return "\n".join(lines)

