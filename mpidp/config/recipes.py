"""Presets of several settings (model.recipe). Pure: no torch, no MPI."""

from __future__ import annotations

from typing import Any

# The settings that lowered the loss in docs/results/2026-11-30-ablation.md. A setting that the user gives has priority.
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "modern": {"model.qk_norm": "head", "model.zero_init": True, "model.input_mix": True, "optim.name": "normuon"},
}
