"""Laws of the table of special tokens: it says what transformers reads, and it travels from the tokenizer to shards and runs."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import prepare
from mpidp.data.index import read_index
from mpidp.data.shards import TokenStream
from mpidp.data.special_tokens import CLASS_NAMES, SpecialTokens, for_run, read_special_tokens, special_names, special_tokens_of
from mpidp.data.tokenizer import load_tokenizer, train_bpe
from mpidp.errors import DataError
from mpidp.training.run_record import keep_special_tokens
from tests.tiny import tiny, train_at

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{% endfor %}"


def model_folder(folder: Path, bos: bool = False, **files: Any) -> Path:
    """Write a tokenizer.json with special tokens, and the given JSON files (or texts) beside it."""
    about = json.loads(train_bpe(iter(["yes no the fox says hello there\n\n a:\n\nyes. " * 9]), 290).to_json())
    vocab = about["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    for name in ("<|im_start|>", "<|im_end|>", "<s>", "<pad>"):
        about["added_tokens"].append({"id": len(vocab) + len(about["added_tokens"]) - 1, "content": name} | flags)
    if bos:
        first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        about["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [about["added_tokens"][3]["id"]], "tokens": ["<s>"]}},
        }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


MAP = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False,
                                         "single_word": False}}
FILES: list[dict[str, Any]] = [
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}},
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast"}, "special_tokens_map__json": MAP},
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<pad>", "eos_token": "<pad>"},
     "special_tokens_map__json": MAP},
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<pad>", "added_tokens_decoder": {}},
     "special_tokens_map__json": MAP},
    {"tokenizer_config__json": {"tokenizer_class": "GPT2TokenizerFast"}},
    {"tokenizer_config__json": {"tokenizer_class": "GPT2TokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}},
    {"tokenizer_config__json": {"tokenizer_class": "Qwen2Tokenizer"}},
    {"tokenizer_config__json": {"tokenizer_class": "GPTNeoXTokenizerFast"}},
    {"tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}},
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": "<pad>",
                                "extra_special_tokens": {"think_start": "<s>"}}},
    {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                "model_specific_special_tokens": {"a_token": "<s>"}}},
    *({"config__json": {"model_type": kind}}
      for kind in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "olmo2")),
    *({"config__json": {"model_type": kind}, "tokenizer_config__json": {"tokenizer_class": "GPT2Tokenizer"}}
      for kind in ("llama", "mistral", "gpt2", "phi3")),
    {"config__json": {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}},
]


@pytest.mark.parametrize("files", FILES, ids=range(len(FILES)))
def test_names_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = model_folder(tmp_path / "m", **files)
    assert special_tokens_of(folder, load_tokenizer(folder)).names == auto.from_pretrained(folder).special_tokens_map


@pytest.mark.parametrize("kind", CLASS_NAMES)
def test_classes_define_the_names_of_transformers(kind: str) -> None:
    made = getattr(pytest.importorskip("transformers"), kind)
    parameters = inspect.signature(made.__init__).parameters.items()
    assert CLASS_NAMES[kind] == {
        name: str(one.default) for name, one in parameters
        if name.endswith("_token") and one.default not in (None, True, False, inspect.Parameter.empty)
    }


def test_the_ends_of_a_text(tmp_path: Path) -> None:
    """The end of a document is first; then follow generation_config (else config), the tokenizer's eos, and the end of a turn."""
    folder = model_folder(tmp_path / "m", tokenizer_config__json={"eos_token": "<pad>", "pad_token": "<pad>"},
                          config__json={"eos_token_id": 7}, chat_template__jinja=TEMPLATE)
    tokenizer = load_tokenizer(folder, "<|endoftext|>")
    pad, end = tokenizer.vocab_size - 1, tokenizer.vocab_size - 3
    found = special_tokens_of(folder, tokenizer)
    assert found.ends == (tokenizer.eod, 7, pad, end) and found.pad == pad and found.special == "tokens"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 10**9, True, "x", -1], "pad_token_id": 3}))
    assert special_tokens_of(folder, tokenizer).ends == (tokenizer.eod, 5, pad, end)
    assert found.template == TEMPLATE and found.bos is None


@pytest.mark.parametrize(("declared", "chosen"), [
    ({"eos_token": "<s>"}, "<s>"), ({"eos_token": {"content": "<s>"}}, "<s>"),  # the model's own token, whatever its name is
    ({"eos_token": "<|im_end|>"}, "<|endoftext|>"),  # a chat model: it ends a turn
    ({"eos_token": "<absent>"}, "<|endoftext|>"), ({"eos_token": None}, "<|endoftext|>"), ({}, "<|endoftext|>"),
])
def test_a_document_ends_with_the_token_that_the_model_declares(tmp_path: Path, declared: dict[str, Any], chosen: str) -> None:
    folder = model_folder(tmp_path / "m", tokenizer_config__json=declared)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([tokenizer.eod]) == ""
    assert special_names(tokenizer)[chosen] == tokenizer.eod == special_tokens_of(folder, tokenizer).ends[0]


