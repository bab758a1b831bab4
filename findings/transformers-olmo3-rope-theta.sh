#!/bin/sh
# transformers applies `rope_theta` in an OLMo 3 config.json only to some layers. It ignores `rope_theta` in a GPT-NeoX config.json.
#
# Versions: transformers 5.24.0, Python 3.11. PyTorch is not needed.
#
# What a good engineer would guess: `rope_theta` in config.json is the rotary base of all layers, as in Llama, unless
# `rope_parameters` says otherwise.
#
# Behaviour: Olmo3Config removes rope_theta from the fields when it configures the layers with full attention. The layers with a
# window, which are configured next, then get the default of the class, 500000. GPTNeoXConfig reads only rotary_emb_base and
# rotary_pct. Neither class prints a warning.
#
# Consequence: if config.json has its own rope_theta but no rope_parameters, transformers computes a different model than config.json
# describes. mpidp rejects such folders.
#
# Output seen:
#   transformers 5.24.0, config.json with rope_theta 10000 (OLMo 3) and 123 (GPT-NeoX)
#   OLMo 3, layers with full attention: 10000.0
#   OLMo 3, layers with a window:       500000.0
#   GPT-NeoX:                           10000.0
# Exit status: 0 if rope_theta is still ignored there, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import transformers
from transformers import GPTNeoXConfig, Olmo3Config

olmo = Olmo3Config.from_dict({"rope_theta": 10000.0}).rope_parameters
neox = GPTNeoXConfig.from_dict({"rope_theta": 123.0}).rope_parameters
found = olmo["full_attention"]["rope_theta"], olmo["sliding_attention"]["rope_theta"], neox["rope_theta"]
print(f"transformers {transformers.__version__}, config.json with rope_theta 10000 (OLMo 3) and 123 (GPT-NeoX)")
print(f"OLMo 3, layers with full attention: {found[0]}")
print(f"OLMo 3, layers with a window:       {found[1]}")
print(f"GPT-NeoX:                           {found[2]}")
if found != (10000.0, 500000.0, 10000.0):
    sys.exit("changed: rope_theta is read")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" 2> "$folder/log" || { tail -3 "$folder/log"; exit 1; }
