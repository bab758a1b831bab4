#!/bin/sh
# trl: SFTTrainer ignores the attention_mask of a tokenized dataset: it attends to padding and trains the model to predict it.
#
# Versions: trl 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: SFTTrainer accepts tokenized datasets. If a tokenizer made input_ids and attention_mask with
# padding="max_length", tokens with mask 0 are neither attended to nor part of the loss, as with transformers' own collator.
#
# Behaviour: SFTTrainer keeps the columns input_ids and labels. Its collator makes a new attention mask of ones for all given tokens, and
# a missing labels column becomes a copy of input_ids, with the padding. No message mentions it. Labels of -100, the column
# assistant_masks, and completion_mask with completion_only_loss=True exclude tokens from the loss, but attention_mask does not.
#
# Consequence: for short texts, most of the tokens in the loss are padding. If the padding token is the end token, the model is trained
# to repeat the end token.
#
# Output seen:
#   trl 1.16.0, transformers 5.24.0
#   dataset,                input_ids:      [2, 3, 4, 1, 0, 0, 0, 0]
#   dataset,                attention_mask: [1, 1, 1, 1, 0, 0, 0, 0]
#   transformers' collator, input_ids:      [2, 3, 4, 1, 0, 0, 0, 0]
#   transformers' collator, attention_mask: [1, 1, 1, 1, 0, 0, 0, 0]
#   transformers' collator, labels:         [2, 3, 4, 1, -100, -100, -100, -100]
#   SFTTrainer,             input_ids:      [2, 3, 4, 1, 0, 0, 0, 0]
#   SFTTrainer,             attention_mask: [1, 1, 1, 1, 1, 1, 1, 1]
#   SFTTrainer,             labels:         [2, 3, 4, 1, 0, 0, 0, 0]
# Exit status: 0 if the mask is still ignored, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "the": 2, "cat": 3, "sat": 4}))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
rows = tokenizer(["the cat sat <eos>"] * 2, padding="max_length", max_length=8)
rows = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2))
arguments = trl.SFTConfig(sys.argv[1], per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
batch = next(iter(trainer.get_train_dataloader()))
expected = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{key: value[0] for key, value in rows.items()}])
print(f"trl {trl.__version__}, transformers {transformers.__version__}")
for name, one in (("dataset", {key: value[0] for key, value in rows.items()}), ("transformers' collator", expected), ("SFTTrainer", batch)):
    for key in ("input_ids", "attention_mask", "labels"):
        if key in one:
            values = one[key] if isinstance(one[key], list) else one[key][0].tolist()
            print(f"{name + ',':23} {key + ':':15}", values)
if batch["attention_mask"].min() == 0 or (batch["labels"] == -100).any():
    sys.exit("changed: SFTTrainer uses the mask")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder/run" 2> "$folder/log" || { cat "$folder/log" >&2; exit 1; }
