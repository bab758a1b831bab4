"""Laws of prompts: their ids, ends and answers are those of transformers, for special tokens, chats and Hugging Face folders."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpidp.data.encoder import Encoder
from mpidp.data.special_tokens import SpecialTokens, special_tokens_of
from mpidp.data.tokenizer import ByteTokenizer, Tokenizer
from mpidp.errors import DataError, UsageError
from mpidp.evaluate import evaluate, evaluate_choices, evaluate_text
from mpidp.evaluate import read_options as evaluate_options
from mpidp.generate import generate, read_options
from mpidp.inference.chats import read_chats, rendered, template_of
from mpidp.inference.generation import write_rows
from mpidp.inference.loading import open_model
from mpidp.inference.rows import read_prompts
from tests.tiny import WORLD, tiny, train_at
from tests.unit.small_tokenizers import byte_level, sentencepiece
from tests.unit.test_hf import begun

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
PROMPTS = ["<|turn|>user\nhello<|endoftext|>\n<|turn|>assistant\n", "hello there", " a<|turn|>", "", "naïve 日本"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat tokenizer, as transformers saves it."""
    out = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    vocab_size = byte_level().vocab_size
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, vocab_size=vocab_size, bos_token_id=None, eos_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3) if p.dim() > 1 else p.fill_(1.0)
    model.save_pretrained(out)
    (out / "tokenizer.json").write_text(byte_level().to_json())
    (out / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}))
    return out


