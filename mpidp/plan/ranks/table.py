"""Formats the tables that `python -m mpidp.plan` and `plan methods` print. Pure, except for plot()."""

from __future__ import annotations

from typing import Any


def duration(seconds: float) -> str:
    """Format a time, for example as 43 s, 12.3 min, 4.1 h or 3.2 d. Pure."""
    for unit, size, until in (("s", 1, 100), ("min", 60, 90), ("h", 3600, 72)):
        if seconds < until * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} d"


def table(found: dict[str, Any]) -> str:
    """Format the result of plan() as text. Pure."""
    noise, ranks, scale = found["noise"], found["columns"], found["noise"]["noise_scale_tokens"]
    bounds = noise["bounds_tokens"]
    spread = f"about {bounds[0]:,.0f} to {bounds[1]:,.0f}" if bounds else "no bounds: too few or too scattered measurements"
    quarters = ", ".join("?" if one is None else f"{one:,.0f}" for one in noise["quarters_tokens"])
    loss = "its final loss" if found["loss"] is None else f"{found['loss_name']} {found['loss']:.4f}"
    steps, tokens = f"{found['steps']:,.0f} steps", f"{found['tokens_a_step']:,.0f} tokens"
    marks = {(1.0, found["ranks"]): "*"}
    for mark, cell in (("!", found["fastest"]), ("$", found["cheapest"])):
        place = (cell["multiple"], cell["ranks"])
        marks[place] = marks.get(place, "") + mark
    lines = [
        f"{found['run']}: {loss} after {steps} of {tokens}, on {_ranks(found['ranks'])}",
        f"gradient noise scale: {scale:,.0f} tokens ({spread}), from {noise['measurements']} measurements in the second half of "
        "these steps",
        f"  by quarters of the run: {quarters}",
        "  Batches well below the noise scale use tokens efficiently; batches well above it waste most of their tokens.",
        f"  Any batch size needs at least about {found['fewest_steps']:,.0f} steps and {found['fewest_tokens']:,.0f} tokens;"
        " a batch as large as the noise scale needs twice as many of each.",
        "",
        f"Predicted time to {loss} (not measured)",
        f"{'batch':>7} {'tokens':>12} {'lanes':>6} {'steps':>10}   " + "".join(f"{_ranks(p):>13}" for p in ranks),
    ]
    for row in found["rows"]:
        cells = ""
        for p in ranks:
            seconds = row["seconds"].get(str(p))
            cells += f"{'-' if seconds is None else duration(seconds):>11}{marks.get((row['multiple'], p), ''):<2}"
        size = f"{row['global_batch']:>7,} {row['tokens']:>12,.0f} {row['lanes']:>6,} {row['steps']:>10,.0f}"
        lines.append(f"{size}   {cells}".rstrip())
    took = found["measured_step_seconds"]
    own = f", measured: {duration(took * found['steps'])}" if took else ""
    lines += [f"  * this run{own}   ! fastest   $ fewest rank-hours   - more ranks than lanes (sequences of micro-batches)", ""]
    lines += [f"{'ranks':>7} {'best batch':>12} {'time':>12} {'x fewest rank-hours':>22}"]
    for cell in found["best"]:
        batch = next(row["global_batch"] for row in found["rows"] if row["multiple"] == cell["multiple"])
        dearer = cell["rank_seconds"] / found["cheapest"]["rank_seconds"]
        lines.append(f"{cell['ranks']:>7} {batch:>12,} {duration(cell['seconds']):>12} {dearer:>22.2f}")
    if found["worth_ranks"]:
        lines.append(f"The largest number of ranks that needs at most twice the fewest rank-hours is {found['worth_ranks']}.")
    if found["fastest_bounds_seconds"]:
        low, high = (duration(one) for one in found["fastest_bounds_seconds"])
        lines.append(f"The fastest choice (!) takes {low} to {high} if the noise scale is within its bounds. Other errors are "
                     "not included.")
    return "\n".join([*lines, "", *_assumed(found)])


