"""Reference implementations of optimizers: textbook formulas for one parameter in float64.

Each function takes a parameter, its gradient, a dict with its state between steps, and the step counted from 1. It returns the
parameter after the step. test_optim.py compares every optimizer of optim.name with the one in REFERENCES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """lr: learning rate of this step; decay: weight decay, 0 for vectors; hidden: True for matrices inside a block."""

    lr: float
    decay: float
    beta1: float
    beta2: float
    hidden: bool


Reference = Callable[[Tensor, Tensor, dict[str, Any], int, Hyper], Tensor]


def adam_update(g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    """Return Adam's direction (Kingma 2015, algorithm 1)."""
    m = state["m"] = h.beta1 * state.get("m", torch.zeros_like(g)) + (1 - h.beta1) * g
    v = state["v"] = h.beta2 * state.get("v", torch.zeros_like(g)) + (1 - h.beta2) * g * g
    return (m / (1 - h.beta1**step)) / ((v / (1 - h.beta2**step)).sqrt() + 1e-8)


def adam(p: Tensor, g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    return p - h.lr * adam_update(g + h.decay * p, state, step, h)


def adamw(p: Tensor, g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    """AdamW: decoupled weight decay (Loshchilov 2019)."""
    return p * (1 - h.lr * h.decay) - h.lr * adam_update(g, state, step, h)


def sgd(p: Tensor, g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    """SGD with momentum beta1 and weight decay."""
    m = state["m"] = h.beta1 * state.get("m", torch.zeros_like(g)) + g + h.decay * p
    return p - h.lr * m


def muon(p: Tensor, g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    """torch's Muon on hidden matrices, AdamW on everything else."""
    if not h.hidden:
        return adamw(p, g, state, step, h)
    if "torch" not in state:
        state["p"] = torch.nn.Parameter(p.float())
        state["torch"] = torch.optim.Muon([state["p"]], weight_decay=h.decay, adjust_lr_fn="match_rms_adamw")
    state["torch"].param_groups[0]["lr"] = h.lr
    state["p"].grad = g.float()
    state["torch"].step()
    return state["p"].detach().double()


def normuon(p: Tensor, g: Tensor, state: dict[str, Any], step: int, h: Hyper) -> Tensor:
    """NorMuon (arXiv 2510.05491, algorithm 1), with torch's orthogonal matrices; AdamW on everything else."""
    if not h.hidden:
        return adamw(p, g, state, step, h)
    direction = torch.zeros(p.shape)
    hidden = Hyper(1.0 / (0.2 * max(p.shape) ** 0.5), 0.0, h.beta1, h.beta2, True)
    orthogonal = -muon(direction.double(), g, state, step, hidden)
    state["p"].data.zero_()
    v = state["v"] = 0.95 * state.get("v", torch.zeros(len(p), 1)) + 0.05 * orthogonal.square().mean(1, keepdim=True)
    rows = orthogonal / (v.sqrt() + 1e-8)
    return p * (1 - h.lr * h.decay) - 0.2 * h.lr * p.numel() ** 0.5 / rows.norm() * rows


REFERENCES: dict[str, Reference] = {"adamw": adamw, "adam": adam, "sgd": sgd, "muon": muon, "normuon": normuon}
