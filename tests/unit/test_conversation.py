"""Laws of `mpidp chat`: an answer is that of `mpidp generate --chat` for the messages so far; a chat that outgrows the context
loses its oldest turns; Ctrl-C ends an answer and not the chat."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mpidp.chat import Screen, read_options, talk
from mpidp.data.chat_template import Template
from mpidp.data.encoder import Encoder
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.errors import DataError, UsageError
from mpidp.inference.conversation import Conversation, Turn
from tests.tiny import WORLD
from tests.unit.test_prompts import answers, folder  # noqa: F401 - a fixture

LETTERS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def conversation(
    seq_len: int, tokens: int = 8, system: str | None = None, template: str = LETTERS, bos: int | None = None
) -> Conversation:
    encoder = Encoder(ByteTokenizer(), SpecialTokens(bos, (256,)), "tokens")
    return Conversation(Template(template, {}, 0.0), encoder, seq_len, tokens, system)


def said(turn: Turn) -> str:
    return bytes(turn.ids).decode()


def test_a_prompt_has_all_turns_and_the_system_message() -> None:
    chat = conversation(100, system="S")
    assert said(chat.ask("one")) == "s:S;u:one;a:"
    chat.answered("1")
    assert said(chat.ask("two")) == "s:S;u:one;a:1;u:two;a:"
    chat.reset()
    assert said(chat.ask("three")) == "s:S;u:three;a:"


def test_only_the_template_writes_bos() -> None:
    """As apply_chat_template in transformers."""
    assert 255 not in conversation(100, bos=255).ask("one").ids


def test_a_chat_that_outgrows_the_context_loses_its_oldest_turns() -> None:
    chat, left_out = conversation(40, tokens=30, system="S"), 0
    for number in range(9):
        turn = chat.ask(f"ask{number}")
        assert said(turn).startswith("s:S;u:") and said(turn).endswith(f"u:ask{number};a:")
        assert 10 <= turn.tokens <= 30 and len(turn.ids) + turn.tokens <= 40  # a quarter of the context is kept for the answer
        left_out += turn.left_out
        chat.answered(f"no{number}")
    assert left_out == 14 and turn.left_out == 2  # one turn of 13 tokens, and the system message, fit


def test_a_message_that_does_not_fit_is_not_added() -> None:
    chat = conversation(40)
    chat.ask("one")
    chat.answered("1")
    with pytest.raises(DataError, match="the chat has 55 tokens. The context has 40 tokens, of which 8 are for the answer"):
        chat.ask("x" * 50)
    assert said(chat.ask("two")) == "u:one;a:1;u:two;a:"


def test_a_message_that_the_template_rejects_is_not_added() -> None:
    chat = conversation(99, template="{% if messages[-1].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + LETTERS)
    with pytest.raises(DataError, match="never"):
        chat.ask("no")
    assert said(chat.ask("yes")) == "u:yes;a:"


def talked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, text: str, *words: str  # noqa: F811
) -> tuple[str, str]:
    """Return what a chat writes to standard output and to standard error. text: standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    talk(WORLD, read_options([str(folder), "--device=cpu", "--threads=1", "--temperature=0", "--tokens=5", *words]))
    found = capsys.readouterr()
    return found.out, found.err


def answer(folder: Path, place: Path, *texts: str) -> str:  # noqa: F811
    """Return the answer of `mpidp generate --chat` to a chat: messages of the user and the assistant by turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    place.write_text(json.dumps({"messages": messages}) + "\n")
    return str(answers(folder, f"--prompts={place}", "--chat", "--tokens=5")[0]["text"])


def test_answers_are_those_of_generate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    first = answer(folder, tmp_path / "c.jsonl", "hello")
    second = answer(folder, tmp_path / "c.jsonl", "hello", first, "fox")
    capsys.readouterr()
    out, err = talked(monkeypatch, capsys, folder, "hello\n\nfox\n/reset\n/help\nhello")
    assert (out, err) == (f"{first}\n{second}\n{first}\n", "")
    out, err = talked(monkeypatch, capsys, folder, f"{'fox ' * 99}\n\udcff\nhello\n/exit\nfox\n")
    assert out == f"{first}\n"
    assert [line.startswith("mpidp: ") for line in err.splitlines()] == [True, True]
    assert talked(monkeypatch, capsys, folder, "hello\n /quit \nfox\n") == (f"{first}\n", "")


def test_ctrl_c_ends_an_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    plain, pieces = Screen.write, list[str]()

    def write(self: Screen, piece: str) -> None:
        plain(self, piece)
        pieces.append(piece)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    first = answer(folder, tmp_path / "c.jsonl", "hello")
    capsys.readouterr()
    monkeypatch.setattr(Screen, "write", write)
    out, _ = talked(monkeypatch, capsys, folder, "hello\n/reset\nhello\n")
    stopped, whole = out[: -len(f"{first}\n")], out[-len(f"{first}\n") :]
    assert whole == f"{first}\n" and stopped.endswith("\n") and first.startswith(stopped[:-1]) and 0 < len(stopped) <= len(first)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("words", "why"), [
    (["--messages", "a"], "must be given together"), (["--out", "a"], "must be given together"),
    (["--messages", "a", "--out", "b", "--system", "c"], "--system cannot be combined with --messages"),
    (["--tokens", "0"], "at least 1"),
    (["--temperature", "-1"], "must not be negative"),
])
def test_options_that_do_not_go_together(words: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read_options(["run", *words])


def test_a_model_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    about: dict[str, Any] = json.loads((tmp_path / "tokenizer_config.json").read_text())
    about.pop("chat_template")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="has no chat template, so it cannot answer chats. Train on data prepared with"):
        talk(WORLD, read_options([str(tmp_path), "--device=cpu", "--threads=1"]))
