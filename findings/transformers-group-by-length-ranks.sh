#!/bin/sh
# transformers' Trainer with group_by_length on several ranks: from the second epoch on, samples are trained twice or not at all.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU, gloo), Python 3.11.
#
# What a good engineer would guess: each epoch trains each sample once, on one of the ranks. This is true for the default strategy.
#
# Behaviour: each rank draws the order of all samples itself and takes its part. group_by_length draws from torch's global generator,
# which nothing synchronizes between the ranks. In the first epoch, all ranks have the same state from the seed. If a rank draws random
# numbers for its batches (the masks of DataCollatorForLanguageModeling), the states differ afterwards, because the batches of the
# ranks have different lengths. So in the next epoch, each rank takes its part of another order.
#
# Consequence: masked language modeling with group_by_length covers only part of the data in each later
# epoch, without an error or a warning. The number of steps is right.
#
# Output seen:
#   transformers 5.24.0, 2 ranks, 64 samples: different samples among the 64 of each epoch
#   random:          64 64 64
#   group_by_length: 64 54 51
# Exit status: 0 if samples are still missing, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments

words = Tokenizer(models.WordLevel({"<pad>": 0, "<mask>": 1, **{str(number): 2 + number for number in range(64)}}))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", mask_token="<mask>")
# 64 samples of different lengths. The first token, which is never masked, is 2 + the number of the sample.
LENGTHS = [2 + number * 7 % 11 for number in range(64)]
SAMPLES = [{"input_ids": [2 + number] + [2] * length, "special_tokens_mask": [1] + [0] * length} for number, length in enumerate(LENGTHS)]


class Model(torch.nn.Module):
    """Records the samples of each step."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.seen.extend(input_ids[:, 0].tolist())
        return {"loss": (self.weight * input_ids.float().mean()).sum()}


def train(strategy):
    """Return the samples that all ranks together trained in each of three epochs."""
    arguments = TrainingArguments(
        sys.argv[1], per_device_train_batch_size=4, num_train_epochs=3, train_sampling_strategy=strategy, use_cpu=True, ddp_backend="gloo",
        report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no", remove_unused_columns=False, log_level="error")
    model = Model()
    trainer = Trainer(model, arguments, train_dataset=SAMPLES, data_collator=DataCollatorForLanguageModeling(tokenizer))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, model.seen)
    return [[one for rank in seen for one in rank[32 * epoch:32 * (epoch + 1)]] for epoch in range(3)]


complete = []
for strategy in ("random", "group_by_length"):
    epochs = train(strategy)
    complete.append([len(set(epoch)) == 64 for epoch in epochs])
    if dist.get_rank() == 0:
        if len(complete) == 1:
            print(f"transformers {transformers.__version__}, 2 ranks, 64 samples: different samples among the 64 of each epoch")
        print(f"{strategy + ':':16}", *[len(set(epoch)) for epoch in epochs], flush=True)
dist.destroy_process_group()
if complete[0] != [True] * 3 or complete[1] != [True, False, False]:
    sys.exit("changed: other epochs are complete")
PROGRAM
OMP_NUM_THREADS=1 "$folder/env/bin/torchrun" --standalone --nproc_per_node 2 "$folder/program.py" "$folder/run"
