#!/bin/sh
# transformers 5: a tokenizer with a changed pre-tokenizer or normalizer gives other tokens after save_pretrained and from_pretrained.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, Python 3.11. PyTorch is not needed.
#
# What a good engineer would guess: tokenizer.json describes the whole tokenizer: normalizer, pre-tokenizer, model, decoder. AutoTokenizer
# loads this file, so the tokenizer of a saved folder gives the same tokens as before.
#
# Behaviour: save_pretrained writes the changed parts into tokenizer.json. If tokenizer_config.json names a class that builds its
# tokenizer itself (GPT2Tokenizer, Qwen2Tokenizer and others), AutoTokenizer takes the vocabulary, the merges and the post-processor from
# tokenizer.json, and the normalizer, the pre-tokenizer and the decoder from the class. Nothing is printed. tokenizers reads the file as
# it was saved. With tokenizer_class PreTrainedTokenizerFast (now TokenizersBackend), AutoTokenizer does, too. Pull request 44254 (closed)
# describes this for published models. LlamaTokenizer has an exception for byte-level files.
#
# Consequence: a model that was trained with single digits, or with lower case, gets other tokens when its folder is loaded: in the next
# training, in the evaluation and in the server. Programs that read tokenizer.json with tokenizers get the right tokens.
#
# Output seen:
#   transformers 5.24.0, tokenizers 0.23.3: tokens of 'In 2024' (Ġ is a space)
#   TokenizersBackend,       before:               ['in', 'Ġ', '2', '0', '2', '4']
#   TokenizersBackend,       AutoTokenizer, after: ['in', 'Ġ', '2', '0', '2', '4']
#   TokenizersBackend,       tokenizers, after:    ['in', 'Ġ', '2', '0', '2', '4']
#   GPT2Tokenizer,           before:               ['in', 'Ġ', '2', '0', '2', '4']
#   GPT2Tokenizer,           AutoTokenizer, after: ['I', 'n', 'Ġ2024']
#   GPT2Tokenizer,           tokenizers, after:    ['in', 'Ġ', '2', '0', '2', '4']
#   Qwen2Tokenizer,          before:               ['in', 'Ġ', '2', '0', '2', '4']
#   Qwen2Tokenizer,          AutoTokenizer, after: ['I', 'n', 'Ġ', '2', '0', '2', '4']
#   Qwen2Tokenizer,          tokenizers, after:    ['in', 'Ġ', '2', '0', '2', '4']
# Exit status: 0 if the parts are still lost, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/program.py" <<'PROGRAM'
import json
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

TEXTS, EXAMPLE = ["In 2024 it was 2024", "it was in 1234 and 2024"] * 20, "In 2024"


def changed(kind):
    """Return a tokenizer of this class, trained with single digits and lower case."""
    empty = Tokenizer(tokenizers.models.BPE())
    empty.normalizer, empty.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"], show_progress=False)
    empty.train_from_iterator(TEXTS, trainer)
    empty.save(f"{sys.argv[1]}/trained.json")
    if kind is PreTrainedTokenizerFast:
        tokenizer = kind(tokenizer_object=empty)
    else:
        model = json.loads(empty.to_str())["model"]
        tokenizer = kind(vocab=model["vocab"], merges=[tuple(one) for one in model["merges"]])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}: tokens of {EXAMPLE!r} (Ġ is a space)")
same = []
for kind in (PreTrainedTokenizerFast, GPT2Tokenizer, Qwen2Tokenizer):
    path = f"{sys.argv[1]}/{kind.__name__}"
    tokenizer = changed(kind)
    tokenizer.save_pretrained(path)
    found = {
        "before": tokenizer.tokenize(EXAMPLE), "AutoTokenizer, after": AutoTokenizer.from_pretrained(path).tokenize(EXAMPLE),
        "tokenizers, after": Tokenizer.from_file(f"{path}/tokenizer.json").encode(EXAMPLE).tokens,
    }
    for when, tokens in found.items():
        print(f"{kind.__name__ + ',':24} {when + ':':21}", tokens)
    same.append([found["before"] == tokens for tokens in found.values()])
if same != [[True, True, True], [True, False, True], [True, False, True]]:
    sys.exit("changed: other tokenizers keep their parts")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder"
