"""Laws of chats: ids and loss masks are those of transformers; a turn is located in every template; every key of a row is used or
counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.chat import render
from data_tools.encode import _tokens
from data_tools.messages import chat_of
from data_tools.prepare import prepare
from data_tools.rows import TrainingRow
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.encoder import Encoder
from mpidp.data.row_fields import RowSkipped
from mpidp.data.shards import TokenStream
from mpidp.data.special_tokens import SpecialTokens, read_special_tokens, special_tokens_of
from mpidp.data.tokenizer import Tokenizer, load_tokenizer
from tests.unit.test_rows import rows_of, said, user, write
from tests.unit.test_special_tokens import model_folder

WORDS = ["yes", " no", "hello there", "the fox", "\n", "é", "漢字", "🙂", "a  b", " ", "<b>", "1+1=2"]


def llama_like(folder: Path) -> Path:
    """Write a tokenizer with a dummy space before each text, and byte fallback."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    letters = "abcdefghijklmnopqrstuvwxyz+=.:\n01234"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁y", "▁n", "▁4", "es"]
    merges = [("▁", "y"), ("▁", "n"), ("▁", "4"), ("e", "s")]
    made = Library(models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    made.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def unigram(folder: Path, scheme: str) -> Path:
    """Write a tokenizer in the manner of SentencePiece's Unigram. scheme: spaces before the text (first) or each part."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    letters = [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyzABINST+=.:/[]<|>_\n0123▁"]
    words = [(word, -4.0) for word in ("▁yes", "yes", "▁the", "ss", ".\n", ":▁", "▁▁", "\n\n")]
    made = Library(models.Unigram([("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), *letters, *words], 0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_template(draw: random.Random) -> tuple[str, str]:
    """Return a chat template with {% generation %}, and the same one without it."""
    cue = draw.choice(["Assistant: ", "<|im_start|>assistant\n", "[/INST]", "a:", " ", "", "{{ bos_token }}", "\n\n"])
    end = draw.choice(["<|im_end|>\n", "{{ eos_token }}", "\n", "", "</s>", " ", "<|im_end|>"])
    words = draw.choice(["{{ m.content }}", "{{ m.content | trim }}", "{{ m['content'] }}"])
    body = f"{{% generation %}}{words}{end}{{% endgeneration %}}"
    first = draw.choice(["", "{{ bos_token }}", "{% if messages[0].role != 'system' %}<s>Be kind.\n{% endif %}"])
    marked = (
        f"{first}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{cue}{body}"
        f"{{% else %}}{{{{ m.role }}}}: {{{{ m.content }}}}\n{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{cue}{{% endif %}}"
    )
    return marked, marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def random_chat(draw: random.Random) -> list[dict[str, Any]]:
    text = lambda: "".join(draw.choices(WORDS, k=draw.randint(1, 4)))  # noqa: E731
    messages = [{"role": "system", "content": text()}] * draw.randint(0, 1)
    first = draw.randint(0, 1)
    messages += [{"role": ("user", "assistant")[(i + first) % 2], "content": text()} for i in range(draw.randint(2, 5))]
    return messages


def encoded(template: Template, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return (ids, loss mask), as in the shards."""
    chat = chat_of({"messages": messages}, template)
    text, spans = render(template, chat)
    encoder = Encoder(tokenizer, SpecialTokens(None, ()), "tokens")
    ids, mask = _tokens(TrainingRow("", text, spans, "", chat.learned[-1]), encoder.placer([text])[0], encoder)
    return ids.tolist(), mask.tolist()


@pytest.mark.parametrize("kind", ["byte-level", "llama", "first", "always"])
def test_ids_and_masks_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """1,000 random chats with random templates. We add an end-of-document token, and do not learn a first token.

    Without {% generation %} the turns are the same: they are located. White space that a template removes may be part of the turn
    there, because it is part of what follows the prompt.
    """
    auto = pytest.importorskip("transformers").AutoTokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if kind == "byte-level":
        folder = model_folder(tmp_path / "m", tokenizer_config__json=config)
    else:
        folder = llama_like(tmp_path / "m") if kind == "llama" else unigram(tmp_path / "m", kind)
    theirs, ours = auto.from_pretrained(folder), load_tokenizer(folder)
    names, draw, compared = special_tokens_of(folder, ours).names, random.Random(kind), 0
    for _ in range(250):
        with_marks, without = random_template(draw)
        messages = random_chat(draw)
        if not any(m["role"] == "assistant" for m in messages):
            continue
        wanted = theirs.apply_chat_template(
            messages, chat_template=with_marks, return_dict=True, return_assistant_tokens_mask=True
        )
        for text in (with_marks, without):
            ids, mask = encoded(Template(text, names, 0.0), messages, ours)
            assert ids[: len(wanted["input_ids"])] == wanted["input_ids"]
            assert mask[1 : len(wanted["input_ids"])] == wanted["assistant_masks"][1:], (text, messages)
        compared += 1
    assert compared > 200


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_IN_THE_LAST_TURN = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ system if loop.index0 >= messages | length - 2 }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set words = m.content %}"
    "{% if not loop.last %}{% set words = m.content.split('</think>')[-1] | trim %}"
    "{% elif '</think>' not in words %}{% set words = '<think>\n\n</think>\n\n' + words %}{% endif %}a:{{ words }}<end>\n"
    "{% else %}u:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}a:"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools %}TOOLS:{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text | trim }}{% endfor %}{% endif %};{{ '!' if loop.last else '' }}{% endfor %}"
)
LOOKS = "{{ messages | length }}{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}"
SYSTEM, CALL = {"role": "system", "content": "Be brief."}, [{"function": {"name": "f"}}]
PART = [{"type": "text", "text": " x "}, {"type": "text", "text": " y "}]


