"""Computes the bytes that the forward pass of one micro-batch keeps for backward. There are functions for a Transformer block,
for the last norm, and for the logits. Pure.

The counted tensors are those that autograd saves in mpidp.model (checked in tests/unit/test_mesh_formulas.py). For
multiplications by constants, biases and residual sums, autograd saves nothing.
"""

from __future__ import annotations

from mpidp.model.loss_chunks import chunk_rows
from mpidp.plan.mesh.sizes import ModelSizes, Shape, Work


def _norm(model: ModelSizes) -> tuple[int, int]:
    """Return (a, b). A norm of D channels keeps a D + b bytes per position for backward. The norm's output is not counted.
    RMSNorm keeps its input, the normalized input and a factor. LayerNorm also keeps a mean. On a GPU, LayerNorm does not keep
    the normalized input."""
    return (8, 8) if model.options.norm == "layer" else (8, 4)


def _between_branches(model: ModelSizes, work: Work) -> int:
    """Return the bytes per token that a block keeps for its norms, and for copies of the inputs of its matrix products. Sequence
    parallelism divides these bytes by tp."""
    o, d = model.options, model.model_dim
    channel, position = _norm(model)
    norms = len(o.norms()) * (channel * d + position)
    if o.parallel:
        norms -= 4 * d  # both norms have the same input, which is kept once
    products = 3 + 1 + o.gated  # each product keeps a 16-bit copy of its input; with mesh.sequence, products share it
    inputs = 2 * 4 * d if work.number_bytes == 4 else 2 * d * (2 if work.sequence else products)
    return norms + inputs


def _copied(model: ModelSizes) -> float:
    """Return the fraction of the layers that keep the result of attention twice.

    The second copy is the input of the output projection. It exists in layers with a sliding window, or if only some
    dimensions of the queries are rotated.
    """
    if model.options.positions == "rotary" and 0 < model.options.rotary_dims < model.shape.head_dim:
        return 1.0
    return sum(model.shape.attended(layer) < model.seq_len for layer in range(model.num_layers)) / model.num_layers


def _inside_branches(model: ModelSizes, work: Work) -> float:
    """Return the bytes per token that a block keeps for its heads and hidden channels. Tensor parallelism divides these bytes by
    tp."""
    o, w, heads, kv, e = model.options, work.number_bytes, model.num_heads, model.num_kv_heads, model.shape.head_dim
    attention: float = w * 4 * heads * e  # queries, repeated keys and values, and the result
    if not o.attention_cap:  # with a cap, backward computes the scores again
        attention += 4 * heads + _copied(model) * w * heads * e
    hidden = w * (4 if o.gated else 2) * model.hidden_dim
    norms = 8 * (heads + kv) * e + (4 * (heads + kv) if o.qk_norm == "head" else 8) if o.qk_norm else 0
    scores = 0 if work.fused else (2 * w + 1) * heads * model.seq_len
    return attention + hidden + norms + scores


def kept_of_block(model: ModelSizes, shape: Shape, work: Work) -> float:
    """Return the bytes per token that one block saves for backward on each rank. Attention that is not fused also saves its
    scores, the scores after dropout, and the dropout mask. In 16 bits these three tensors take 5 bytes per score (Korthikanti
    2022, section 4.1). Pure."""
    between = _between_branches(model, work) / (shape.tp if work.sequence else 1)
    return between + _inside_branches(model, work) / shape.tp


def kept_of_last_norm(model: ModelSizes, number_bytes: int) -> int:
    """Return the bytes per token that the last norm and the input of the head take on a rank that has all positions. Pure."""
    return (_norm(model)[0] + number_bytes) * model.model_dim


def logits_bytes(model: ModelSizes, shape: Shape, number_bytes: int) -> float:
    """Return the bytes per token that the logits and their gradients take on each rank with train.loss=whole. With a soft-cap,
    the capped logits are included. Pure."""
    each = (8 if number_bytes == 4 else 10) + (number_bytes if model.options.logit_cap else 0)
    return each * model.vocab_size / shape.tp


def loss_bytes(model: ModelSizes, shape: Shape, work: Work) -> float:
    """Return the peak number of bytes that the loss of a micro-batch takes on each rank of the last stage.

    If the loss is computed at once, the bytes are those of the log-probabilities, their gradients and the gradients of the
    logits. If the loss is computed in chunks, the gradients of the hidden states and (without LoRA) of the head are computed
    together with the loss. In this case the bytes are those of the gradients computed with the loss, plus the larger of two
    terms: the logits of one chunk, or the scaled copies of these gradients that backward makes. Pure.
    """
    tokens, capped = work.micro_batch * model.seq_len, model.options.logit_cap > 0
    rows = chunk_rows(work.loss, model.shape, tokens)
    if not rows:
        return (12 + work.number_bytes * capped) * tokens * model.vocab_size / shape.tp
    chunk = ((4 if work.number_bytes == 4 else 6) + 8 * capped) * min(rows, tokens) * model.vocab_size / shape.tp
    gradients = 4 * tokens * model.model_dim + (0 if model.lora_rank else 4 * model.table / shape.tp)
    return gradients + max(chunk, gradients)
