"""The programs that can read an exported folder, and the restrictions of each program. docs/consumers.md lists versions. Pure.

CONSUMERS maps each program to its restrictions. A restriction refuses some models. If no restriction of a program refuses a
model, the program computes the same results as mpidp. If a restriction refuses a model, the program fails or computes different
results. tests/programs/test_consumers.py runs the programs to test both statements.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpidp.errors import UsageError
from mpidp.hf.fields import head_size
from mpidp.hf.layers import per_layer
from mpidp.hf.names import settings_of


@dataclass(frozen=True)
class Facts:
    """The contents of the JSON files of an exported folder, and the options of its model.

    Families of models describe the same option by different fields of config.json. For example, one family lists the layers with
    sliding windows, and another family gives a number n: every n-th layer has full attention. Restrictions should read
    `options`, because `options` describes all families in the same way.
    """

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    options: Mapping[str, Any]  # options of the model, as returned by settings_of()
    files: frozenset[str] = frozenset()  # names of all files except the weights

    @property
    def head_dim(self) -> int:
        return head_size(self.options)

    @property
    def ropes(self) -> set[str]:
        """The kinds of rope scaling that the model uses, such as linear or llama3. The set is empty without rope scaling."""
        texts = (self.options["rope_scaling"], self.options["window_rope_scaling"])
        return {text.partition(":")[0] for text in texts if text}

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "llama"))

    @property
    def windows(self) -> bool:
        """Whether the model has a sliding window that is shorter than its context."""
        return bool(self.options["window"] and self.options["window"] < self.config["max_position_embeddings"])

    def full_every(self, period: int) -> bool:
        """Return whether every period-th layer has full attention and all other layers have a sliding window."""
        layers = self.options["num_layers"]
        return per_layer(self.options["window_layers"], layers, "w") == per_layer("w" * (period - 1) + "f", layers, "")

    @property
    def is_char(self) -> bool:
        """Whether the tokenizer is mpidp's char tokenizer: BPE without merges and without a pre-tokenizer."""
        return not self.tokenizer.get("pre_tokenizer") and not self.tokenizer["model"].get("merges", [None])

    @property
    def adds_bos(self) -> bool:
        """Whether the post-processor of the tokenizer puts a special token before a text."""
        last = self.tokenizer.get("post_processor") or {}
        return any("SpecialToken" in piece for one in [last, *last.get("processors", [])] for piece in one.get("single", []))


@dataclass(frozen=True)
class Restriction:
    """A feature that a program does not support. `applies`: a function that returns whether an exported folder needs the feature.
    `says`: what happens, and what the user can do. `refused`: whether the program fails or computes different results. If so, the
    export is refused."""

    applies: Callable[[Facts], bool]
    says: str
    refused: bool = True


