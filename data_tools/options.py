"""The options of data_tools.prepare, and checks of their values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.mixture import Source
from data_tools.rows import FORMATS
from data_tools.vocabulary import check_eod, check_tokenizer
from mpidp.errors import UsageError
from mpidp.runtime.options import add_out


@dataclass(frozen=True)
class PrepareOptions:
    """The options of data_tools.prepare, on the command line or as arguments of prepare()."""

    sources: list[Source]
    tokenizer: str = "byte"
    shards: int = 4
    val_fraction: float = 0.05  # share of the stream or of the documents that is used for validation
    form: str = "text"  # --format: "text", or rows with a loss mask (rows.py): "prompt_completion" or "chat"
    text_key: str = "text"  # the field of a row that contains a document
    chat_template: str | None = None  # a file with the template; None: the template of the tokenizer
    template_arg: Sequence[str] = ()  # KEY=VALUE
    seq_len: int = 0  # for rows: the window length in tokens; no row crosses a multiple of this length
    truncate: bool = False  # whether rows longer than seq_len are truncated instead of skipped
    tokens: int = 0  # total tokens of the mixture; 0: stop when a source is exhausted
    repeat: bool = False  # whether an exhausted source starts over
    split: str = ""  # used for validation: "text": the end of the stream; "document": whole documents; "": see by_document
    seed: int = 0  # validation documents are chosen by a hash of seed, file name and index in the file
    bad_utf8: str = "replace"  # "replace", or "skip": skip documents with invalid UTF-8
    strict: bool = False  # whether a bad row raises DataError; otherwise it is skipped
    bos: str = "auto"  # "auto", or "none": documents and rows begin without BOS
    special: str = ""  # "text" or "tokens"; "": text for documents, and the tokenizer's default for rows
    eod: str | None = None  # the end-of-document token of a tokenizer.json; None: a token with one of the usual names

    @property
    def rows(self) -> bool:
        """Whether the sources contain rows with a loss mask, and not plain text."""
        return self.form != "text"

    @property
    def by_document(self) -> bool:
        """Whether whole documents are chosen for validation. Otherwise the end of the stream is used. With --repeat, the end
        of the stream would contain documents of the training split."""
        return self.split == "document" or (not self.split and (self.rows or self.repeat))

    @property
    def arranged(self) -> bool:
        """Whether arrange.py determines the order of the documents. Otherwise they keep the order of the files."""
        return self.rows or len(self.sources) > 1 or self.tokens > 0

    @property
    def advice(self) -> str:
        """What may help if a split is too small, for the error message."""
        if not self.val_fraction:
            return ""
        whole = ", or give another --seed" + ", or --split text" * (not self.rows and not self.repeat)
        return ", or set --val-fraction 0" + whole * self.by_document

    def tokens_of(self, split: str) -> int:
        """Return the largest number of tokens of a split: its fraction of --tokens, or 0 for no limit. A split ends with the
        document that reaches this number. `split`: "train" or "val"."""
        val = round(self.tokens * self.val_fraction) if self.by_document else 0
        return max(1, val if split == "val" else self.tokens - val) if self.tokens else 0


def template_args(words: Sequence[str]) -> dict[str, Any]:
    """Parse `words` of the form KEY=VALUE, from --template-arg. A value that is valid JSON is parsed. Other values are strings.
    Raises UsageError if a word is not KEY=VALUE. Pure."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--template-arg '{word}' must have the form KEY=VALUE, for example enable_thinking=false")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def check_options(options: PrepareOptions) -> None:
    """Raise UsageError if an option is invalid. Call this before any input is read. Independent."""
    rows = options.rows
    if options.shards < 1:
        raise UsageError(f"--shards {options.shards} must be at least 1")
    if not 0 <= options.val_fraction < 1:
        raise UsageError(f"--val-fraction {options.val_fraction} must be at least 0 and below 1")
    if options.split not in ("", "text", "document"):
        raise UsageError(f"--split '{options.split}' must be 'text' or 'document'")
    if options.bad_utf8 not in ("replace", "skip"):
        raise UsageError(f"--bad-utf8 '{options.bad_utf8}' must be 'replace' or 'skip'")
    if options.form not in FORMATS:
        raise UsageError(f"--format '{options.form}' must be one of {', '.join(FORMATS)}")
    if rows and options.split == "text":
        raise UsageError(f"--split text cannot be combined with --format {options.form}, because it would cut rows in two. Use "
                         "--split document")
    if rows and options.seq_len < 2:
        raise UsageError(f"--format {options.form} packs whole rows into windows. Give the length of a window with --seq-len N "
                         "(at least 2), and train with model.seq_len=N")
    if not rows and (options.seq_len or options.truncate):
        raise UsageError("--seq-len and --truncate apply only to --format prompt_completion and --format chat, because plain "
                         "text is not packed into windows")
    if rows and options.text_key != "text":
        raise UsageError("--text-key applies only to --format text. With --format rows, the names of the fields are fixed")
    if (options.chat_template or options.template_arg) and options.form != "chat":
        raise UsageError(f"{'--chat-template' if options.chat_template else '--template-arg'} applies only to --format chat")
    if options.bos not in ("auto", "none"):
        raise UsageError(f"--bos '{options.bos}' must be 'auto' or 'none'")
    if options.special not in ("", "text", "tokens"):
        raise UsageError(f"--special '{options.special}' must be 'text' or 'tokens'")
    if options.special == "text" and options.form == "chat":
        raise UsageError("--special text cannot be combined with --format chat, because the special tokens of the template must "
                         "become ids. Omit --special")
    if options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens} must be at least 0")
    if options.repeat and not options.tokens:
        raise UsageError("--repeat needs --tokens N, because a repeating mixture without a limit never ends")
    if options.repeat and options.split == "text" and options.val_fraction:
        raise UsageError("--repeat cannot be combined with --split text, because the validation split would contain documents "
                         "of the training split. Use --split document, or --val-fraction 0")
    check_tokenizer(options.tokenizer)
    check_eod(options.tokenizer, options.eod)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of data_tools.prepare to a parser. Pure."""
    add = parser.add_argument
    add("--source", action="append", metavar="PATH",
        help="a file, a folder (text, .jsonl, .json, .csv, .parquet, .arrow; also .gz and .zst), or stdlib: the .py files "
        "of Python's standard library without site-packages, dist-packages and tests; to mix sources, give the option several "
        "times, as PATH:WEIGHT (default: stdlib)")
    add("--format", dest="form", default="text", help="'text': plain text; 'prompt_completion': rows with the fields prompt "
        "and completion, with the loss on the completion; 'chat': rows with messages (role, content), with the loss on assistant "
        "turns (default: %(default)r)")
    add("--text-key", metavar="NAME", default="text", help="the field or column that contains the text of a document (default: "
                                                           "%(default)s)")
    add("--chat-template", metavar="FILE", help="with --format chat: file with the chat template (default: the template of the "
                                                "tokenizer)")
    add("--template-arg", action="append", metavar="KEY=VALUE", default=[], help="with --format chat: a variable of the "
        "template, for example enable_thinking=false; may be given several times. A row's chat_template_kwargs override it")
    add("--seq-len", type=int, metavar="N", default=0,
        help="length of a window in tokens (required for rows); train with the same model.seq_len")
    add("--truncate", action="store_true", help="truncate rows longer than --seq-len tokens instead of skipping them")
    add("--tokens", type=int, metavar="N", default=0,
        help="total number of tokens of the mixture; 0: stop when a source is exhausted (default: %(default)s)")
    add("--repeat", action="store_true", help="with --tokens: start an exhausted source again from its beginning")
    add("--tokenizer", default="byte", metavar="PATH", help="byte, char, bpe:VOCAB (trained here), a tokenizer.json, or a folder "
        "that contains one (default: %(default)s)")
    add_out(parser, "the folder of shards to write (default: %(default)s)", default="shards/stdlib")
    add("--workers", type=int, metavar="N", default=0,
        help="number of encoding threads; 0: all cores, or one per rank under mpirun; any number gives the same shards "
        "(default: %(default)s)")
    add("--shards", type=int, metavar="N", default=4, help="number of training files (default: %(default)s)")
    add("--val-fraction", type=float, metavar="F", default=0.05,
        help="share of the tokens or documents that is used for validation; 0: none (default: %(default)s)")
    add("--split", default="", help="what becomes the validation split. 'text': the end of the stream; 'document': whole "
        "documents, chosen at random (default: 'document' for rows and with --repeat, otherwise 'text')")
    add("--seed", type=int, metavar="N", default=0, help="random seed of --split document (default: %(default)s)")
    add("--bad-utf8", default="replace",
        help="'replace': replace bytes that are not valid UTF-8; 'skip': skip documents with such bytes (default: %(default)r)")
    add("--strict", action="store_true", help="fail on malformed rows instead of skipping them; with --format prompt_completion "
        "or chat, also on empty or too long rows")
    add("--bos", default="auto", help="'auto': documents and rows begin with BOS if the tokenizer adds BOS to texts; 'none': no "
                                      "BOS (default: %(default)r)")
    add("--special", default="", help="how the name of a special token in a text, such as <|im_start|>, is encoded. 'text': "
        "like any other text; 'tokens': as the id of the token (default: 'tokens' for rows if the tokenizer comes with a model, "
        "otherwise 'text')")
    add("--eod", help="the end-of-document token of a tokenizer.json (default: the token with one of the usual names)")
