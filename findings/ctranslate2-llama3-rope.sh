#!/bin/sh
# CTranslate2 ignores the rope scaling of a Llama 3 model that transformers 5 saved, without an error or a warning.
#
# Versions: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: a converter that reads config.json either applies the scaling `rope_type: llama3` or rejects the
# model. CTranslate2 lists Llama 3 among its supported models, so it applies the scaling.
#
# Behaviour: transformers 5 writes the scaling to the key `rope_parameters`. The converter reads rope_theta from this key, but not the
# scaling. Conversion and inference succeed. The logits equal those of the same weights without scaling.
#
# Consequence: a Llama 3.1 model that was fine-tuned and saved with transformers 5 generates different text in CTranslate2, without an
# error message. A comparison of the logits for one long prompt shows the difference.
#
# Output seen:
#   ctranslate2 4.8.5, transformers 5.24.0: largest difference of logits over 200 positions
#   from transformers with llama3 scaling: 10.238
#   from transformers without scaling:     0.000
# Exit status: 0 if the scaling is still ignored, 1 if the behaviour changed.
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

folder = sys.argv[1]
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0").save_pretrained(folder)


def model(rope):
    """Return a random model with these rope parameters; the weights are always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, rope_parameters=rope, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
scaled, plain = model(llama3), model({"rope_type": "default", "rope_theta": 500000.0})
scaled.save_pretrained(folder)
ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    right, without = scaled(ids).logits[0].numpy(), plain(ids).logits[0].numpy()
ctranslate2.converters.TransformersConverter(folder).convert(folder + "/converted")
generator = ctranslate2.Generator(folder + "/converted", device="cpu", compute_type="float32")
found = np.array(generator.forward_batch([[f"t{i}" for i in ids[0].tolist()]]))[0]
print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}: largest difference of logits over 200 positions")
print(f"from transformers with llama3 scaling: {abs(found - right).max():.3f}")
print(f"from transformers without scaling:     {abs(found - without).max():.3f}")
if abs(found - right).max() < 0.1 or abs(found - without).max() > 0.1:
    sys.exit("changed: the scaling is applied")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/model" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
