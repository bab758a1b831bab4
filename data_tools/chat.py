"""Chat templates: render a conversation to text and locate the assistant's parts of the text. Pure, apart from reading files.

Templates are rendered as in transformers, in jinja2's immutable sandbox, because templates are untrusted input. trim_blocks,
lstrip_blocks and loop controls are on. A template can use raise_exception, tojson, strftime_now and the tokenizer's special
tokens by name (bos_token). It gets no tools. The assistant's parts are those that the template marks with {% generation %}. A
template without these marks is rendered up to each assistant turn (with add_generation_prompt), and again with the turn included.
The assistant's part is the difference.
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

BEGIN, END = "\ufdd0", "\ufdd1"  # around the assistant's parts; both are noncharacters, which no text contains
MAX_BYTES = 2**24  # largest size of a template file
Spans = list[tuple[int, int]]  # characters [start, stop) of a text


class TemplateRejection(ValueError):  # noqa: N818
    """Raised if the template raises an error for a conversation."""


@dataclass(frozen=True)
class Template:
    """A chat template and its inputs. Raises DataError if the template is invalid and UsageError if jinja2 is missing."""

    text: str
    specials: Mapping[str, str]  # special tokens by name, such as bos_token
    moment: float  # the time that strftime_now returns, in seconds since 1970; the same on all ranks

    def __getstate__(self) -> dict[str, Any]:  # the template is sent to other ranks; the compiled form cannot be pickled
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
            where = f"line {error.lineno} of the chat template: {error.message}"
            raise DataError(f"{where}; correct it, or give another template with --chat-template") from None

    def check(self) -> None:
        """Raise UsageError or DataError if the template cannot be used."""
        assert self._compiled is not None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
        """Return the text of a conversation and the spans of the assistant's parts.

        Raises TemplateRejection if the template rejects the conversation. Raises DataError if the text of the first messages
        changes when more messages follow, because the start of a turn is then unknown.
        """
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
                        "the assistant's part of the text cannot be located: the chat template renders the first "
                        f"{i + 1} messages differently when more messages follow, or its generation prompt differs from the "
                        "start of the answer. Mark the part with "
                        "{% generation %} ... {% endgeneration %} in the template (--chat-template FILE)"
                    )
                spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        jinja2 = _library()
        given = {**self.specials, "messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            return str(self._compiled.render(**given))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise TemplateRejection(f"rejected by the chat template ({str(error) or type(error).__name__})") from None

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
    """Return the chat template. Raises UsageError if there is none and DataError if it cannot be read. Independent.

    The template is `file` (--chat-template) if given. Otherwise it is chat_template.jinja, or the key `chat_template` of
    tokenizer_config.json, in the folder of the tokenizer.json.
    """
    path = Path(tokenizer)
    folder = path if path.is_dir() else path.parent if path.exists() else None
    about = _read_json(folder / "tokenizer_config.json") if folder is not None else {}
    specials = {key: text for key, value in about.items() if key.endswith("_token") and (text := _content(value)) is not None}
    text = _read(Path(file)) if file else None
    if text is None and folder is not None and (folder / "chat_template.jinja").exists():
        text = _read(folder / "chat_template.jinja")
    if text is None and (found := about.get("chat_template")):
        if isinstance(found, list):  # several named templates
            found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
        text = found if isinstance(found, str) else None
    if text is None:
        where = f"there is none in the folder of {tokenizer}" if folder is not None else f"the tokenizer {tokenizer} has none"
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
        raise DataError(f"{path} is not valid JSON ({error}); correct or remove it") from None
    return found if isinstance(found, dict) else {}


def _content(value: Any) -> str | None:
    """Return the text of a special token, which is stored as a string or as an object with `content`."""
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
        """{% generation %}: marks the assistant's parts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    class Namespace(Plain):
        """Rejects attributes that give access to the interpreter."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name}")
            super().__setitem__(name, value)

    def reject(message: str) -> None:
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
        "raise_exception": reject, "namespace": Namespace,
        "strftime_now": lambda form: datetime.fromtimestamp(moment, UTC).strftime(form),
    }
    return environment
