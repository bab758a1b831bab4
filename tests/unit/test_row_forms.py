"""Laws of the forms of rows: a row in any form gives the ids and the loss mask of the same messages in the common form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import render
from data_tools.encode import _tokens
from data_tools.messages import chat_of
from data_tools.prepare import prepare
from data_tools.rows import TrainingRow
from mpidp.data.chat_template import Template
from mpidp.data.encoder import Encoder
from mpidp.data.row_fields import RowSkipped
from mpidp.data.row_forms import as_messages, as_pair
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import DataError
from mpidp.inference.chats import messages_of, read_chats
from mpidp.inference.rows import read_prompts
from tests.unit.test_rows import CHATML, said, spoken, user, write
from tests.unit.test_special_tokens import model_folder

TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def turns(*words: str, keys: tuple[str, str] = ("from", "value"), roles: tuple[str, str] = ("human", "gpt")) -> list[Any]:
    return [{keys[0]: roles[i % 2], keys[1]: one} for i, one in enumerate(words)]


def system(words: str) -> dict[str, Any]:
    return {"role": "system", "content": words}


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a row, and the same row in the common form
    "conversations": ({"conversations": turns("a", "b", "c", "d")}, {"messages": [user("a"), said("b"), user("c"), said("d")]}),
    "conversation": ({"conversation": turns("a", "b")}, {"messages": [user("a"), said("b")]}),
    "role and content": (
        {"conversations": turns("a", "b", keys=("role", "content"), roles=("user", "assistant"))},
        {"messages": [user("a"), said("b")]},
    ),
    "from in messages": ({"messages": turns("a", "b")}, {"messages": [user("a"), said("b")]}),
    "other roles": (
        {"conversations": [{"from": "system", "value": "s"}, *turns("a", "b", roles=("user", "Chatgpt"))]},
        {"messages": [system("s"), user("a"), said("b")]},
    ),
    "system field": ({"conversations": turns("a", "b"), "system": "s"}, {"messages": [system("s"), user("a"), said("b")]}),
    "empty system field": ({"conversations": turns("a", "b"), "system": ""}, {"messages": [user("a"), said("b")]}),
    "train": (
        {"conversations": [*turns("a", "b", "c"), {"from": "gpt", "value": "d", "train": True}]},
        {"messages": [user("a"), said("b"), user("c"), said("d", train=True)]},
    ),
    "JSON text": ({"conversations": json.dumps(turns("a", "b"))}, {"messages": [user("a"), said("b")]}),
    "lists in an object": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"], "weight": [None, 1]}},
        {"messages": [user("a"), said("b", weight=1)]},
    ),
    "lists in messages": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, {"messages": [user("a"), said("b")]},
    ),
    "tools": (
        {
            "conversations": [
                *turns("a"), {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
                {"from": "observation", "value": "2"}, {"from": "gpt", "value": "it is 2"},
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, said("it is 2"),
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
    ),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, {"messages": [user("a"), said("b")]}),
    "Alpaca, input": ({"instruction": "a", "input": "i", "output": "b"}, {"messages": [user("a\ni"), said("b")]}),
    "Alpaca, history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
        {"messages": [system("s"), user("a"), said("b"), user("c"), said("d")]},
    ),
    "Dolly": ({"instruction": "a", "context": "i", "response": "b"}, {"messages": [user("a\ni"), said("b")]}),
    "preferences with an answer": (
        {"messages": [user("a"), said("b")], "chosen": [said("b")], "rejected": [said("c")]},
        {"messages": [user("a"), said("b")], "chosen": [said("b")], "rejected": [said("c")]},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_any_form_is_a_chat_without_its_answer(name: str, tmp_path: Path) -> None:
    """For `chat --messages` and `generate --chat`. A row of `messages` that ends with an answer is an error, as before."""
    row, common = FORMS[name]
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    if "messages" in row and "from" not in str(row):
        with pytest.raises(DataError, match="the last message is the assistant's"):
            read_chats(tmp_path / "c.jsonl")
        return
    (found,) = read_chats(tmp_path / "c.jsonl")
    assert messages_of(found) == common["messages"][:-1] and found.get("tools") == common.get("tools")
    assert {key: found[key] for key in row if key not in ("messages", "tools")} == {
        key: value for key, value in row.items() if key not in ("messages", "tools")}


def test_instructions_need_no_answer_to_become_prompts(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "i"}, {"instruction": "a", "context": "i"}, {"instruction": "a", "label": False}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [messages_of(row) for row in read_chats(tmp_path / "c.jsonl")] == [[user("a\ni")], [user("a\ni")], [user("a")]]
    wanted = [as_pair({**row, "label": True, "output": "b", "response": "b"})[0]["prompt"] for row in rows]
    assert wanted[0] != wanted[2]
    found = read_prompts(tmp_path / "c.jsonl")
    assert [row.pop("prompt") for row in found][::2] == wanted[::2] and found == rows
    (tmp_path / "c.jsonl").write_text(json.dumps(FORMS["conversations"][0]) + "\n")
    with pytest.raises(DataError, match="line 1: `conversations` holds messages, which need a chat template"):
        read_prompts(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": [{"from": "nobody", "value": "a"}]}) + "\n")
    with pytest.raises(DataError, match="line 1: `from` of a message is 'nobody'"):
        read_chats(tmp_path / "c.jsonl")


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_any_form_becomes_messages(name: str) -> None:
    row, common = FORMS[name]
    assert as_messages(row)[0] == common and as_messages(common) == (common, "")


@pytest.mark.parametrize("name", ["conversations", "tools", "Alpaca, history"])
def test_ids_and_masks_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    folder = model_folder(tmp_path / "m", tokenizer_config__json=config)
    theirs, ours = auto.from_pretrained(folder), load_tokenizer(folder)
    row, common = FORMS[name]
    wanted = theirs.apply_chat_template(
        common["messages"], chat_template=template, tools=common.get("tools"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )
    chat = chat_of(row, Template(template, {}, 0.0))
    text, spans = render(Template(template, {}, 0.0), chat)
    encoder = Encoder(ours, SpecialTokens(None, ()), "tokens")
    ids, mask = _tokens(TrainingRow("", text, spans, "", chat.learned[-1]), encoder.placer([text])[0], encoder)
    count = len(wanted["input_ids"])
    assert ids[:count].tolist() == wanted["input_ids"] and mask[1:count].tolist() == wanted["assistant_masks"][1:]
    assert sum(wanted["assistant_masks"]) > 3


@pytest.mark.parametrize(("row", "words"), [
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "`from` of a message is 'narrator', but must be one of human"),
    ({"conversations": "text"}, "`conversations` is a string that is not JSON"),
    ({"conversations": 3}, "`conversations` is a number, not a list of messages"),
    ({"conversations": ["a"]}, "a message is a string"),
    ({"conversations": {"from": ["human"], "value": []}}, "different lengths"),
    ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "`value` is a string that is not JSON"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "not JSON with `name` and `arguments`"),
    ({"instruction": "a", "output": 3}, "`output` is a number"), ({"instruction": "a", "output": ""}, "its `output` is empty"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "`history` is not a list of pairs"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rows of preferences"),
    ({"conversations": turns("a"), "chosen": turns("b"), "rejected": turns("c")}, "rows of preferences"),
    ({"messages": turns("a", "b"), "images": ["x.png"]}, "`images`, but mpidp trains on text only"),
    ({"prompt": [user("a")], "completion": [said("b")], "label": False}, "`label` is false: the model should avoid this answer"),
    ({"conversations": turns("a", "b"), "kto_tag": False}, "`kto_tag` is false: the model should avoid this answer"),
    ({"instruction": "a", "output": "b", "label": False}, "`label` is false: the model should avoid this answer"),
    ({"instruction": "a", "output": "b", "label": "False"}, "`label` is false"),  # from a .csv file
])  # fmt: skip
def test_a_row_that_has_no_messages_is_skipped_with_its_reason(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowSkipped, match=words):
        as_messages(row)


@pytest.mark.parametrize(("row", "words"), [
    ({"messages": turns("a", "b")}, "needs --format chat"), ({"conversations": turns("a", "b")}, "needs --format chat"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rows of preferences"),
    ({"prompt": "a", "completion": "b", "label": False}, "the model should avoid this answer"),
    ({"prompt": "a", "completion": "b", "kto_tag": "false"}, "the model should avoid this answer"),
    ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "`history` needs --format chat"),
])  # fmt: skip
def test_a_row_that_has_no_completion_is_skipped_with_its_reason(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowSkipped, match=words):
        as_pair(row)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_forms_may_be_mixed_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Each row is read in its own form, and the summary counts them. In a .parquet file, absent fields are null."""
    names = ("conversations", "Alpaca, input", "system field", "role and content")
    rows, common = [FORMS[name][0] for name in names], [FORMS[name][1] for name in names]
    (tmp_path / "t.jinja").write_text(CHATML)
    (tmp_path / "a").mkdir()
    if kind == "jsonl":
        write(tmp_path / "a/a.jsonl", *rows)
    elif kind == "json":
        (tmp_path / "a/a.json").write_text(json.dumps(rows, indent=1))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows, _schema(pyarrow)), tmp_path / "a/a.parquet")
    options: dict[str, Any] = {"form": "chat", "chat_template": str(tmp_path / "t.jinja"), "seq_len": 160, "val_fraction": 0}
    prepare(str(tmp_path / "a"), out=tmp_path / "out", strict=True, shards=1, **options)
    told = capsys.readouterr().out
    assert "3 rows read as ShareGPT rows" in told and "1 row read as Alpaca rows" in told and "not used" not in told
    prepare(write(tmp_path / "b.jsonl", *common), out=tmp_path / "common", strict=True, shards=1, **options)
    assert "read as" not in capsys.readouterr().out
    assert sorted(spoken(tmp_path / "out")) == sorted(spoken(tmp_path / "common"))


