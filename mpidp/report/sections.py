"""Makes the sections of the report about one run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mpidp.metrics.jsonl import number
from mpidp.report.about import dict_by_line, energy, events, settings, what_ran
from mpidp.report.charts import MOST_COLUMNS, Curve, cascade, curves, duration, figure, heat_map, short, stacks
from mpidp.report.costs import Costs, joules_until
from mpidp.report.page import cards, charts, note, paragraph, section, table
from mpidp.report.read import RecordedRun
from mpidp.report.waterfall import PARTS, Waterfall

MOST_FIGURES = 400  # maximum number of figures of tasks that are shown
MOST_ROWS = 32  # maximum number of ranks shown; if there are more, only the slowest and the fastest are shown


def of_run(run: RecordedRun, fall: Waterfall, spent: Costs) -> str:
    """Return all sections about a run. fall: its waterfall (its time, divided into parts). spent: its costs. Pure."""
    return "".join([state(run, fall), figures(run, fall, spent), what_ran(run), learning(run), tasks(run), speed(run),
                    time_spent(run, fall), ranks(run), energy(run, spent), events(run), settings(run)])


def state(run: RecordedRun, fall: Waterfall) -> str:
    """Return notes if the run has not finished, or if an older version of mpidp recorded it. Otherwise return "". Pure."""
    last, of = run.steps[-1]["step"], run.config.get("train.steps")
    parts = []
    if run.going:
        parts.append(note(f"This run is in progress: step {last} of {of}. The report shows the run at the time "
                          "when the report was made."))
    elif run.end is None:
        parts.append(
            note(
                f"This run is not finished: its last step is {last} of {of}, and no job is working on it. Start it again with "
                "the same command to resume from its last checkpoint."
            )
        )
    if not fall.dated:
        parts.append(
            note(
                "The lines of metrics.jsonl have no times, because an older version wrote them. The time between steps is "
                "therefore unknown, and shares are relative to the time of the steps only."
            )
        )
    return "".join(parts)


def usual_speed(run: RecordedRun) -> float:
    """Return the median of the tokens per second at meetings (steps at which all ranks synchronize), without the first three
    meetings if there are more than nine. If the jobs of the run had different numbers of ranks, only jobs with the number of
    ranks of the last job count. Pure."""
    meetings, ranks, found = {id(line) for line in run.meetings}, run.ranks, []
    for line in run.lines:
        if line.get("event") == "start":
            ranks = int(number(line, "ranks") or 1)
        elif id(line) in meetings and ranks == run.ranks and (speed := number(line, "tokens_per_second")):
            found.append(speed)
    return statistics.median(found[3:] if len(found) > 9 else found) if found else 0.0


def figures(run: RecordedRun, fall: Waterfall, spent: Costs) -> str:
    """Return HTML cards with the most important figures of a run. Pure."""
    losses = [number(line, "val_loss") for line in run.evaluations]
    mfu = [one for line in run.meetings if (one := number(line, "mfu")) is not None]
    rows = [
        (f"{run.steps[-1]['step']:,}", "steps"), (short(run.tokens), "training tokens"),
        ("-" if not losses or losses[-1] is None else f"{losses[-1]:.4f}", "validation loss (nats per token)"),
        (f"{usual_speed(run):,.0f}", "tokens per second (median step)"),
        (f"{100 * statistics.median(mfu):.1f}%" if mfu else "not known", "MFU (share of the device's peak)"),
        (f"{100 * fall.goodput:.1f}%", "goodput (share of time in steps that were not lost)"),
        (duration(fall.whole), "total time, all jobs"),
        (f"{spent.joules / run.tokens:.3g} J" if spent.joules is not None and run.tokens else "not available",
         "energy per token"),
    ]
    return cards(rows)


def learning(run: RecordedRun) -> str:
    """Return the section with curves of the loss against tokens, time and energy. Pure."""
    spent, joules = dict_by_line(run.worked()), dict_by_line(list(joules_until(run)))
    hours = max(spent.values(), default=0.0)
    unit, name = (3600.0, "hours") if hours > 7200 else (60.0, "minutes") if hours > 120 else (1.0, "seconds")
    tokens_at = {line["step"]: number(line, "tokens") or 0.0 for line in run.steps}

    def points(place: Any, found: Sequence[Any], key: str) -> list[tuple[float, float]]:
        return [(place(line), loss) for line in found if (loss := number(line, key)) is not None]  # null: the loss was nan

    def lines(place: Any) -> list[Curve]:
        return [Curve("training", points(place, run.steps, "train_loss")),
                Curve("validation", points(place, run.evaluations, "val_loss"), dots=True)]

    against = [curves("Loss against tokens", lines(lambda line: tokens_at.get(line["step"], 0.0)), "tokens", "nats per token")]
    if spent:
        against.append(
            curves("Loss against time", lines(lambda line: spent[id(line)] / unit), f"{name}, all jobs", "nats per token")
        )
    if max(joules.values(), default=0.0) > 0:
        against.append(curves("Loss against energy", lines(lambda line: joules[id(line)] / 1e3), "kJ", "nats per token"))
    return section("Learning", charts(*against))


def tasks(run: RecordedRun) -> str:
    """Return the section about train.eval_tasks. For each task and metric, it shows the values of the first and the last
    evaluation, and the range of all values. Pure."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.lines:
        if "event" not in line and "val_tokens" in line:
            for name in line:
                if "/" in name and (value := number(line, name)) is not None:
                    found.setdefault(name, []).append((line["step"], value))
    rows = [
        (name, f"{values[0][1]:.4g} (step {values[0][0]:,})", f"{values[-1][1]:.4g} (step {values[-1][0]:,})",
         f"{min(value for _, value in values):.4g} to {max(value for _, value in values):.4g}")
        for name, values in sorted(found.items())[:MOST_FIGURES] if "_stderr" not in name
    ]
    head = ("task/metric", "first evaluation", "last evaluation", "range")
    return section("Tasks", table(head, rows, (1, 2, 3))) if rows else ""


