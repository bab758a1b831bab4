"""Makes the sections of the report that compare several runs: their figures, their curves, and how they scale with the number of
ranks. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpidp.metrics.jsonl import number
from mpidp.report.about import dict_by_line
from mpidp.report.charts import Curve, curves, duration, short
from mpidp.report.costs import Costs, machines
from mpidp.report.page import charts, note, paragraph, section, table
from mpidp.report.read import RecordedRun
from mpidp.report.sections import of_steps, usual_speed
from mpidp.report.waterfall import Waterfall

# Scaling is computed only for runs that agree in these settings.
SAME = (
    "model.", "mesh.", "strategy.", "comm.compress", "comm.reducer", "optim.name", "train.device", "train.dtype",
    "train.compile", "train.recompute", "data.path", "train.micro_batch",
)
FREE = ("strategy.servers",)  # settings in the sections of SAME that may differ
HASH_DIGITS = 12  # digits of weights_sha256 in the table
OWN = ("run.", "faults.", "metrics.", "energy.")  # sections that are left out of the table of differences


@dataclass(frozen=True)
class ScalingPoint:
    """The speed and the efficiency of all runs with the same number of ranks."""

    ranks: int
    speed: float  # tokens per second, median of the runs
    efficiency: float | None  # speed per rank, relative to the speed per rank with the fewest ranks


@dataclass(frozen=True)
class Scaling:
    """How the speed of several runs depends on the number of ranks."""

    kind: str  # "strong", "weak", or "" if no efficiency can be computed
    why: str  # the reason for `kind`
    rows: list[ScalingPoint]


def scaling_of(ranks_batches_speeds: Sequence[tuple[int, int, float]]) -> Scaling:
    """Return the scaling of several runs. ranks_batches_speeds: (number of ranks, global batch, tokens per second) of each run.

    The scaling is strong if all runs have the same global batch. It is weak if the batch is proportional to the number of ranks.
    Otherwise no efficiency is computed. Pure."""
    by_ranks: dict[int, list[float]] = {}
    batches: dict[int, set[int]] = {}
    for ranks, batch, speed in ranks_batches_speeds:
        by_ranks.setdefault(ranks, []).append(speed)
        batches.setdefault(ranks, set()).add(batch)
    speeds = {ranks: statistics.median(found) for ranks, found in sorted(by_ranks.items())}
    sizes = {batch for found in batches.values() for batch in found}
    each = {batch / ranks for ranks, found in batches.items() for batch in found}
    if len(speeds) < 2:
        points = [ScalingPoint(n, speed, None) for n, speed in speeds.items()]
        return Scaling("", "all runs have the same number of ranks", points)
    kind = "strong" if len(sizes) == 1 else "weak" if len(each) == 1 else ""
    why = {
        "strong": f"strong scaling: the same global batch of {max(sizes)} sequences at every number of ranks",
        "weak": f"weak scaling: the global batch grows with the ranks, {max(each):g} sequences per rank",
        "": f"neither strong nor weak scaling: global batches {sorted(sizes)} are neither equal nor proportional to the ranks, "
        "so efficiency is not computed",
    }[kind]
    first = min(speeds)
    alone = speeds[first] / first
    points = [ScalingPoint(n, speed, speed / (n * alone) if kind and alone else None) for n, speed in speeds.items()]
    return Scaling(kind, why, points)


def scaling(runs: Sequence[RecordedRun]) -> Scaling:
    """Return the scaling of the runs. If their models, data, devices or methods differ, the result has no rows, and its `why`
    states the reason. Pure."""
    different = [key for key in differences(runs) if key.startswith(SAME) and key not in FREE]
    if different:
        return Scaling("", f"scaling not computed: the runs differ in {', '.join(different)}", [])
    return scaling_of([(run.ranks, int(run.config.get("train.global_batch", 0)), usual_speed(run)) for run in runs])


def differences(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the names of the settings that differ between the runs. Settings of run.*, faults.*, metrics.* and energy.* are left
    out. Pure."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    return [key for key in keys if not key.startswith(OWN) and len({str(run.config.get(key)) for run in runs}) > 1]


def scaling_chart(found: Scaling) -> str:
    """Return a chart of measured and ideal speed against the number of ranks, or "" if all runs have the same number of ranks.
    Pure."""
    if len(found.rows) < 2:
        return ""
    first = found.rows[0]
    ideal = [(float(row.ranks), first.speed * row.ranks / first.ranks) for row in found.rows]
    lines = [
        Curve("measured", [(float(row.ranks), row.speed) for row in found.rows], dots=True),
        Curve("ideal", ideal, dots=True),
    ]
    return curves(f"{found.kind.capitalize() or 'Neither strong nor weak'} scaling", lines, "ranks", "tokens/s", zero=True,
                  x_ticks=[row.ranks for row in found.rows])


def scaling_section(found: Scaling) -> str:
    """Return the section about scaling, with a table and a chart. It states whether the scaling is strong or weak. If no
    efficiency can be computed, it states the reason. Pure."""
    rows = [(str(row.ranks), f"{row.speed:,.0f}", f"{100 * row.efficiency:.1f}%" if row.efficiency is not None else "-")
            for row in found.rows]
    shown = note if not found.kind else paragraph
    return section("Scaling", shown(found.why[0].upper() + found.why[1:] + "."),
                   table(("ranks", "tokens/s", f"{found.kind} efficiency".strip()), rows, numbers=(0, 1, 2)) if rows else "",
                   charts(scaling_chart(found)))


def loss_charts(runs: Sequence[RecordedRun], key: str) -> list[str]:
    """Return two charts of a loss of all runs, one against tokens and one against time. key: "val_loss" or "train_loss". Runs
    without this loss are left out. Pure."""
    title = {"val_loss": "Validation loss", "train_loss": "Training loss"}[key]
    by_tokens, by_time = [], []
    for run in runs:
        at, spent_at = {line["step"]: number(line, "tokens") or 0.0 for line in run.steps}, dict_by_line(run.worked())
        lines = run.evaluations if key == "val_loss" else run.steps
        losses = [(line, loss) for line in lines if (loss := number(line, key)) is not None]
        by_tokens.append(Curve(run.name, [(at.get(line["step"], 0.0), loss) for line, loss in losses]))
        if spent_at:
            by_time.append(Curve(run.name, [(spent_at[id(line)], loss) for line, loss in losses]))
    return [curves(f"{title} against tokens", by_tokens, "tokens", "nats per token"),
            curves(f"{title} against time", by_time, "seconds, all jobs", "nats per token")]


def compare(runs: Sequence[RecordedRun], falls: Mapping[str, Waterfall], spent: Mapping[str, Costs]) -> str:
    """Return the sections that compare several runs with a table, curves, and scaling. falls: the waterfall (time of the run,
    divided into parts) of each run, by name. spent: the costs of each run, by name. Pure."""
    rows = []
    for run in runs:
        fall, cost = falls[run.name], spent[run.name]
        losses = [number(line, "val_loss") for line in run.evaluations]
        rows.append(
            (
                run.name, str(run.ranks), str(machines(run.facts) or "?"), str(run.config.get("train.global_batch", "?")),
                str(run.steps[-1]["step"]), short(run.tokens),
                "-" if not losses or losses[-1] is None else f"{losses[-1]:.4f}",
                duration(fall.whole),
                f"{usual_speed(run):,.0f}",
                f"{100 * fall.goodput:.1f}%",
                f"{cost.joules / run.tokens:.3g}" if cost.joules is not None and run.tokens else "n/a",
                "finished" if run.end else "running" if run.going else "unfinished",
                str((run.end or {}).get("weights_sha256", "-"))[:HASH_DIGITS],
            )
        )
    head = ("run", "ranks", "machines", "batch", "steps", "tokens", "val loss", "time", "tokens/s", "goodput", "J/token", "state",
            "weights_sha256")
    changed = [(key, *(str(run.config.get(key, "-")) for run in runs)) for key in differences(runs)]
    losses_of = ["val_loss"] + ["train_loss"] * any(len(run.evaluations) < 2 for run in runs)
    speeds = [Curve(run.name, of_steps(run, "tokens_per_second")) for run in runs]
    return section(
        "Comparison", table(head, rows, numbers=range(1, 11)),
        paragraph("Settings that differ:") + table(("setting", *(run.name for run in runs)), changed) if changed else
        paragraph("The runs have the same settings.", "soft"),
        charts(*(chart for key in losses_of for chart in loss_charts(runs, key)),
               curves("Throughput", speeds, "step", "tokens/s", zero=True)),
    ) + scaling_section(scaling(runs))
