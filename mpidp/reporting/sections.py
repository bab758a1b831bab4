"""What the report says of one run. Pure."""

from __future__ import annotations

import statistics
from typing import Any

from mpidp.metrics.jsonl import number
from mpidp.reporting.about import dict_by_line, energy, events, settings, what_ran
from mpidp.reporting.charts import MOST_COLUMNS, Curve, cascade, curves, duration, field, figure, short, stacks
from mpidp.reporting.costs import Costs, joules_until
from mpidp.reporting.page import cards, charts, note, section, table, words
from mpidp.reporting.read import Run
from mpidp.reporting.waterfall import PARTS, Waterfall

MOST_ROWS = 32  # ranks by name: the slowest and the fastest of more


def of_run(run: Run, fall: Waterfall, spent: Costs) -> str:
    """All sections. Pure."""
    return "".join([state(run, fall), figures(run, fall, spent), what_ran(run), learning(run), speed(run), time_spent(run, fall),
                    ranks(run), energy(run, spent), events(run), settings(run)])


def state(run: Run, fall: Waterfall) -> str:
    """What to know first: not at its end, or records of an older kind. Pure."""
    last, of = run.steps[-1]["step"], run.config.get("train.steps")
    parts = []
    if run.going:
        parts.append(note(f"This run is still going: step {last} of {of}. The report tells of what was there when it was made."))
    elif run.end is None:
        parts.append(
            note(
                f"This run has not come to its end: its last step is {last} of {of}, and no job works on it now. The same "
                "command that started it goes on from its last checkpoint."
            )
        )
    if not fall.dated:
        parts.append(
            note(
                "Its lines have no times (an older version wrote them): what lay between steps is not known, and shares are "
                "of the time of steps alone."
            )
        )
    return "".join(parts)


def usual_speed(run: Run) -> float:
    """Median tokens a second of steps, after the first few. Pure."""
    steps = run.steps[3:] if len(run.steps) > 9 else run.steps
    speeds = [speed for line in steps if (speed := number(line, "tokens_per_second"))]
    return statistics.median(speeds) if speeds else 0.0


def figures(run: Run, fall: Waterfall, spent: Costs) -> str:
    """The few that are looked for. Pure."""
    losses = [number(line, "val_loss") for line in run.evaluations]
    mfu = [one for line in run.steps if (one := number(line, "mfu")) is not None]
    rows = [
        (f"{run.steps[-1]['step']:,}", "steps"), (short(run.tokens), "tokens learned from"),
        (f"{losses[-1]:.4f}" if losses else "-", "validation loss, nats a token"),
        (f"{usual_speed(run):,.0f}", "tokens a second, median of steps"),
        (f"{100 * statistics.median(mfu):.1f}%" if mfu else "not known", "MFU: of the devices' peak"),
        (f"{100 * fall.goodput:.1f}%", "goodput: time of steps that count, of all"),
        (duration(fall.whole), "of all jobs that worked on it"),
        (f"{spent.joules / run.tokens:.3g} J" if spent.joules is not None and run.tokens else "not available", "energy a token"),
    ]
    return cards(rows)


def learning(run: Run) -> str:
    """Loss against tokens, time and energy. Pure."""
    spent, joules = dict_by_line(run.worked()), dict_by_line(list(joules_until(run)))
    hours = max(spent.values(), default=0.0)
    unit, name = (3600.0, "hours") if hours > 7200 else (60.0, "minutes") if hours > 120 else (1.0, "seconds")
    tokens_at = {line["step"]: number(line, "tokens") or 0.0 for line in run.steps}

    def lines(place: Any) -> list[Curve]:
        return [
            Curve("training", [(place(line), number(line, "train_loss") or 0.0) for line in run.steps]),
            Curve("validation", [(place(line), number(line, "val_loss") or 0.0) for line in run.evaluations], dots=True),
        ]

    against = [curves("Loss against tokens", lines(lambda line: tokens_at.get(line["step"], 0.0)), "tokens", "nats a token")]
    if spent:
        against.append(
            curves("Loss against time", lines(lambda line: spent[id(line)] / unit), f"{name} of work on the run", "nats a token")
        )
    if max(joules.values(), default=0.0) > 0:
        against.append(curves("Loss against energy", lines(lambda line: joules[id(line)] / 1e3), "kJ", "nats a token"))
    return section("Learning", charts(*against))


def of_steps(run: Run, name: str) -> list[tuple[float, float]]:
    """(step, figure). Pure."""
    return [(line["step"], value) for line in run.steps if (value := number(line, name)) is not None]


