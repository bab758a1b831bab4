"""The settings of the section `model`, and the shape of the Transformer that these settings describe. This module imports
neither torch nor MPI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpidp.config.recipes import RECIPES
from mpidp.config.settings import FIXED, setting
from mpidp.model.option_checks import option_problems
from mpidp.model.options import CHOICES, DEFAULTS
from mpidp.model.shape import TransformerShape, default_hidden_dim


@dataclass(frozen=True)
class ModelSettings:
    """Settings model.*: the model and its shape."""

    kind: str = setting("transformer", "transformer, lstm, or your own model as MODULE:FACTORY (docs/library.md)", resume=FIXED)
    options: str = setting("", "extra arguments for your own model: NAME=VALUE,...", resume=FIXED)
    num_layers: int = setting(4, "number of Transformer blocks", "layers", low=1, resume=FIXED)
    num_heads: int = setting(4, "number of attention heads; must divide model_dim", "heads", low=1, resume=FIXED)
    num_kv_heads: int = setting(0, "number of key-value heads; must divide num_heads; 0: num_heads", "heads", low=0, resume=FIXED)
    model_dim: int = setting(128, "model width", "channels", low=2, resume=FIXED)
    hidden_dim: int = setting(0, "feed-forward width; 0: 8/3 model_dim, rounded up to a multiple of 64", "channels", low=0,
                              resume=FIXED)
    seq_len: int = setting(128, "context length", "tokens", low=1, resume=FIXED)
    dropout: float = setting(0.0, "dropout rate of embeddings and residual branches", "", low=0.0, high=0.99, resume=FIXED)
    tie_embeddings: bool = setting(False, "use one matrix for the embedding and the output head", "bool", resume=FIXED)
    rope_theta: float = setting(10000.0, "base of the rotary position embedding", "", low=1.0, resume=FIXED)
    rope_scaling: str = setting("", "RoPE scaling: linear, llama3, yarn or longrope, and numbers (docs/model.md)", resume=FIXED)
    norm_eps: float = setting(1e-5, "epsilon of norms", "", low=0.0, resume=FIXED)
    head_dim: int = setting(0, "head size; 0: model_dim / num_heads", "channels", low=0, resume=FIXED)
    vocab_size: int = setting(0, "rows of embedding and output head; 0: the tokenizer's size", "tokens", low=0, resume=FIXED)
    activation: str = setting("silu", "activation of the feed-forward layer; gelu: exact GELU; relu2: relu(x)^2", "",
                              CHOICES["activation"], resume=FIXED)
    gated: bool = setting(True, "true: the feed-forward layer is down(act(gate(x)) * up(x)); false: down(act(up(x)))", "bool",
                          resume=FIXED)
    attention_bias: str = setting("", "attention projections that have a bias: some of q,k,v,o", "names", resume=FIXED)
    mlp_bias: bool = setting(False, "biases in the feed-forward layer", "bool", resume=FIXED)
    qk_norm: str = setting("", "RMSNorm of queries and keys: per head, or over all heads of a layer; empty: none", "",
                           CHOICES["qk_norm"], resume=FIXED)
    norm: str = setting("rms", "rms: RMSNorm; layer: LayerNorm with gain and bias", "", CHOICES["norm"], resume=FIXED)
    norm_plus_one: bool = setting(False, "norms multiply by 1 + weight instead of weight", "bool", resume=FIXED)
    norm_place: str = setting("before", "norms before each attention and feed-forward layer, after it, or both", "",
                              CHOICES["norm_place"], resume=FIXED)
    parallel: bool = setting(False, "attention and feed-forward layer of a block have the same input", "bool", resume=FIXED)
    positions: str = setting("rotary", "rotary: rotate queries and keys; learned: add rows of a learned table to embeddings", "",
                             CHOICES["positions"], resume=FIXED)
    position_rows: int = setting(0, "rows of the table of learned positions; 0: seq_len", "rows", low=0, resume=FIXED)
    rotary_dims: int = setting(0, "number of leading dimensions of each head that are rotated; 0: all", "channels", low=0,
                               resume=FIXED)
    rotary_layers: str = setting("", "one letter per layer, repeated if there are more layers, for example yyyn; y: rotary "
                                 "positions; n: none; empty: all y", "letters", resume=FIXED)
    window: int = setting(0, "sliding window: number of positions that a position attends to, including itself; 0: all earlier "
                          "positions", "tokens", low=0, high=2**31, resume=FIXED)
    window_layers: str = setting("", "one letter per layer, repeated if there are more layers, for example wf; w: sliding "
                                 "window; f: full attention; empty: all w", "letters", resume=FIXED)
    window_rope_theta: float = setting(0.0, "rope_theta of layers with a window; 0: rotary positions as in the other layers", "",
                                       low=0.0, resume=FIXED)
    window_rope_scaling: str = setting("", "rope_scaling of layers with a window, if window_rope_theta is set", "", resume=FIXED)
    embedding_scale: float = setting(1.0, "factor for the embedding's output", "", resume=FIXED)
    input_mix: bool = setting(False, "mix the embedding's output into the input of each block, with two learned factors", "bool",
                              resume=FIXED)
    residual_scale: float = setting(1.0, "factor for the outputs of attention and feed-forward layers", "", resume=FIXED)
    attention_scale: float = setting(0.0, "factor for attention scores; 0: head_dim ** -0.5", "", low=0.0, resume=FIXED)
    logit_scale: float = setting(1.0, "factor for the logits", "", resume=FIXED)
    attention_cap: float = setting(0.0, "soft-cap of attention scores: cap * tanh(score / cap); 0: none", "", low=0.0,
                                   resume=FIXED)
    logit_cap: float = setting(0.0, "soft-cap of the logits: cap * tanh(logit / cap); 0: none", "", low=0.0, resume=FIXED)
    slices: int = setting(1, "number of slices into which every layer is cut, a power of two; training then has the same bits "
                          "with any mesh.tp that divides this number; 1: off (docs/parallel.md)", "slices", low=1, high=64,
                          resume=FIXED)
    zero_init: bool = setting(False, "initialize the last matrix of each residual branch with 0", "bool", resume=FIXED)
    recipe: str = setting("none", "preset of several settings; the settings that you give have priority (docs/model.md)", "",
                          tuple(RECIPES))
    lora_rank: int = setting(0, "rank of LoRA adapters; only the adapters are trained; 0: off", "", low=0, resume=FIXED)
    lora_alpha: float = setting(16.0, "LoRA scaling: the adapter's output is multiplied by lora_alpha / lora_rank", "", low=0.0,
                                resume=FIXED)
    lora_targets: str = setting("q,k,v,o,gate,up,down", "layers that get adapters", "names", resume=FIXED)


def transformer_shape(m: ModelSettings, vocab_size: int) -> TransformerShape:
    """Return the shape of the Transformer. Automatic values are filled in. Pure."""
    return TransformerShape(
        vocab_size, m.num_layers, m.num_heads, m.num_kv_heads or m.num_heads, m.model_dim,
        m.hidden_dim or default_hidden_dim(m.model_dim), m.seq_len, m.dropout, m.tie_embeddings, m.rope_theta,
        m.norm_eps, m.head_dim, m.rope_scaling, **{name: getattr(m, name) for name in DEFAULTS},
    )


def automatic(m: ModelSettings) -> dict[str, int]:
    """Return {name: value} for those settings of the Transformer that can be automatic. Automatic values are filled in.
    Pure."""
    shape = transformer_shape(m, 1)
    return {"num_kv_heads": shape.num_kv_heads, "hidden_dim": shape.hidden_dim, "position_rows": shape.table_rows}


def shape_problems(m: ModelSettings) -> Iterator[str]:
    """Yield a message for each setting of the Transformer that is invalid or contradicts another setting. Pure."""
    problems = []
    if m.head_dim % 2:
        problems.append(f"model.head_dim={m.head_dim} must be even")
    elif not m.head_dim and (m.model_dim % m.num_heads or m.model_dim // m.num_heads % 2):
        problems.append(f"the head size, model.model_dim={m.model_dim} / model.num_heads={m.num_heads}, must be an even integer")
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        problems.append(f"model.num_kv_heads={m.num_kv_heads} must divide model.num_heads={m.num_heads}")
    if m.slices & (m.slices - 1):
        problems.append(f"model.slices={m.slices} must be a power of two: 1, 2, 4, 8, ...")
    yield from problems
    yield from option_problems(transformer_shape(m, 1))
