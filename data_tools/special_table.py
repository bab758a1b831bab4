"""Makes the table of special tokens that is stored with the shards, and finds the chat template. Both depend on --tokenizer
and other options."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_tools.options import PrepareOptions, template_args
from data_tools.vocabulary import given_tokenizer
from mpidp.data.chat_template import Template, TemplateRejection
from mpidp.data.model_files import read_template
from mpidp.data.places import placer
from mpidp.data.special_tokens import SpecialTokens, special_tokens_of, with_template
from mpidp.data.tokenizer import Tokenizer
from mpidp.errors import UsageError
from mpidp.runtime.log import log


def table_of(tokenizer: str, eod: str | None) -> SpecialTokens:
    """Return the special tokens of the tokenizer that --tokenizer names. The table is empty if --tokenizer is byte, char or
    bpe:VOCAB. `eod`: the value of --eod. Independent."""
    given = given_tokenizer(tokenizer, eod)
    if given is None:
        return SpecialTokens(None, ())
    path = Path(tokenizer)
    return special_tokens_of(path if path.is_dir() else path.parent, given)


def find_template(options: PrepareOptions, table: SpecialTokens) -> Template:
    """Return the chat template: the file --chat-template if given, else the template in `table`. Log a warning if the template
    uses special tokens that are not defined. Raises UsageError if there is no template, and DataError if the template is invalid.
    Independent."""
    file, tokenizer = options.chat_template, options.tokenizer
    args = {**table.template_args, **template_args(options.template_arg)}
    text = read_template(Path(file)) if file else table.template
    if text is None:
        exists = Path(tokenizer).exists()
        where = (f"there is none in the folder of {tokenizer}, as chat_template.jinja or in tokenizer_config.json" if exists
                 else f"the tokenizer {tokenizer} has none")
        raise UsageError(f"--format chat needs a chat template, but {where}. Give --chat-template FILE")
    stamp = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = float(stamp) if stamp.isdigit() else time.time()
    template = Template(text, table.names, moment, args, None if file else table.tool_template)
    template.check()
    if missing := template.undefined_names():
        log.warning(f"the chat template uses {', '.join(missing)}, which the files of {tokenizer} do not define. "
                    "The template writes nothing where it uses these names")
    return template


def completed_table(table: SpecialTokens, made: Tokenizer, template: Template | None, options: PrepareOptions) -> SpecialTokens:
    """Return the special tokens of the shards: those of `table`, changed as the chat template and the options require. If
    `table` is empty, start from the special tokens of the tokenizer. `made`: the tokenizer of the shards. Pure."""
    if not table.ends:
        table = special_tokens_of(None, made)
    if template is not None:
        table = with_template(replace(table, template_args=template.args, tool_template=template.tool_text), made, template.text)
    has_bos = options.bos == "auto" and (template is None or _writes_bos(template, made, table.bos))
    return replace(table, bos=table.bos if has_bos else None, special=options.special or table.special)


def _writes_bos(template: Template, made: Tokenizer, bos: int | None) -> bool:
    """Return whether the template writes BOS at the start of a chat. If it does not, chats have no BOS, as in transformers.
    Pure."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(TemplateRejection):
        return placer(made, "tokens")([template.render(messages)])[0].ids[:1].tolist() == [bos]
    return False
