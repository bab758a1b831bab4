"""Converts a tokenizer of mpidp to a Hugging Face tokenizer.json with the same ids. Also compares two tokenizer.json files.
Independent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpidp.data.end_of_document import USUAL_EOD
from mpidp.data.fast_bpe import byte_names
from mpidp.data.tokenizer import FORMAT, MAX_VOCAB, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_json
from mpidp.errors import DataError

EOD = USUAL_EOD[0]


def huggingface_json(tokenizer: Tokenizer) -> str:
    """Return the contents of a Hugging Face tokenizer.json for `tokenizer`. If `tokenizer` is already a
    Hugging Face tokenizer, return the contents of its file.

    Byte and char tokenizers become BPE tokenizers without merges. For a character outside the vocabulary, such a BPE tokenizer
    gives no id, while mpidp's char tokenizer raises DataError.
    """
    if not isinstance(tokenizer, (ByteTokenizer, CharTokenizer)):
        return tokenizer.to_json()
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizers

    if isinstance(tokenizer, ByteTokenizer):
        made = HFTokenizers(models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        made = HFTokenizers(models.BPE(vocab={c: i for i, c in enumerate(tokenizer.characters)}, merges=[]))
        made.decoder = decoders.Fuse()
    name = EOD
    while name in made.get_vocab():
        name = f"<{name}>"
    made.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return str(made.to_str(pretty=True))


def same(file: Path, used: bytes) -> bool:
    """Return whether two tokenizers give the same ids. The formatting of the JSON does not matter. file: the path of a
    tokenizer.json. used: the contents of another tokenizer.json.

    Raises DataError if one of them is not a readable tokenizer.json.
    """
    first, second = _both(file, used)
    return first == second


def extends(file: Path, used: bytes) -> bool:
    """Return whether the tokenizer `used` is the tokenizer in `file`, or has the same contents and more added tokens with new
    ids. file: the path of a tokenizer.json. used: the contents of another tokenizer.json.

    Raises DataError if one of them is not a readable tokenizer.json.
    """
    first, second = _both(file, used)
    known, added = first.pop("added_tokens") or [], second.pop("added_tokens") or []
    if first != second or any(one not in added for one in known):
        return False
    vocabulary = first["model"].get("vocab") or {}
    taken = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    return all(one in known or one["id"] not in taken for one in added)


def _both(file: Path, used: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return _plain(file.read_bytes()), _plain(used)
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{file}: not a readable tokenizer.json ({error})") from None


def names_of(tokenizer_json: str) -> dict[int, str]:
    """Return {id: text} for all tokens of a Hugging Face tokenizer.json. tokenizer_json: the contents of the file.
    Independent."""
    from tokenizers import Tokenizer as HFTokenizers

    return {i: name for name, i in HFTokenizers.from_str(tokenizer_json).get_vocab(with_added_tokens=True).items()}


def _plain(content: bytes) -> dict[str, Any]:
    """Return the entries of a tokenizer.json that determine ids, in Hugging Face's format. content: the contents of the
    file."""
    text = content.decode()
    try:
        is_mpidp = json.loads(text).get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"not a JSON object: {error}") from None
    from tokenizers import Tokenizer as HFTokenizers

    if is_mpidp:
        text = huggingface_json(tokenizer_from_json(text))
    try:
        theirs = HFTokenizers.from_str(text)
        if max(theirs.get_vocab().values(), default=0) >= MAX_VOCAB:  # to_str takes time proportional to the largest id
            raise DataError(f"it has an id of {MAX_VOCAB} or more")
        parsed: dict[str, Any] = json.loads(theirs.to_str())
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise DataError(str(error)) from None
    return {key: value for key, value in parsed.items() if key not in ("truncation", "padding", "post_processor")}
