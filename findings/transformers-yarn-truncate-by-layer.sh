#!/bin/sh
# transformers ignores YaRN's key `truncate` if rope_parameters has one entry per kind of layer (OLMo 3, Gemma 3).
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: the keys of a YaRN scaling have the same meaning in rope_parameters (for all layers) and in
# rope_parameters["full_attention"] (for some layers). So in both places, `truncate: false` and `truncate: true` give different
# frequencies.
#
# Behaviour: factor, beta_fast and the other keys are read from the entry of the kind of layer. But `truncate` is read from the outer
# dictionary, which does not have this key. So the default, true, is used, without a warning.
#
# Consequence: a program that computes the frequencies as config.json describes them gives other results than transformers. mpidp
# rejects such a config.json.
#
# Output seen:
#   transformers 5.24.0: largest relative difference between the frequencies with truncate true and false
#   one entry for all layers:     0.0041
#   one entry per kind of layer:  0.0000
# Exit status: 0 if the key is still ignored, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import transformers
from transformers import LlamaConfig, Olmo3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 65536}
YARN = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}


def for_all(truncate):
    config = LlamaConfig(**SIZES, rope_parameters=YARN | {"truncate": truncate})
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0]


def by_layer(truncate):
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}, "full_attention": YARN | {"truncate": truncate}}
    config = Olmo3Config(**SIZES, layer_types=["sliding_attention", "full_attention"], rope_parameters=kinds)
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu", layer_type="full_attention")[0]


def difference(frequencies):
    return float(((frequencies(True) - frequencies(False)) / frequencies(True)).abs().max())


print(f"transformers {transformers.__version__}: largest relative difference between the frequencies with truncate true and false")
print(f"one entry for all layers:     {difference(for_all):.4f}")
print(f"one entry per kind of layer:  {difference(by_layer):.4f}")
if difference(for_all) < 1e-3 or difference(by_layer) > 0:
    sys.exit("changed: the key is read in both places, or in none")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
