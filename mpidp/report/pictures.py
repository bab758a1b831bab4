"""Draws the charts of the report with matplotlib and writes them as PNG files, for papers and slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpidp.errors import UsageError
from mpidp.metrics.jsonl import number
from mpidp.report.compare import Scaling, scaling
from mpidp.report.page import DASHES, LIGHT
from mpidp.report.read import RecordedRun
from mpidp.report.sections import of_steps, per_rank
from mpidp.report.waterfall import PARTS, waterfall


def draw(runs: Sequence[RecordedRun], folder: Path) -> list[Path]:
    """Write loss.png and throughput.png, and for each run waterfall_RUN.png (its time, divided into parts) and ranks_RUN.png
    (the compute time of each rank). If the runs used different numbers of ranks, also write scaling.png. Return the paths.
    Raises UsageError if a file cannot be written. Independent."""
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made.append(_save(folder / "loss.png", lambda axes: _loss(axes, runs)))
        made.append(_save(folder / "throughput.png", lambda axes: _throughput(axes, runs)))
        for run in runs:
            name = run.name.strip("/").replace("/", "_")
            made.append(_save(folder / f"waterfall_{name}.png", lambda axes, run=run: _waterfall(axes, run)))
            if per_rank(run)[1]:
                made.append(_save(folder / f"ranks_{name}.png", lambda axes, run=run: _ranks(axes, run)))
        if len(runs) > 1 and len((found := scaling(runs)).rows) > 1:
            made.append(draw_scaling(found, folder / "scaling.png"))
    except OSError as error:
        raise UsageError(f"--png={folder} cannot be written ({error}). Choose another folder") from error
    return made


def draw_scaling(found: Scaling, path: Path) -> Path:
    """Draw a chart of speed against the number of ranks, write it to `path`, and return `path`. Raises OSError if the file cannot
    be written. Independent."""

    def fill(axes: Any) -> None:
        ranks, first = [row.ranks for row in found.rows], found.rows[0]
        axes.plot(ranks, [row.speed for row in found.rows], "o-", color=LIGHT[0], label="measured")
        axes.plot(ranks, [first.speed * n / first.ranks for n in ranks], "--", color=LIGHT[7], label="ideal")
        for row in found.rows:
            if row.efficiency is not None:
                axes.annotate(f"{100 * row.efficiency:.0f}%", (row.ranks, row.speed), textcoords="offset points", xytext=(4, -14))
        axes.set(xlabel="ranks", ylabel="tokens/s", xticks=ranks, title=found.why)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    return _save(path, fill)


def _save(path: Path, fill: Any) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # works without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    fill(axes)
    axes.title.set_fontsize(10)
    figure.savefig(path, dpi=150)
    return path


def _style(i: int) -> dict[str, Any]:
    dashes = [float(one) for one in DASHES[i % 8].split()] if DASHES[i % 8] != "none" else []
    return {"color": LIGHT[i % 8], "linestyle": (0, tuple(dashes)) if dashes else "-", "linewidth": 1.6}


def _loss(axes: Any, runs: Sequence[RecordedRun]) -> None:
    for i, run in enumerate(runs):
        at = {line["step"]: number(line, "tokens") or 0.0 for line in run.steps}
        axes.plot(
            list(at.values()), [number(line, "train_loss") for line in run.steps], **_style(i) | {"linewidth": 0.7}, alpha=0.5
        )
        evaluated = [(at.get(line["step"], 0.0), number(line, "val_loss")) for line in run.evaluations]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), **_style(i), marker="o", markersize=3, label=f"{run.name}, validation")
    axes.set(xlabel="tokens", ylabel="nats per token", title="Loss (thin: training)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _throughput(axes: Any, runs: Sequence[RecordedRun]) -> None:
    for i, run in enumerate(runs):
        if found := of_steps(run, "tokens_per_second"):
            axes.plot(*zip(*found, strict=True), **_style(i), label=run.name)
    axes.set(xlabel="step", ylabel="tokens/s", title="Throughput")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _waterfall(axes: Any, run: RecordedRun) -> None:
    fall = waterfall(run)
    kept = [part for part in PARTS if fall.seconds[part] > 0 or part == "ideal"]
    shares, speeds, so_far = fall.shares, fall.speeds(), 0.0
    for i, part in enumerate(kept):
        axes.barh(i, 100 * shares[part], left=so_far, color="#1f7a55" if i == 0 else "#c2560c")
        so_far += 100 * shares[part]
        axes.annotate(f"{100 * shares[part]:.1f}%, then {speeds[part]:,.0f} tokens/s", (102, i), va="center",
                      fontsize=8, annotation_clip=False)
    axes.set(yticks=range(len(kept)), yticklabels=kept, xlim=(0, 100), xlabel="% of the time",
             title=f"{run.name}: from ideal to measured")
    axes.invert_yaxis()


def _ranks(axes: Any, run: RecordedRun) -> None:
    steps, rows = per_rank(run)
    image = axes.imshow([[1e3 * value for value in compute] for _, compute, _ in rows], aspect="auto", interpolation="nearest",
                        cmap="cividis", extent=(steps[0] - 0.5, steps[-1] + 0.5, len(rows) - 0.5, -0.5))
    axes.figure.colorbar(image, label="compute time (ms)")
    axes.set(xlabel="step", ylabel="rank", title=f"{run.name}: compute time by rank")
    axes.yaxis.get_major_locator().set_params(integer=True)
