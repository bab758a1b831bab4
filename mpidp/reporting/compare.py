"""Several runs beside each other: figures, curves, and how well they scale, where that is a question. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpidp.metrics.jsonl import number
from mpidp.reporting.about import dict_by_line
from mpidp.reporting.charts import Curve, curves, duration, short
from mpidp.reporting.costs import Costs, machines
from mpidp.reporting.page import charts, note, section, table, words
from mpidp.reporting.read import Run
from mpidp.reporting.sections import usual_speed
from mpidp.reporting.waterfall import Waterfall

# of these runs must have the same, or no scaling is told of them; a batch of another size is told as what it is
SAME = (
    "model.",
    "mesh.",
    "strategy.",
    "comm.compress",
    "comm.reducer",
    "optim.name",
    "train.device",
    "train.dtype",
    "train.compile",
    "train.recompute",
    "data.path",
    "train.micro_batch",
)
FREE = ("strategy.servers",)
OWN = ("run.", "faults.", "metrics.", "energy.")  # settings of which a table of differences is silent


@dataclass(frozen=True)
class Row:
    """All runs of one number of ranks."""

    ranks: int
    speed: float  # tokens a second
    efficiency: float | None  # of the fewest ranks' speed a rank


@dataclass(frozen=True)
class Scaling:
    """kind: strong, weak, or nothing where no efficiency can be told; why."""

    kind: str
    why: str
    rows: list[Row]


def scaling_of(ranks_batches_speeds: Sequence[tuple[int, int, float]]) -> Scaling:
    """Strong: the same global batch; weak: it grows as the ranks do; else neither. Pure."""
    by_ranks: dict[int, list[float]] = {}
    batches: dict[int, set[int]] = {}
    for ranks, batch, speed in ranks_batches_speeds:
        by_ranks.setdefault(ranks, []).append(speed)
        batches.setdefault(ranks, set()).add(batch)
    speeds = {ranks: statistics.median(found) for ranks, found in sorted(by_ranks.items())}
    sizes = {batch for found in batches.values() for batch in found}
    each = {batch / ranks for ranks, found in batches.items() for batch in found}
    if len(speeds) < 2:
        return Scaling("", "all runs have the same number of ranks", [Row(n, speed, None) for n, speed in speeds.items()])
    kind = "strong" if len(sizes) == 1 else "weak" if len(each) == 1 else ""
    why = {
        "strong": f"strong scaling: the same global batch of {max(sizes)} sequences on all numbers of ranks",
        "weak": f"weak scaling: more ranks, more batch: {max(each):g} sequences a rank",
        "": f"neither strong nor weak scaling: global batches {sorted(sizes)} neither stay nor grow as the ranks do: no "
        "efficiency is told",
    }[kind]
    first = min(speeds)
    alone = speeds[first] / first
    return Scaling(kind, why, [Row(n, speed, speed / (n * alone) if kind and alone else None) for n, speed in speeds.items()])


def scaling(runs: Sequence[Run]) -> Scaling:
    """Of runs of one model and method; else none, and why. Pure."""
    different = [key for key in differences(runs) if key.startswith(SAME) and key not in FREE]
    if different:
        return Scaling("", f"no scaling is told: the runs differ in {', '.join(different)}", [])
    return scaling_of([(run.ranks, int(run.config.get("train.global_batch", 0)), usual_speed(run)) for run in runs])


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all. Pure."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    return [key for key in keys if not key.startswith(OWN) and len({str(run.config.get(key)) for run in runs}) > 1]


def scaling_chart(found: Scaling) -> str:
    """Speed against ranks, beside what it would be without any loss. Pure."""
    if len(found.rows) < 2:
        return ""
    first = found.rows[0]
    ideal = [(float(row.ranks), first.speed * row.ranks / first.ranks) for row in found.rows]
    lines = [
        Curve("measured", [(float(row.ranks), row.speed) for row in found.rows], dots=True),
        Curve("without loss", ideal, dots=True),
    ]
    return curves(f"{found.kind.capitalize() or 'No'} scaling", lines, "ranks", "tokens/s", zero=True,
                  x_ticks=[row.ranks for row in found.rows])


def scaling_section(found: Scaling) -> str:
    """Says which kind, always. Pure."""
    rows = [(str(row.ranks), f"{row.speed:,.0f}", f"{100 * row.efficiency:.1f}%" if row.efficiency is not None else "not told")
            for row in found.rows]
    said = note if not found.kind else words
    return section("Scaling", said(found.why[0].upper() + found.why[1:] + "."),
                   table(("ranks", "tokens/s", f"{found.kind} efficiency".strip()), rows, numbers=(0, 1, 2)) if rows else "",
                   charts(scaling_chart(found)))


def compare(runs: Sequence[Run], falls: Mapping[str, Waterfall], spent: Mapping[str, Costs]) -> str:
    """Table, curves, scaling of several runs. Pure."""
    rows = []
    for run in runs:
        fall, cost = falls[run.name], spent[run.name]
        losses = [number(line, "val_loss") for line in run.evaluations]
        rows.append(
            (
                run.name,
                str(run.ranks),
                str(machines(run.facts) or "?"),
                str(run.config.get("train.global_batch", "?")),
                str(run.steps[-1]["step"]),
                short(run.tokens),
                f"{losses[-1]:.4f}" if losses else "-",
                duration(fall.whole),
                f"{usual_speed(run):,.0f}",
                f"{100 * fall.goodput:.1f}%",
                f"{cost.joules / run.tokens:.3g}" if cost.joules is not None and run.tokens else "n/a",
                "ended" if run.end else "going" if run.going else "not ended",
            )
        )
    head = ("run", "ranks", "machines", "batch", "steps", "tokens", "val loss", "time", "tokens/s", "goodput", "J/token", "state")
    changed = [(key, *(str(run.config.get(key, "-")) for run in runs)) for key in differences(runs)]
    by_tokens, by_time, speeds = [], [], []
    for run in runs:
        told = run.evaluations if len(run.evaluations) > 1 else run.steps
        name = "val_loss" if len(run.evaluations) > 1 else "train_loss"
        at, spent_at = {line["step"]: number(line, "tokens") or 0.0 for line in run.steps}, dict_by_line(run.worked())
        values = [(line, number(line, name) or 0.0) for line in told]
        by_tokens.append(Curve(run.name, [(at.get(line["step"], 0.0), value) for line, value in values]))
        if spent_at:
            by_time.append(Curve(run.name, [(spent_at[id(line)], value) for line, value in values]))
        speeds.append(Curve(run.name, [(line["step"], number(line, "tokens_per_second") or 0.0) for line in run.steps]))
    return section(
        "Comparison", table(head, rows, numbers=range(1, 11)),
        words("Settings that differ:") + table(("setting", *(run.name for run in runs)), changed) if changed else
        words("No setting that matters differs.", "soft"),
        charts(curves("Validation loss against tokens", by_tokens, "tokens", "nats a token"),
               curves("Validation loss against time", by_time, "seconds of work on the run", "nats a token"),
               curves("Throughput", speeds, "step", "tokens/s", zero=True)),
    ) + scaling_section(scaling(runs))
