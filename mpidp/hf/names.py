"""Convert config.json and tensor names between mpidp and Hugging Face (LLaMA family). Pure, without torch.

Both use the same layout of weights and half-split rotary positions, so no weights are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from mpidp.errors import DataError, UsageError
from mpidp.model.rope_scaling import rope_scaling
from mpidp.model.shape import TransformerShape

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
MODEL_TYPES = ("llama", "mistral")
MISTRAL_WINDOW = 4096  # of Mistral models whose config.json has no sliding_window, as in transformers
MAX_LAYERS = 2**16
NOT_KEPT = ("transformers_version", "_name_or_path", "auto_map")  # auto_map names code in the folder
OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}
ONLY = {  # keys of config.json for which mpidp's Transformer supports only this value
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None,
}


def huggingface_name(name: str) -> str:
    """Convert a parameter's name: blocks.3.attention.q.weight becomes model.layers.3.self_attn.q_proj.weight. Pure."""
    names = name.removesuffix(".weight").split(".", 2)
    if names[0] == "blocks":
        return f"model.layers.{names[1]}.{INSIDE[names[2]]}.weight"
    return f"{OUTSIDE[names[0]]}.weight"


def settings_of(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the settings of section model from a config.json. Pure.

    Raises DataError if a key is missing or a value is not supported. where: the file's path, for error messages.
    """

    def problem(message: str) -> DataError:
        return DataError(f"{where}: {message}")

    def number(key: str, kind: type = int, default: float | None = None, most: int = 2**31 - 1) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if value is None:
            raise problem(f"{key} is missing: the model is not of the LLaMA family, or the file is damaged")
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not 0 < value <= most or kind(value) != value:
            raise problem(f"{key}={short(value)} must be a positive {'integer' if kind is int else 'number'} of at most {most:,}")
        return kind(value)

    named, kind = config.get("architectures"), config.get("model_type")
    fits = any(one in ARCHITECTURES for one in named) if isinstance(named, list) and named else kind in MODEL_TYPES
    if not fits:
        raise problem(f"architectures={short(named)}, model_type={short(kind)}: only {' and '.join(ARCHITECTURES)} are supported")
    if config.get("hidden_act") == "swish":  # another name of silu
        config = {**config, "hidden_act": "silu"}
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise problem(f"{key}={short(config[key])} is not supported: mpidp's Transformer has only {key}={value!r}")
    if not isinstance(tied := config.get("tie_word_embeddings") or False, bool):
        raise problem(f"tie_word_embeddings={short(tied)} must be true or false")
    theta, scaling = _rope(config, problem, number("max_position_embeddings", default=2048))
    heads, dim = number("num_attention_heads"), number("hidden_size")
    head_dim = number("head_dim", default=dim // heads)
    found = {
        "num_layers": number("num_hidden_layers", most=MAX_LAYERS), "num_heads": heads,
        "num_kv_heads": number("num_key_value_heads", default=heads), "model_dim": dim,
        "hidden_dim": number("intermediate_size"), "tie_embeddings": tied,
        "rope_theta": theta, "rope_scaling": scaling, "norm_eps": number("rms_norm_eps", float, 1e-6),
        "head_dim": 0 if head_dim * heads == dim else head_dim, "vocab_size": number("vocab_size"),
    }
    if heads % found["num_kv_heads"] or head_dim % 2:
        raise problem(
            f"{heads} heads of size {head_dim} and {found['num_kv_heads']} key-value heads are invalid: the head size must be "
            "even, and the number of heads a multiple of the number of key-value heads"
        )
    return found


def _rope(config: Mapping[str, Any], problem: Any, limit: int) -> tuple[float, str]:
    """Return (rope_theta, rope_scaling). Reads the keys of transformers 5 (rope_parameters) and of older versions."""
    both = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(one, dict) for one in both):
        raise problem(f"rope_parameters={short(both[0])} and rope_scaling={short(both[1])} must be objects")
    scaling = both[1] or both[0]  # as in transformers
    if any(isinstance(value, dict) for value in scaling.values()):
        raise problem(f"rope_parameters={short(scaling)} is not supported: all layers must have the same parameters")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise problem(f"partial_rotary_factor={short(scaling['partial_rotary_factor'])} is not supported: it must be 1.0")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < 2**62:
        raise problem(f"rope_theta={short(theta)} must be a positive number")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return float(theta), ""
    if kind != "llama3":
        fix = "The weights were trained with it, so it cannot be left out"
        if kind == "dynamic":
            fix = ("It changes nothing up to max_position_embeddings tokens. For such a model.seq_len, write \"default\" for "
                   "\"dynamic\" in config.json in a copy of the folder, and keep rope_theta")
        raise problem(f"rope scaling {short(kind)} is not supported: only llama3 is. {fix}")
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or limit
    try:
        numbers = [float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")] + [float(original)]
        text = "llama3:" + ",".join(f"{number:.17g}" for number in numbers)
        rope_scaling(text)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise problem(f"rope scaling llama3 needs factor, low_freq_factor and high_freq_factor; problem: {error}") from None
    return float(theta), text


def window_of(config: Mapping[str, Any], where: object) -> int | None:
    """Return the longest context in which attention covers all earlier tokens: sliding_window of config.json; None: any. Pure.

    Raises DataError if sliding_window is no positive integer.
    """
    named = config.get("architectures")
    is_mistral = ARCHITECTURES[1] in named if isinstance(named, list) and named else config.get("model_type") == MODEL_TYPES[1]
    window = config.get("sliding_window", MISTRAL_WINDOW if is_mistral else None)
    if window is not None and (type(window) is not int or window < 1):
        raise DataError(f"{where}: sliding_window={short(window)} must be a positive integer or null")
    return window


def shape_of(settings: Mapping[str, Any], seq_len: int = 1) -> TransformerShape:
    """Return the shape for the settings from settings_of. Pure."""
    rest = {key: value for key, value in settings.items() if key != "head_dim"}
    return TransformerShape(seq_len=seq_len, head_size=settings["head_dim"], **rest)


def config_of(
    shape: TransformerShape, dtype: str, ids: Mapping[str, int | None], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of config.json for a model. Pure.

    ids: bos_token_id, eos_token_id and pad_token_id where `before` has none; before: config.json of the model that this one was
    fine-tuned from; its other keys are kept. The result has rope_theta and torch_dtype for old versions of transformers, and
    rope_parameters and dtype for new ones.
    """
    scaling = rope_scaling(shape.rope_scaling)
    unknown = [f"model.{name}={value}" for name, value in shape.changed().items()]
    if scaling is not None and scaling.kind != "llama3":
        unknown.append(f"model.rope_scaling={shape.rope_scaling}")
    if unknown:
        raise UsageError(f"the export does not support {', '.join(unknown)}: a LLaMA model has no such option")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high, "original_max_position_embeddings": int(scaling.original),
        }
    usual: dict[str, Any] = {
        "architectures": [ARCHITECTURES[0]], "model_type": MODEL_TYPES[0], "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, **ids, "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0,
        "max_position_embeddings": shape.seq_len,
    }
    fixed = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.model_dim, "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings, "rope_theta": shape.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": shape.rope_theta}, "dtype": dtype, "torch_dtype": dtype,
    }
    kept = {key: value for key, value in before.items() if key not in NOT_KEPT}
    window = window_of(kept, "config.json")
    if window is not None and window < shape.seq_len:  # mpidp's attention covers the whole context
        fixed["sliding_window"] = None
    if scaling is not None:  # llama.cpp's converter reads it here
        fixed["original_max_position_embeddings"] = int(scaling.original)
    usual |= kept
    longest = usual["max_position_embeddings"]
    usual["max_position_embeddings"] = max(longest if type(longest) is int else 0, shape.seq_len)
    return usual | fixed
