"""Exported folders have the special tokens of the training: transformers reads the ids, chats and ends that the model knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

from data_tools.prepare import prepare
from mpidp.data.shards import TokenStream
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import load_tokenizer
from mpidp.export import export
from mpidp.hf.tokenizer_files import _with_arguments, text_files, with_begin
from tests.tiny import WORLD, text, tiny, train_at
from tests.unit.test_hf import begun, llama

NAMES = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "who was there"}, {"role": "assistant", "content": "the rank of a tree"}]
WORDS = ("the rank of a tree", "  adds\nÜ 漢", "")


def processor(kind: str) -> Any:
    begin = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return {
        "none": None, "bos": begin, "bos in a sequence": processors.Sequence([processors.ByteLevel(trim_offsets=True), begin]),
        "bos and eos": processors.TemplateProcessing(
            single="<s> $A <|endoftext|>", pair="<s> $A $B", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
        ),
        "eos": processors.TemplateProcessing(single="$A <|endoftext|>", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]),
        "bert": processors.BertProcessing(("<|endoftext|>", 0), ("<s>", 1)),
    }[kind]


PROCESSORS = ("none", "bos", "bos in a sequence", "bos and eos", "eos", "bert")


def made(folder: Path, kind: str, **config: Any) -> Path:
    """A folder with a byte-level BPE tokenizer, as a model has it."""
    tokenizer = Theirs(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=NAMES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text(3000)], trainer)
    if (one := processor(kind)) is not None:
        tokenizer.post_processor = one
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def exported(shards: Path, place: Path, seq_len: int = 16) -> Path:
    model = {"num_layers": 1, "num_heads": 2, "model_dim": 16, "hidden_dim": 32, "seq_len": seq_len}
    train = {"steps": 1, "eval_every": 0, "eval_tokens": 0}
    train_at(1, tiny(shards, place / "run", model=model, train=train, optim={"warmup_steps": 0}))
    export(WORLD, str(place / "run"), str(place / "out"))
    return place / "out"


def texts(tokenizer: Path, place: Path, **options: Any) -> Path:
    (place / "text.txt").write_text(text(4000))
    prepare(str(place / "text.txt"), str(tokenizer), place / "shards", shards=1, verbose=False, **options)
    return place / "shards"


@pytest.mark.parametrize("kind", PROCESSORS)
def test_ids_begin_as_in_training(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "model", kind, bos_token="<s>", eos_token="<|im_end|>")
    shards = texts(folder, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(exported(shards, tmp_path)), load_tokenizer(shards)
    stream = TokenStream(shards, "train")
    first = stream.read(0, stream.num_tokens)[:1].tolist()
    begins = first if first == [1] else []  # BOS, if the data has it
    for words in WORDS:
        assert theirs(words).input_ids == begins + ours.encode(words).tolist(), words
    assert theirs.bos_token_id == (begins or [ours.eod])[0] and theirs.eos_token_id == ours.eod
    assert theirs(["the", "the rank of"], padding=True).input_ids  # there is a pad token
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [theirs.bos_token_id, ours.eod, theirs.pad_token_id]


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("bos", [None, 1])
def test_a_post_processor_is_replaced_only_where_it_adds_other_ids(tmp_path: Path, kind: str, bos: int | None) -> None:
    before = (made(tmp_path / "model", kind) / "tokenizer.json").read_text()
    after = with_begin(before, bos)
    fits = (bos is None and kind == "none") or (bos == 1 and kind in ("bos", "bos in a sequence"))
    assert (after == before) == fits
    one, two = Theirs.from_str(before), Theirs.from_str(after)
    for words in WORDS:
        assert two.encode(words).ids == ([] if bos is None else [bos]) + one.encode(words, add_special_tokens=False).ids
    assert two.encode("the", "rank").ids[: len(two.encode("the").ids)] == two.encode("the").ids


def chats(tokenizer: Path, place: Path, **options: Any) -> Path:
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(60)))
    prepare(str(place / "chats.jsonl"), str(tokenizer), place / "shards", shards=1, val_fraction=0.1, form="chat",
            seq_len=64, verbose=False, **options)
    return place / "shards"


def row(shards: Path) -> list[int]:
    """Return the ids of the first row, without the end of the document."""
    stream = TokenStream(shards, "train")
    ids = stream.read(0, 64)
    return ids[: int(np.flatnonzero(ids == 0)[0])].tolist()


@pytest.mark.parametrize("kind", ["none", "bos"])
@pytest.mark.parametrize("with_file", [False, True])
def test_a_chat_is_that_of_the_training(tmp_path: Path, kind: str, with_file: bool) -> None:
    """The template of the data and the tokens that it names are in the export, from wherever they came."""
    folder = made(tmp_path / "model", kind, bos_token="<s>", eos_token="<|im_end|>")
    if with_file:
        (tmp_path / "given.jinja").write_text(TEMPLATE)
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    shards = chats(folder, tmp_path, chat_template=str(tmp_path / "given.jinja") if with_file else None)
    theirs = AutoTokenizer.from_pretrained(exported(shards, tmp_path, 64))
    assert theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False) == row(shards)
    assert row(shards)[0] == 1 and theirs.bos_token == "<s>"
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert set(ends) == {0, 3}  # <|endoftext|> and <|im_end|>


def test_a_fine_tune_keeps_the_files_of_its_model_but_for_the_data_s_template(tmp_path: Path) -> None:
    folder = made(
        tmp_path / "model", "bos", bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", add_bos_token=True,
        chat_template=[{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "tools {{ tools }}"},
                       {"name": "rag", "template": "rag"}, {"name": "../../up", "template": "no"}],
        auto_map={"AutoTokenizer": ["code.Own", None]}, my_key=[1],
    )
    llama("tied").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3], "temperature": 0.6, "do_sample": True}))
    (tmp_path / "given.jinja").write_text(TEMPLATE)
    shards = chats(folder, tmp_path, chat_template=str(tmp_path / "given.jinja"))
    train_at(1, begun(shards, folder, tmp_path / "run", train={"steps": 1}, optim={"warmup_steps": 0},
                      model={"seq_len": 64}))
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False) == row(shards)
    kept = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert kept["my_key"] == [1] and kept["pad_token"] == "<pad>" and not {"auto_map", "chat_template"} & set(kept)
    assert {file.name: file.read_text() for file in (tmp_path / "out/additional_chat_templates").iterdir()} == {
        "tool_use.jinja": "tools {{ tools }}", "rag.jinja": "rag",
    }
    assert theirs.apply_chat_template(CHAT, tokenize=False, chat_template="rag") == "rag"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["temperature"] == 0.6 and generation["eos_token_id"] == [3, 0]
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 3
    assert theirs("the").input_ids[0] == 1
    shutil.rmtree(tmp_path / "shards")
    shards = texts(folder, tmp_path, bos="none")  # trained without BOS: neither the export adds it
    train_at(1, begun(shards, folder, tmp_path / "plain", train={"steps": 1}, optim={"warmup_steps": 0}))
    export(WORLD, str(tmp_path / "plain"), str(tmp_path / "other"))
    assert AutoTokenizer.from_pretrained(tmp_path / "other")("the").input_ids[0] != 1
    assert not json.loads((tmp_path / "other/tokenizer_config.json").read_text())["add_bos_token"]


@pytest.mark.parametrize(("kept", "ends"), [
    ({"config.json": {"eos_token_id": [3, 5]}}, [3, 5, 0]),
    ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"temperature": 0.6}}, [5, 0]),
    ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": 3}}, [3, 0]),
    ({"config.json": {}}, 0),
])
def test_the_ends_of_config_json_are_exported_if_generation_config_json_names_none(kept: dict[str, Any], ends: Any) -> None:
    files = text_files(SpecialTokens(None, (0,)), {0: "<|endoftext|>"}, kept, 64)
    assert files["generation_config.json"]["eos_token_id"] == ends


def test_arguments_of_the_template_are_its_defaults(tmp_path: Path) -> None:
    written = "\n{{ messages[0].content }}{% if thinks %}THINKS{% endif %}{{ mode }}{{ none_of is none }}{{ a.b[1] }}"
    arguments = {"thinks": False, "mode": "my \"NAME\" 🙂", "none_of": None, "a": {"b": [True, 2]}}
    folder = made(tmp_path / "model", "none", eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(_with_arguments(written, arguments))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "\nwho was theremy \"NAME\" 🙂True2"
    assert theirs.apply_chat_template(CHAT, tokenize=False, thinks=True, mode="x") == "\nwho was thereTHINKSxTrue2"