def _schema(pyarrow: Any) -> Any:
    text = pyarrow.string()
    message = pyarrow.struct([(key, text) for key in ("from", "value", "role", "content")])
    texts = [(key, text) for key in ("system", "instruction", "input", "output")]
    return pyarrow.schema([("conversations", pyarrow.list_(message)), *texts])


def test_alpaca_rows_are_prompts_and_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [FORMS["Alpaca"][0], FORMS["Alpaca, input"][0]]
    options: dict[str, Any] = {"form": "prompt_completion", "seq_len": 300, "val_fraction": 0, "shards": 1}
    prepare(write(tmp_path / "a.jsonl", *rows), out=tmp_path / "out", **options)
    first = "Below is an instruction that describes a task"
    rest = " Write a response that appropriately completes the request.\n\n### Instruction:\na\n\n"
    paired = f"{first}, paired with an input that provides further context.{rest}### Input:\ni\n\n### Response:\nb$"
    assert sorted(spoken(tmp_path / "out")) == sorted([(f"{first}.{rest}### Response:\nb$", "b$"), (paired, "b$")])
    assert "2 rows read as Alpaca rows" in capsys.readouterr().out


def test_a_file_of_preferences_or_of_rendered_chats_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    options: dict[str, Any] = {"form": "chat", "chat_template": str(tmp_path / "t.jinja"), "seq_len": 80}
    for row, words in (
        ({"prompt": "a", "chosen": [said("b")], "rejected": [said("c")]}, "rows of preferences .* last message of `messages`"),
        ({"text": "<|im_start|>user\na<|im_end|>"}, "`text` with a chat that a template has rendered; to train on it"),
        ({"text": "a"}, "`text` with plain text; to train on it, use --format text"),
    ):
        with pytest.raises(DataError, match=f"(?s)no text at all.*{words}"):
            prepare(write(tmp_path / "a.jsonl", row, row), out=tmp_path / "out", **options)
