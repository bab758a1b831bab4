#!/bin/sh
# In transformers, position_ids that start again at 0 also change the attention mask, but only if no cache and no mask are used.
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: position_ids only select the rotary angles. The arguments use_cache and an attention_mask of ones
# do not change the logits of a single forward pass.
#
# Behaviour: without a cache and without attention_mask, transformers reads the restart as the start of a packed document. Then tokens
# do not attend to earlier documents. use_cache is True unless the model's config or the call says otherwise, also in training mode.
# With it, or with an attention_mask of ones, tokens attend to all earlier tokens, without a warning. A comment in
# masking_utils.py says that the restart is only looked for without mask and cache.
#
# Consequence: a model that is trained on packed documents with position_ids sees other documents or not, depending on use_cache. A
# comparison of logits between two programs fails, although weights, tokens and positions are the same.
#
# Output seen:
#   transformers 5.24.0, Llama, two documents of 6 tokens: largest difference from the logits of the second document alone
#   use_cache=True, mask None: 6.9362
#   use_cache=True, mask of ones: 6.9362
#   use_cache=False, mask None: 0.0000
#   use_cache=False, mask of ones: 6.9362
#   no argument, in training mode: 6.9362
# Exit status: 0 if the logits still depend on use_cache and mask, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
)).eval()
ids = torch.randint(0, 64, (1, 12))
positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
alone = model(ids[:, 6:]).logits


def difference(**arguments):
    return float((model(ids, position_ids=positions, **arguments).logits[:, 6:] - alone).abs().max().detach())


print(f"transformers {transformers.__version__}, Llama, two documents of 6 tokens: largest difference from the logits of the second document alone")
found = {}
for cache in (True, False):
    for name, mask in (("None", None), ("of ones", torch.ones_like(ids))):
        found[cache, name] = difference(use_cache=cache, attention_mask=mask)
        print(f"use_cache={cache}, mask {name}: {found[cache, name]:.4f}")
model.train()
found["train"] = difference()
print(f"no argument, in training mode: {found['train']:.4f}")
if any((value < 0.01) != (key == (False, "None")) for key, value in found.items()):
    sys.exit("changed: another set of calls separates the documents")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