def of_steps(run: RecordedRun, name: str) -> list[tuple[float, float]]:
    """Return a list of (step, value of the field `name`). Steps without this field are left out. Lines between two meetings
    (steps at which all ranks synchronize) describe only rank 0. Of these lines, only the field comm_bytes is used. Pure."""
    lines = run.steps if name == "comm_bytes" else run.meetings
    return [(line["step"], value) for line in lines if (value := number(line, name)) is not None]


def speed(run: RecordedRun) -> str:
    """Return the section about tokens per second, MFU, and the bytes that rank 0 sent. Pure."""
    speeds = Curve("tokens per second", of_steps(run, "tokens_per_second"))
    parts = [curves("Throughput", [speeds], "step", "tokens/s", zero=True)]
    mfu = [(step, 100 * value) for step, value in of_steps(run, "mfu")]
    parts.append(curves("Model FLOPs utilization", [Curve("MFU", mfu)], "step", "% of peak", zero=True))
    remarks = "" if mfu else paragraph("MFU is not computed, because the peak FLOP/s of this device is not known.", "soft")
    each = of_steps(run, "comm_bytes")
    total = sum(value for _, value in each)
    if each and not total:
        remarks += paragraph(
            "Rank 0 sent no messages: gradients went through the shared memory of its node, or there was only one rank."
        )
    elif each:
        remarks += paragraph(
            f"Rank 0 sent {short(total)}B, {short(total / len(each))}B per step. "
            "Steps that were lost in a restart are not counted."
        )
        if len({value for _, value in each}) > 1:
            parts.append(curves("Bytes sent by rank 0", [Curve("bytes", each)], "step", "bytes per step", zero=True))
    return section("Throughput and bytes sent", charts(*parts), remarks)


