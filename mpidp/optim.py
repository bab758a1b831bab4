"""torch's own optimizers, the learning rate as a pure function of the step, and the global norm that clipping needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpidp.comm.buckets import NORM_BLOCK


@dataclass(frozen=True)
class Schedule:
    """lr_at(step) for steps counted from 1."""

    kind: str  # cosine | linear | constant | wsd
    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr_at(self, step: int) -> float:
        """Linear warm-up to lr, then: cosine or linear decay to min_lr at the last step; constant; or wsd, constant with
        linear decay over the last fifth (warmup-stable-decay, Hu 2024). Pure."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        fraction = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "constant":
            return self.lr
        if self.kind == "wsd":
            fraction = max(0.0, (fraction - 0.8) / 0.2)
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.kind == "cosine" else 1.0 - fraction
        return self.min_lr + (self.lr - self.min_lr) * decay


class Optimizer:
    """One or two torch optimizers over named parameters, updated together. Independent."""

    def __init__(
        self, name: str, named_parameters: list[tuple[str, torch.nn.Parameter]], weight_decay: float, beta1: float,
        beta2: float,
    ) -> None:
        """Matrices decay, gains do not. name: adamw, adam, sgd (momentum beta1), or muon: torch's Muon on the hidden
        matrices with its update scaled to AdamW's size, so that one learning rate serves both, and AdamW on the rest."""
        self.named = dict(named_parameters)
        matrices = [p for p in self.named.values() if p.dim() >= 2]
        gains = [p for p in self.named.values() if p.dim() < 2]
        decays = ((matrices, weight_decay), (gains, 0.0))
        groups: list[dict[str, Any]] = [{"params": of, "weight_decay": decay} for of, decay in decays if of]
        fused: dict[str, Any] = {"betas": (beta1, beta2), "eps": 1e-8, "fused": True}
        self.parts: list[torch.optim.Optimizer]
        if name == "adamw":
            self.parts = [torch.optim.AdamW(groups, lr=0.0, **fused)]
        elif name == "adam":
            self.parts = [torch.optim.Adam(groups, lr=0.0, **fused)]
        elif name == "sgd":
            self.parts = [torch.optim.SGD(groups, lr=1.0, momentum=beta1, fused=True)]
        elif name == "muon":
            outer = ("embedding.weight", "head.weight")
            hidden = [p for n, p in self.named.items() if p.dim() == 2 and not n.endswith(outer)]
            chosen = set(map(id, hidden))
            rest = [{**g, "params": [p for p in g["params"] if id(p) not in chosen]} for g in groups]
            self.parts = [
                torch.optim.Muon(hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW([g for g in rest if g["params"]], lr=0.0, **fused),
            ]
        else:
            raise ValueError(f"unknown optimizer {name!r}")

    def step(self, lr: float) -> None:
        """Update every parameter from its .grad."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def state_dict(self) -> dict[str, Tensor]:
        """State tensors by `parameter/key`."""
        return {
            f"{name}/{key}": value
            for name, p in self.named.items()
            for part in self.parts
            for key, value in part.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give the state back. ValueError for an entry of no parameter."""
        part_of = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for entry, value in state.items():
            name, _, key = entry.rpartition("/")
            if name not in self.named:
                raise ValueError(f"optimizer state for unknown parameter {name!r}")
            p = self.named[name]
            device = torch.device("cpu") if key == "step" and p.device.type == "cpu" else p.device
            part_of[id(p)].state[p][key] = value.to(device)


def global_norm(flat: Tensor) -> Tensor:
    """L2 norm of a flat gradient, float64 scalar. flat: (n,), n a multiple of NORM_BLOCK.

    Summed over fixed blocks in fixed order, so that neither the number of ranks nor of threads changes it. Independent.
    """
    return torch.linalg.vector_norm(flat.view(-1, NORM_BLOCK), dim=1).double().square().sum().sqrt()
