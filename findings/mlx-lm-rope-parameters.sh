#!/bin/sh
# mlx-lm ignores the rotary base and the rope scaling of a Llama model that transformers 5 saved.
#
# Versions: mlx-lm 0.32.2, mlx and mlx-cpu 0.32.4, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11 on Linux x86-64.
#
# What a good engineer would guess: mlx-lm loads folders that transformers saved, and this version requires transformers 5.7 or newer.
# So it reads the key `rope_parameters`, which transformers 5 writes instead of `rope_theta` and `rope_scaling`.
#
# Behaviour: for model_type llama, mlx-lm reads only the old keys. Without them, it uses rope_theta 10000 and no scaling, and prints
# no warning.
#
# Consequence: if a Llama model with another base (Llama 3 has 500000) was saved with transformers 5, its logits in mlx-lm are wrong. A
# folder that has both the old and the new keys is read correctly.
#
# Output seen:
#   mlx-lm 0.32.2: rope_theta 10000 in place of 500000
#   largest difference of logits from transformers over 200 positions: 9.689
# Exit status: 0 if the key is still ignored, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

import mlx.core as mx
import numpy as np
import torch
from mlx_lm import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0").save_pretrained(folder)
torch.manual_seed(0)
saved = LlamaForCausalLM(LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, initializer_range=0.2,
)).eval()
saved.save_pretrained(folder)
ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    right = saved(ids).logits[0].numpy()
loaded, _ = load(folder)
found = np.array(loaded(mx.array(ids.numpy())).astype(mx.float32))[0]
print(f"mlx-lm {importlib.metadata.version('mlx-lm')}: rope_theta {loaded.args.rope_theta} in place of 500000")
print(f"largest difference of logits from transformers over 200 positions: {abs(found - right).max():.3f}")
if abs(found - right).max() < 0.1:
    sys.exit("changed: rope_parameters is read")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/model" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
