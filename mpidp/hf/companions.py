"""Finds the files that accompany the weights in a Hugging Face folder. These files are copied to RUN/hf (RUN: the run's
folder) and to an exported folder."""

from __future__ import annotations

from pathlib import Path

from mpidp.data.model_files import MAX_BYTES, TEMPLATE, TEMPLATES
from mpidp.errors import DataError

FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    TEMPLATE, "chat_template.json",
)
OF_TOKENIZER = ("tokenizer.model", "vocab.json", "merges.txt")  # other forms of tokenizer.json, which some programs read


def companions(folder: Path, of_tokenizer: bool) -> dict[str, Path]:
    """Return {name: path} of the files that accompany the weights. The names are relative to the folder. Independent.

    `of_tokenizer`: whether to include other files of the tokenizer, such as tokenizer.model. Set it only if the run uses the
    tokenizer of this folder. Raises DataError if a file is too large, or is a link to a file outside the folder. Links into the
    blobs of the Hub's cache are allowed.
    """
    names = [*FILES, *(OF_TOKENIZER if of_tokenizer else ())]
    names += sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    found = {name: folder / name for name in names if (folder / name).is_file()}
    for path in found.values():
        _check(folder, path)
    return found


def _check(folder: Path, path: Path) -> None:
    home, real = folder.resolve(), path.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(one) for one in homes):
        raise DataError(f"{path} is a link to {real}, which is outside the folder. If you trust this file, put "
                        "a copy in place of the link")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES} bytes, which is too large for such a file. Restore the file")