@pytest.fixture(scope="module")
def library(folder: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and model of the folder."""
    return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)


def answers(folder: Path, *words: str) -> list[dict[str, Any]]:
    return generate(WORLD, read_options([str(folder), "--device=cpu", "--threads=1", "--temperature=0", "--tokens=12", *words]))


def expected(library: tuple[Any, Any], ids: list[int], ends: list[int]) -> str:
    """The greedy answer of transformers, without the token that ends it."""
    tokenizer, model = library
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    found = out[0, len(ids) :].tolist()
    return str(tokenizer.decode(found[:-1] if found[-1] in ends else found))


@pytest.mark.parametrize("special", ["tokens", "text"])
def test_ids_are_those_of_transformers(folder: Path, library: tuple[Any, Any], special: str) -> None:
    encoder = open_model(evaluate_options([str(folder), "--threads=1"]), WORLD, special)[2]
    for text in PROMPTS:
        wanted = library[0](text, split_special_tokens=special == "text").input_ids
        assert encoder.prompt(text) == (wanted or [0])
    assert (1 in encoder.prompt(PROMPTS[0])) == (special == "tokens")


def test_answers_of_a_folder_are_those_of_transformers(folder: Path, library: tuple[Any, Any], tmp_path: Path) -> None:
    texts = [text for text in PROMPTS if text]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    found = answers(folder, f"--prompts={tmp_path / 'p.jsonl'}")
    assert [row["text"] for row in found] == [expected(library, library[0](text).input_ids, [0]) for text in texts]


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_text_ends_at_every_end_of_its_model(
    folder: Path, library: tuple[Any, Any], shards: Path, tmp_path: Path, place: str, listed: bool
) -> None:
    """Of a folder, and of a run that was fine-tuned from it with shards that know one end only."""
    prompt = "hello there"
    ids = library[0](prompt).input_ids
    said = library[0](expected(library, ids, [])).input_ids
    end = said[3]
    source = tmp_path / "hf"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "generation_config.json").unlink()
    about = json.loads((folder / place).read_text()) | {"eos_token_id": [0, end] if listed else end}
    (source / place).write_text(json.dumps(about))
    run = tmp_path / "run"
    train_at(1, begun(shards, source, run, train={"steps": 1}, optim={"lr": 1e-30, "min_lr": 0.0}))
    for model in (source, run):
        (row,) = answers(model, f"--prompt={prompt}")
        assert (row["text"], row["ended"]) == (expected(library, ids, [0, end]), "eod")


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    from data_tools.prepare import prepare

    (folder.parent / "text.txt").write_text("hello there the fox says yes\n" * 60)
    (folder.parent / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    prepare(str(folder.parent / "text.txt"), str(folder.parent / "tokenizer.json"), folder.parent / "shards", shards=1,
            val_fraction=0.2, verbose=False)
    return folder.parent / "shards"


CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello"}]},
    {"messages": [{"role": "system", "content": "says"}, {"role": "user", "content": "no"}], "id": 3},
    {"messages": [{"role": "user", "content": "fox"}], "chat_template_kwargs": {"enable_thinking": True}},
]


def test_chats_are_rendered_as_by_transformers(folder: Path, library: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    found, tokenizer = answers(folder, f"--prompts={tmp_path / 'c.jsonl'}", "--chat"), library[0]
    for row, chat in zip(found, CHATS, strict=True):
        ids = tokenizer.apply_chat_template(
            chat["messages"], add_generation_prompt=True, return_dict=False, **chat.get("chat_template_kwargs", {}))
        assert row["text"] == expected(library, ids, [0]) and row["messages"] == chat["messages"]
    (alone,) = answers(folder, "--prompt=hello", "--chat")
    assert alone["text"] == found[0]["text"]
    (tmp_path / "c.txt").write_text("hello\n")
    assert answers(folder, f"--prompts={tmp_path / 'c.txt'}", "--chat")[0]["text"] == found[0]["text"]


@pytest.mark.parametrize(("row", "said"), [
    ({"messages": []}, "must be a list of messages"), ({"messages": ["a"]}, 'an object with a "role"'),
    ({"a": 1}, 'no "messages"'),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
])
def test_bad_chats_are_named_by_their_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(CHATS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"c.jsonl, line 2: .*{said}"):
        read_chats(tmp_path / "c.jsonl")


def test_chats_need_a_template_and_may_be_rejected() -> None:
    with pytest.raises(UsageError, match="runs/x has no chat template"):
        template_of(SpecialTokens(None, (0,)), "runs/x", 0.0)
    strict = template_of(SpecialTokens(None, (0,), template="{{ raise_exception('no') }}"), "runs/x", 0.0)
    with pytest.raises(DataError, match="rejected by the chat template"):
        rendered(strict, CHATS[0])


def test_rows_of_generate_may_have_the_forms_of_prepare() -> None:
    """Lists and objects may be JSON strings, and `prompt` may be a list of messages."""
    template = "{{ messages[0].content }}{{ tools | tojson }}{{ documents | tojson }}{{ x }}"
    made = template_of(SpecialTokens(None, (0,), template=template), "runs/x", 0.0)
    messages, one = [{"role": "user", "content": "q"}], {"title": "t"}
    plain = {"messages": messages, "tools": [one], "documents": [one], "chat_template_kwargs": {"x": 5}}
    packed = {key: json.dumps(value) for key, value in plain.items()}
    listed = plain | {"tools": [json.dumps(one)], "documents": [json.dumps(one)], "messages": None, "prompt": messages}
    assert [rendered(made, row) for row in (plain, packed, listed)] == ['q[{"title": "t"}][{"title": "t"}]5'] * 3
    for bad in ({"documents": "so"}, {"tools": ["so"]}, {"documents": [3]}, {"chat_template_kwargs": [3]}, {"messages": "[["},
                {"tools": "[" * 100_000}):
        with pytest.raises(DataError, match="` is (a string that is not JSON|not a list of objects|a list, not an object)"):
            rendered(made, plain | bad)


@pytest.mark.parametrize("bos", [None, 1])
def test_a_text_begins_as_the_training_data_did(bos: int | None) -> None:
    tokenizer = sentencepiece()
    encoder = Encoder(tokenizer, SpecialTokens(bos, (tokenizer.eod,)), "tokens")
    plain, begin = tokenizer.encode("hello").tolist(), tokenizer.eod if bos is None else bos
    assert encoder.document("hello").tolist() == [begin, *plain]
    assert encoder.prompt("hello") == ([] if bos is None else [bos]) + plain
    assert encoder.prompt("") == [begin] == encoder.document("").tolist() == encoder.chat("")
    assert encoder.chat("hello") == plain  # the template writes BOS
    if bos is not None:  # a text that begins with BOS gets no second one
        assert encoder.prompt("<s>hello")[:2].count(bos) == 1 and encoder.document("<s>hello").tolist().count(bos) == 1


@pytest.mark.parametrize("special", ["text", "tokens"])
@pytest.mark.parametrize("make", [ByteTokenizer, byte_level, sentencepiece])
def test_half_of_a_surrogate_pair_is_an_error(make: Callable[[], Tokenizer], special: str) -> None:
    tokenizer = make()
    encoder = Encoder(tokenizer, SpecialTokens(None, (tokenizer.eod,)), special)
    for encode in (encoder.ids, encoder.document, encoder.prompt):
        for text in ("hello \ud83d", "\udcff"):  # of JSON; of a command line with a byte that is not UTF-8
            with pytest.raises(DataError, match="half of a surrogate pair.*position"):
                encode(text)


def test_texts_that_name_special_tokens_are_counted() -> None:
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, special_tokens_of(None, tokenizer), "text")
    assert encoder.named(["a", "b<|turn|>", "<|turn|>"]) == ("<|turn|>", 2) and encoder.named(["a"]) == ("", 0)


@torch.no_grad()
def test_a_base_is_evaluated_as_by_transformers(folder: Path, library: tuple[Any, Any], shards: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("hello there the fox says no")
    found = evaluate_text(evaluate_options([str(folder), f"--text={tmp_path / 'some.txt'}", "--threads=1"]), WORLD)
    ids = torch.tensor([[0, *library[0]("hello there the fox says no").input_ids]])
    assert found["loss"] == pytest.approx(float(library[1](input_ids=ids, labels=ids).loss.detach()), rel=1e-5)
    whole = evaluate(str(folder), str(shards), WORLD, device="cpu", threads=1, seq_len=16)
    from mpidp.data.shards import TokenStream

    stream = TokenStream(shards, "val")
    tokens = torch.from_numpy(stream.read(0, stream.num_tokens).astype(np.int64))
    losses = [library[1](input_ids=part[None, :-1]).logits[0].log_softmax(-1).gather(1, part[1:, None]).sum()
              for at in range(0, len(tokens) - 1, 16) if len(part := tokens[at : at + 17]) > 1]
    assert whole["loss"] == pytest.approx(-float(sum(losses)) / (len(tokens) - 1), rel=1e-5)
    assert math.isfinite(whole["bits_per_byte"])
    (tmp_path / "c.jsonl").write_text('{"context": "hello", "choices": [" there", " yes"], "label": 0}\n')
    assert evaluate_choices(evaluate_options([str(folder), f"--choices={tmp_path / 'c.jsonl'}"]), WORLD)["items"] == 1


def test_no_text_is_lost_if_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mpidp.runtime.files.write_file", full)
    with pytest.raises(UsageError, match=r"--out .*t.jsonl cannot be written \(No space left on device\). The texts are on"):
        write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "text": "b"}], WORLD)
    assert capsys.readouterr().out == '{"prompt": "a", "text": "b"}\n'


def test_a_run_has_no_files_of_an_earlier_run_in_its_folder(folder: Path, shards: Path, tmp_path: Path) -> None:
    """Otherwise generate and export would use the special tokens and the config of the earlier run's model."""
    run = tmp_path / "run"
    train_at(1, begun(shards, folder, run, train={"steps": 1}))
    before = evaluate(str(run), str(shards), WORLD)
    assert (run / "hf").is_dir()
    train_at(1, tiny(shards, run, run={"resume": "never"}))
    assert not (run / "hf").exists() and not (run / "init.json").exists()
    assert evaluate(str(run / "previous_1"), str(shards), WORLD) == before
    for name, sections, kept in (("scratch", {}, False), ("other", {"train": {"init_from": str(run)}}, True)):
        new = tmp_path / name  # as after an earlier run that ended before its first checkpoint
        shutil.copytree(run / "previous_1/hf", new / "hf")
        shutil.copy(run / "previous_1/init.json", new)
        train_at(1, tiny(shards, new, **sections))
        assert not (new / "hf").exists() and (new / "init.json").exists() == kept


def test_values_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["a"], "at": [datetime(2026, 11, 30, 12)], "day": [date(2026, 11, 30)], "price": [Decimal("1.50")]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    write_rows(tmp_path / "t.jsonl", read_prompts(tmp_path / "p.parquet"), WORLD)
    assert json.loads((tmp_path / "t.jsonl").read_text()) == {
        "prompt": "a", "at": "2026-11-30 12:00:00", "day": "2026-11-30", "price": "1.50"}


def test_what_a_folder_needs_is_said(folder: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a Hugging Face folder, which names no shards"):
        evaluate(str(folder), None, WORLD)
    with pytest.raises(UsageError, match="--seq-len 65 is too large: the context of .* has only 64 tokens"):
        evaluate(str(folder), str(shards), WORLD, seq_len=65)
    run = tmp_path / "run"
    train_at(1, begun(shards, folder, run, train={"steps": 1}))
    with pytest.raises(UsageError, match="--seq-len applies to Hugging Face folders only"):
        answers(run, "--prompt=a", "--seq-len=8")
