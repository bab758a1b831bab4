"""The configuration: all sections of settings, checks for contradictions, and TOML output.

command_line.py reads settings from files and arguments. This module imports neither torch nor MPI.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpidp.config import rules
from mpidp.config.model_settings import ModelSettings, shape_problems
from mpidp.config.settings import (
    CommSettings,
    DataSettings,
    EnergySettings,
    FaultSettings,
    MeshSettings,
    MetricsSettings,
    OptimizerSettings,
    RunSettings,
    StrategySettings,
    TrainSettings,
)
from mpidp.errors import UsageError
from mpidp.storage.address import address_problems


@dataclass(frozen=True)
class Config:
    """All sections of settings. `Config()` has the defaults, which train on shards/stdlib."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimizerSettings = field(default_factory=OptimizerSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    comm: CommSettings = field(default_factory=CommSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    run: RunSettings = field(default_factory=RunSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    energy: EnergySettings = field(default_factory=EnergySettings)
    given: tuple[str, ...] = field(default=(), compare=False)  # section.key of the settings that the user gives

    def with_values(self, **sections: Mapping[str, Any]) -> Config:
        """Return a copy with the given values, for example config.with_values(train={"lanes": 8}). The values are not checked."""
        return dataclasses.replace(self, **{s: dataclasses.replace(getattr(self, s), **v) for s, v in sections.items()})

    def flat(self) -> dict[str, Any]:
        """Return all settings as {section.key: value}. Pure."""
        return {key: value for key, _, value in fields_of(self)}


def fields_of(config: Config | None = None) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (section.key, field, value) for each setting, in order. The values are those of `config`, or the defaults if
    `config` is None."""
    config = config or Config()
    for section in dataclasses.fields(Config):
        part = getattr(config, section.name)
        for f in dataclasses.fields(part) if section.name != "given" else ():
            yield f"{section.name}.{f.name}", f, getattr(part, f.name)


def checked(config: Config) -> Config:
    """Check the config and return it unchanged. Raises UsageError if a setting is not valid, or if settings contradict each
    other. Independent."""
    model, train, optim, comm = config.model, config.train, config.optim, config.comm
    problems = []
    if train.global_batch < train.micro_batch:
        problems.append(f"train.global_batch={train.global_batch} is smaller than train.micro_batch={train.micro_batch}")
    num_micro_batches = -(-train.global_batch // (train.micro_batch or 1))  # 0 means auto
    if train.lanes > num_micro_batches:
        problems.append(f"train.lanes={train.lanes} is more than the {num_micro_batches} micro-batches of a step")
    shape_unknown = train.init_from and not model.vocab_size  # the shape is read from init_from later
    if model.kind == "transformer" and not shape_unknown:
        problems += shape_problems(model)
    if sum(map(bool, (train.steps, train.tokens, train.epochs))) > 1:
        problems.append("set only one of train.steps, train.tokens and train.epochs")
    problems += rules.problems(config.flat())
    for name in ("data.path", "run.mirror", "train.init_from"):
        problems += address_problems(name, config.flat()[name])
    plain = {"train.balance": "even", "train.audit_every": 0, "train.noise_every": 0}
    needs_tree = [f"{key}={value}" for key, _, value in fields_of(config) if value != plain.get(key, value)]
    needs_tree += ["comm.transport=window"] * (comm.transport == "window") + ["comm.copies=node"] * (comm.copies == "node")
    if needs_tree and comm.reducer not in ("auto", "tree"):
        problems.append(f"{', '.join(needs_tree)} cannot be combined with comm.reducer={comm.reducer}: use comm.reducer=tree")
    if comm.compress != "none" and (needs_tree or comm.reducer not in ("auto", "allreduce")):
        wrong = needs_tree + [f"comm.reducer={comm.reducer}"] * (comm.reducer not in ("auto", "allreduce"))
        problems.append(f"comm.compress={comm.compress} is not supported with {', '.join(wrong)}")
    if comm.compress not in ("topk", "randomk"):
        sparse = {"comm.ratio": comm.ratio, "comm.ratio_warmup": comm.ratio_warmup, "comm.momentum": comm.momentum}
        problems += [
            f"{key}={value} requires comm.compress=topk or randomk, not comm.compress={comm.compress}"
            for key, value in sparse.items() if value
        ]
    if train.balance == "steal" and comm.transport == "messages":
        problems.append("train.balance=steal needs a shared memory window, which comm.transport=messages disables")
    if train.balance == "steal" and comm.overlap in ("thread", "poll"):
        problems.append(f"comm.overlap={comm.overlap} cannot be combined with train.balance=steal: overlap requires that each "
                        "rank's last micro-batch is known before the step, but work stealing moves micro-batches during the step")
    if comm.gpu == "nccl":
        nccls = {"train.device": ("cpu",), "comm.reducer": ("root",), "comm.overlap": ("thread", "poll")}
        others = [f"{key}={value}" for key, _, value in fields_of(config) if value in nccls.get(key, ())]
        if others:
            problems.append(f"comm.gpu=nccl reduces gradients on the GPU and is not supported with {', '.join(others)}")
    if not train.eval_every:
        problems += [f"{stop} requires train.eval_every above 0, because it has no effect without evaluations during training"
                     for stop in stops_by_loss(config)]
    if not train.eval_tasks and (train.eval_tasks_dir or train.eval_tasks_limit):
        problems.append("train.eval_tasks_dir and train.eval_tasks_limit require train.eval_tasks")
    if train.eval_tasks and not all(name.strip() for name in train.eval_tasks.split(",")):
        problems.append(f"train.eval_tasks='{train.eval_tasks}' has an empty name: give names of tasks, separated by commas")
    if 0 < train.spike <= 1:
        problems.append(f"train.spike={train.spike} must be more than 1 (a multiple of the usual gradient norm), or 0 (off)")
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr={optim.min_lr} is more than optim.lr={optim.lr}")
    if train.steps and optim.warmup_steps > train.steps:
        problems.append(f"optim.warmup_steps={optim.warmup_steps} is more than train.steps={train.steps}")
    if problems:
        raise UsageError("; ".join(problems))
    return config


def stops_by_loss(config: Config) -> list[str]:
    """Return those settings, as KEY=VALUE, that can end the run early because of its validation loss. Pure."""
    values = {"train.target_loss": config.train.target_loss, "train.patience": config.train.patience}
    return [f"{key}={value}" for key, value in values.items() if value]


def to_toml(config: Config) -> str:
    """Return the config as TOML text. from_args() turns the text back into the same config."""
    lines: list[str] = []
    section = ""
    for key, _, value in fields_of(config):
        name, _, key = key.partition(".")
        if name != section:
            lines += ([""] if lines else []) + [f"[{name}]"]
            section = name
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"
