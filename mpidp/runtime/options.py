"""Options that several commands have. An option has the same meaning and the same help text in all commands.

| option | meaning |
|---|---|
| --data DIR | a folder of shards |
| --tokenizer PATH | a tokenizer.json, or a folder that contains one |
| --out PATH | what the command writes |
| --ranks N | number of MPI ranks |
| --json | print one line of JSON on standard output instead of text; everything else goes to standard error |

This module imports neither torch nor MPI.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from mpidp.runtime.environment import launcher_rank
from mpidp.runtime.log import log


def program(module: str) -> str:
    """Return the name of a command as the user called it. `module`: the module of the command. For mpidp.train, the name is
    "mpidp train" or "python -m mpidp.train". Independent."""
    return sys.argv[0] if sys.argv[0].startswith("mpidp ") else f"python -m {module}"


def note_old_spelling(old: str, new: str) -> None:
    """Log that `old` is an old spelling of `new`. Only rank 0 logs it. Independent."""
    if launcher_rank() == 0:
        log.warning("note: %s is an old spelling that still works; use %s", old, new)


def rank_counts(text: str) -> list[int]:
    """Return the numbers of ranks in `text`, such as "1,2,4" or "16k" (16,000). Raises ArgumentTypeError if one of them is not
    a whole number of at least 1. Pure."""
    counts = []
    for word in text.lower().split(","):
        try:
            count = float(word.removesuffix("k")) * (1000 if word.endswith("k") else 1)
        except ValueError:
            count = 0.0
        if not 1 <= count < 2**31 or count % 1:
            raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers of at least 1, separated by commas")
        counts.append(int(count))
    return counts


def rank_count(text: str) -> int:
    """Return the number of ranks in `text`. Raises ArgumentTypeError if `text` is not one whole number of at least 1. Pure."""
    try:
        (count,) = rank_counts(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: give one whole number of at least 1") from None
    return count


def add_data(parser: argparse.ArgumentParser, use: str, default: str = "", kind: Any = str) -> None:
    """Add --data DIR. `use`: the words after "folder of shards" in the help text. `kind`: the type of the value. Pure."""
    shown = f" (default: {default})" if default else ""
    parser.add_argument("--data", metavar="DIR", type=kind, help=f"folder of shards {use}{shown}")


def add_out(parser: argparse.ArgumentParser, about: str, metavar: str = "DIR", default: str | None = None) -> None:
    """Add --out. `about`: the help text, which describes what is written. Pure."""
    parser.add_argument("--out", metavar=metavar, default=default, help=about)


def add_new_out(parser: argparse.ArgumentParser, about: str, metavar: str = "DIR") -> None:
    """Add --out. `about`: as in add_out(). Also accept the old spelling, in which the output is the second positional
    argument. After parsing, call take_out(), which requires one of the two spellings. Pure."""
    parser.add_argument("old_out", nargs="?", help=argparse.SUPPRESS)
    add_out(parser, about, metavar)


def take_out(parser: argparse.ArgumentParser, options: argparse.Namespace, old: str, new: str) -> None:
    """Set options.out to the output that the user gave, in the new or the old spelling. `old`, `new`: the two spellings, for a
    note to the user. Raises UsageError unless the user gave the output exactly once. Independent."""
    if options.old_out is not None and options.out is None:
        note_old_spelling(old, new)
        options.out, options.old_out = options.old_out, None
    if options.out is None or options.old_out is not None:
        metavar = next(action.metavar for action in parser._actions if action.dest == "out")
        parser.error(f"name the output once, with --out {metavar}")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json. Pure."""
    parser.add_argument("--json", action="store_true",
                        help="print one line of JSON to standard output, and everything else to standard error")


def add_ranks(parser: argparse.ArgumentParser, default: str, several: bool = False) -> None:
    """Add --ranks. Its value is a list of numbers if `several` is true, else one number. `default`: a description of the default.
    Pure."""
    parser.add_argument("--ranks", metavar="N[,N...]" if several else "N", type=rank_counts if several else rank_count,
                        help=f"number of MPI ranks{', or several such numbers' * several} (default: {default})")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer PATH, whose default is the tokenizer in RUN. Pure."""
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder that contains one (default: RUN's copy)")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN (the folder of a run or of a checkpoint), and the options of add_opening(). Pure."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    add_opening(parser)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add --model.kind and --base. --model.kind allows mpidp to run the code of a custom model. --base is the path of the base
    model of a LoRA run. Pure."""
    parser.add_argument("--base", metavar="DIR", default="", help="path of the base model of a LoRA run, if the model was moved")
    parser.add_argument("--model.kind", dest="model_kind", metavar="KIND", default="",
                        help="MODULE:FACTORY of a run with a custom model. Without this option, mpidp does not run code that RUN "
                        "names")


def add_texts(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --special and --seq-len, which say how texts are encoded. `default`: the words with which the help describes the
    default of --special. Pure."""
    parser.add_argument("--special", choices=("text", "tokens"),
                        help="how to encode the name of a special token in a text, such as <|im_start|>. 'tokens' encodes it "
                        f"as the id of the token, 'text' like any other text ({default})")
    add_seq_len(parser)


def add_seq_len(parser: argparse.ArgumentParser) -> None:
    """Add --seq-len, the context length for a Hugging Face folder. Pure."""
    parser.add_argument("--seq-len", type=int, default=0, metavar="N",
                        help="context length for a Hugging Face folder. 0: the model's own, at most 2048 (default: %(default)s)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how tokens are chosen: --tokens, --temperature, --top-k, --top-p, --stop and --seed. Pure."""
    add = parser.add_argument
    add("--tokens", type=int, default=200, help="largest number of tokens to generate (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="number by which logits are divided. 0 always chooses the likeliest token "
                                                       "(default: %(default)s)")
    add("--top-k", type=int, default=50, help="sample from the K likeliest tokens. 0 means all tokens (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that together have this probability (default: "
                                                 "%(default)s)")
    add("--stop", metavar="TEXT", action="append", default=[], help="stop before TEXT; this option may be given several times")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_batch(parser: argparse.ArgumentParser, texts: str) -> None:
    """Add --batch and --exact, for commands that compute batches of texts. `texts`: what the command calls the texts. Pure."""
    parser.add_argument("--batch", type=int, default=8, help=f"{texts} per batch on each rank (default: %(default)s)")
    parser.add_argument("--exact", choices=("true", "false"), default="true",
                        help="'true': a text does not depend on the other texts of its batch. 'false': faster, but rounding may "
                        "change a text (default: %(default)s)")


def check_sampling(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise UsageError if the value of an option of add_sampling() is invalid. Pure."""
    if options.tokens < 0 or options.top_k < 0 or not 0 <= options.temperature < math.inf:
        parser.error("--tokens, --temperature and --top-k must not be negative, and the temperature must be finite")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p} must be above 0 and at most 1 (1 means all tokens)")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed} must be from 0 to {2**63 - 1}")
    if "" in options.stop:
        parser.error("--stop '': the text must not be empty")


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a trained model is computed: --device, --threads, --tp and --pp. Pure."""
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device to compute on (default: %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads per rank. 0 means as many as in training (default: %(default)s)")
    add("--tp", type=int, default=1, help="tensor-parallel ranks per replica, like mesh.tp in training (default: %(default)s)")
    add("--pp", type=int, default=1, help="pipeline stages per replica, like mesh.pp in training (default: %(default)s)")
