"""Lets a strategy update parameters with an optimizer of torch.optim that the user made (mpidp.library)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpidp.parallel.whole_matrices import Hidden
from mpidp.reducers.buckets import FlatLayout


class TorchOptimizer:
    """Gives a torch.optim optimizer the interface that strategies use. Independent.

    The torch optimizer gets the averaged gradient. It uses its own learning rate, and keeps its own state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layout: FlatLayout, gradients: Tensor) -> None:
        self.optimizer, self.updates = optimizer, 0
        self._gradients = [(p, view) for (_, _, p), view in zip(layout.placed(), layout.views(gradients), strict=True)]

    def step(self, lr: float) -> None:
        """Update all parameters with the averaged gradient. `lr` is ignored, because the torch optimizer has its own learning
        rate."""
        before = [p.grad for p, _ in self._gradients]
        for p, view in self._gradients:
            p.grad = view
        self.optimizer.step()
        for (p, _), gradient in zip(self._gradients, before, strict=True):
            p.grad = gradient
        self.updates += 1

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made so far."""
        self.updates = updates

    def moments(self) -> dict[str, Tensor]:
        """Return an empty dict, because the torch optimizer keeps its own state."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty dict, because the torch optimizer keeps its own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing, because the torch optimizer keeps its own state."""


@dataclass(frozen=True)
class TorchRule:
    """Has the part of UpdateRule (optimizer.py) that strategies use."""

    optimizer: torch.optim.Optimizer
    hidden: ClassVar[Hidden] = Hidden()
    matrices: ClassVar[frozenset[str]] = frozenset()

    def make(self, layout: FlatLayout, parameters: Tensor, gradients: Tensor, *more: Any, **share: Any) -> TorchOptimizer:
        """Return the optimizer of flat parameters. Independent."""
        return TorchOptimizer(self.optimizer, layout, gradients)
