"""Tiny models with random weights of the families in mpidp/hf/families.py, made by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mpidp.hf.families import BY_MODEL_TYPE
from mpidp.hf.fields import head_size
from mpidp.hf.folder import ModelFolder, whole
from mpidp.hf.names import shape_of
from mpidp.model.transformer import Transformer

VOCABULARY, T = 288, 24  # T: positions, more than the windows
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
PHI = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0], "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 12, "rope_theta": 5e5}
TIED = {"tie_word_embeddings": True}
ROWS: dict[str, dict[str, Any]] = {  # model_type, and what differs from SIZES and the defaults; the windows are below 16 tokens
    "llama": {},
    "llama, biases, linear": {**TIED, "attention_bias": True, "mlp_bias": True, "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama, llama3": {**TIED, "head_dim": 16, "rope_parameters": LLAMA3},
    "llama, yarn": {"rope_parameters": YARN},
    "mistral": {"sliding_window": 6},
    "qwen2": {**TIED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "rope_parameters": {
        **YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}},
    "qwen3": {**TIED, "head_dim": 16},
    "qwen3, windows": {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
                       "max_window_layers": 3},
    "smollm3": {},
    "smollm3, windows": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 0, 1], "mlp_bias": True},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "rope_parameters": {
        "full_attention": {**YARN, "attention_factor": 1.3, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
    "granite": {**TIED, "embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.3,
                "attention_multiplier": 0.2},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24,
                    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "phi3": {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "phi3, longrope": {"original_max_position_embeddings": 24, "partial_rotary_factor": 0.5, "rope_parameters": PHI},
    "phi3, longrope, long": {"original_max_position_embeddings": 12, "partial_rotary_factor": 0.5, "rope_parameters": PHI},
    "gpt2": {},
    "gpt2, untied": {"tie_word_embeddings": False, "scale_attn_weights": False, "activation_function": "gelu"},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_neox, sequential": {**TIED, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    "starcoder2": {"sliding_window": 6},
    "starcoder2, no bias": {"use_bias": False},
    "arcee": {"mlp_bias": True},
}
MODEL_TYPES = {row: row.partition(",")[0] for row in ROWS}
ONE_OF_EACH = [row for row, kind in MODEL_TYPES.items() if row == kind]


def config_of_row(row: str, **more: Any) -> Any:
    """Return transformers' config of a row. more: values that replace those of the row. Pure."""
    kind = MODEL_TYPES[row]
    values = {**SIZES, **IDS, "max_position_embeddings": 64, **json.loads(json.dumps(ROWS[row])), **more}
    if kind in ("gpt2", "gpt_neox"):
        values.pop("num_key_value_heads", None)
    if kind == "gpt2":
        values["n_inner"], values["n_positions"] = values.pop("intermediate_size"), values.pop("max_position_embeddings")
    return type(AutoConfig.for_model(kind))(**values)


def model_of_row(row: str, **more: Any) -> Any:
    """Return transformers' model of a row, with random weights in which every parameter matters. Pure."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of_row(row, **more))
    plus_one = BY_MODEL_TYPE[MODEL_TYPES[row]].options.get("norm_plus_one", False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.dim() == 1 and name.endswith("weight")
            p.normal_(1.0 if gain and not plus_one else 0.0, 0.2 if p.dim() > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's default is 0.1
    return model


def folder_of_row(row: str, folder: Path, tokenizer: Path | None = None, **more: Any) -> Path:
    """Write transformers' folder of a row, with a tokenizer.json if one is given. Independent."""
    model_of_row(row, **more).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


def ours(folder: ModelFolder, seq_len: int = T) -> Transformer:
    """Return mpidp's model with the weights of a folder. Pure."""
    model = Transformer(shape_of(folder.settings, seq_len))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(folder.box(f"model/{name}", whole(folder.sizes, name)))
    return model


def under_our_names(folder: ModelFolder, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters or gradients of a folder's model in transformers, by mpidp's names and in its shapes. Pure."""
    places, found = folder._layout.places(folder.sizes, head_size(folder.settings)), {}
    for name, size in folder.sizes.items():
        stored = theirs[places[name].name if places[name].name in theirs else "lm_head.weight"]  # transformers renames it
        whole = stored.detach().T if places[name].transposed else stored.detach()
        found[name] = torch.cat([whole[rows] for rows in places[name].slices(0, size[0])])
    return found


def tokens(seq_len: int = T) -> torch.Tensor:
    """Return two sequences of tokens. Pure."""
    return torch.randint(1, VOCABULARY, (2, seq_len), generator=torch.Generator().manual_seed(1))


def saved(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder. Independent."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found
