"""Energy, node-hours and what they stand for: sums of what was measured, factors that were stated. Nothing is guessed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpidp.metrics.jsonl import number
from mpidp.reporting.read import Run

J_PER_KWH = 3.6e6
SAID = {"cpu": "CPU packages and their memory", "gpu": "GPUs"}


@dataclass(frozen=True)
class Costs:
    """Of a run; None where it is not known, `why` says why there is no energy or not all of it."""

    joules: float | None
    of: str  # what was measured
    why: str
    node_hours: float | None
    grams: float | None  # CO2e
    price: float | None


def machines(start: dict) -> int:
    """On which a start's ranks run; nodes that are pretended are one. Pure."""
    nodes = start.get("nodes")
    return len({str(host).partition("#")[0] for host in nodes}) if isinstance(nodes, dict) and nodes else 0


def costs(run: Run, grams_per_kwh: float, price_per_node_hour: float) -> Costs:
    """Factors of 0 are not stated. Pure."""
    starts = run.starts
    of = [tuple(start.get("energy_of") or ()) for start in starts]
    why = "; ".join(dict.fromkeys(str(start["energy_not"]) for start in starts if start.get("energy_not")))
    joules = None
    if of and of[0] and len(set(of)) == 1:
        joules = run.total("energy_joules") + run.total("lost_joules")
    elif any(of):
        why = "not all jobs of the run could measure the same"
    elif not why:
        why = "the run was recorded by a version that did not measure it"
    hours = _node_hours(run)
    return Costs(
        joules, " and ".join(SAID[part] for part in of[0]) if joules is not None else "", why, hours,
        joules / J_PER_KWH * grams_per_kwh if joules is not None and grams_per_kwh else None,
        hours * price_per_node_hour if hours is not None and price_per_node_hour else None,
    )


def _node_hours(run: Run) -> float | None:
    """None where hosts or times were not recorded."""
    worked, count, before, total = run.worked(), 0, 0.0, 0.0
    if not worked or not all(machines(start) for start in run.starts):
        return None
    for line, now in worked:
        count = machines(line) if line.get("event") == "start" else count
        total, before = total + count * (now - before), now
    return total / 3600


def joules_until(run: Run) -> Iterator[tuple[dict, float]]:
    """(line, J until then) of lines that tell. Pure."""
    so_far = 0.0
    for line in run.lines:
        so_far += (number(line, "energy_joules") or 0.0) + (number(line, "lost_joules") or 0.0)
        yield line, so_far
