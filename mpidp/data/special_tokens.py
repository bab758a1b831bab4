"""A table of the special tokens of a model. It is stored as special_tokens.json in the folder of shards and in RUN.

The command prepare writes this file, train copies it to the run, and generate, evaluate and export use it. Plain tokenizers
(byte, char, or BPE trained by mpidp) have no such file. Their table is special_tokens_of(None, tokenizer).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpidp.data.chat_template import STANDARD, Template, TemplateRejection
from mpidp.data.model_files import chat_templates_of, optional_object
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import DataError, UsageError

FILE = "special_tokens.json"
FORMAT = "mpidp-special-tokens"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")  # files of a model
_END_OF_TEXT, _LLAMA = "<|endoftext|>", {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CLASS_NAMES: dict[str, dict[str, str]] = {  # special tokens of transformers' tokenizer classes, if no file defines them
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT),
    "GPTNeoXTokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT) | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END_OF_TEXT),
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA | {
        "prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>", "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
    },
    "GemmaTokenizer": {
        "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>",
    },
    "CohereTokenizer": {
        "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
        "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
    },
}
CLASS_OF_MODEL = {  # transformers' tokenizer class by model_type of config.json, if no file names a class
    "gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "gptj": "GPT2Tokenizer", "opt": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer", "olmo": "GPTNeoXTokenizer", "qwen2": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer", "cohere": "CohereTokenizer", "cohere2": "CohereTokenizer",
    "code_llama": "CodeLlamaTokenizer", "starcoder2": "GPT2Tokenizer",
}
WITHOUT_CLASS = frozenset({"mistral", "mixtral", "phi3", "olmo2"})  # model_types whose tokenizer class defines no names


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a model, and how the model's training data use them."""

    bos: int | None  # the id before every document and row; None: there is none
    ends: tuple[int, ...]  # ids that end a text; the end-of-document id is the first
    pad: int | None = None
    special: str = "text"  # "tokens": names of special tokens in prompts and rows become ids; "text": names stay text
    names: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: variables of the chat template
    template: str | None = None  # chat template (jinja2)
    template_args: Mapping[str, Any] = field(default_factory=dict)  # other variables of the template, such as enable_thinking
    tool_template: str | None = None  # the template for chats with tools; None: use the same template

    def to_json(self) -> str:
        """Return the contents of special_tokens.json."""
        return json.dumps({"format": FORMAT, "version": 1, **asdict(self)}, indent=1) + "\n"

    @property
    def is_plain(self) -> bool:
        """True if this is the table of a plain tokenizer. Such a table is not stored."""
        return self == SpecialTokens(None, self.ends[:1])


def read_special_tokens(folder: Path) -> SpecialTokens | None:
    """Read FOLDER/special_tokens.json. Return None if the file does not exist. Raises DataError if it is invalid. Independent."""
    path = folder / FILE
    found = optional_object(path)
    if found is None:
        return None
    try:
        return _parsed(found)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not valid: {problem}. Restore the file, or prepare the shards again") from None


def for_run(run_dir: Path, tokenizer: Tokenizer) -> SpecialTokens:
    """Return the table of the special tokens of a run. Independent.

    Runs of older versions have no special_tokens.json. If such a run was fine-tuned from a model, its table is made from this
    model's files in RUN/hf. Otherwise, its table is made from the tokenizer, without BOS.
    """
    found = read_special_tokens(run_dir)
    if found is not None:
        return found
    fine_tuned = (run_dir / "init.json").exists()
    made = special_tokens_of(run_dir / "hf" if fine_tuned else None, tokenizer)
    return made if fine_tuned else replace(made, bos=None)  # older runs from scratch were trained without BOS


def special_tokens_of(folder: Path | None, tokenizer: Tokenizer) -> SpecialTokens:
    """Return the table of the special tokens of a tokenizer. If FOLDER/special_tokens.json exists, the table is read from this
    file. Otherwise, the table is made from the files that transformers reads.

    `folder`: the tokenizer's folder, or None if there is no folder. Raises DataError if a file is invalid. Independent.
    """
    if folder is not None and (stored := read_special_tokens(folder)) is not None:
        return with_template(stored, tokenizer, stored.template)
    about, vocabulary = _stored(tokenizer)
    ids = {one["content"]: one["id"] for one in about.get("added_tokens") or []}
    ids = {name: i for name, i in {**vocabulary, **ids}.items() if type(i) is int and 0 <= i < tokenizer.vocab_size}
    files: dict[str, dict[str, Any]] = {}
    if folder is not None:
        files = {name: found for name in COMPANIONS if (found := optional_object(folder / name)) is not None}
    names, generation = _names(files, about), files.get("generation_config.json", {})
    ends = [tokenizer.eod, *_ids(generation.get("eos_token_id", files.get("config.json", {}).get("eos_token_id")))]
    ends += [ids[name] for name in (names.get("eos_token"),) if name in ids]
    pad = next((i for i in (ids.get(names.get("pad_token", "")), *_ids(generation.get("pad_token_id"))) if i is not None), None)
    pad = pad if pad is not None and pad < tokenizer.vocab_size else None
    templates = chat_templates_of(folder) if folder is not None else {}
    special = "tokens" if files or templates or len(special_names(tokenizer)) > 1 else "text"
    table = SpecialTokens(tokenizer.bos, tuple(ends), pad, special, names, tool_template=templates.get("tool_use"))
    return with_template(table, tokenizer, templates.get("default"))


