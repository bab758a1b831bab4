"""Laws of the ends of turns: the model learns a token that ends each answer, in whatever way the template writes it; and turns
that have only tool calls are located."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools.chat import render
from data_tools.messages import chat_of
from data_tools.prepare import prepare
from mpidp.data.chat_template import Template
from mpidp.data.tokenizer import load_tokenizer
from tests.unit.test_chats import llama_like
from tests.unit.test_rows import rows_of, said, user, write

TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}u:{{ m.content }};{% else %}BEGIN{{ m.content }}ENDING"
    "{% endif %}{% endfor %}"
)
NOT_AFTER_THE_LAST = "{% if not loop.last %}{{ eos_token }}{% endif %}"
NEXT_TURN = "{% if not loop.last %}<s>{% endif %}"  # the beginning of the next turn ends this one


def template(begin: str, end: str) -> str:
    return TURNS.replace("BEGIN", begin).replace("ENDING", end)


def learned_of(tmp_path: Path, text: str, answers: list[str], more_ends: Sequence[int] = ()) -> str:
    """Return the text of the tokens in the loss of a chat with two answers."""
    folder = llama_like(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *more_ends]}))
    (folder / "chat_template.jinja").write_text(text)
    source = write(tmp_path / "a.jsonl", {"messages": [user("a"), said(answers[0]), user("b"), said(answers[1])]})
    prepare(source, str(folder / "tokenizer.json"), tmp_path / "out", 1, 0.0, form="chat", seq_len=64)
    tokenizer, [(ids, mask)] = load_tokenizer(folder), rows_of(tmp_path / "out")
    pieces = ["</s>" if i == tokenizer.eod else tokenizer.decode([i]) for i, m in zip(ids, mask, strict=True) if m]
    return "".join(pieces).replace(" ", "")  # the tokenizer puts a space before each text


@pytest.mark.parametrize(("text", "more_ends", "learned"), [
    (template("", "{{ eos_token }}"), [], "yes</s>no</s>"),
    (template("", NOT_AFTER_THE_LAST), [], "yes</s>no</s>"),
    (template("{% generation %}", NOT_AFTER_THE_LAST + "{% endgeneration %}"), [], "yes</s>no</s>"),
    (template("{% generation %}", "{% endgeneration %}" + NOT_AFTER_THE_LAST), [], "yesno</s>"),  # as the marks say
    (template("", "{{ eos_token + '\n' }}"), [], "yes</s>\nno</s>\n"),
    (template("", NEXT_TURN), [1], "yes<s>no</s>"),
    (template("", NEXT_TURN), [], "yesno</s>"),
    (template("", "."), [], "yes.no.</s>"),
])  # fmt: skip
def test_each_turn_ends_with_a_token_in_the_loss(tmp_path: Path, text: str, more_ends: list[int], learned: str) -> None:
    assert learned_of(tmp_path, text, ["yes", "no"], more_ends) == learned


@pytest.mark.parametrize(("end", "learned"), [
    ("{{ eos_token }}", "</s>no</s>"), (NOT_AFTER_THE_LAST, "</s>no</s>"), ("", "no</s>"),
])  # fmt: skip
def test_of_an_empty_answer_the_end_is_learned(tmp_path: Path, end: str, learned: str) -> None:
    assert learned_of(tmp_path, template("", end), ["", "no"]) == learned


def test_the_end_of_a_completion_is_learned_although_an_end_is_inside(tmp_path: Path) -> None:
    folder = llama_like(tmp_path / "m")
    source = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "yes</s>b:no"}, {"prompt": "a", "completion": "yes</s>"})
    prepare(source, str(folder), tmp_path / "out", 1, 0.0, form="prompt_completion", seq_len=64, special="tokens")
    ends = [[m for i, m in zip(ids, mask, strict=True) if i == 2] for ids, mask in rows_of(tmp_path / "out")]
    assert [sum(one) for one in ends] == [2, 1]


CALLS = (  # writes reasoning after the last question only, and a line break between content and call
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'a:' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{% if m.content %}{{ '\n' }}{% endif %}"
    "<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>{% endfor %}<end>{{ '\n' }}"
    "{% else %}{{ m.role[0] + ':' + m.content + '<end>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": "é<b>"}}}]
TOOL = {"role": "tool", "content": "3"}
SPOKEN = '<call>f({"x": "é<b>"})</call>'


@pytest.mark.parametrize("prompt", ["a:", "a:<think>\n"])
@pytest.mark.parametrize(("content", "calls", "turn"), [
    (None, CALL, f"{SPOKEN}<end>\n"),
    ("", CALL, f"{SPOKEN}<end>\n"),
    ("so", CALL, f"so\n{SPOKEN}<end>\n"),
    (None, CALL * 2, f"{SPOKEN}{SPOKEN}<end>\n"),
    ("", [], "<end>\n"),
])  # fmt: skip
def test_a_turn_with_only_tool_calls_is_located(prompt: str, content: str | None, calls: list[Any], turn: str) -> None:
    made = Template(CALLS.replace("{{ 'a:' }}{% endif %}", "{{ '" + prompt.replace("\n", "\\n") + "' }}{% endif %}"), {}, 0.0)
    messages = [user("q"), said(content, tool_calls=calls), TOOL, said("yes")]
    text, spans = render(made, chat_of({"messages": messages}, made))
    assert [text[a:b].removeprefix("<think>\n").removeprefix("\n</think>\n\n") for a, b in spans] == [turn, "yes<end>\n"]


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    """Only the completion's turns are learned."""
    made = Template(CALLS, {}, 0.0)
    row = {"prompt": [user("q"), said("yes"), user("r")], "completion": [said("no")]}
    text, spans = render(made, chat := chat_of(row, made))
    assert [text[a:b] for a, b in spans] == ["<think>\n\n</think>\n\nno<end>\n"] and chat.unused == []
    whole = {"messages": row["prompt"] + row["completion"], "prompt": "q"}
    assert chat_of(whole, made).unused == ["prompt"] and len(render(made, chat_of(whole, made))[1]) == 2
