"""Fills in the automatic values of a config: threads, device, precision, steps, model shape."""

from __future__ import annotations

from dataclasses import asdict

import torch

from mpidp.config.defaults import kind, known_settings, outer, ratio, sync_intervals
from mpidp.config.model_settings import automatic, transformer_shape
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model import own
from mpidp.model.shape import LSTMShape, Shape
from mpidp.runtime.environment import launched_with_ulfm


def check_shards(level: int) -> None:
    """Raise UsageError if `level` (mesh.shard) is above 0 and the job was started with ULFM, because the shard of a failed
    rank would be lost. Independent."""
    if level and launched_with_ulfm():
        raise UsageError(
            f"mesh.shard={level} is not supported with mpirun --with-ft ulfm: the shard of a failed rank would be lost, and the "
            "other ranks could not continue. Start without --with-ft, or set mesh.shard=0. Without --with-ft, a failure ends the "
            "job, and the same command resumes from the last checkpoint"
        )


def resolve_reducer(config: Config) -> str:
    """Return the name of the reducer. The value auto means tree for synchronous training without compression, and allreduce
    otherwise. Pure."""
    if config.comm.reducer != "auto":
        return config.comm.reducer
    plain = kind_of(config) == "synchronous" and config.comm.compress == "none"
    return "tree" if plain else "allreduce"


def kind_of(config: Config) -> str:
    """Return the method that the settings strategy.* select. Pure."""
    return kind(config.strategy.name, config.strategy.quorum)


def workers(config: Config, size: int) -> int:
    """Return the number of ranks that compute gradients. These are all `size` ranks except parameter servers. Raises UsageError
    if all ranks are servers. Pure."""
    serving = (config.strategy.servers or 1) if config.strategy.name == "server" else 0
    if serving >= size:
        raise UsageError(
            f"strategy.servers={serving}, but the job has {size} rank{'s' * (size > 1)}, so no rank remains to compute "
            "gradients. Start more ranks than servers"
        )
    return size - serving


def model_shape(config: Config, vocab_size: int) -> Shape:
    """Return the model's shape. Automatic values are filled in. A user's own model is also created and tested.

    `vocab_size`: number of tokens in the tokenizer. Raises UsageError if model.vocab_size is smaller than this number, or if the
    model cannot be trained. Independent."""
    m = config.model
    if m.vocab_size and m.vocab_size < vocab_size:
        raise UsageError(
            f"model.vocab_size={m.vocab_size}, but the tokenizer of {config.data.path} has {vocab_size} tokens, which do "
            "not fit in the embedding. " + (
                f"Set model.vocab_size={vocab_size} to add {vocab_size - m.vocab_size} rows, which start as the mean of the "
                "others, or prepare the data with the model's tokenizer" if config.train.init_from
                else "Prepare the data with a smaller tokenizer, or leave model.vocab_size at 0"
            )
        )
    vocab_size = m.vocab_size or vocab_size
    if m.kind == "lstm":
        return LSTMShape(vocab_size, m.num_layers, m.model_dim, m.seq_len, m.dropout, m.tie_embeddings)
    if m.kind != "transformer":
        plain, settings = asdict(Config().model), asdict(m)
        return own.shape_of(m.kind, settings, {k: v for k, v in settings.items() if v != plain[k]}, vocab_size, config.train.seed)
    return transformer_shape(m, vocab_size)


def resolve(config: Config, steps_per_epoch: int, lanes: Lanes, threads: int, device: torch.device, dtype: torch.dtype) -> Config:
    """Return the config with all automatic values filled in. `device`, `dtype`: where and in which precision the run computes.

    Raises UsageError if sharding is combined with ULFM. Pure."""
    check_shards(config.mesh.shard)
    t, m = config.train, config.model
    steps = t.steps or 300
    if t.tokens:
        steps = -(-t.tokens // (t.global_batch * m.seq_len))
    elif t.epochs:
        steps = max(1, round(t.epochs * steps_per_epoch))
    warmup = config.optim.warmup_steps
    settings = config.flat()
    outer_lr, outer_momentum = outer(settings)
    every, meet = sync_intervals(settings)
    return config.with_values(
        strategy=known_settings(
            kind_of(config), sync_every=every, meet_every=meet, servers=config.strategy.servers or 1, outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        ),
        model=automatic(m) if m.kind == "transformer" else {},
        train={
            "steps": steps, "tokens": 0, "epochs": 0.0, "lanes": lanes.num_lanes, "threads": threads,
            "device": device.type, "dtype": str(dtype).removeprefix("torch."),
            "eval_every": -(-t.eval_every // meet) * meet,  # rounded up to a step at which all ranks synchronize
            "save_every": -(-t.save_every // meet) * meet if t.save_every > 0 else t.save_every,
        },
        optim={"warmup_steps": min(100, steps // 10) if warmup < 0 else warmup},
        comm={"reducer": resolve_reducer(config), "ratio": ratio(settings)}
        # comm.overlap applies only to synchronous training with whole gradients
        | ({"overlap": "none"} if kind_of(config) != "synchronous" or config.mesh.shard >= 2 else {}),
    )