def _assumed(found: dict[str, Any]) -> list[str]:
    """Return lines that state the assumptions of the predictions."""
    timed = [one["ranks"] for one in found["measured"]]
    lines = [
        *(
            f"Measured on {_ranks(one['ranks'])}: {one['micro_batch']:.3g} s per micro-batch, {one['comm']:.3g} s communication "
            f"and {one['update']:.3g} s update per step."
            for one in found["measured"]
        ),
        "Assumptions: learning rate and schedule suit each batch; every rank is as fast as those measured, with its own cores or",
        "GPU; communication time does not depend on the batch. Evaluations and checkpoints are not counted.",
    ]
    if max(timed) == 1:
        lines.append("Communication was not measured, so several ranks are slower than predicted. Add a RUN on several ranks.")
    elif len(timed) == 1:
        lines.append("Communication is assumed to be as fast on any number of ranks above 1. Add a short RUN on more ranks.")
    if found["ranks_not_said"]:
        lines += [f"The number of ranks is missing in metrics.jsonl and assumed to be 1: {', '.join(found['ranks_not_said'])}."]
    return lines


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def size(number: float) -> str:
    """Format a number of bytes. Pure."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:.0f} B"


def methods_table(found: dict[str, Any]) -> str:
    """Format the result of compare_methods() as text. Pure."""
    tried, rows, nodes = found["tried_seconds"], found["rows"], found["nodes"]
    link = f"{1e3 * found['latency_seconds']:.3g} ms, {8e-6 * found['bandwidth_bytes_per_second']:,.4g} Mbit/s"
    how = "given" if found["compute_given"] else "measured"
    lines = [
        f"{_ranks(found['ranks'])} on {nodes} node{'s' * (nodes != 1)}; slowest link: {link} ({found['link_from']}); "
        f"compute: {found['compute_seconds']:.3g} s per step ({how})",
        f"Measured, {tried:g} s each:" if tried else "Predictions, not measurements:",
        "",
        f"{'method':<14} {'sent/step':>12} {'s/step':>10} {'speed':>7}"
        + (f" {'predicted':>10} {'time':>8} {found['loss_name']:>10}" if tried else "") + "  settings",
    ]
    predicted = {row["method"]: row for row in found["foretold"]}
    for row in rows:
        if row["refused"]:
            lines.append(f"{row['method']:<14} rejected: {row['refused']}")
            continue
        speed = "-" if row["speed"] is None else f"{row['speed']:.2f}"
        line = f"{row['method']:<14} {size(row['sent_bytes']):>12} {row['step_seconds']:>10.3g} {speed:>7}"
        if tried:
            took = duration(found["took_seconds"][row["method"]])
            line += f" {predicted[row['method']]['step_seconds']:>10.3g} {took:>8} {row['loss']:>10.4f}"
        lines.append(f"{line}  {' '.join(row['settings']) or '(none)'}")
    lines += ["", found["why"]]
    if chosen := next((row["settings"] for row in rows if row["method"] == found["recommended"]), None):
        lines.append(f"Settings: {' '.join(chosen)}")
    if not tried:
        lines.append("Bytes are those sent by rank 0. Time to compress and decompress is not counted. See docs/plan.md.")
    return "\n".join(lines)


def plot(found: dict[str, Any], file: str) -> None:
    """Plot the train_loss of each method that was tried, once against time and once against bytes sent. found: the result of
    compare_methods(). file: path of the picture. Independent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for name, curve in found["curves"].items():
        for axis, at, unit in ((axes[0], 0, 1.0), (axes[1], 1, 1e6)):
            axis.plot([point[at] / unit for point in curve], [point[2] for point in curve], label=name)
    axes[0].set(xlabel="step time (s)", ylabel="train_loss")
    axes[1].set(xlabel="MB sent by rank 0", xscale="symlog")
    axes[0].legend()
    figure.savefig(file)
