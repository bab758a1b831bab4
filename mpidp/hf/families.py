"""The table FAMILIES of the model families that can be imported and exported. Pure, without torch.

A row describes one family. The row states how fields of config.json are converted to options of the model (fields.py,
layers.py, rope_fields.py). It also states the names of the tensors (tensors.py), and the options that all models of the family
have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpidp.hf.fields import ACTIVATIONS, Field, activation, cap, flag, head_dim, head_size, implied, kv_heads, number, size, tied
from mpidp.hf.layers import above, every, every_in, first_window, layered_window, window, windows_without_rotary, without_rotary
from mpidp.hf.rope_fields import rope, two_ropes
from mpidp.hf.tensors import Layout

MAX_LAYERS = 2**16
DROPOUTS = ("attention_dropout", "hidden_dropout", "classifier_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
            "residual_dropout", "embedding_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob")
FREE = {  # fields that do not change the logits, in every family
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "auto_map", "dtype",
    "torch_dtype", "initializer_range", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict",
    "return_dict_in_generate", "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "num_labels", "_num_labels",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "task_specific_params", "finetuning_task", "torchscript", "use_bfloat16", "is_decoder", "output_past", "n_ctx",
    "pretraining_tp", "cache_implementation", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "_experts_implementation", "_output_attentions", "use_flash_attention_2", "use_flash_attn", "is_llama_config",
    "transformers.js_config", "tie_last_hidden_states", "max_position_embeddings", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "tf_legacy_loss", "unsloth_fixed", "unsloth_version",
    "custom_pipelines", "max_sequence_length", "gradient_checkpointing", "_flash_attn_2_enabled", "use_flash_attention",
    *DROPOUTS,
}
ONLY: dict[str, tuple[Any, ...]] = {  # fields that must have one of these values, in every family
    "quantization_config": (None,), "per_layer_config": (None,), "add_cross_attention": (False,), "is_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,), "tie_encoder_decoder": (False,), "pruned_heads": (None, {}),
    "rope_interleaved": (False,), "use_mrope": (False,), "lm_head_bias": (False,), "use_bidirectional_attention": (None, False),
}

OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj", "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
}
QK = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
AFTER = {"attention_out_norm": "post_attention_layernorm", "feed_forward_out_norm": "post_feedforward_layernorm"}
QKV = ("attention.q", "attention.k", "attention.v")


def without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    """Return a copy of `names` without the entries whose keys are in left_out. Pure."""
    return {name: value for name, value in names.items() if name not in left_out}


LLAMA = Layout("model.", "model.layers.{}", OUTSIDE, INSIDE)
PLAIN = Layout("model.", "model.layers.{}", OUTSIDE, without(INSIDE, "feed_forward.gate"))
QWEN3 = Layout("model.", "model.layers.{}", OUTSIDE, INSIDE | QK)
OLMO2 = Layout("model.", "model.layers.{}", OUTSIDE, without(INSIDE, "attention_norm", "feed_forward_norm") | QK | AFTER)
BOTH = INSIDE | AFTER | {"feed_forward_norm": "pre_feedforward_layernorm"}
GEMMA2, GEMMA3 = (Layout("model.", "model.layers.{}", OUTSIDE, names) for names in (BOTH, BOTH | QK))
PHI3 = Layout(
    "model.", "model.layers.{}", OUTSIDE, without(INSIDE, *QKV, "feed_forward.gate", "feed_forward.up"),
    {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up")},
)
STARCODER2 = Layout(
    "model.", "model.layers.{}", OUTSIDE,
    without(INSIDE, "feed_forward.gate") | {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"},
)
GPT2 = Layout(
    "transformer.", "transformer.h.{}",
    {"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    {"attention_norm": "ln_1", "feed_forward_norm": "ln_2", "attention.o": "attn.c_proj", "feed_forward.up": "mlp.c_fc",
     "feed_forward.down": "mlp.c_proj"},
    {"attn.c_attn": QKV}, transposed=(*QKV, "attention.o", "feed_forward.up", "feed_forward.down"),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
GPT_NEOX = Layout(
    "gpt_neox.", "gpt_neox.layers.{}",
    {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm", "attention.o": "attention.dense",
     "feed_forward.up": "mlp.dense_h_to_4h", "feed_forward.down": "mlp.dense_4h_to_h"},
    {"attention.query_key_value": QKV}, by_head=True,
    ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)


@dataclass(frozen=True)
class Family:
    """A model family of the transformers library.

    title: public models of the family. options: the options that all models of the family have. only: the supported values of
    some fields. free: the fields that do not change the logits. longest: the name of the field with the maximum context
    length. copies: maps the old name of a field to its new name. An exported config.json gets the field under both names.
    """

    architecture: str
    model_type: str
    title: str
    fields: tuple[Field, ...]
    layout: Layout = LLAMA
    options: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    longest: str = "max_position_embeddings"
    copies: Mapping[str, str] = field(default_factory=dict)


WIDTHS = (
    size("vocab_size", "vocab_size"), size("hidden_size", "model_dim"), size("num_hidden_layers", "num_layers", most=MAX_LAYERS),
    size("num_attention_heads", "num_heads"),
)


def sizes(kv: int = 0) -> tuple[Field, ...]:
    """Return the `Field` objects for the sizes of the model. kv: see kv_heads()."""
    return (*WIDTHS, kv_heads(kv), size("intermediate_size", "hidden_dim"))


def usual(
    kv: int = 0, head: int = 0, eps: float = 1e-6, ties: bool = False, act: str = "silu", act_key: str = "hidden_act",
    eps_key: str = "rms_norm_eps",
) -> tuple[Field, ...]:
    """Return the `Field` objects that nearly all families have. act_key, eps_key: the names of two fields. The other arguments
    are defaults for missing fields: kv for num_key_value_heads, head for head_dim, eps for `eps_key`, ties for
    tie_word_embeddings, act for `act_key`."""
    return (*sizes(kv), head_dim(head), number(eps_key, "norm_eps", eps), activation(act_key, act), tied(ties))


def bias(key: str = "attention_bias", default: bool = False) -> Field:
    """Return the `Field` object that determines whether q, k, v and o have biases. key: the name of the field. default: the value
    if the field is missing."""
    return flag(key, default, {"attention_bias": "q,k,v,o"}, {"attention_bias": ""})


def mlp_bias(key: str = "mlp_bias") -> Field:
    """Return the `Field` object that determines whether the feed-forward layer has biases. key: the name of the field."""
    return flag(key, False, {"mlp_bias": True}, {"mlp_bias": False})


def query_scale(default: float) -> Field:
    """Return the `Field` object of query_pre_attn_scalar of Gemma. Attention scores are divided by the square root of its value.
    default: the value if the field is missing."""
    return number(
        "query_pre_attn_scalar", "attention_scale", default, lambda value, _: value**-0.5,
        lambda scale, options: _whole((scale or head_size(options) ** -0.5) ** -2),
    )


def _whole(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


ROOT = implied("embedding_scale", lambda found: math.sqrt(found["model_dim"]))
GEMMA = {"norm_plus_one": True}
LAYER_NORM = {"norm": "layer", "gated": False}
QWEN_WINDOW = layered_window(4096, above("max_window_layers", 28), True, ("max_window_layers",), first_window)
GEMMA_ACT = without(ACTIVATIONS, "gelu") | {"gelu": "gelu_tanh"}  # Gemma 1's files contain gelu, but mean gelu_tanh

FAMILIES: tuple[Family, ...] = (
    Family("LlamaForCausalLM", "llama", "Llama 2, Llama 3, TinyLlama, SmolLM2", (*usual(), bias(), mlp_bias(), rope())),
    Family("MistralForCausalLM", "mistral", "Mistral", (*usual(kv=8), window(4096), rope())),
    Family("Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", (*usual(kv=32), QWEN_WINDOW, rope()),
           options={"attention_bias": "q,k,v"}),
    Family("Qwen3ForCausalLM", "qwen3", "Qwen3", (*usual(kv=32, head=128), bias(), QWEN_WINDOW, rope()), QWEN3,
           {"qk_norm": "head"}),
    Family("SmolLM3ForCausalLM", "smollm3", "SmolLM3", (
        *usual(kv=4, ties=True), bias(), mlp_bias(), without_rotary(4),
        layered_window(None, windows_without_rotary, True), rope(2e6),
    ), free=("max_window_layers",)),
    Family("Olmo2ForCausalLM", "olmo2", "OLMo 2", (*usual(eps=1e-5), bias(), rope()), OLMO2,
           {"qk_norm": "layer", "norm_place": "after"}),
    Family("Olmo3ForCausalLM", "olmo3", "OLMo 3", (
        *usual(eps=1e-5), bias(), layered_window(4096, every(4)), two_ropes(500000.0, 500000.0),
    ), OLMO2, {"qk_norm": "layer", "norm_place": "after"}),
    Family("GraniteForCausalLM", "granite", "Granite 3", (
        *usual(), bias(), mlp_bias(), number("embedding_multiplier", "embedding_scale", 1.0),
        number("logits_scaling", "logit_scale", 1.0, lambda value, _: 1.0 / value, lambda value, _: _whole(1.0 / value)),
        number("residual_multiplier", "residual_scale", 1.0),
        number("attention_multiplier", "attention_scale", 1.0, back=lambda scale, options: scale or head_size(options) ** -0.5),
        rope(),
    )),
    Family("GemmaForCausalLM", "gemma", "Gemma 1", (
        *sizes(16), head_dim(256), number("rms_norm_eps", "norm_eps", 1e-6),
        activation("hidden_act", "gelu_pytorch_tanh", GEMMA_ACT), tied(True), bias(), ROOT, rope(),
    ), options=GEMMA, free=("hidden_activation",)),
    Family("Gemma2ForCausalLM", "gemma2", "Gemma 2", (
        *usual(4, 256, ties=True, act="gelu_pytorch_tanh", act_key="hidden_activation"), bias(), query_scale(256), ROOT,
        cap("attn_logit_softcapping", "attention_cap", 50.0), cap("final_logit_softcapping", "logit_cap", 30.0),
        layered_window(4096, every(2)), rope(),
    ), GEMMA2, GEMMA | {"norm_place": "both"}, free=("hidden_act", "sliding_window_size")),
    Family("Gemma3ForCausalLM", "gemma3_text", "Gemma 3 (text)", (
        *usual(4, 256, ties=True, act="gelu_pytorch_tanh", act_key="hidden_activation"), bias(), query_scale(256), ROOT,
        cap("final_logit_softcapping", "logit_cap", None),
        layered_window(4096, every_in("sliding_window_pattern", 6), more=("sliding_window_pattern",)),
        two_ropes(1e6, 1e4, "rope_local_base_freq"),
    ), GEMMA3, GEMMA | {"norm_place": "both", "qk_norm": "head"}, {"attn_logit_softcapping": (None,)},
        ("hidden_act", "_sliding_window_pattern")),
    Family("Phi3ForCausalLM", "phi3", "Phi-3, Phi-4", (
        *usual(eps=1e-5), window(None),
        rope(partial=1.0, kinds={"longrope": "longrope", "su": "longrope", "yarn": "longrope"}, original=4096),
    ), PHI3, only={"attention_bias": (False,), "mlp_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)}),
    Family("GPT2LMHeadModel", "gpt2", "GPT-2", (
        size("vocab_size", "vocab_size"), size("n_embd", "model_dim"), size("n_layer", "num_layers", most=MAX_LAYERS),
        size("n_head", "num_heads"), implied("num_kv_heads", lambda found: found["num_heads"]),
        size("n_inner", "hidden_dim", lambda found: 4 * found["model_dim"]), size("n_positions", "position_rows", lambda _: 1024),
        number("layer_norm_epsilon", "norm_eps", 1e-5), activation("activation_function", "gelu_new"), tied(True),
        flag("scale_attn_weights", True, {"attention_scale": 0.0}, {"attention_scale": 1.0}),
    ), GPT2, LAYER_NORM | {"attention_bias": "q,k,v,o", "mlp_bias": True, "positions": "learned"},
        {"scale_attn_by_inverse_layer_idx": (False,)},
        ("reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
         "summary_first_dropout", "summary_last_dropout"), longest="n_positions", copies={"n_ctx": "n_positions"}),
    Family("GPTNeoXForCausalLM", "gpt_neox", "GPT-NeoX, Pythia", (
        *WIDTHS, implied("num_kv_heads", lambda found: found["num_heads"]), size("intermediate_size", "hidden_dim"),
        number("layer_norm_eps", "norm_eps", 1e-5), activation("hidden_act", "gelu"),
        tied(False), bias(default=True), flag("use_parallel_residual", True, {"parallel": True}, {"parallel": False}),
        rope(theta_keys=("rotary_emb_base",), partial=0.25, partial_keys=("rotary_pct",)),
    ), GPT_NEOX, LAYER_NORM | {"mlp_bias": True}),
    Family("Starcoder2ForCausalLM", "starcoder2", "StarCoder2", (
        *usual(2, eps=1e-5, ties=True, act="gelu_pytorch_tanh", eps_key="norm_epsilon"),
        flag("use_bias", True, {"attention_bias": "q,k,v,o", "mlp_bias": True}, {"attention_bias": "", "mlp_bias": False}),
        window(None), rope(),
    ), STARCODER2, LAYER_NORM, {"mlp_type": ("default",), "norm_type": ("layer_norm",)},
        ("activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights",
         "layer_norm_epsilon")),
    Family("ArceeForCausalLM", "arcee", "Arcee AFM", (*usual(eps=1e-5, act="relu2"), bias(), mlp_bias(), rope()), PLAIN,
           {"gated": False}),
)
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
