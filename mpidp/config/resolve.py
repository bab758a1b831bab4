"""From what a config leaves open to plain values: threads, device, precision, steps; and what the bits depend on."""

from __future__ import annotations

from dataclasses import asdict

import torch

from mpidp.config.defaults import kind, known_settings, outer, ratio, sync_intervals
from mpidp.config.schema import Config
from mpidp.data.lanes import Lanes
from mpidp.errors import UsageError
from mpidp.model import own
from mpidp.model.shape import LSTMShape, Shape, TransformerShape, default_hidden_dim
from mpidp.runtime.environment import launched_with_ulfm


def check_shards(level: int) -> None:
    """UsageError where ranks may die and the others are to go on: what a dead rank alone held is gone. Independent."""
    if level and launched_with_ulfm():
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
    return kind(config.strategy.name, config.strategy.quorum)


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
    settings = config.flat()
    outer_lr, outer_momentum = outer(settings)
    try:
        every, meet = sync_intervals(settings, steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config.with_values(
        strategy=known_settings(
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
        comm={"reducer": resolve_reducer(config), "ratio": ratio(settings)}
        # an overlap of its own: a thread that reduced during backward would sum what is not to be summed yet
        | ({"overlap": "none"} if kind_of(config) != "synchronous" or config.mesh.shard >= 2 else {}),
    )
