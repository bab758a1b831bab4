"""config.json of a model of the LLaMA family and our settings, its tensors' names and ours. Pure, without torch.

Weights are the same numbers in the same layout: rotary positions are half-split in both, so nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.errors import DataError
from mpidp.model.shape import TransformerShape, rope_scaling

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
MODEL_TYPES = ("llama", "mistral")
OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}
ONLY = {  # the one value, where config.json has the key, that our Transformer computes
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None,
}


def theirs(name: str) -> str:
    """Of a parameter of ours: blocks.3.attention.q.weight is model.layers.3.self_attn.q_proj.weight. Pure."""
    words = name.removesuffix(".weight").split(".", 2)
    if words[0] == "blocks":
        return f"model.layers.{words[1]}.{INSIDE[words[2]]}.weight"
    return f"{OUTSIDE[words[0]]}.weight"


def settings_of(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Of section model: what a config.json says of the model. DataError for what is not there, or our Transformer does not
    compute. Pure."""

    def refused(words: str) -> DataError:
        return DataError(f"{where}: {words}")

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if value is None:
            raise refused(f"it has no {key}: not a model of the LLaMA family, or damaged")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value or value <= 0:
            raise refused(f"{key}={value!r} must be a positive {'whole ' * (kind is int)}number")
        return kind(value)

    named, kind = config.get("architectures"), config.get("model_type")
    fits = any(one in ARCHITECTURES for one in named) if isinstance(named, list) and named else kind in MODEL_TYPES
    if not fits:
        raise refused(f"architectures={named!r}, model_type={kind!r}: only {' and '.join(ARCHITECTURES)} can be taken up")
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise refused(f"{key}={config[key]!r}: this Transformer has {key}={value!r} alone, so it would be another model")
    limit, window = number("max_position_embeddings", default=2048), config.get("sliding_window")
    if window is not None and window < limit:
        raise refused(f"sliding_window={window!r}: attention here reaches over the whole context")
    theta, scaling = _rope(config, refused, limit)
    heads, dim = number("num_attention_heads"), number("hidden_size")
    head_dim = number("head_dim", default=dim // heads)
    found = {
        "num_layers": number("num_hidden_layers"), "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads", default=heads), "model_dim": dim,
        "hidden_dim": number("intermediate_size"), "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": theta, "rope_scaling": scaling, "norm_eps": number("rms_norm_eps", float, 1e-6),
        "head_dim": 0 if head_dim * heads == dim else head_dim, "vocab_size": number("vocab_size"),
    }
    if heads % found["num_kv_heads"] or head_dim % 2:
        raise refused(f"{heads} heads of width {head_dim}, {found['num_kv_heads']} key-value heads: that is no attention")
    return found


def _rope(config: Mapping[str, Any], refused: Any, limit: int) -> tuple[float, str]:
    """(rope_theta, rope_scaling), from the keys of transformers 5 (rope_parameters) or from older ones."""
    said = config.get("rope_parameters") or {}
    scaling = {**said, **(config.get("rope_scaling") or {})}
    if not all(isinstance(value, (int, float, str, type(None))) for value in scaling.values()):
        raise refused(f"rope_parameters={said!r}: there is one kind of rotation for all layers here")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise refused(f"partial_rotary_factor={scaling['partial_rotary_factor']!r}: here all channels of a head are rotated")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), ""
    if kind != "llama3":
        raise refused(
            f"rope scaling {kind!r}: only llama3 is computed here. A context within the model's first one needs none: take "
            "rope_scaling (or rope_parameters) out of a copy of the folder, if that is what it was trained with"
        )
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or limit
    try:
        numbers = [float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")] + [float(original)]
        text = "llama3:" + ",".join(f"{number:.17g}" for number in numbers)
        rope_scaling(text)
    except (KeyError, TypeError, ValueError) as error:
        raise refused(f"rope scaling llama3 without {error}: it needs factor, low_freq_factor and high_freq_factor") from None
    return float(theta), text


def shape_of(settings: Mapping[str, Any], seq_len: int = 1) -> TransformerShape:
    """What settings_of found, as a shape. Pure."""
    rest = {key: value for key, value in settings.items() if key != "head_dim"}
    return TransformerShape(seq_len=seq_len, head_size=settings["head_dim"], **rest)


def config_of(shape: TransformerShape, dtype: str, eod: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model; before: that of the model it was made from, whose other keys stay. Old readers find rope_theta and
    torch_dtype, new ones rope_parameters and dtype. Pure."""
    scaling = rope_scaling(shape.rope_scaling)
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": int(scaling.original),
        }
    usual: dict[str, Any] = {
        "architectures": [ARCHITECTURES[0]], "model_type": MODEL_TYPES[0], "bos_token_id": None, "eos_token_id": eod,
        "pad_token_id": None, "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0,
        "max_position_embeddings": shape.seq_len,
    }
    ours = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.model_dim, "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings, "rope_theta": shape.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": shape.rope_theta}, "dtype": dtype, "torch_dtype": dtype,
    }
    kept = {key: value for key, value in before.items() if key not in ("transformers_version", "_name_or_path")}
    if scaling is not None:  # llama.cpp's converter looks for it here
        ours["original_max_position_embeddings"] = int(scaling.original)
    usual |= kept
    usual["max_position_embeddings"] = max(usual["max_position_embeddings"], shape.seq_len)
    return usual | ours