def test_plain_tokenizers_have_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello there\n" * 50)
    for tokenizer in ("byte", "char", "bpe:260"):
        index = prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "out", 1)
        assert not (tmp_path / "out/special_tokens.json").exists() and "special_tokens" not in index.to_json()
    again = prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), tmp_path / "again", 1)  # our own BPE, given as a file
    assert again.to_json() == index.to_json()
    assert for_run(tmp_path / "out", load_tokenizer(tmp_path / "out")) == SpecialTokens(None, (0,))


def test_the_tokenizer_of_shards_or_of_a_run_keeps_its_end_of_documents(tmp_path: Path) -> None:
    folder, run = model_folder(tmp_path / "m", tokenizer_config__json={"eos_token": "<|im_end|>"}), tmp_path / "run"
    (tmp_path / "a.txt").write_text("hello there\n" * 50)
    index = prepare(str(tmp_path / "a.txt"), str(folder), tmp_path / "out", 1, eod="<|im_end|>")
    assert index.eod != load_tokenizer(folder).eod
    run.mkdir()
    for name in ("tokenizer.json", "special_tokens.json"):
        (run / name).write_bytes((tmp_path / "out" / name).read_bytes())
    for given in (tmp_path / "out", run, run / "tokenizer.json"):
        again = prepare(str(tmp_path / "a.txt"), str(given), tmp_path / "again", 1)
        assert again.to_json() == index.to_json()


def test_the_table_travels_to_shards_and_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder(tmp_path / "m", bos=True, tokenizer_config__json={"bos_token": "<s>", "eos_token": "<|im_end|>"},
                          chat_template__jinja=TEMPLATE)
    (tmp_path / "a.txt").write_text("hello there\n" * 50)
    index = prepare(str(tmp_path / "a.txt"), str(folder), tmp_path / "out", 1)
    table = special_tokens_of(folder, load_tokenizer(folder))
    assert table.bos is not None and read_special_tokens(tmp_path / "out") == table
    content = read_index(tmp_path / "out").special_tokens_bytes(tmp_path / "out")
    assert content == table.to_json().encode() and index.special_tokens_sha256

    run, tokenizer = tmp_path / "run", load_tokenizer(tmp_path / "out")
    (run / "hf").mkdir(parents=True)
    (run / "hf/chat_template.jinja").write_text("other")
    keep_special_tokens(content, table.template, run)
    assert for_run(run, tokenizer) == table and (run / "hf/chat_template.jinja").read_text() == TEMPLATE
    keep_special_tokens(None, None, run)  # a run that starts again, with other data
    assert not (run / "special_tokens.json").exists()

    (tmp_path / "out/special_tokens.json").write_text("{}")
    with pytest.raises(DataError, match=r"special_tokens.json has changed since index.json was written"):
        TokenStream(tmp_path / "out").index.special_tokens_bytes(tmp_path / "out")
    with pytest.raises(DataError, match=r"special_tokens.json is not valid: its format is not"):
        read_special_tokens(tmp_path / "out")


def test_training_refuses_an_invalid_table_that_the_index_lists(tmp_path: Path) -> None:
    folder, run = model_folder(tmp_path / "m", tokenizer_config__json={"eos_token": "<|im_end|>"}), tmp_path / "run"
    (tmp_path / "a.txt").write_text("hello there\n" * 50)
    index = prepare(str(tmp_path / "a.txt"), str(folder), tmp_path / "out", 1)
    (tmp_path / "out/special_tokens.json").write_text("{}")
    changed = replace(index, special_tokens_sha256=hashlib.sha256(b"{}").hexdigest())
    (tmp_path / "out/index.json").write_text(changed.to_json())
    with pytest.raises(DataError, match=r"out/special_tokens.json is not valid: its format is not"):
        train_at(1, tiny(tmp_path / "out", run, train={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0}))
    assert not (run / "special_tokens.json").exists()


def test_older_runs_take_the_files_of_their_model(tmp_path: Path) -> None:
    """Only fine-tuned runs were prompted with BOS."""
    folder = model_folder(tmp_path / "m", bos=True, tokenizer_config__json={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(folder)
    (tmp_path / "run").mkdir()
    assert for_run(tmp_path / "run", tokenizer).bos is None
    folder.rename(tmp_path / "run/hf")
    (tmp_path / "run/init.json").write_text("{}")
    found = for_run(tmp_path / "run", tokenizer)
    assert found.bos == tokenizer.bos is not None and found.ends == (tokenizer.eod, tokenizer.vocab_size - 3)


@pytest.mark.parametrize("change", [
    {"version": 2}, {"ends": []}, {"ends": [-1]}, {"ends": 3}, {"bos": "a"}, {"bos": 2**40}, {"special": "no"}, {"names": 3},
    {"names": {"a": 1}}, {"template": 3}, {"template_args": []}, {"pad": 1.5}, {"ends": None},
])  # fmt: skip
def test_an_invalid_table_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = json.loads(SpecialTokens(1, (0, 2), 3, "tokens", {"bos_token": "<s>"}, "x", {"a": 1}).to_json())
    (tmp_path / "special_tokens.json").write_text(json.dumps(good | change))
    with pytest.raises(DataError, match="special_tokens.json is not valid: "):
        read_special_tokens(tmp_path)