def speed(run: Run) -> str:
    """Tokens a second, MFU, bytes of rank 0. Pure."""
    parts = [curves("Throughput", [Curve("tokens a second", of_steps(run, "tokens_per_second"))], "step", "tokens/s", zero=True)]
    mfu = [(step, 100 * value) for step, value in of_steps(run, "mfu")]
    parts.append(curves("Model FLOPs utilisation", [Curve("MFU", mfu)], "step", "% of peak", zero=True))
    told = "" if mfu else words("MFU is not claimed: the peak of this device is not known to mpidp.", "soft")
    each = of_steps(run, "comm_bytes")
    total = sum(value for _, value in each)
    if each and not total:
        told += words(
            "Rank 0 sent no message: gradients went through memory that the ranks of its node share, or there was one rank."
        )
    elif each:
        told += words(f"Rank 0 sent {short(total)}B in steps that count, {short(total / len(each))}B a step.")
        if len({value for _, value in each}) > 1:
            parts.append(curves("Bytes sent by rank 0", [Curve("bytes", each)], "step", "bytes a step", zero=True))
    return section("Throughput and bytes sent", charts(*parts), told)


def time_spent(run: Run, fall: Waterfall) -> str:
    """The waterfall, as picture and table. Pure."""
    speeds, shares, rows, so_far = fall.speeds(), fall.shares, [], 0.0
    kept = [part for part in PARTS if fall.seconds[part] > 0 or part == "ideal"]
    for part in kept:
        begin, so_far = so_far, so_far + shares[part]
        rows.append((part, begin, so_far, f"{100 * shares[part]:.1f}%, then {short(speeds[part])} tokens/s"))
    told = [
        (part, PARTS[part], duration(fall.seconds[part]), f"{100 * shares[part]:.2f}%", f"{speeds[part]:,.0f}") for part in kept
    ]
    told.append(("all", "", duration(fall.whole), "100.00%", f"{fall.tokens / fall.whole:,.0f}" if fall.whole else "-"))
    return section(
        "Where the time went",
        words(
            f"From ideal, {speeds['ideal']:,.0f} tokens a second, to measured, {speeds['other']:,.0f}, over the whole run. "
            "Each bar is a share of all time; the figure behind it is the speed if this and what stands above it "
            "were all that takes time."
        ),
        cascade(rows),
        table(("part", "what it is", "time", "share", "tokens/s so far"), told, numbers=(2, 3, 4)),
    )


def per_rank(run: Run) -> tuple[list[int], list[tuple[int, list[float], list[float]]]]:
    """(steps, rows of (rank, compute seconds, data seconds) at them), since the last change of ranks. Pure."""
    count = run.ranks
    lines = [line for line in run.steps if isinstance(line.get("rank_compute_seconds"), list)
             and len(line["rank_compute_seconds"]) == count == len(line.get("rank_data_seconds") or [])]
    first = run.starts[-1]["step"] if run.starts and len(run.starts) > 1 else 0
    lines = [line for line in lines if line["step"] > first] or lines
    rows = [(rank, [line["rank_compute_seconds"][rank] for line in lines], [line["rank_data_seconds"][rank] for line in lines])
            for rank in range(count)] if lines else []
    return [line["step"] for line in lines], rows


def ranks(run: Run) -> str:
    """Lanes of ranks: what each does in a step, and when it was slow. Pure."""
    steps, rows = per_rank(run)
    if not rows:
        return section("Ranks", words("What each rank computed was not recorded.", "soft"))
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
    told = (
        f"Rank {slowest} took longest in {times} of {len(steps)} steps; on average a rank waited {duration(lost)} a step for the "
        f"slowest."
        if len(rows) > 1
        else "One rank waits for nobody."
    )
    if len(rows) > MOST_ROWS:
        told += f" Of {len(rows)} ranks the {MOST_ROWS // 2} slowest and the {MOST_ROWS // 2} fastest are shown."
    bins = min(MOST_COLUMNS, len(steps))
    cuts = [(i * len(steps) // bins, (i + 1) * len(steps) // bins) for i in range(bins)]
    usual = statistics.median(value for _, compute, _ in rows for value in compute)
    cells = [(names[rank], [statistics.fmean(rows[rank][1][a:b]) for a, b in cuts]) for rank in shown]
    return section(
        "Ranks", words(told),
        figure("Mean step by rank", stacks([(names[rank], (*mean[rank], waits[rank])) for rank in shown],
                                           ("computing", "waiting for data", "waiting for the slowest rank"))),
        figure(f"Computing over time: a stronger colour, longer than usual ({duration(usual)})",
               field(cells, [steps[a] for a, _ in cuts], duration, usual)),
    )
