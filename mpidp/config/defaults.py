"""Defaults of the strategy settings that depend on other settings. Pure: no torch, no MPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpidp.config.settings import StrategySettings

Settings = Mapping[str, Any]  # by section.key

OF = {  # settings of section strategy that only these know; quorum: synchronous with strategy.quorum below 1
    "quorum": ("synchronous",), "sync_every": ("local",), "staleness": ("delayed", "server", "quorum"),
    "compensation": ("delayed",), "group": ("local",), "group_size": ("local",), "outer_lr": ("local",),
    "outer_momentum": ("local",), "overlap": ("local",), "fragments": ("local",), "servers": ("server",), "mode": ("server",),
    "replay": ("server", "quorum"), "meet_every": ("delayed", "local", "server", "quorum"),
}

DEFAULTS = {key: getattr(StrategySettings(), key) for key in OF}


def kind(name: str, quorum: float) -> str:
    """The method that strategy.name and strategy.quorum ask for. Pure."""
    return "quorum" if name == "synchronous" and quorum < 1 else name


def _kind(settings: Settings) -> str:
    return kind(settings["strategy.name"], settings["strategy.quorum"])


def rhythm(settings: Settings, steps: int) -> tuple[int, int]:
    """(sync_every, meet_every) with nothing left open, for a run of so many steps. ValueError when ranks would never average.
    Independent."""
    name, every, meet = _kind(settings), settings["strategy.sync_every"], settings["strategy.meet_every"]
    if name == "synchronous":
        return 1, 1
    in_turn = settings["strategy.overlap"] or settings["strategy.fragments"] > 1  # rounds reach over each other, but at meetings
    alone = settings["strategy.group"] == "all" and not in_turn
    if name in ("delayed", "server", "quorum"):
        return 1, meet or 10
    if every > steps:
        raise ValueError(f"strategy.sync_every={every} is more than the {steps} steps of the run: the ranks would never average")
    every = every or min(50 if settings["strategy.group"] == "all" else 1, steps)
    return every, meet or (every if alone else every * max(4 if in_turn else 1, -(-50 // every)))


def outer(settings: Settings) -> tuple[float, float]:
    """(outer_lr, outer_momentum) with nothing left open where there is an outer step. Momentum repeats a step that is late
    (overlap), and what was held back of one is late: then less of it, or none (SparseLoCo, Sarfi 2025, section 3). Pure."""
    lr, momentum = settings["strategy.outer_lr"], settings["strategy.outer_momentum"]
    if settings["strategy.name"] != "local" or settings["strategy.group"] != "all":
        return lr, momentum
    sparse = settings["comm.compress"] in ("topk", "randomk")
    usual = (1.0, 0.0) if sparse else (0.7, 0.5 if settings["strategy.overlap"] else 0.7)
    return lr if lr >= 0 else usual[0], momentum if momentum >= 0 else usual[1]


def ratio(settings: Settings) -> float:
    """comm.ratio with nothing left open. Of an average that is seldom, topk sends more. Pure."""
    often = settings["strategy.name"] != "local"
    usual = {"topk": 0.01 if often else 0.03, "randomk": 0.1}
    return float(settings["comm.ratio"] or usual.get(settings["comm.compress"], 0.0))


def known_settings(name: str, **settings: Any) -> dict[str, Any]:
    """Those of these settings that this strategy knows. Independent."""
    return {key: value for key, value in settings.items() if name in OF[key]}
