"""Makes linear layers compute row by row, so that the rounding of a row does not depend on the other rows of the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def by_rows(model: nn.Module) -> None:
    """Make each linear layer on the CPU compute single positions (B, 1, D) row by row, as matrix-vector products.

    This is faster than before for one row, and takes less than 1.5 times as long for eight rows. Inputs with more positions are
    computed as before. Independent.
    """
    for module in model.modules():
        plain = type(module) is nn.Linear and module.bias is None and "forward" not in vars(module)
        if plain and module.weight.device.type == "cpu":
            module.forward = partial(_forward, module.weight, module.forward)  # type: ignore[method-assign]


def _forward(weight: Tensor, otherwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dim() != 3 or x.shape[1] != 1:
        return otherwise(x)
    rows = [torch.mv(weight, row) for row in x.squeeze(1).unbind()]
    return (rows[0][None] if len(rows) == 1 else torch.stack(rows)).unsqueeze(1)
