"""Which parameters are trained: all, but for those that patterns freeze (optim.freeze), and a base under adapters (lora.py).

What is not trained has no gradient, no optimizer state and no place in what ranks send each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mpidp.errors import UsageError

SHOWN = 6  # names, where a pattern matches none


def frozen(names: Sequence[str], patterns: str) -> set[str]:
    """Those of a model's parameters that match one of the patterns ("embedding.*,blocks.0.*": fnmatch). UsageError for a pattern
    that matches none. Pure."""
    found: set[str] = set()
    for pattern in (word.strip() for word in patterns.split(",") if word.strip()):
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(names[:: max(1, len(names) // SHOWN)][:SHOWN])
            raise UsageError(f"optim.freeze: {pattern} matches no parameter; there are, for example, {some}")
        found.update(matching)
    return found


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of those that are. Independent."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
