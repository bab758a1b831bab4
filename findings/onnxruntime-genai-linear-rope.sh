#!/bin/sh
# The model builder of onnxruntime-genai ignores `linear` rope scaling, without an error or a warning.
#
# Versions: onnxruntime-genai 0.18.0, onnxruntime 1.32.0, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: linear scaling, which divides positions by a factor, is the simplest and the oldest kind of scaling.
# The builder supports the more complicated kinds `llama3` and `yarn`. So it supports `linear`, or rejects the model.
#
# Behaviour: the builder writes the model. The logits equal those of the same weights without scaling.
#
# Consequence: if the context of a model was extended by position interpolation, the converted model generates wrong text.
#
# Output seen:
#   onnxruntime-genai 0.18.0, largest difference of logits at the last of 200 positions
#   from transformers with linear scaling: 4.910
#   from transformers without scaling:     0.000
# Exit status: 0 if the scaling is still ignored, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx-ir==1.1.0
cat > "$folder/program.py" <<'PROGRAM'
import subprocess
import sys

import numpy as np
import onnxruntime_genai
import torch
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


scaled = model({"rope_type": "linear", "rope_theta": 500000.0, "factor": 8.0})
plain = model({"rope_type": "default", "rope_theta": 500000.0})
scaled.save_pretrained(folder)
ids = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    right, without = scaled(ids).logits[0, -1].numpy(), plain(ids).logits[0, -1].numpy()
built = folder + "/onnx"
builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", built, "-p", "fp32", "-e", "cpu"]
subprocess.run(builder, check=True, stdout=subprocess.DEVNULL)
loaded = onnxruntime_genai.Model(built)
options = onnxruntime_genai.GeneratorParams(loaded)
options.set_search_options(max_length=300)
generator = onnxruntime_genai.Generator(loaded, options)
generator.append_tokens(ids.numpy().astype(np.int32))
found = generator.get_output("logits")[0, -1]
print(f"onnxruntime-genai {onnxruntime_genai.__version__}, largest difference of logits at the last of 200 positions")
print(f"from transformers with linear scaling: {abs(found - right).max():.3f}")
print(f"from transformers without scaling:     {abs(found - without).max():.3f}")
if abs(found - right).max() < 0.1 or abs(found - without).max() > 0.1:
    sys.exit("changed: the scaling is applied")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/model" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
