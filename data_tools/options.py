"""The options of data_tools.prepare, and checks of their values."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.mixture import Source
from data_tools.rows import FORMATS
from data_tools.vocabulary import check_tokenizer
from mpidp.errors import UsageError


@dataclass(frozen=True)
class PrepareOptions:
    """The options of the command line or of prepare(). `split` is never empty."""

    sources: list[Source]
    tokenizer: str = "byte"
    shards: int = 4
    val_fraction: float = 0.05
    seed: int = 0
    split: str = "text"
    bad_utf8: str = "replace"
    strict: bool = False
    form: str = "text"  # --format
    seq_len: int = 0  # window length in tokens; 0: documents are not packed
    truncate: bool = False
    tokens: int = 0  # of the mixture; 0: no limit
    repeat: bool = False
    text_key: str = "text"

    @property
    def arranged(self) -> bool:
        """True if documents are reordered relative to the files."""
        return self.form != "text" or len(self.sources) > 1 or self.tokens > 0

    def tokens_of(self, split: str) -> int:
        """Return the token limit of a split: its part of --tokens. 0 means no limit."""
        val = round(self.tokens * self.val_fraction) if self.split == "document" else 0
        return max(1, val if split == "val" else self.tokens - val) if self.tokens else 0


def check_options(options: PrepareOptions, chat_template: str | None = None) -> None:
    """Raise UsageError for invalid options, before any input is read. Independent."""
    rows = options.form != "text"
    if options.shards < 1:
        raise UsageError(f"--shards {options.shards} must be at least 1")
    if not 0 <= options.val_fraction < 1:
        raise UsageError(f"--val-fraction {options.val_fraction} must be in [0, 1)")
    if options.split not in ("text", "document"):
        raise UsageError(f"--split {options.split} must be text or document")
    if options.bad_utf8 not in ("replace", "skip"):
        raise UsageError(f"--bad-utf8 {options.bad_utf8} must be replace or skip")
    if options.form not in FORMATS:
        raise UsageError(f"--format {options.form} must be one of {', '.join(FORMATS)}")
    if rows and options.split == "text":
        raise UsageError(f"--format {options.form}: --split text would cut rows in two; use --split document")
    if rows and options.seq_len < 2:
        raise UsageError(f"--format {options.form} packs whole rows into windows: give --seq-len N, the model.seq_len to use")
    if not rows and (options.seq_len or options.truncate):
        raise UsageError("--seq-len and --truncate apply to --format prompt_completion and chat only: plain text is not packed")
    if rows and options.text_key != "text":
        raise UsageError("--text-key applies to --format text only: rows have fixed fields")
    if chat_template and options.form != "chat":
        raise UsageError("--chat-template applies to --format chat only")
    if options.tokens < 0 or options.repeat and not options.tokens:
        raise UsageError("--tokens N must be above 0, and --repeat needs it: without a limit, a repeating mixture never ends")
    check_tokenizer(options.tokenizer)
