"""Computes energy, node-hours, CO2e and price from measured values and given factors. No value is estimated. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpidp.metrics.jsonl import number
from mpidp.report.read import RecordedRun

J_PER_KWH = 3.6e6
PARTS_MEASURED = {"cpu": "CPU packages and their memory", "gpu": "GPUs"}


@dataclass(frozen=True)
class Costs:
    """The costs of a run. A cost that is not known is None."""

    joules: float | None
    of: str  # which devices were measured
    why: str  # the reason why energy is missing or incomplete
    node_hours: float | None
    grams: float | None  # emissions, CO2e
    price: float | None  # in the currency of the given rate


def machines(start: dict) -> int:
    """Return the number of machines in a `start` line, or 0 if the line does not list them. Virtual nodes on one machine
    (MPIDP_PRETEND_NODES) count as one. Pure."""
    nodes = start.get("nodes")
    return len({str(host).partition("#")[0] for host in nodes}) if isinstance(nodes, dict) and nodes else 0


def costs(run: RecordedRun, grams_per_kwh: float, price_per_node_hour: float) -> Costs:
    """Return the costs of a run. If grams_per_kwh is 0, the emissions are not known. If price_per_node_hour is 0, the price is
    not known. Pure."""
    starts = run.starts
    of = [tuple(start.get("energy_of") or ()) for start in starts]
    why = "; ".join(dict.fromkeys(str(start["energy_not"]) for start in starts if start.get("energy_not")))
    joules = None
    if of and of[0] and len(set(of)) == 1:
        joules = run.total("energy_joules") + run.total("lost_joules")
    elif any(of):
        why = "the jobs of the run measured different devices"
    elif not why:
        why = "the version of mpidp that recorded the run did not measure energy"
    hours = _node_hours(run)
    return Costs(
        joules, " and ".join(PARTS_MEASURED.get(part, part) for part in of[0]) if joules is not None else "", why, hours,
        joules / J_PER_KWH * grams_per_kwh if joules is not None and grams_per_kwh else None,
        hours * price_per_node_hour if hours is not None and price_per_node_hour else None,
    )


def _node_hours(run: RecordedRun) -> float | None:
    """Return the node-hours of all jobs, or None if hosts or times were not recorded. Steps that a start removed are counted with
    the machines of the job before this start, which computed them."""
    worked, count, before, total = run.worked(), 0, 0.0, 0.0
    if not worked or not run.starts or not all(machines(start) for start in run.starts):
        return None
    for line, now in worked:
        lost = number(line, "lost_seconds") or 0.0
        total += count * lost
        count = machines(line) if line.get("event") == "start" else count
        total, before = total + count * (now - before - lost), now
    return total / 3600


def joules_until(run: RecordedRun) -> Iterator[tuple[dict, float]]:
    """For each line of metrics.jsonl, yield (line, joules that the run has used up to this line). Pure."""
    so_far = 0.0
    for line in run.lines:
        so_far += (number(line, "energy_joules") or 0.0) + (number(line, "lost_joules") or 0.0)
        yield line, so_far