@pytest.mark.parametrize(("template", "messages", "keys", "turns"), [
    (DEFAULT_SYSTEM, [said("Hi"), user("a"), said("yes")], {}, ["Hi<|im_end|>\n", "yes<|im_end|>\n"]),
    (SYSTEM_IN_THE_LAST_TURN, [SYSTEM, user("a"), said("yes"), user("b"), said("no")], {}, ["yes</s>", "no</s>"]),
    (SYSTEM_IN_THE_LAST_TURN, [SYSTEM, user("a"), said(" yes\n"), user("b"), said(" no ")], {}, ["yes</s>", "no</s>"]),
    (REASONING, [user("a"), said("<think>\nhm\n</think>\n\nyes"), user("b"), said("<think>\nso\n</think>\n\nno")], {},
     ["yes<end>\n", "<think>\nso\n</think>\n\nno<end>\n"]),
    (REASONING, [user("a"), said("yes")], {"chat_template_kwargs": {"enable_thinking": False}}, ["yes<end>\n"]),
    (REASONING, [user("a"), said("yes")], {"chat_template_kwargs": '{"enable_thinking": false}'}, ["yes<end>\n"]),
    (REASONING, [user("a"), said("yes", weight=0), user("b"), said("no", weight=1)], {},
     ["<think>\n\n</think>\n\nno<end>\n"]),
    (REASONING, [user("a"), said("yes", train=True), user("b"), said("no", train=False)], {}, ["yes<end>\n"]),
    (TOOLS, [user("a"), said(None, tool_calls=CALL), {"role": "tool", "content": "3"}, said("yes")],
     {"tools": [{"type": "function"}]}, ['{"function": {"name": "f"}}</>', "yes</>"]),
    (TOOLS, [user("a"), {"role": "assistant", "tool_calls": CALL}], {"tools": '[{"type": "function"}]'},
     ['{"function": {"name": "f"}}</>']),
    (PARTS, [user("a"), said(PART), {"role": "user", "content": PART}, said("b")], {}, ["xy;", "b;!"]),
])  # fmt: skip
def test_every_turn_is_located(
    template: str, messages: list[dict[str, Any]], keys: dict[str, Any], turns: list[str]
) -> None:
    made = Template(template, {}, 0.0)
    chat = chat_of({"messages": messages} | keys, made)
    text, spans = render(made, chat)
    assert [text[start:stop] for start, stop in spans] == turns and chat.unused == []
    assert "tools" not in keys or text.startswith('TOOLS:[{"type": "function"}]\n')


def test_a_turn_that_cannot_be_located_skips_its_row_alone() -> None:
    made = Template(LOOKS, {}, 0.0)
    with pytest.raises(RowSkipped, match="message 2 cannot be found in the text"):
        render(made, chat_of({"messages": [user("a"), said("b"), user("c"), said("d")]}, made))
    marked = Template("{% generation %}all{% endgeneration %}", {}, 0.0)
    with pytest.raises(RowSkipped, match="some of its 2 assistant turns .* the template marks 1 parts of the text"):
        render(marked, chat_of({"messages": [user("a"), said("b", weight=0), user("c"), said("d")]}, marked))


