#!/bin/sh
# peft saves incomplete adapters if they are named "0" and "1": each file lacks a layer of the model.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: the name of an adapter is free. Several adapters of one model can be numbered, and save_pretrained
# writes each of them completely.
#
# Behaviour: save_pretrained removes the weights of the other adapters. It takes each weight whose name contains ".0." for a weight of the
# adapter "0", and so removes layer 0 (model.layers.0.) from the file of adapter "1", and layer 1 from the file of adapter "0". Nothing
# is printed. load_adapter prints nothing, either, and leaves the missing layers at their initial value, which has no effect. peft's
# issue 3584 (open) reports this for adapters that are named as modules, such as "mlp".
#
# Consequence: the training of a layer is lost in the saved file. An evaluation after loading shows another model than the trained one.
#
# Output seen:
#   peft 0.21.2, 3 layers, two adapters: layers in the saved file, difference of the logits after loading
#   adapter 'red' of ['red', 'blue']: layers [0, 1, 2], difference 0.0000
#   adapter 'blue' of ['red', 'blue']: layers [0, 1, 2], difference 0.0000
#   adapter '0' of ['0', '1']: layers [0, 2], difference 0.1666
#   adapter '1' of ['0', '1']: layers [1, 2], difference 0.2213
# Exit status: 0 if layers are still missing, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/program.py" <<'PROGRAM'
import sys

import peft
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                     num_key_value_heads=2)
TOKENS = torch.arange(16)[None]


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def save_and_load(names, path):
    """Return, for each adapter, the layers in its file and the largest difference of the logits after loading."""
    lora = {name: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) for name in names}
    model = peft.get_peft_model(base(), lora[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora[name])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    found = {}
    for name in names:
        with safe_open(f"{path}/{name}/adapter_model.safetensors", "pt") as file:
            layers = sorted({int(key.split(".layers.")[1].split(".")[0]) for key in file.keys()})
        model.set_adapter(name)
        loaded = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="empty")
        loaded.load_adapter(f"{path}/{name}", adapter_name="trained")
        loaded.set_adapter("trained")
        with torch.no_grad():
            found[name] = layers, float((model.eval()(TOKENS).logits - loaded.eval()(TOKENS).logits).abs().max())
    return found


print(f"peft {peft.__version__}, 3 layers, two adapters: layers in the saved file, difference of the logits after loading")
complete = []
for names in (["red", "blue"], ["0", "1"]):
    for name, (layers, difference) in save_and_load(names, f"{sys.argv[1]}/{names[0]}").items():
        complete.append(layers == [0, 1, 2])
        print(f"adapter {name!r} of {names}: layers {layers}, difference {difference:.4f}")
if complete != [True, True, False, False]:
    sys.exit("changed: other files are complete")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder"
