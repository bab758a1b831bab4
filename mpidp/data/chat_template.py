"""Renders chat templates in the same way as the library transformers. Pure.

Templates are untrusted input. They run in jinja2's immutable sandbox, with limits on time and memory. jinja2's trim_blocks,
lstrip_blocks and loop controls are on. A template can use raise_exception, tojson, strftime_now, namespace and dict. It can also
use the tokenizer's special tokens by name, for example bos_token.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from mpidp.errors import DataError, UsageError

BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters of Unicode that enclose the parts that {% generation %} marks
MAX_SECONDS = 2.0  # CPU time of one rendering
MAX_TIMEOUTS = 3  # after this many chats that exceed MAX_SECONDS, rendering stops with an error
MAX_MEMORY = 2**30  # bytes that one rendering may allocate
MAX_BITS = 2**12  # largest number of bits of an integer that a template computes
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for a message's reasoning; most templates use the first
STANDARD = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class TemplateRejection(ValueError):  # noqa: N818
    """A template cannot render a chat, because the template raises an error or exceeds a limit."""


@dataclass(frozen=True)
class Template:
    """A chat template and its inputs. Methods raise DataError if the template is invalid, and UsageError if jinja2 is missing."""

    text: str
    names: Mapping[str, str]  # special tokens by name, such as bos_token
    moment: float  # the time that strftime_now returns, in seconds since 1970; the same on all ranks
    args: Mapping[str, Any] = field(default_factory=dict)  # other variables, such as enable_thinking
    tool_text: str | None = None  # the template for chats with tools; None: use the same template

    def __getstate__(self) -> dict[str, Any]:  # the template is sent to other ranks; the compiled form cannot be pickled
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def of(self, tools: Any) -> Template:
        """Return the template for chats with these tools. If `tools` is None, return the default template. The choice is the same
        as in transformers."""
        return self if tools is None or self.tool_text is None else self._for_tools

    @cached_property
    def _for_tools(self) -> Template:
        return replace(self, text=self.tool_text or self.text, tool_text=None)

    @cached_property
    def has_marks(self) -> bool:
        """True if the template marks the assistant's parts with {% generation %}."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.text) is not None

    @cached_property
    def _compiled(self) -> Any:
        jinja2 = _library()
        environment = _environment(self.moment)
        try:
            with _bounded():
                return environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            problem = f"line {error.lineno} of the chat template: {error.message}"
        except (RecursionError, MemoryError, TimeoutError, SyntaxError, ValueError, OverflowError) as error:
            problem = f"the chat template is too large or too deeply nested ({type(error).__name__})"
        raise DataError(f"{problem}. Correct the template, or give another with --chat-template")

    def check(self) -> None:
        """Raise DataError if the template is invalid, and UsageError if jinja2 is missing."""
        assert self._compiled is not None and self.of([])._compiled is not None

    def undefined_names(self) -> list[str]:
        """Return the names of special tokens (*_token) that the template uses but that have no value."""
        from jinja2 import meta

        used = meta.find_undeclared_variables(_environment(self.moment).parse(self.text))
        return sorted(name for name in used if name.endswith("_token") and name not in {**self.names, **self.args})

    def render(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool = False, tools: Any = None, documents: Any = None,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a chat. Raises TemplateRejection if the template rejects the chat.

        `prompt`: whether the text ends with the generation prompt. `args`: variables for this chat, which replace variables of
        the same name in the attributes `names` and `args`. In the text, BEGIN and END enclose each part that {% generation %}
        marks.
        """
        jinja2, template = _library(), self.of(tools)._compiled
        given = {**self.names, **self.args, **(args or {})} | {
            "messages": [_message(one) for one in messages], "tools": tools, "documents": documents,
            "add_generation_prompt": prompt,
        }
        try:
            with _bounded():
                text = str(template.render(**given))
                text.encode()  # fails for half of a surrogate pair, which no tokenizer accepts
                return text
        except MemoryError:
            reason = f"the template needs more than {MAX_MEMORY >> 20} MiB of memory"
        except UnicodeEncodeError:
            reason = "the rendered text has half of a surrogate pair"
        except TimeoutError:
            reason = f"the template needs more than {MAX_SECONDS:.0f} s"
            template.environment.timeouts += 1
            if template.environment.timeouts >= MAX_TIMEOUTS:
                raise DataError(f"the chat template needs more than {MAX_SECONDS:.0f} s for one chat. Give another template with "
                                "--chat-template") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
                RecursionError) as error:
            reason = str(error) or type(error).__name__
        raise TemplateRejection(f"rejected by the chat template ({reason})")


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message `given` in the form in which transformers passes messages to templates. Null values are removed. The
    message's reasoning, if any, is stored under the keys "thinking" and "reasoning_content"."""
    message = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@contextmanager
def _bounded() -> Iterator[None]:
    """Return a context with limited CPU time and memory, if the system supports such limits. Code that exceeds a limit raises
    TimeoutError or MemoryError."""
    with _limited_memory(), _limited_time():
        yield


@contextmanager
def _limited_memory() -> Iterator[None]:
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", "rb") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY
        if before[0] != resource.RLIM_INFINITY and before[0] <= most:
            raise ValueError
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def _library() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UsageError("chat templates need jinja2. Run pip install 'mpidp[data]'") from None
    return jinja2


def _environment(moment: float) -> Any:
    jinja2 = _library()
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace as Plain

    class Generation(Extension):
        """Implements the tag {% generation %}, which marks the assistant's parts of a chat."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    class Sandbox(ImmutableSandboxedEnvironment):
        """Raises an error if a template computes too large an integer."""

        intercepted_binops = frozenset({"**", "*"})
        timeouts = 0  # number of renderings that took too long

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * max(1, abs(right)) if operator == "**" else left.bit_length() + right.bit_length()
                if bits > MAX_BITS:
                    raise jinja2.TemplateError(f"the template computes an integer of more than {MAX_BITS} bits")
            return super().call_binop(context, operator, left, right)

    class Namespace(Plain):
        """Raises an error if a template sets an attribute that begins with "_". Such attributes could give access to the
        interpreter."""

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

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": reject, "namespace": Namespace,
        "strftime_now": lambda form: datetime.fromtimestamp(moment, UTC).strftime(form),
    }
    return environment