CTRANSLATE2 = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2")
NEED_UNK = ("mistral", "gemma", "gemma2", "gemma3_text")  # CTranslate2's loaders that need an unk_token
MLX_WINDOWS = ("gemma3_text", "olmo3", "smollm3")  # families whose sliding windows mlx-lm computes
CONSUMERS: dict[str, tuple[Restriction, ...]] = {
    "transformers": (),
    "llama.cpp": (
        Restriction(
            lambda facts: facts.windows and facts.model_type in ("mistral", "starcoder2"),
            "it ignores the sliding windows of this family. Results are right for texts of at most sliding_window tokens",
        ),
        Restriction(
            lambda facts: facts.windows and facts.model_type in ("qwen2", "qwen3"),
            "it cannot load Qwen models with sliding windows",
        ),
        Restriction(
            lambda facts: facts.windows and facts.model_type == "gemma3_text" and not facts.full_every(6),
            "it always uses full attention in every sixth layer of Gemma 3, and ignores layer_types in config.json",
        ),
        Restriction(
            lambda facts: facts.model_type in ("gemma", "gemma2", "phi3") and "tokenizer.model" not in facts.files,
            "for this family, its converter needs the file tokenizer.model of the model that the run started from",
        ),
        Restriction(
            lambda facts: facts.model_type == "gpt2" and facts.options["hidden_dim"] != 4 * facts.options["model_dim"],
            "it needs n_inner = 4 * n_embd",
        ),
        Restriction(
            lambda facts: facts.model_type == "gpt_neox" and "rotary_pct" not in facts.config,
            "its converter needs the key rotary_pct, which transformers 5 does not write. Add it to config.json",
        ),
    ),
    "ctranslate2": (
        Restriction(
            lambda facts: facts.model_type not in CTRANSLATE2,
            f"of the families that mpidp exports, it supports only {', '.join(CTRANSLATE2)}",
        ),
        Restriction(
            lambda facts: facts.model_type == "llama"
            and facts.head_dim * facts.options["num_heads"] != facts.options["model_dim"],
            "for Llama, it computes attention wrongly, or fails, if head_dim is not hidden_size / num_attention_heads",
        ),
        Restriction(lambda facts: "llama3" in facts.ropes, "its converter ignores llama3 rope scaling"),
        Restriction(lambda facts: "yarn" in facts.ropes, "its converter rejects yarn rope scaling"),
        Restriction(lambda facts: facts.windows and facts.model_type in ("qwen2", "qwen3"), "it ignores sliding windows"),
        Restriction(
            lambda facts: facts.windows and facts.model_type in ("mistral", "gemma3_text"),
            "it fails for texts longer than the sliding window",
        ),
        Restriction(
            lambda facts: facts.model_type in NEED_UNK and not facts.tokenizer_config.get("unk_token"),
            "for this family, it needs unk_token in tokenizer_config.json. Add one, for example the end-of-document token",
            refused=False,
        ),
        Restriction(
            lambda facts: not facts.tokenizer_config.get("bos_token") and not facts.tokenizer_config.get("pad_token"),
            "it needs bos_token in tokenizer_config.json. Add one, for example the end-of-document token",
            refused=False,
        ),
    ),
    "onnxruntime-genai": (
        Restriction(lambda facts: facts.head_dim % 16 != 0, "it fails at the first token if head_dim is not a multiple of 16"),
        Restriction(lambda facts: "linear" in facts.ropes, "its model builder ignores linear rope scaling"),
        Restriction(
            lambda facts: facts.is_char, "its tokenizer gives -1 for spaces and for characters outside ASCII. Encode text with "
            "the library `tokenizers`", refused=False,
        ),
        Restriction(
            lambda facts: facts.adds_bos, "its tokenizer does not add BOS. Put the id of BOS before the other ids", refused=False,
        ),
    ),
    "mlx-lm": (
        Restriction(
            lambda facts: facts.model_type == "gpt2",
            "it reads GPT-2 only with names of tensors that do not begin with \"transformer.\"",
        ),
        Restriction(lambda facts: facts.model_type in ("arcee", "starcoder2"), "it computes wrong results for this family"),
        Restriction(
            lambda facts: facts.windows and facts.model_type not in MLX_WINDOWS,
            "it ignores the sliding windows of this family. Results are right for texts of at most sliding_window tokens",
        ),
        Restriction(lambda facts: facts.model_type == "gemma", "for Gemma 1, it uses another GELU than transformers"),
        Restriction(
            lambda facts: facts.model_type in ("qwen2", "qwen3") and bool(facts.config.get("attention_bias")),
            "it cannot load Qwen models with attention_bias",
        ),
        Restriction(
            lambda facts: facts.model_type == "gpt_neox" and facts.options["hidden_dim"] != 4 * facts.options["model_dim"],
            "for GPT-NeoX, it needs intermediate_size = 4 * hidden_size",
        ),
    ),
    "openvino": (
        Restriction(
            lambda facts: True, "on CPUs with bfloat16 arithmetic it computes in float32 only if "
            "INFERENCE_PRECISION_HINT=f32", refused=False,
        ),
    ),
    "vllm": (Restriction(lambda facts: True, "mpidp was not tested with vLLM", refused=False),),
}


def check(consumer: str, texts: Mapping[str, bytes]) -> list[str]:
    """Return notes for the user. Each note is a restriction of the program `consumer` that applies to an exported folder.
    `texts`: the contents of the folder's text files, by name. Pure.

    Raises UsageError if the program fails or computes different results with this folder.
    """
    config, tokenizer, about = (json.loads(texts[name]) for name in ("config.json", "tokenizer.json", "tokenizer_config.json"))
    facts = Facts(config, tokenizer, about, settings_of(config, "config.json"), frozenset(texts))
    found = [one for one in CONSUMERS[consumer] if one.applies(facts)]
    if refused := [one.says for one in found if one.refused]:
        raise UsageError(f"--for {consumer}: {'; '.join(refused)}. To write the folder for other programs, omit --for")
    return [f"{consumer}: {one.says}" for one in found]
