#!/bin/sh
# transformers' Trainer: the load balancing loss of a mixture-of-experts model grows with gradient_accumulation_steps.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: one batch of 4 rows and 4 accumulated batches of 1 row give the same gradient. This is true for
# models without experts since transformers 4.46, which divides the loss by the number of tokens of the whole step.
#
# Behaviour: only the cross entropy is divided by the number of tokens of the whole step. The model adds router_aux_loss_coef times the
# auxiliary loss of each small batch, and Trainer does not divide this sum again. So with N accumulation steps, the auxiliary loss and
# its gradient have N times their weight. The logged loss contains the larger sum. huggingface/transformers issue 48690 reports the same
# growth for N processes with DDP. ms-swift, which builds on Trainer, repairs the growth in its own trainer (modelscope/ms-swift pull
# request 5823).
#
# Consequence: a run that reduces the batch of a device to an eighth, because memory is short, and accumulates 8 times, balances the
# experts 8 times as strongly and logs another loss, with otherwise the same settings and the same data.
#
# Output seen:
#   transformers 5.24.0: 4 equal rows, router_aux_loss_coef 1: norm of the gradient's part that the auxiliary loss causes
#   Mixtral, batches of 4, accumulation steps 1: 1.0 times, loss 6.279
#   Mixtral, batches of 1, accumulation steps 4: 4.0 times, loss 13.288
#   Qwen3Moe, batches of 4, accumulation steps 1: 1.0 times, loss 18.935
#   Qwen3Moe, batches of 1, accumulation steps 4: 4.0 times, loss 63.371
# Exit status: 0 if the auxiliary loss still grows, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/program.py" <<'PROGRAM'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, initializer_range=0.3, output_router_logits=True)
row = torch.randint(0, 32, (16,), generator=torch.Generator().manual_seed(1))


def step(name, coefficient, accumulation):
    """Return the gradient of one optimizer step of Trainer, and the logged loss."""
    config = getattr(transformers, f"{name}Config")(**SIZES, router_aux_loss_coef=coefficient)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    arguments = TrainingArguments(
        sys.argv[1], per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0,
        logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", log_level="error")
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 4,
                      optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return seen[0], trainer.state.log_history[0]["loss"]


print(f"transformers {transformers.__version__}: 4 equal rows, router_aux_loss_coef 1: norm of the gradient's part that the auxiliary loss causes")
ratios = []
for name in ("Mixtral", "Qwen3Moe"):
    parts = {}
    for accumulation in (1, 4):
        (with_aux, loss), (without, _) = step(name, 1.0, accumulation), step(name, 0.0, accumulation)
        parts[accumulation] = float((with_aux - without).norm())
        ratios.append(parts[accumulation] / parts[1])
        print(f"{name}, batches of {4 // accumulation}, accumulation steps {accumulation}: {ratios[-1]:.1f} times, loss {float(loss):.3f}")
if any(abs(ratio - expected) > 0.1 for ratio, expected in zip(ratios, (1, 4, 1, 4))):
    sys.exit("changed: the auxiliary loss does not grow with the accumulation steps")
PROGRAM
"$folder/env/bin/python" "$folder/program.py" "$folder"
