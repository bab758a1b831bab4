"""Laws of tool calls whose arguments are JSON text: transformers renders the same text, and quoted arguments are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.prepare import prepare
from mpidp.data.chat_template import Template
from tests.unit.test_rows import said, user, write

CALLS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content or '' }}{% for one in m.tool_calls or [] %}{% set f=one.function %}"
AS_JSON = CALLS + "{{ f.name }}({{ f.arguments | tojson }}){% endfor %};{% endfor %}"
AS_IT_IS = CALLS + "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{% endfor %};{% endfor %}"
AS_ITEMS = CALLS + "{% for key, value in f.arguments | items %}{{ key }}={{ value }}{% endfor %}{% endfor %};{% endfor %}"
ROWS = [
    {"messages": [user("a"), said(None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])]}
    for arguments in ({"city": "Köln"}, json.dumps({"city": "Köln"}, ensure_ascii=False), "{}", "Köln")
]


@pytest.mark.parametrize(("template", "counted"), [(AS_JSON, (2, 3)), (AS_IT_IS, ())])
def test_quoted_arguments_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, counted: tuple[int, ...]
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    source = write(tmp_path / "a.jsonl", *ROWS)
    prepare(source, "byte", tmp_path / "out", 1, 0.0, form="chat", seq_len=128, chat_template=str(tmp_path / "t.jinja"))
    words = capsys.readouterr().out
    places = ", ".join(f"{source}:{n}" for n in counted)
    assert ("quoted string" in words) == bool(counted) and (not counted or f"quotes): {places}\n" in words)
    for row in ROWS[1:3]:
        arguments = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
        text = Template(template, {}, 0.0).render(row["messages"])
        assert text.count(json.dumps(arguments, ensure_ascii=False)) == bool(counted)


def test_a_template_that_needs_an_object_is_named_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jinja").write_text(AS_ITEMS)
    source = write(tmp_path / "a.jsonl", *ROWS[:2])
    prepare(source, "byte", tmp_path / "out", 1, 0.0, form="chat", seq_len=128, chat_template=str(tmp_path / "t.jinja"))
    words = capsys.readouterr().out
    assert f"1 malformed line or row skipped: {source}:2: rejected by the chat template" in words
    assert "write `arguments` of a tool call as an object, not as JSON text" in words
