"""Guesses which setting a user meant, if the name of a setting is unknown. This module imports neither torch nor MPI."""

from __future__ import annotations

import difflib
from collections.abc import Collection

SYNONYMS = {  # for each setting, its names in other programs (transformers, nanoGPT, Megatron-LM, torchrun scripts)
    "data.path": "data data_dir data_path dataset train_data datasets",
    "model.num_layers": "n_layer n_layers layers num_hidden_layers depth",
    "model.num_heads": "n_head n_heads heads num_attention_heads",
    "model.num_kv_heads": "n_kv_heads kv_heads num_key_value_heads num_query_groups",
    "model.model_dim": "n_embd hidden_size d_model dim embed_dim embedding_dim width",
    "model.hidden_dim": "intermediate_size ffn_dim d_ff ffn_hidden_size",
    "model.seq_len": "block_size context_length context seq_length max_seq_len max_length max_position_embeddings",
    "model.tie_embeddings": "tie_word_embeddings tied_embeddings weight_tying",
    "model.norm_eps": "rms_norm_eps layer_norm_eps",
    "model.lora_rank": "lora lora_r rank_lora",
    "model.lora_targets": "target_modules lora_target_modules",
    "train.init_from": "pretrained model_name_or_path finetune_from load base_model init",
    "train.steps": "max_steps max_iters train_iters iterations iters num_steps num_train_steps total_steps",
    "train.tokens": "max_tokens num_tokens total_tokens",
    "train.epochs": "num_train_epochs num_epochs max_epochs epoch",
    "train.patience": "early_stopping early_stopping_patience",
    "train.global_batch": "batch_size batch global_batch_size train_batch_size total_batch_size",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size gradient_accumulation_steps grad_accum",
    "train.dtype": "precision mixed_precision bf16 fp16 amp torch_dtype",
    "train.recompute": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "train.threads": "num_threads omp_num_threads cpu_threads",
    "train.eval_every": "eval_interval eval_steps val_every eval_freq val_interval",
    "train.eval_tokens": "eval_iters eval_batches",
    "train.save_every": "save_interval save_steps save_freq checkpoint_every checkpoint_interval ckpt_every",
    "optim.name": "optimizer optim optimizer_name",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.min_lr": "lr_min eta_min min_learning_rate final_lr",
    "optim.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay_style",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_iters warmup_ratio",
    "optim.weight_decay": "wd decay",
    "optim.beta1": "adam_beta1 betas momentum train.momentum optim.momentum",
    "optim.beta2": "adam_beta2",
    "optim.clip": "grad_clip max_grad_norm clip_grad clip_norm gradient_clipping gradient_clip_val",
    "strategy.sync_every": "local_steps inner_steps",
    "comm.compress": "compression gradient_compression",
    "mesh.tp": "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp_size",
    "mesh.pp": "pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size pp_size stages",
    "mesh.dp": "data_parallel data_parallel_size dp_size replicas",
    "mesh.shard": "zero zero_stage fsdp sharding",
    "run.dir": "output_dir out_dir save_dir log_dir checkpoint_dir output run",
    "run.resume": "resume_from_checkpoint resume_from load_checkpoint",
    "run.keep": "save_total_limit keep_last max_checkpoints",
    "metrics.track": "report_to tracker trackers logger logging_backend wandb mlflow trackio tensorboard_dir tb",
}


def suggestion(key: str, known: Collection[str]) -> str:
    """Return the setting in `known` that the user most likely meant by the unknown name `key`. The user may have used another
    program's name, a wrong section or a wrong spelling. Pure."""
    key = key.lower().replace("-", "_")
    section, _, name = key.rpartition(".")
    other = {word: setting for setting, words in SYNONYMS.items() if setting in known for word in words.split()}
    names: dict[str, list[str]] = {}
    for setting in known:
        names.setdefault(setting.partition(".")[2], []).append(setting)
    for word in (key, key.replace(".", "_"), name):
        if word in other and word not in names:
            return other[word]
    in_section = [word for word, settings in names.items() if any(one.startswith(f"{section}.") for one in settings)]
    for words, cutoff in ((names, 1.0), (in_section, 0.8), (names, 0.8), (other, 0.8)):
        if near := difflib.get_close_matches(name, words, n=1, cutoff=cutoff):
            same = names.get(near[0]) or [other[near[0]]]
            return difflib.get_close_matches(f"{section}.{near[0]}", same, n=1, cutoff=0.0)[0]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
