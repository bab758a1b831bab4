"""Chat templates: a conversation to text, and which of the text the assistant says. Pure, but for the files that are read.

Rendered as transformers does: jinja2's immutable sandbox (templates come from strangers) with trim_blocks, lstrip_blocks and
loop controls; raise_exception, tojson and strftime_now; the tokenizer's special tokens by name (bos_token); no tools.
What the assistant says is what a template marks by {% generation %}; else, of each turn of the assistant's, what comes between
the text that asks for it (the messages before it, add_generation_prompt) and the text that ends with it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mpidp.errors import DataError, UsageError

BEGIN, END = "\ufdd0", "\ufdd1"  # around what is generated: no characters, so no text has them
MAX_BYTES = 2**24
Spans = list[tuple[int, int]]  # characters [start, stop) of a text


class Refused(ValueError):  # noqa: N818
    """The template says no to a conversation, in its own words."""


@dataclass(frozen=True)
class Template:
    """A chat template and what it is given. DataError when it is no template at all, UsageError without jinja2."""

    text: str
    specials: Mapping[str, str]  # bos_token and the like
    moment: float  # seconds since 1970 that strftime_now tells, the same on all ranks

    def __getstate__(self) -> dict[str, Any]:  # ranks tell each other of it: what is compiled stays
        return {"text": self.text, "specials": self.specials, "moment": self.moment}

    @cached_property
    def _marks(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    @cached_property
    def _compiled(self) -> Any:
        jinja2 = _library()
        environment = _environment(self.moment)
        try:
            return environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            words = f"line {error.lineno} of the chat template: {error.message}; mend it, or give another by --chat-template"
            raise DataError(words) from None

    def check(self) -> None:
        """UsageError or DataError where it cannot be used."""
        assert self._compiled is not None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
        """The text of a conversation, and what of it the assistant says. Refused; DataError for a template that renders a
        beginning otherwise when more follows: then nobody can say where a turn begins."""
        if self._marks:
            return self._marked(self._render(messages, False))
        text = self._render(messages, False)
        spans: Spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:i], True)
                after = text if i + 1 == len(messages) else self._render(messages[: i + 1], False)
                if not (after.startswith(before) and text.startswith(after)):
                    raise DataError(
                        f"the chat template renders the first {i + 1} messages otherwise when others follow, or what asks for an "
                        "answer otherwise than what is answered, so what the assistant says cannot be told apart: mark it by "
                        "{% generation %} ... {% endgeneration %} in the template (--chat-template FILE)"
                    )
                spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        jinja2 = _library()
        given = {**self.specials, "messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": asks}
        try:
            return str(self._compiled.render(**given))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise Refused(f"the chat template refuses it ({str(error) or type(error).__name__})") from None

    def _marked(self, text: str) -> tuple[str, Spans]:
        parts = re.split(f"([{BEGIN}{END}])", text)
        plain, spans, since = "", [], -1
        for part in parts:
            if part == BEGIN:
                since = len(plain)
            elif part == END:
                spans.append((since, len(plain)))
            else:
                plain += part
        return plain, spans


def find_template(file: str | None, tokenizer: str) -> Template:
    """The template of --chat-template, else the one beside a given tokenizer.json: chat_template.jinja, or `chat_template` in
    tokenizer_config.json. UsageError when there is none, DataError when it cannot be read. Independent."""
    path = Path(tokenizer)
    folder = path if path.is_dir() else path.parent if path.exists() else None
    about = _read_json(folder / "tokenizer_config.json") if folder is not None else {}
    specials = {key: text for key, value in about.items() if key.endswith("_token") and (text := _content(value)) is not None}
    text = _read(Path(file)) if file else None
    if text is None and folder is not None and (folder / "chat_template.jinja").exists():
        text = _read(folder / "chat_template.jinja")
    if text is None and (found := about.get("chat_template")):
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
        text = found if isinstance(found, str) else None
    if text is None:
        where = f"beside the tokenizer {tokenizer} there is none" if folder is not None else f"the tokenizer {tokenizer} has none"
        raise UsageError(
            f"--format chat needs a chat template, and {where} (chat_template.jinja, or `chat_template` in "
            "tokenizer_config.json): give --chat-template FILE"
        )
    moment = os.environ.get("SOURCE_DATE_EPOCH", "")
    template = Template(text, specials, float(moment) if moment.isdigit() else time.time())
    template.check()
    return template


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES} bytes: not a chat template")
        return data.decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give --chat-template an existing file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: not a chat template") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); mend or remove it") from None
    return found if isinstance(found, dict) else {}


def _content(value: Any) -> str | None:
    """Of a special token: its text, or an object that holds it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _library() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UsageError("--format chat needs jinja2: pip install 'mpidp[data]'") from None
    return jinja2


def _environment(moment: float) -> Any:
    jinja2 = _library()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace as Plain

    class Generation(Extension):
        """{% generation %}: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    class Namespace(Plain):
        """Without names that lead into the interpreter."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse, "namespace": Namespace,
        "strftime_now": lambda form: datetime.fromtimestamp(moment, UTC).strftime(form),
    }
    return environment
