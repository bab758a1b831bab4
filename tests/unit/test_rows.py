"""Laws of rows: the loss covers completions or assistant turns, packing changes no loss, and bad rows are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.arrange import pack
from data_tools.options import PrepareOptions
from data_tools.prepare import prepare
from data_tools.special_table import find_template, table_of
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.lanes import Lanes
from mpidp.data.loader import IGNORED, Loader
from mpidp.data.places import placer
from mpidp.data.sampler import Sampler
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from mpidp.errors import DataError, UsageError
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import Transformer
from mpidp.parallel.engine import Engine

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def chat(*said: str, first: str = "user") -> dict[str, Any]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[i % 2], "content": words} for i, words in enumerate(said)]}


def user(words: Any) -> dict[str, Any]:
    return {"role": "user", "content": words}


def said(words: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **keys}


def rows_of(out: Path, split: str = "train") -> list[tuple[list[int], list[bool]]]:
    """Return (ids, loss mask) of each document in order, including the padding after it."""
    stream = TokenStream(out, split)
    stream.check(contents=True)
    ids, mask = stream.read(0, stream.num_tokens), stream.read_mask(0, stream.num_tokens)
    assert mask is not None
    cuts = np.flatnonzero(stream.read_starts(0, stream.num_tokens))
    assert len(cuts) == stream.num_documents and cuts[0] == 0
    return [(a.tolist(), b.tolist()) for a, b in zip(np.split(ids, cuts[1:]), np.split(mask, cuts[1:]), strict=True)]


def spoken(out: Path, split: str = "train") -> list[tuple[str, str]]:
    """Return (text, text with loss) of each row for the byte tokenizer, with EOD as "$" and without padding."""
    def text(ids: list[int]) -> str:
        return bytes(ord("$") if i == 256 else i for i in ids).decode()

    rows = rows_of(out, split)
    return [(text(ids).rstrip("$") + "$", text([i for i, m in zip(ids, mask, strict=True) if m])) for ids, mask in rows]


def test_of_a_pair_the_completion_and_the_end_are_learned(tmp_path: Path) -> None:
    """A first token is not predicted, so it is no target."""
    source = write(tmp_path / "a.jsonl", pair("2+2=", "4"), pair("", "abc"), "", pair("say ", "hi there"))
    index = prepare(source, out=tmp_path / "out", form="prompt_completion", seq_len=16, val_fraction=0, shards=2)
    assert sorted(spoken(tmp_path / "out")) == [("2+2=4$", "4$"), ("abc$", "bc$"), ("say hi there$", "hi there$")]
    assert index.window == 16 and index.splits["train"].loss_mask and index.source["learned_tokens"] == 2 + 3 + 9
    assert TokenStream(tmp_path / "out").num_tokens == 2 * 16 + 1


@pytest.mark.parametrize(("template", "row", "text", "learned"), [
    (CHATML, chat("hi", "yo"), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n$", "yo<|im_end|>\n$"),
    (STRICT, chat("one", "two", "three", "four"), "u:one\na:two\nu:three\na:four\n$", "two\nfour\n$"),
    (STRICT, chat("one", "two", "three"), "u:one\na:two\nu:three\n$", "two\n"),  # after a turn without loss EOD has none
    (MARKED, chat("one", "two", "three", "four"), "u:one;a:two.;u:three;a:four.;$", "two.four.$"),
    (MARKED, chat("first", "then", first="assistant"), "a:first.;u:then;$", "first."),
    (MARKED.replace("{% gen", "{%+ gen"), chat("one", "two"), "u:one;a:two.;$", "two.$"),
])  # fmt: skip
def test_of_a_conversation_what_the_assistant_says_is_learned(
    tmp_path: Path, template: str, row: dict[str, Any], text: str, learned: str
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    source = write(tmp_path / "a.jsonl", row, row)
    prepare(source, out=tmp_path / "out", form="chat", chat_template=str(tmp_path / "t.jinja"), seq_len=80, val_fraction=0)
    assert spoken(tmp_path / "out") == [(text, learned)] * 2


def hugging_face(folder: Path, eod: str, chat_template: Any = CHATML) -> str:
    """A tokenizer that contains a template's special tokens."""
    about = json.loads(train_bpe(iter(["user assistant: what it says, and what you said " * 9]), 280).to_json())
    first = 1 + max(about["model"]["vocab"].values())
    names = {"id": first, "content": "<|im_start|>"}, {"id": first + 1, "content": "<|im_end|>"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    about["added_tokens"] += [one | flags for one in names]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    config = {"chat_template": chat_template, "eos_token": {"content": eod}, "bos_token": "<s>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize(("eod", "learned"), [("<|im_end|>", "yo<|im_end|>\n"), ("<|endoftext|>", "yo<|im_end|>\n<|endoftext|>")])
def test_a_template_s_special_tokens_are_single_ids(tmp_path: Path, eod: str, learned: str) -> None:
    """An end token that the template writes itself is not added again."""
    tokenizer = hugging_face(tmp_path / "hf", eod)
    source = write(tmp_path / "a.jsonl", chat("hi", "yo"))
    prepare(source, tokenizer, tmp_path / "out", 1, 0.0, form="chat", seq_len=40, eod=eod)
    [(ids, mask)] = rows_of(tmp_path / "out")
    import tokenizers

    library = tokenizers.Tokenizer.from_file(tokenizer)
    special = [library.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")]
    assert [i for i in ids if i == special[0]] == special[:1] * 2
    assert library.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False) == learned


def test_where_a_template_is_found(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = hugging_face(tmp_path / "a", "<|im_end|>", several)
    found = find_template(PrepareOptions([], tokenizer), table_of(tokenizer, None))
    assert found.text == "yes" and found.names == {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    (tmp_path / "a/chat_template.jinja").write_text("nearer{{ bos_token }}")
    found = find_template(PrepareOptions([], tokenizer), table_of(str(tmp_path / "a"), None))
    assert found.render([{"role": "user", "content": ""}]) == "nearer<s>"
    (tmp_path / "mine.jinja").write_text("mine")
    given = PrepareOptions([], tokenizer, chat_template=str(tmp_path / "mine.jinja"))
    assert find_template(given, table_of(tokenizer, None)).text == "mine"


@pytest.mark.parametrize("tokenizer", [
    ByteTokenizer(), CharTokenizer("".join(sorted(set("ünï 漢字 🙂 ab")))), train_bpe(iter(["ünï 漢字 🙂 ab"]), 270),
], ids=lambda t: t.kind)  # fmt: skip
def test_ids_know_their_characters(tokenizer: Tokenizer) -> None:
    text = "ab b, a 漢字🙂 ünï".replace(",", "")
    [placed] = placer(tokenizer, "text")([text])
    ids, places = placed.ids, placed.starts
    assert ids.tolist() == tokenizer.encode(text).tolist() and (np.diff(places) >= 0).all()
    for place in places:
        if tokenizer.kind != "bpe" or text[:place].isascii():  # otherwise a token may span two characters
            assert tokenizer.decode(ids[places >= place]) == text[place:]


@pytest.mark.parametrize(("form", "row", "kind", "words"), [
    ("prompt_completion", "{", "malformed", "not valid JSON"), ("prompt_completion", "[1]", "malformed", "not an object"),
    ("prompt_completion", {"prompt": "a", "completion": 3}, "malformed", "no string fields `prompt` and `completion`"),
    ("prompt_completion", pair("a", ""), "empty", "its completion is empty"),
    ("prompt_completion", pair("a" * 90, "b"), "long", "92 tokens, more than --seq-len 80"),
    ("chat", {"messages": []}, "malformed", "`messages` is empty"), ("chat", {"text": "x"}, "malformed", "no field `messages`"),
    ("chat", {"messages": [{"role": "user"}]}, "malformed", "without `content`, and without `tool_calls`"),
    ("chat", {"messages": 3}, "malformed", "`messages` is a number, not a list"),
    ("chat", {"messages": [{"content": "a"}]}, "malformed", "without a string field `role`"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, "malformed", "whose `content` is a number"),
    ("chat", {"messages": [user([{"type": "image_url"}, {"type": "text", "text": "a"}]), said("b")]}, "malformed",
     "a part of type `image_url`, but mpidp trains on text only"),
    ("chat", chat("a", "b") | {"tools": "[{"}, "malformed", "`tools` is a string that is not JSON"),
    ("chat", chat("a", "b") | {"tools": [3]}, "malformed", "`tools` is not a list of objects"),
    ("chat", chat("a", "b") | {"chat_template_kwargs": []}, "malformed", "`chat_template_kwargs` is a list, not an object"),
    ("chat", {"messages": [user("a"), said("b", weight=0.5)]}, "malformed", "`weight`, `train` or `loss` is 0.5"),
    ("chat", {"messages": [user("a") | {"train": True}, said("b")]}, "malformed", "a user message has"),
    ("chat", {"messages": [user("a"), said("b", train=False)]}, "empty", "no assistant turn to learn"),
    ("chat", {"messages": [user("a"), said("b", loss=False)]}, "empty", "no assistant turn to learn"),
    ("chat", {"messages": [user("a"), said("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])]}, "malformed",
     "the chat template does not write `tool_calls`"),
    ("chat", '{"messages": ' * 900 + "1" + "}" * 900, "malformed", "(?:nested too deeply|no field `messages`)"),
    ("chat", '{"a": ' * 4000 + "1" + "}" * 4000, "malformed", "(?:not valid JSON|nested too deeply)"),
    ("chat", chat("alone"), "empty", "no assistant turn"),
    ("chat", chat("a", "b", first="assistant"), "malformed", r"rejected by the chat template \(roles must alternate\)"),
    ("chat", chat("a\ufdd0", "b"), "malformed", "U\\+FDD0"),
])  # fmt: skip
def test_bad_rows_are_told_and_skipped_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, row: Any, kind: str, words: str
) -> None:
    (tmp_path / "t.jinja").write_text(STRICT)
    good = pair("a", "b") if form != "chat" else chat("a", "b")
    source = write(tmp_path / "a.jsonl", good, row, *[row] * 6, good)
    options: dict[str, Any] = {"form": form, "seq_len": 80, "val_fraction": 0, "shards": 1}
    options |= {"chat_template": str(tmp_path / "t.jinja")} if form == "chat" else {}
    index = prepare(source, out=tmp_path / "out", **options)
    said = capsys.readouterr().out
    assert index.source[kind] == 7 and index.splits["train"].documents == 2
    assert "a.jsonl:2" in said and "a.jsonl:6" in said and "a.jsonl:7" not in said
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{words}.*--strict"):
        prepare(source, out=tmp_path / "strict", strict=True, **options)
    with pytest.raises(DataError, match="no text at all.*7 malformed" if kind == "malformed" else "no text at all"):
        prepare(write(tmp_path / "b.jsonl", *[row] * 7), out=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_long_rows_may_be_cut(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pair("long", "abcdefgh"), pair("too long to learn", "x"), pair("a", "b"))
    index = prepare(source, out=tmp_path / "out", form="prompt_completion", seq_len=8, val_fraction=0, truncate=True)
    assert sorted(spoken(tmp_path / "out")) == [("ab$", "b$"), ("longabcd$", "abcd")]
    assert (index.source["long"], index.source["empty"]) == (2, 1)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"form": "chat"}, UsageError, "Give the length of a window with --seq-len N"),
    ({"form": "rows"}, UsageError, "one of text, prompt_completion, chat"),
    ({"form": "chat", "seq_len": 8}, UsageError, "needs a chat template, but the tokenizer byte has none.*--chat-template FILE"),
    ({"form": "chat", "seq_len": 8, "chat_template": "gone"}, DataError, "cannot read gone"),
    ({"form": "chat", "seq_len": 8, "chat_template": "bad.jinja"}, DataError, "line 2 of the chat template"),
    ({"form": "chat", "seq_len": 99, "chat_template": "turns.jinja"}, DataError, r"a.jsonl:1.*message 2 cannot be found"),
    ({"form": "chat", "seq_len": 99, "chat_template": "slow.jinja"}, DataError, "needs more than 0 s for one chat"),
    ({"form": "chat", "seq_len": 9, "special": "text"}, UsageError, "--special text cannot be combined with --format chat"),
    ({"form": "chat", "seq_len": 8, "template_arg": ["3=x"]}, UsageError, "--template-arg '3=x' must have the form KEY=VALUE"),
    ({"template_arg": ["a=x"]}, UsageError, "--template-arg applies only to --format chat"),
    ({"bos": "x"}, UsageError, "--bos 'x' must"), ({"special": "x"}, UsageError, "--special 'x' must"),
    ({"form": "prompt_completion", "seq_len": 8, "split": "text"}, UsageError, "would cut rows in two"),
    ({"seq_len": 8}, UsageError, "--seq-len and --truncate"),
    ({"chat_template": "x"}, UsageError, "applies only to --format chat"),
    ({"repeat": True}, UsageError, "--repeat needs --tokens N"),
    ({"repeat": True, "tokens": 9, "split": "text"}, UsageError, "--repeat cannot be combined with --split text"),
])  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("fine\n{% if %}")
    monkeypatch.setattr("mpidp.data.chat_template.MAX_SECONDS", 0.1)
    Path("turns.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m.content | length }}{% endfor %}")
    Path("slow.jinja").write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(error, match=words):
        prepare(write(Path("a.jsonl"), *[chat("a", "b", "c", "d")] * 3), out="out", **options)
    assert not Path("out").exists()


def test_hostile_templates_stay_in_their_sandbox() -> None:
    for text in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}x", "{% set n = namespace() %}{% set n.__class__ = 1 %}",
                 "{{ messages[0].content.__class__.__subclasses__() }}"):
        with pytest.raises(TemplateRejection, match="rejected"):
            Template(text, {}, 0.0).render([{"role": "user", "content": "a"}])
    assert Template("{{ strftime_now('%Y') }}{{ {'a': '<é>'} | tojson }}", {}, 0.0).render([]) == '1970{"a": "<é>"}'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(20, 50))
