"""Our tokenizers as a Hugging Face tokenizer.json that gives the same ids, and whether two such files do. Independent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpidp.data.tokenizer import FORMAT, USUAL_EOD, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_json
from mpidp.errors import DataError

EOD = USUAL_EOD[0]


def huggingface_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json: a given one as it is; bytes and characters as BPE without merges, of which each is a token.
    Characters beyond a char vocabulary are left out by it, where ours refuses the text."""
    if not isinstance(tokenizer, (ByteTokenizer, CharTokenizer)):
        return tokenizer.to_json()
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs

    if isinstance(tokenizer, ByteTokenizer):
        made = Theirs(models.BPE(vocab={name: byte for byte, name in enumerate(_byte_names())}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        made = Theirs(models.BPE(vocab={c: i for i, c in enumerate(tokenizer.characters)}, merges=[]))
        made.decoder = decoders.Fuse()
    name = EOD
    while name in made.get_vocab():
        name = f"<{name}>"
    made.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return str(made.to_str(pretty=True))


def same(file: Path, used: bytes) -> bool:
    """Do the tokenizer.json `file` and the contents `used` of another give the same ids? However they are written. DataError."""
    try:
        return _plain(file.read_bytes()) == _plain(used)
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{file}: not a tokenizer.json that can be read ({error})") from None


def eod_name(tokenizer_json: str, eod: int) -> str:
    """The text of token `eod` in a Hugging Face tokenizer.json."""
    from tokenizers import Tokenizer as Theirs

    return str(Theirs.from_str(tokenizer_json).id_to_token(eod))


def _plain(content: bytes) -> dict[str, Any]:
    """What decides the ids, in one way of writing it."""
    text = content.decode()
    try:
        ours = json.loads(text).get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"not a JSON object: {error}") from None
    from tokenizers import Tokenizer as Theirs

    if ours:
        text = huggingface_json(tokenizer_from_json(text))
    try:
        parsed: dict[str, Any] = json.loads(Theirs.from_str(text).to_str())
    except Exception as error:
        raise DataError(str(error)) from None
    return {key: value for key, value in parsed.items() if key not in ("truncation", "padding", "post_processor")}


def _byte_names() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2): printable ones for themselves, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