def test_keys_that_nobody_uses_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "m", chat_template__jinja=REASONING)
    row = {"messages": [user("a"), said("b")], "chat_template_kwargs": {"enable_thinking": False}}
    rows = [row, row | {"enable_thinking": True, "id": None}, row | {"tools": [{}]}, row | {"chat_template_kwargs": {"date": 1}},
            {"messages": [user("a"), said("b", tool_calls=CALL, name="x")]}]
    source = write(tmp_path / "a.jsonl", *rows)
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, form="chat", seq_len=64)
    words = capsys.readouterr().out
    places = [f"{source}:{n}: {key}" for n, key in ((2, "enable_thinking"), (3, "tools"), (4, "chat_template_kwargs.date"),
                                                    (5, "messages.tool_calls"))]
    assert f"4 rows with keys that are not used: {', '.join(places)}" in words
    assert len(rows_of(tmp_path / "out")) == 5


@pytest.mark.parametrize("in_files", [False, True])
def test_chats_with_tools_use_the_template_for_tools(tmp_path: Path, in_files: bool) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not in_files:
        config["chat_template"] = [{"name": "default", "template": PARTS}, {"name": "tool_use", "template": TOOLS}]
    folder = model_folder(tmp_path / "m", tokenizer_config__json=config)
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(PARTS)
        (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    rows: list[dict[str, Any]] = [{"messages": [user("a"), said("b")], "tools": tools} for tools in (None, [], [{"f": 1}])]
    prepare(write(tmp_path / "a.jsonl", *rows), str(folder), tmp_path / "out", 1, 0.0, form="chat", seq_len=64)
    theirs = auto.from_pretrained(folder)
    wanted = [theirs.apply_chat_template(row["messages"], tools=row["tools"])["input_ids"] for row in rows]
    assert [ids[: len(one)] for (ids, _), one in zip(rows_of(tmp_path / "out"), wanted, strict=True)] == wanted
    table = read_special_tokens(tmp_path / "out")
    assert table is not None and (table.template, table.tool_template) == (PARTS, TOOLS)


def test_arguments_and_undefined_names_of_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ mood }}{{ m.content }}{{ turn_token }}{% endfor %}"
    folder = model_folder(tmp_path / "m", chat_template__jinja=template, tokenizer_config__json={"bos_token": "<s>"})
    rows = [{"messages": [user("a"), said("b")]}, {"messages": [user("a"), said("b")], "chat_template_kwargs": {"mood": "!"}}]
    source = write(tmp_path / "a.jsonl", *rows)
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, form="chat", seq_len=64, template_arg=["mood=?", "n=3"])
    assert "the chat template uses turn_token, which the files of" in capsys.readouterr().err
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode(np.array(ids)) for ids, _ in rows_of(tmp_path / "out")]
    assert texts == ["<s>?a?b", "<s>!a!b"]
    table = read_special_tokens(tmp_path / "out")
    assert table is not None and table.template_args == {"mood": "?", "n": 3} and table.template == template


@pytest.mark.parametrize(("template", "words"), [
    ("{{ 'a' * 10 ** 10 }}", "more than 1024 MiB of memory"), ("{{ 'a' | center(10 ** 10) }}", "more than 1024 MiB of memory"),
    ("{{ 10 ** ((messages | length) ** 9) }}", "an integer of more than 4096 bits"),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "recursion"),
    ("{{ '\\ud800' }}", "half of a surrogate pair"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0 s"),
])  # fmt: skip
def test_a_template_has_limits(monkeypatch: pytest.MonkeyPatch, template: str, words: str) -> None:
    monkeypatch.setattr("mpidp.data.chat_template.MAX_SECONDS", 0.1)
    with pytest.raises(TemplateRejection, match=words):
        Template(template, {}, 0.0).render([user("a")] * 9)


def ids_of(folder: Path, text: str, special: bool = True) -> list[int]:
    """Return the ids of a text as the `tokenizers` library gives them."""
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = not special
    return list(library.encode(text, add_special_tokens=False).ids)


def test_a_completion_is_encoded_with_its_prompt(tmp_path: Path) -> None:
    """No dummy space before it. A token that holds characters of both is learned."""
    folder = llama_like(tmp_path / "m")
    source = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}, {"prompt": "say ", "completion": "yes"})
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, form="prompt_completion", seq_len=12)
    texts = {"2+2=4": 1, "say yes": 2}  # in "say yes", the token after "say" is " y"
    for (ids, mask), (text, learned) in zip(rows_of(tmp_path / "out"), texts.items(), strict=True):
        wanted = ids_of(folder, text)
        assert ids[: len(wanted) + 1] == [*wanted, 2] and mask[len(wanted)] and not any(mask[len(wanted) + 1 :])
        assert [i for i in range(len(wanted)) if mask[i]] == list(range(len(wanted) - learned, len(wanted)))


