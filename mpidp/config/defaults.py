"""Defaults of strategy settings that depend on other settings. Pure: no torch, no MPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mpidp.config.settings import StrategySettings

Settings = Mapping[str, Any]  # {section.key: value}

# {setting: the methods that use the setting}
METHODS = {f.name: f.metadata["methods"] for f in fields(StrategySettings) if f.metadata["methods"]}
DEFAULTS = {name: getattr(StrategySettings, name) for name in METHODS}


def kind(name: str, quorum: float) -> str:
    """Return the method that strategy.name and strategy.quorum select. The method is "quorum" if the strategy is synchronous and
    the quorum is below 1. Otherwise it is `name`. Pure."""
    return "quorum" if name == "synchronous" and quorum < 1 else name


def method_of(settings: Settings) -> str:
    """Return the method that the settings select. Pure."""
    return kind(settings["strategy.name"], settings["strategy.quorum"])


def sync_intervals(settings: Settings, steps: int) -> tuple[int, int]:
    """Return (sync_every, meet_every) for a run of this many steps, with automatic values filled in. Raises ValueError if
    the ranks would never average. Independent."""
    name, every, meet = method_of(settings), settings["strategy.sync_every"], settings["strategy.meet_every"]
    if name == "synchronous":
        return 1, 1
    overlapping = settings["strategy.overlap"] or settings["strategy.fragments"] > 1  # then averages do not make ranks equal
    global_average = settings["strategy.group"] == "all" and not overlapping
    if name in ("delayed", "server", "quorum"):
        return 1, meet or 10
    if every > steps:
        raise ValueError(f"strategy.sync_every={every} is more than the {steps} steps of the run: the ranks would never average")
    every = every or min(50 if settings["strategy.group"] == "all" else 1, steps)
    return every, meet or (every if global_average else every * max(4 if overlapping else 1, -(-50 // every)))


def outer(settings: Settings) -> tuple[float, float]:
    """Return (outer_lr, outer_momentum), with automatic values filled in if the strategy has an outer step.

    With overlap, updates arrive late. With sparse compression, they also arrive late, because of error feedback. Momentum repeats
    these updates even later. The default momentum is therefore smaller with overlap, and 0 with sparse compression (SparseLoCo,
    Sarfi 2025, section 3). Pure.
    """
    lr, momentum = settings["strategy.outer_lr"], settings["strategy.outer_momentum"]
    if settings["strategy.name"] != "local" or settings["strategy.group"] != "all":
        return lr, momentum
    sparse = settings["comm.compress"] in ("topk", "randomk")
    usual = (1.0, 0.0) if sparse else (0.7, 0.5 if settings["strategy.overlap"] else 0.7)
    return lr if lr >= 0 else usual[0], momentum if momentum >= 0 else usual[1]


def ratio(settings: Settings) -> float:
    """Return comm.ratio, with the automatic value filled in. The automatic value for topk is larger with strategy.name=local,
    because averages are rare. Pure."""
    topk = 0.03 if settings["strategy.name"] == "local" else 0.01
    usual = {"topk": topk, "randomk": 0.1}
    return float(settings["comm.ratio"] or usual.get(settings["comm.compress"], 0.0))


def known_settings(name: str, **settings: Any) -> dict[str, Any]:
    """Return those of the given settings that the method `name` uses. Independent."""
    return {key: value for key, value in settings.items() if name in METHODS[key]}
