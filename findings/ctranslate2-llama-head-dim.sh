#!/bin/sh
# CTranslate2 computes wrong results for a Llama model whose head_dim is not hidden_size / num_attention_heads.
#
# Versions: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: the converter copies the projections, whose shapes determine the size of a head. The converter's
# loaders for Mistral and Qwen3 read head_dim from config.json. So the loader for Llama reads head_dim, too, or rejects such a model.
#
# Behaviour: the loader for Llama ignores head_dim. Without grouped heads, conversion and inference succeed and the logits are wrong.
# With grouped heads, inference fails with "axis 2 has dimension ... but expected ...".
#
# Consequence: a Llama model with wider or narrower heads generates different text in CTranslate2, without an error message.
#
# Output seen:
#   ctranslate2 4.8.5, transformers 5.24.0: largest difference of logits over 200 positions
#   hidden_size 64, 4 heads of 16: 0.000
#   hidden_size 64, 4 heads of 24: 3.718
# Exit status: 0 if the results are still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
cat > "$folder/program.py" <<'PROGRAM'
import sys

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0")
ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))
print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}: largest difference of logits over 200 positions")
differences = []
for head_dim in (16, 24):
    folder = f"{sys.argv[1]}/{head_dim}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=head_dim,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        right = model(ids).logits[0].numpy()
    ctranslate2.converters.TransformersConverter(folder).convert(folder + "/converted")
    generator = ctranslate2.Generator(folder + "/converted", device="cpu", compute_type="float32")
    found = np.array(generator.forward_batch([[f"t{i}" for i in ids[0].tolist()]]))[0]
    differences.append(abs(found - right).max())
    print(f"hidden_size 64, 4 heads of {head_dim}: {differences[-1]:.3f}")
if differences[0] > 0.01 or differences[1] < 0.1:
    sys.exit("changed: the results are right")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/model" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
