"""Law: with each option, logits and gradients equal those of a model of transformers that has this option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from mpidp.model.shape import TransformerShape, shapes_of
from mpidp.model.transformer import Transformer

V, L, D, H, K, F, T = 40, 4, 32, 4, 2, 48, 24
SIZES = {
    "vocab_size": V, "num_hidden_layers": L, "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": K,
    "intermediate_size": F, "rms_norm_eps": 1e-5, "max_position_embeddings": T, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}
OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}, "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm", **{f"feed_forward.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
OUT = {"attention_out_norm": "post_attention_layernorm", "feed_forward_out_norm": "post_feedforward_layernorm"}
AFTER = {ours: name for ours, name in INSIDE.items() if not ours.endswith("_norm") or ours.startswith("attention.")} | OUT
BOTH = INSIDE | OUT | {"feed_forward_norm": "pre_feedforward_layernorm"}


def renamed(inside: dict[str, str], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with LLaMA's names, under our names."""
    found = {}
    for ours, name in OUTSIDE.items():
        found |= {f"{ours}.{part}": theirs[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in theirs}
    for layer in range(L):
        for ours, name in inside.items():
            for part in ("weight", "bias"):
                if (key := f"model.layers.{layer}.{name}.{part}") in theirs:
                    found[f"blocks.{layer}.{ours}.{part}"] = theirs[key]
    return found


def of_phi(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs = dict(theirs)
    for layer in range(L):
        at = f"model.layers.{layer}"
        q, k, v = theirs[f"{at}.self_attn.qkv_proj.weight"].split([D, D // 2, D // 2])
        gate, up = theirs[f"{at}.mlp.gate_up_proj.weight"].chunk(2)
        theirs |= {f"{at}.self_attn.{x}_proj.weight": one for x, one in zip("qkv", (q, k, v), strict=True)}
        theirs |= {f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up}
    return renamed(INSIDE, theirs)


def of_gpt2(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"embedding.weight": theirs["transformer.wte.weight"], "positions.weight": theirs["transformer.wpe.weight"]}
    found |= {f"norm.{part}": theirs[f"transformer.ln_f.{part}"] for part in ("weight", "bias")}
    names = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    products = {"attention.o": "attn.c_proj", "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    for layer in range(L):
        at, to = f"transformer.h.{layer}", f"blocks.{layer}"
        for part in ("weight", "bias"):
            found |= {f"{to}.{ours}.{part}": theirs[f"{at}.{name}.{part}"] for ours, name in names.items()}
            found |= {f"{to}.{ours}.{part}": theirs[f"{at}.{name}.{part}"].movedim(0, -1) for ours, name in products.items()}
            three = theirs[f"{at}.attn.c_attn.{part}"].movedim(0, -1).chunk(3)
            found |= {f"{to}.attention.{x}.{part}": one for x, one in zip("qkv", three, strict=True)}
    return found


def of_neox(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"embedding.weight": theirs["gpt_neox.embed_in.weight"], "head.weight": theirs["lm_head.weight"]}
    found |= {f"norm.{part}": theirs[f"gpt_neox.final_layer_norm.{part}"] for part in ("weight", "bias")}
    names = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
             "attention.o": "attention.dense", "feed_forward.up": "mlp.dense_h_to_4h", "feed_forward.down": "mlp.dense_4h_to_h"}
    for layer in range(L):
        at, to = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
        for part in ("weight", "bias"):
            found |= {f"{to}.{ours}.{part}": theirs[f"{at}.{name}.{part}"] for ours, name in names.items()}
            heads = theirs[f"{at}.attention.query_key_value.{part}"]
            heads = heads.view(H, 3, D // H, *heads.shape[1:]).transpose(0, 1).flatten(1, 2)
            found |= {f"{to}.attention.{x}.{part}": one for x, one in zip("qkv", heads, strict=True)}
    return found


@dataclass(frozen=True)
class Family:
    """A model of transformers and its options here."""

    config: Any
    given: dict[str, Any]
    options: dict[str, Any]
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda theirs: renamed(INSIDE, theirs))
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)


def llama(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"} | rope}


FAMILIES = {
    "linear": Family(hf.LlamaConfig, llama(rope_type="linear", factor=3.0), {"rope_scaling": "linear:3"}),
    "llama3": Family(hf.LlamaConfig, llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=12), {"rope_scaling": "llama3:8,1,4,12"}),
    "yarn": Family(hf.LlamaConfig, llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=12),
                   {"rope_scaling": "yarn:4,12"}),
    "yarn with limits": Family(
        hf.LlamaConfig, llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=8, beta_slow=2,
                              attention_factor=1.3, truncate=False), {"rope_scaling": "yarn:4,128,8,2,1.3,0"}),
    "Qwen2": Family(hf.Qwen2Config, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
                    {"attention_bias": "q,k,v", "window": 5, "window_layers": "ffww"}),
    "Qwen3": Family(hf.Qwen3Config, {"head_dim": 12}, {"qk_norm": "head", "head_size": 12}),
    "Mistral": Family(hf.MistralConfig, {"sliding_window": 6, "head_dim": 8}, {"window": 6}),
    "SmolLM3": Family(hf.SmolLM3Config,
                      {"no_rope_layers": [1, 1, 0, 1], "tie_word_embeddings": False} | llama(rope_theta=2e6),
                      {"rotary_layers": "yyny", "rope_theta": 2e6}),
    "OLMo 2": Family(hf.Olmo2Config, {}, {"qk_norm": "layer", "norm_place": "after"}, lambda theirs: renamed(AFTER, theirs)),
    "OLMo 3": Family(
        hf.Olmo3Config, {
            "sliding_window": 7, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                   "original_max_position_embeddings": 12}}},
        {"qk_norm": "layer", "norm_place": "after", "window": 7, "window_layers": "wwwf", "rope_scaling": "yarn:4,12",
         "window_rope_theta": 1e4}, lambda theirs: renamed(AFTER, theirs)),
    "Granite": Family(
        hf.GraniteConfig, {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
                           "logits_scaling": 8.0, "attention_bias": True, "mlp_bias": True},
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.3, "logit_scale": 1 / 8,
         "attention_bias": "q,k,v,o", "mlp_bias": True}),
    "Gemma 2": Family(
        hf.Gemma2Config, {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.8,
                          "final_logit_softcapping": 2.0, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"head_size": 12, "window": 6, "window_layers": "wf", "attention_scale": 20**-0.5, "attention_cap": 0.8, "logit_cap": 2.0,
         "activation": "gelu_tanh", "norm_place": "both", "norm_plus_one": True, "embedding_scale": math.sqrt(D),
         "tie_embeddings": True}, lambda theirs: renamed(BOTH, theirs)),
    "Gemma 3": Family(
        hf.Gemma3TextConfig, {
            "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
        {"head_size": 12, "window": 6, "window_layers": "wwwf", "attention_scale": 20**-0.5, "rope_theta": 1e6,
         "rope_scaling": "linear:8", "window_rope_theta": 1e4, "qk_norm": "head", "activation": "gelu_tanh", "norm_place": "both",
         "norm_plus_one": True, "embedding_scale": math.sqrt(D), "tie_embeddings": True},
        lambda theirs: renamed(BOTH, theirs)),
    **{f"Phi-3, {which} factors": Family(
        hf.Phi3Config, {"original_max_position_embeddings": original, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0],
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": original}, "pad_token_id": V - 1},
        {"rotary_dims": 6, "rope_scaling": f"longrope:{original},{factor},1,1.5,2,2,3,5"}, of_phi)
       for which, original, factor in (("short", 24, 1.0), ("long", 12, math.sqrt(1 + math.log(2) / math.log(12))))},
    "GPT-2": Family(
        hf.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"num_kv_heads": H, "positions": "learned", "position_rows": T, "norm": "layer", "activation": "gelu_tanh",
         "gated": False, "attention_bias": "q,k,v,o", "mlp_bias": True, "tie_embeddings": True}, of_gpt2,
        {"vocab_size": V, "n_layer": L, "n_embd": D, "n_head": H, "n_inner": F, "n_positions": T, "bos_token_id": None,
         "eos_token_id": None}),
    "GPT-NeoX": Family(
        hf.GPTNeoXConfig, {"rotary_pct": 0.5, "use_parallel_residual": True, "num_key_value_heads": H},
        {"num_kv_heads": H, "rotary_dims": 4, "parallel": True, "norm": "layer", "activation": "gelu", "gated": False,
         "attention_bias": "q,k,v,o", "mlp_bias": True}, of_neox),
}