def test_no_row_crosses_a_window_and_few_windows_are_needed(lengths: list[int], window: int) -> None:
    places, total = pack(np.array(lengths), window)
    taken = np.zeros(total, dtype=int)
    for place, length in zip(places.tolist(), lengths, strict=True):
        assert place // window == (place + length - 1) // window
        taken[place : place + length] += 1
    assert taken.max() == 1 and total % window == 1
    assert (total - 1) // window <= max(1, 2 * sum(lengths) / window + 1)


def test_packed_is_unpacked(tmp_path: Path) -> None:
    """The loss of each packed row, and its gradient, equal those of the row alone, in training and evaluation. Shards may divide
    a row anywhere."""
    words = ["the rank of a tree", "adds its lanes", "in order", "so that", "no one can tell", "who was there", "when done"]
    rows = [pair(words[i % 7], f"{words[i * 3 % 7]} {i}") for i in range(23)]
    source = write(tmp_path / "a.jsonl", *rows)
    prepare(source, out=tmp_path / "out", form="prompt_completion", seq_len=64, val_fraction=0, shards=5)
    stream, shape = TokenStream(tmp_path / "out"), TransformerShape(257, 2, 4, 2, 32, 64, 64)
    model = Transformer(shape, seed=1)
    engine = Engine(model, torch.device("cpu"), torch.float32, 0, 0.0, 1)

    alone, tokens = torch.zeros(()), 0
    for ids, mask in rows_of(tmp_path / "out"):
        x, y = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        losses = torch.nn.functional.cross_entropy(model(x[None])[0], y, reduction="none")
        alone, tokens = alone + losses[torch.tensor(mask[1:])].sum(), tokens + sum(mask[1:])
    alone.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    sampler = Sampler(stream.num_tokens, 64, Lanes(8, 2), 0, "shuffled", stream.token_bytes)
    loader = Loader(stream, sampler, range(4), torch.device("cpu"))
    packed, counted = torch.zeros(()), 0
    for _ in range(sampler.steps_per_epoch):
        batch = next(loader)
        for v in range(4):
            if len(batch[v].tokens):
                packed, counted = packed + engine.loss_sum(batch[v], None), counted + batch[v].num_tokens
                assert batch[v].num_tokens == int((batch[v].targets != IGNORED).sum())
    loader.close()
    packed.backward()
    assert counted == tokens == sum(len(row["completion"]) + 1 for row in rows)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None and (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm()
    from mpi4py import MPI

    loss, number = engine.evaluate(stream, MPI.COMM_SELF, 64, 2)
    assert number == tokens and loss * number == pytest.approx(alone.item(), rel=1e-6)
    stream.apart = False
    assert abs(engine.evaluate(stream, MPI.COMM_SELF, 64, 2)[0] - loss) > 1e-3


def test_rows_packed_for_other_windows_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pair("a", "b"))
    prepare(source, out=tmp_path / "out", form="prompt_completion", seq_len=8, val_fraction=0)
    stream = TokenStream(tmp_path / "out")
    with pytest.raises(UsageError, match=r"model.seq_len=12 would split .*windows of 8 tokens.*model.seq_len=8.*--seq-len 12"):
        stream.keep_apart("auto", 12)
    for documents, apart in (("auto", True), ("joined", False), ("apart", True)):
        stream.keep_apart(documents, 16)
        assert stream.apart is apart


def test_a_very_long_row_is_not_encoded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its beginning decides: it is skipped, or truncated as it would be otherwise."""
    rows = [{"prompt": "q" * 30, "completion": "c" * 5000}, {"prompt": "q", "completion": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shards(name: str, **options: Any) -> tuple[list[int], int]:
        options |= {"form": "prompt_completion", "seq_len": 40}
        index = prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / name, 1, 0.0, **options)
        stream = TokenStream(tmp_path / name, "train")
        return stream.read(0, stream.num_tokens).tolist(), index.source["long"]

    skipped, truncated = shards("a"), shards("b", truncate=True)
    monkeypatch.setattr("data_tools.encode.WINDOW", 100)
    monkeypatch.setattr("data_tools.encode.MAX_CHARACTERS", 2)
    assert (shards("c"), shards("d", truncate=True)) == (skipped, truncated)
    assert "over 101 tokens" in capsys.readouterr().out
    assert skipped[1] == truncated[1] == 1 and len(truncated[0]) > len(skipped[0])
