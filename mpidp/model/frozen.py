"""Which parameters are trained: all, but for those that patterns freeze (optim.freeze), and a base under adapters (lora.py).

What is not trained has no gradient, no optimizer state and no place in what ranks send each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from mpidp.errors import UsageError

SHOWN = 6  # names, where a pattern matches none


def freeze(parameters: Mapping[str, nn.Parameter], patterns: str, names: Sequence[str]) -> None:
    """Let the parameters stay as they are whose names match one of the patterns ("embedding.*,blocks.0.*": fnmatch). names: of
    the whole model, where parameters are a part of it. UsageError for a pattern that matches none, and when nothing is left to
    train, here or at all. Independent."""
    wanted = [word.strip() for word in patterns.split(",") if word.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // SHOWN)][:SHOWN])
            raise UsageError(f"optim.freeze: {pattern} matches no parameter; there are, for example, {some}")
    for name, p in parameters.items():
        if any(fnmatchcase(name, pattern) for pattern in wanted):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        where = "that there is to train" if len(parameters) == len(names) else "of a stage of the pipeline"
        raise UsageError(f"optim.freeze={patterns} freezes every parameter {where}: leave something to train")


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of those that are. Independent."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
