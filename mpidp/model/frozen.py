"""Finds frozen parameters. A parameter is frozen if it matches a pattern of optim.freeze. With LoRA, all parameters of the base
model are frozen.

Frozen parameters have no gradient and no optimizer state. Ranks do not exchange them in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mpidp.errors import UsageError

SHOWN = 6  # number of example names in an error message


def frozen(names: Sequence[str], patterns: str) -> set[str]:
    """Return the names that match a pattern. patterns: fnmatch patterns, separated by commas, for example
    "embedding.*,blocks.0.*".

    Raises UsageError if a pattern matches no name. Pure.
    """
    found: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",") if part.strip()):
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(names[:: max(1, len(names) // SHOWN)][:SHOWN])
            raise UsageError(f"optim.freeze: {pattern!r} matches no parameter. Some of the model's parameters are {some}")
        found.update(matching)
    return found


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a list of (name, parameter) pairs of the parameters that are not frozen. Independent."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
