"""Small Hugging Face tokenizers of the usual kinds, for tests."""

from __future__ import annotations

import string

from tokenizers import Tokenizer as HFTokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mpidp.data.tokenizer import Tokenizer, tokenizer_from_json

SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]
WORDS = ["hello there blue red answer yes no the fox says naïve 日本語"] * 50


def byte_level(prefix: bool = False) -> Tokenizer:
    """In the manner of GPT-2 and Llama 3. prefix: a space is put before each text."""
    made = HFTokenizers(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|turn|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer_from_json(made.to_str())


def sentencepiece(prefix: str = "prepend") -> Tokenizer:
    """In the manner of Llama 2, with byte fallback. prefix: how a space is put before texts: prepend, always, first, or none."""
    space = "\u2581"
    names = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), space, *string.ascii_letters, *string.digits, *"+=.,?!\n", "é"]
    names += [space + c for c in "4abh"]
    made = HFTokenizers(models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[(space, c) for c in "4abh"], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True))
    if prefix in ("prepend", "none"):
        spaces = normalizers.Replace(" ", space)
        made.normalizer = normalizers.Sequence([normalizers.Prepend(space), spaces]) if prefix == "prepend" else spaces
        strip = [decoders.Strip(" ", 1, 0)] if prefix == "prepend" else []
        made.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prefix, split=False)])
    made.add_special_tokens(SPECIAL)
    return tokenizer_from_json(made.to_str())


def wordpiece() -> Tokenizer:
    """In the manner of BERT: the bytes of its tokens are not known."""
    vocab = {name: i for i, name in enumerate(["[UNK]", "[SEP]", "hello", "fox", "##es", "yes", "."])}
    made = HFTokenizers(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return tokenizer_from_json(made.to_str())