def with_template(table: SpecialTokens, tokenizer: Tokenizer, template: str | None) -> SpecialTokens:
    """Return a copy of the table with the chat template `template`, or without a chat template if `template` is None.
    Independent.

    If the template writes a special token after an assistant's message, `ends` of the copy contains this token.
    """
    ends, special = [tokenizer.eod, *table.ends], special_names(tokenizer)
    if template is not None:
        ends += [special[name] for name in _turn_end(template, table.names, list(special))]
    return replace(table, template=template, ends=tuple(dict.fromkeys(i for i in ends if i < tokenizer.vocab_size)))


def special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Return {name: id} of the special tokens whose names can occur in a text, such as <|im_start|>. Independent."""
    about, _ = _stored(tokenizer)
    return {one["content"]: one["id"] for one in about.get("added_tokens") or [] if one.get("special") and one["content"]}


def _names(files: Mapping[str, dict[str, Any]], about: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: text} of the special tokens, for example bos_token, as transformers determines them. Texts in the model's
    files replace the default texts of the tokenizer's class. `files`: the contents of the model's files. `about`: the contents of
    tokenizer.json."""
    config = files.get("tokenizer_config.json", {})
    merged = dict(config)
    if "added_tokens_decoder" not in config:
        merged |= files.get("special_tokens_map.json", {})
    model = files.get("config.json", {})
    model_type = str(model.get("model_type"))
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or CLASS_OF_MODEL.get(model_type, "")
    kind = "" if model_type in WITHOUT_CLASS else str(kind).removesuffix("Fast")
    byte_level = '"ByteLevel"' in json.dumps([about.get("pre_tokenizer"), about.get("decoder")])
    found: dict[str, Any] = {} if kind == "LlamaTokenizer" and byte_level else dict(CLASS_NAMES.get(kind, {}))
    found |= {key: value for key, value in merged.items() if key in STANDARD or key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        found |= merged[key] if isinstance(merged.get(key), dict) else {}
    return {key: text for key, value in found.items() if (text := _content(value)) is not None}


def _turn_end(template: str, names: Mapping[str, str], special: list[str]) -> Iterator[str]:
    """Yield the special token that the template writes after an assistant's message, if there is one."""
    mark = "\ue000"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    with suppress(TemplateRejection, DataError, UsageError):
        tail = Template(template, names, 0.0).render(messages).rpartition(mark)[2]
        places = [(tail.find(name), -len(name), name) for name in special if name in tail]
        if places and mark not in tail:
            yield min(places)[2]


def _stored(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (contents of tokenizer.json, vocabulary) of a tokenizer. Both are empty for a byte or char tokenizer."""
    if tokenizer.kind != "bpe":
        return {}, {}
    about = json.loads(tokenizer.to_json())
    vocabulary = (about.get("model") or {}).get("vocab")
    return about, vocabulary if isinstance(vocabulary, dict) else {}


def _parsed(found: Mapping[str, Any]) -> SpecialTokens:
    if found.get("format") != FORMAT or found.get("version") != 1:
        raise ValueError(f"its format is not {FORMAT} version 1")
    bos, ends, pad, special, template = (found[key] for key in ("bos", "ends", "pad", "special", "template"))
    names, args, tool_template = found["names"], found["template_args"], found.get("tool_template")
    if not isinstance(ends, list) or len(_ids(ends)) != len(ends) or not ends:
        raise ValueError('"ends" must be a list of at least one token id')
    if any(value is not None and not _ids(value) for value in (bos, pad)):
        raise ValueError('"bos" and "pad" must be a token id or null')
    if special not in ("text", "tokens"):
        raise ValueError('"special" must be "text" or "tokens"')
    if not all(isinstance(text, str | None) for text in (template, tool_template)) or not all(
        isinstance(one, dict) for one in (names, args)
    ):
        raise ValueError('"template" must be a string or null; "names" and "template_args" must be objects')
    if not all(isinstance(value, str) for value in names.values()):
        raise ValueError('the values of "names" must be strings')
    return SpecialTokens(bos, tuple(ends), pad, special, names, template, args, tool_template)


def _ids(value: Any) -> list[int]:
    """Return the valid ids in `value`, which is an id, a list of ids, or null."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < 2**31]


def _content(value: Any) -> str | None:
    """Return the text of a special token, which is stored as a string or as an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