def time_spent(run: RecordedRun, fall: Waterfall) -> str:
    """Return the section that shows the waterfall as a chart and a table. Pure."""
    speeds, shares, rows, so_far = fall.speeds(), fall.shares, [], 0.0
    kept = [part for part in PARTS if fall.seconds[part] > 0 or part == "ideal"]
    for part in kept:
        begin, so_far = so_far, so_far + shares[part]
        rows.append((part, begin, so_far, f"{100 * shares[part]:.1f}%, {short(speeds[part])} tokens/s"))
    lines = [
        (part, PARTS[part], duration(fall.seconds[part]), f"{100 * shares[part]:.2f}%", f"{speeds[part]:,.0f}") for part in kept
    ]
    lines.append(("all", "", duration(fall.whole), "100.00%", f"{fall.tokens / fall.whole:,.0f}" if fall.whole else "-"))
    return section(
        "Where the time went",
        paragraph(
            f"From the ideal of {speeds['ideal']:,.0f} tokens/s to the measured {speeds['other']:,.0f} tokens/s over the whole "
            "run. Each bar is a share of the total time. The figure next to a bar is the speed that the run would have if only "
            "this part and the parts above it took time."
        ),
        cascade(rows),
        table(("part", "what it is", "time", "share", "tokens/s so far"), lines, numbers=(2, 3, 4)),
    )


def per_rank(run: RecordedRun) -> tuple[list[int], list[tuple[int, list[float], list[float]]]]:
    """Return (steps, rows). The steps are those since the last start of a job. There is one row per rank: (rank, compute
    seconds of each step, data seconds of each step). If the last job has not recorded these times, return the steps of all
    jobs with the same number of ranks. Pure."""
    count = run.ranks
    lines = [line for line in run.steps if isinstance(line.get("rank_compute_seconds"), list)
             and len(line["rank_compute_seconds"]) == count == len(line.get("rank_data_seconds") or [])]
    first = run.starts[-1]["step"] if run.starts and len(run.starts) > 1 else 0
    lines = [line for line in lines if line["step"] > first] or lines
    rows = [(rank, [line["rank_compute_seconds"][rank] for line in lines], [line["rank_data_seconds"][rank] for line in lines])
            for rank in range(count)] if lines else []
    return [line["step"] for line in lines], rows


def ranks(run: RecordedRun) -> str:
    """Return the section about ranks. It shows each rank's mean time per step, and a heat map of the compute time by rank and
    step. Pure."""
    steps, rows = per_rank(run)
    if not rows:
        return section("Ranks", paragraph("The compute time of each rank was not recorded.", "soft"))
    mean = {rank: (statistics.fmean(compute), statistics.fmean(data)) for rank, compute, data in rows}
    longest = [max(a[i] + b[i] for _, a, b in rows) for i in range(len(steps))]
    waits = {rank: statistics.fmean(longest[i] - compute[i] - data[i] for i in range(len(steps))) for rank, compute, data in rows}
    slowest = max(mean, key=lambda rank: sum(mean[rank]))
    shown = [row[0] for row in rows]
    if len(rows) > MOST_ROWS:
        order = sorted(mean, key=lambda rank: -sum(mean[rank]))
        shown = sorted([*order[: MOST_ROWS // 2], *order[-MOST_ROWS // 2 :]])
    names = {rank: f"rank {rank}" + (" (slowest)" if rank == slowest and len(rows) > 1 else "") for rank in mean}
    times = sum(max(rows, key=lambda row: row[1][i] + row[2][i])[0] == slowest for i in range(len(steps)))
    lost = statistics.fmean(waits.values())
    remark = (
        f"Rank {slowest} was the slowest in {times} of {len(steps)} steps. On average a rank waited {duration(lost)} per step "
        f"for the slowest rank."
        if len(rows) > 1
        else "With one rank, there is no wait for other ranks."
    )
    if len(rows) > MOST_ROWS:
        remark += f" The charts show the {MOST_ROWS // 2} slowest and the {MOST_ROWS // 2} fastest of {len(rows)} ranks."
    bins = min(MOST_COLUMNS, len(steps))
    cuts = [(i * len(steps) // bins, (i + 1) * len(steps) // bins) for i in range(bins)]
    usual = statistics.median(value for _, compute, _ in rows for value in compute)
    cells = [(names[rank], [statistics.fmean(rows[rank][1][a:b]) for a, b in cuts]) for rank in shown]
    return section(
        "Ranks", paragraph(remark),
        figure("Mean step time by rank", stacks([(names[rank], (*mean[rank], waits[rank])) for rank in shown],
                                                ("compute", "waiting for data", "waiting for the slowest rank"))),
        figure(f"Compute time over the run (a stronger colour means longer than the usual {duration(usual)})",
               heat_map(cells, [steps[a] for a, _ in cuts], duration, usual)),
    )
