#!/bin/sh
# tokenizers: a BPE with end_of_word_suffix, trained twice on the same text in the same process, gives the tokens different ids.
#
# Versions: tokenizers 0.23.3, Python 3.11.
#
# What a good engineer would guess: training counts pairs and has no random part, so the same text gives the same tokenizer. This is
# true for a BPE without prefix and suffix (8 trainings gave 1 result).
#
# Behaviour: tokens with a suffix (or a continuing_subword_prefix, as in WordPiece) get their ids in the order of a hash table, which
# changes from training to training. The merges of pairs with equal counts can then differ, too. huggingface/tokenizers issue 1794
# reports this for WordPiece.
#
# Consequence: a tokenizer that is trained again from the same text, or on each rank instead of on one, encodes the same text with
# other ids. Shards and checkpoints made with the first tokenizer are read with wrong meanings, without an error, because the size of
# the vocabulary is the same.
#
# Output seen:
#   tokenizers 0.23.3: 8 trainings on the same text
#   BPE: different vocabularies: 1
#   BPE with end_of_word_suffix: different vocabularies: 8
#   WordPiece: different vocabularies: 8
# Exit status: 0 if ids still differ, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tokenizers==0.23.3
cat > "$folder/program.py" <<'PROGRAM'
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = [" ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx")] * 3
KINDS = {
    "BPE": (models.BPE, trainers.BpeTrainer, {}),
    "BPE with end_of_word_suffix": (models.BPE, trainers.BpeTrainer, {"end_of_word_suffix": "</w>"}),
    "WordPiece": (models.WordPiece, trainers.WordPieceTrainer, {}),
}


def vocabulary(kind):
    model, trainer, options = KINDS[kind]
    tokenizer = Tokenizer(model(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXT, trainer(vocab_size=60, show_progress=False, **options))
    return tuple(sorted(tokenizer.get_vocab().items()))


print(f"tokenizers {tokenizers.__version__}: 8 trainings on the same text")
found = {kind: len({vocabulary(kind) for _ in range(8)}) for kind in KINDS}
for kind, count in found.items():
    print(f"{kind}: different vocabularies: {count}")
if found["BPE"] != 1 or found["BPE with end_of_word_suffix"] == 1:
    sys.exit("changed: another set of trainings is reproducible")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
