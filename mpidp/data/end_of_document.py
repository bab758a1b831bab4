"""Chooses the token that ends a document. It is the token that the model's files declare, or a token with one of the usual names.
Independent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mpidp.data.model_files import optional_object
from mpidp.errors import DataError

USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<EOD>", "[EOS]", "[SEP]")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|eom_id|>")  # tokens that end a turn of a chat


def find_eod(vocab: Mapping[str, int], eod: str | int | None, declared: str | None = None) -> int:
    """Return the id of the end-of-document token. Raises DataError if there is no such token.

    `vocab`: the id of each token. `eod`: the end-of-document token, its id, or None if it is not known. `declared`: the
    model's eos_token, or None. If `eod` is None, `declared` is chosen if it is in `vocab`. Otherwise the first
    token of USUAL_EOD that is in `vocab` is chosen. `declared` is ignored if it ends a turn of a chat, because in pretraining
    data, documents end with another token.
    """
    if isinstance(eod, int) and eod in vocab.values():
        return eod
    usual = USUAL_EOD if declared is None or declared in TURN_ENDS else (declared, *USUAL_EOD)
    for name in usual if eod is None else (str(eod),):
        if name in vocab:
            return vocab[name]
    if eod is not None:
        raise DataError(f"the tokenizer has no token {eod!r}. Give a token of its vocabulary with --eod")
    raise DataError(f"the tokenizer has none of the usual end-of-document tokens ({', '.join(USUAL_EOD)}). Use --eod TOKEN")


def stored_eod(folder: Path) -> int | None:
    """Return the end-of-document id that mpidp stored in a folder: the value `eod` in the index.json of shards, or else the
    first id of the list `ends` in the special_tokens.json of a run. Return None if no such file can be read, or if it has no
    such id."""
    for name, key in (("index.json", "eod"), ("special_tokens.json", "ends")):
        with suppress(OSError, ValueError, AttributeError, RecursionError):
            found = json.loads((folder / name).read_bytes()).get(key)
            if ids := [one for one in (found if isinstance(found, list) else [found])[:1] if type(one) is int]:
                return ids[0]
    return None


def declared_eos(folder: Path) -> str | None:
    """Return the eos_token in FOLDER/tokenizer_config.json or, if this file has no eos_token, in
    FOLDER/special_tokens_map.json. Return None if neither file has an eos_token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        found = (optional_object(folder / name) or {}).get("eos_token")
        found = found.get("content") if isinstance(found, dict) else found
        if isinstance(found, str):
            return found
    return None
