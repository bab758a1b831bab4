"""Defaults of strategy settings that depend on other settings. This module imports neither torch nor MPI."""

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
    """Return the method: "quorum" if `name` is "synchronous" and `quorum` is below 1, else `name`. `name`: the value of
    strategy.name. `quorum`: the value of strategy.quorum. Pure."""
    return "quorum" if name == "synchronous" and quorum < 1 else name


def method_of(settings: Settings) -> str:
    """Return the method that `settings` ({section.key: value}) select. Pure."""
    return kind(settings["strategy.name"], settings["strategy.quorum"])


def sync_intervals(settings: Settings, steps: int) -> tuple[int, int]:
    """Return (sync_every, meet_every): the steps between two averages, and the steps between two synchronizations of all
    ranks. Automatic values are filled in. `steps`: the number of steps of the run. Raises ValueError if sync_every is more
    than `steps`. Independent."""
    name, every, meet = method_of(settings), settings["strategy.sync_every"], settings["strategy.meet_every"]
    if name == "synchronous":
        return 1, 1
    overlapping = settings["strategy.overlap"] or settings["strategy.fragments"] > 1  # ranks then differ after an average
    global_average = settings["strategy.group"] == "all" and not overlapping
    if name in ("delayed", "server", "quorum"):
        return 1, meet or 10
    if every > steps:
        raise ValueError(f"strategy.sync_every={every} is more than the {steps} steps of the run, so the ranks would never "
                         "average their parameters. Set a smaller value")
    every = every or min(50 if settings["strategy.group"] == "all" else 1, steps)
    return every, meet or (every if global_average else every * max(4 if overlapping else 1, -(-50 // every)))


def outer(settings: Settings) -> tuple[float, float]:
    """Return (outer_lr, outer_momentum), for the outer step of local SGD. With strategy.name=local and
    strategy.group=all, automatic values are filled in.

    The default momentum is smaller with strategy.overlap, and 0 with comm.compress=topk or randomk. With each of these
    settings, some updates arrive late, and momentum would repeat the late updates even later (SparseLoCo, Sarfi 2025, section
    3). Pure.
    """
    lr, momentum = settings["strategy.outer_lr"], settings["strategy.outer_momentum"]
    if settings["strategy.name"] != "local" or settings["strategy.group"] != "all":
        return lr, momentum
    sparse = settings["comm.compress"] in ("topk", "randomk")
    usual = (1.0, 0.0) if sparse else (0.7, 0.5 if settings["strategy.overlap"] else 0.7)
    return lr if lr >= 0 else usual[0], momentum if momentum >= 0 else usual[1]


def ratio(settings: Settings) -> float:
    """Return comm.ratio, the share of values that sparse compression sends. The automatic value is filled in. For topk, the
    automatic value is larger with strategy.name=local, because averages are rare. Pure."""
    topk = 0.03 if settings["strategy.name"] == "local" else 0.01
    usual = {"topk": topk, "randomk": 0.1}
    return float(settings["comm.ratio"] or usual.get(settings["comm.compress"], 0.0))


def known_settings(name: str, **settings: Any) -> dict[str, Any]:
    """Return those entries of `settings` that the method `name` uses. The keys of `settings` are names of the settings
    strategy.*, without the prefix "strategy.". Independent."""
    return {key: value for key, value in settings.items() if name in METHODS[key]}