def shape_of(family: Family) -> TransformerShape:
    sizes = {"vocab_size": V, "num_layers": L, "num_heads": H, "num_kv_heads": K, "model_dim": D, "hidden_dim": F, "seq_len": T}
    return TransformerShape(**{**sizes, **family.options})


def random_model(family: Family) -> Any:
    """A model of transformers with random values in all parameters, including gains and biases."""
    torch.manual_seed(1)
    config = family.config(**family.sizes | family.given)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0, 0.3)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_equal(name: str) -> None:
    family = FAMILIES[name]
    theirs, shape = random_model(family), shape_of(family)
    ours, state = Transformer(shape), family.names(dict(theirs.named_parameters()))
    if shape.tie_embeddings:
        state.pop("head.weight", None)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes_of(shape)
    ours.load_state_dict(state, strict=not shape.tie_embeddings)
    ids = torch.randint(0, V - 1, (2, T), generator=torch.Generator().manual_seed(2))
    wanted, found = theirs(input_ids=ids).logits, ours(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))
    targets = ids.roll(-1, 1).flatten()
    for logits in (wanted, found):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    gradients = family.names({key: p.grad for key, p in theirs.named_parameters() if p.grad is not None})
    assert gradients.keys() >= {key for key, _ in ours.named_parameters()}
    largest = max(float(p.grad.abs().max()) for p in ours.parameters())
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], rtol=1e-4, atol=1e-5 * largest)
