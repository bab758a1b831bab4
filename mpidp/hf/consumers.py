"""Programs that read an exported folder, and what each of them does not do (docs/consumers.md, with versions). Pure.

A row of CONSUMERS is a program, a row of its tuple one restriction. tests/programs/test_consumers.py compares the rows with the
programs: a program must agree with mpidp exactly where no row refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpidp.errors import UsageError


@dataclass(frozen=True)
class Facts:
    """The contents of config.json, tokenizer.json and tokenizer_config.json of an exported folder."""

    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.width // self.heads)

    @property
    def width(self) -> int:
        return int(self.config.get("hidden_size") or self.config["n_embd"])

    @property
    def heads(self) -> int:
        return int(self.config.get("num_attention_heads") or self.config["n_head"])

    @property
    def rope(self) -> str:
        """The type of rope scaling: default, linear, llama3, ..."""
        return str((self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}).get("rope_type", "default"))

    @property
    def is_char(self) -> bool:
        """Whether the tokenizer is mpidp's char tokenizer: BPE without merges and without a pre-tokenizer."""
        return not self.tokenizer.get("pre_tokenizer") and not self.tokenizer["model"].get("merges", [None])

    @property
    def adds_bos(self) -> bool:
        return bool(self.tokenizer.get("post_processor"))


@dataclass(frozen=True)
class Restriction:
    """Something that a program does not do. applies: whether an exported folder needs it; says: what happens, and what to do;
    refused: the program fails or computes another result, so nothing is written."""

    applies: Callable[[Facts], bool]
    says: str
    refused: bool = True


CONSUMERS: dict[str, tuple[Restriction, ...]] = {
    "transformers": (),
    "llama.cpp": (
        Restriction(
            lambda facts: True, "its converter knows the tokenizers of public models only. For others, `mpidp export RUN --out "
            "FILE.gguf --format gguf` runs the converter and writes a file that llama.cpp loads", refused=False,
        ),
    ),
    "ctranslate2": (
        Restriction(
            lambda facts: facts.head_dim * facts.heads != facts.width,
            "it computes attention wrongly, or fails, if head_dim is not hidden_size / num_attention_heads",
        ),
        Restriction(lambda facts: facts.rope == "llama3", "its converter leaves the llama3 rope scaling out"),
    ),
    "onnxruntime-genai": (
        Restriction(lambda facts: facts.head_dim % 16 != 0, "it fails at the first token if head_dim is no multiple of 16"),
        Restriction(lambda facts: facts.rope == "linear", "its model builder leaves linear rope scaling out"),
        Restriction(
            lambda facts: facts.is_char, "its tokenizer gives -1 for spaces and for characters outside ASCII: encode text with "
            "the library `tokenizers`", refused=False,
        ),
        Restriction(lambda facts: facts.adds_bos, "its tokenizer adds no BOS: put the id of BOS before the ids", refused=False),
    ),
    "mlx-lm": (),
    "openvino": (
        Restriction(
            lambda facts: True, "on CPUs with bfloat16 arithmetic it does not compute in float32 unless "
            "INFERENCE_PRECISION_HINT=f32", refused=False,
        ),
    ),
    "vllm": (Restriction(lambda facts: True, "mpidp was not tested with vLLM", refused=False),),
}


def check(consumer: str, texts: Mapping[str, bytes]) -> list[str]:
    """Return notes about what a program does not do with a folder that has these text files. Pure.

    Raises UsageError if the program fails or computes another result.
    """
    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    facts = Facts(*(json.loads(texts[name]) for name in files))
    found = [one for one in CONSUMERS[consumer] if one.applies(facts)]
    if refused := [one.says for one in found if one.refused]:
        raise UsageError(f"--for {consumer}: {'; '.join(refused)}. Without --for, the folder is written for other programs")
    return [f"{consumer}: {one.says}" for one in found]