@pytest.mark.parametrize("special", ["", "tokens", "text"])
def test_rows_name_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], special: str) -> None:
    """Rows that were rendered by hand become ids, as in transformers; with --special text they stay text."""
    folder = model_folder(tmp_path / "m", tokenizer_config__json={"eos_token": "<|im_end|>"})
    row = {"prompt": "<|im_start|>user\nblue<|im_end|>\n<|im_start|>assistant\n", "completion": "no<|im_end|>"}
    source = write(tmp_path / "a.jsonl", row, {"prompt": "a", "completion": "b"})
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, form="prompt_completion", seq_len=96, special=special)
    ids, mask = rows_of(tmp_path / "out")[0]
    wanted = ids_of(folder, row["prompt"] + row["completion"], special != "text")
    assert ids[: len(wanted)] == wanted and mask[len(wanted)]
    words = capsys.readouterr().out
    assert f"1 document or row with the name of a special token in the text: {source}:1: names <|im_start|>" in words
    table = read_special_tokens(tmp_path / "out")
    assert table is not None and table.special == (special or "tokens")


@pytest.mark.parametrize("special", ["", "tokens"])
def test_documents_name_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], special: str) -> None:
    """Documents stay text, unless --special tokens says otherwise. They are counted."""
    folder = model_folder(tmp_path / "m")
    texts = ["a<|im_end|>b", "plain", "<|im_start|>x<|endoftext|>"]
    source = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, special=special)
    stream = TokenStream(tmp_path / "out")
    wanted = [ids_of(folder, text, special == "tokens") for text in texts]
    wanted = [[*ids, 0] if ids[-1:] != [0] else ids for ids in wanted]  # a text that ends with the end of a document has it once
    assert stream.read(0, stream.num_tokens).tolist() == sum(wanted, [])
    words = capsys.readouterr().out
    assert f"2 documents or rows with the name of a special token in the text: {source}: document 1 names <|im_end|>" in words


@pytest.mark.parametrize("bos", ["auto", "none"])
def test_documents_and_rows_begin_with_bos(tmp_path: Path, bos: str) -> None:
    """If the tokenizer adds BOS to texts. It is not learned, has no bytes, and is not doubled if the template wrote it."""
    files = {"tokenizer_config__json": {"bos_token": "<s>"}, "chat_template__jinja": "{{ bos_token }}" + TOOLS}
    folder = model_folder(tmp_path / "m", bos=True, **files)
    first = [ids_of(folder, "<s>")[0]] if bos == "auto" else []
    source = write(tmp_path / "a.jsonl", {"text": "the fox"}, {"text": "hello"})
    index = prepare(source, str(folder), tmp_path / "text", 1, 0.0, bos=bos)
    stream = TokenStream(tmp_path / "text")
    wanted = [*first, *ids_of(folder, "the fox"), 0, *first, *ids_of(folder, "hello"), 0]
    assert stream.read(0, stream.num_tokens).tolist() == wanted and index.splits["train"].text_bytes == 12
    second = len(first) + len(ids_of(folder, "the fox")) + 1
    assert np.flatnonzero(stream.read_starts(0, len(wanted))).tolist() == [0, second]

    source = write(tmp_path / "b.jsonl", {"prompt": "the fox", "completion": " says"}, {"prompt": "", "completion": "yes"})
    prepare(source, str(folder), tmp_path / "pairs", 1, 0.0, form="prompt_completion", seq_len=10, bos=bos)
    for (ids, mask), text in zip(rows_of(tmp_path / "pairs"), ("the fox says", "yes"), strict=True):
        assert ids[: len(first) + 1] == [*first, *ids_of(folder, text)][: len(first) + 1] and not mask[0]
        assert mask[1] == (text == "yes")

    source = write(tmp_path / "c.jsonl", {"messages": [user("a"), said("b")]})
    prepare(source, str(folder), tmp_path / "chats", 1, 0.0, form="chat", seq_len=64, bos=bos)
    [(ids, _)] = rows_of(tmp_path / "chats")
    assert ids[:3] == ids_of(folder, "<s><user>")[:3]
    table = read_special_tokens(tmp_path / "text")
    assert table is not None and table.bos == (first[0] if first else None)

    plain = tmp_path / "plain.jinja"
    plain.write_text(TOOLS)  # a template without BOS: no BOS, as in transformers
    prepare(source, str(folder), tmp_path / "no", 1, 0.0, form="chat", seq_len=64, bos=bos, chat_template=str(plain))
    [(ids, _)] = rows_of(tmp_path / "no")
    table = read_special_tokens(tmp_path / "no")
    assert ids[:2] == ids_of(folder, "<user>")[:2] and table is not None and table.bos is None
