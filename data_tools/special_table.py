"""Make the table of special tokens of the shards from --tokenizer, the chat template and other options."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_tools.options import PrepareOptions
from data_tools.vocabulary import given_tokenizer
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.places import placer
from mpidp.data.special_tokens import SpecialTokens, special_tokens_of, with_template
from mpidp.data.tokenizer import Tokenizer


def table_of(tokenizer: str, eod: str | None) -> SpecialTokens:
    """Return the table of special tokens of --tokenizer. If the tokenizer will be made from the corpus, the table is empty.
    Independent."""
    given = given_tokenizer(tokenizer, eod)
    if given is None:
        return SpecialTokens(None, ())
    path = Path(tokenizer)
    return special_tokens_of(path if path.is_dir() else path.parent, given)


def completed_table(table: SpecialTokens, made: Tokenizer, template: Template | None, options: PrepareOptions) -> SpecialTokens:
    """Return the table of the shards: the tokenizer's table, changed by the chat template and the options. Pure."""
    if not table.ends:
        table = special_tokens_of(None, made)
    if template is not None:
        table = with_template(replace(table, template_args=template.args, tool_template=template.tool_text), made, template.text)
    has_bos = options.bos == "auto" and (template is None or _writes_bos(template, made, table.bos))
    return replace(table, bos=table.bos if has_bos else None, special=options.special or table.special)


def _writes_bos(template: Template, made: Tokenizer, bos: int | None) -> bool:
    """Return True if the template writes BOS at the start of a chat. In chats only the template adds BOS, as in
    transformers. Pure."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(TemplateRejection):
        return placer(made, "tokens")([template.render(messages)])[0].ids[:1].tolist() == [bos]
    return False
