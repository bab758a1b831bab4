"""Draw a run's loss against tokens: python benchmarks/loss_curve.py RUN OUT.png   (needs matplotlib, in the extra `test`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [(line["tokens"] / 1e3, line["train_loss"]) for line in lines if "train_loss" in line]
    tokens_at = {line["step"]: line["tokens"] / 1e3 for line in lines if "train_loss" in line}
    val = [(tokens_at[line["step"]], line["val_loss"]) for line in lines if "val_tokens" in line]
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=140)
    axes.plot(*zip(*train, strict=True), color="#9db8d2", linewidth=0.9, label="training, each step")
    axes.plot(*zip(*val, strict=True), color="#1b4f8a", marker="o", linewidth=1.8, label="validation")
    for x, y in val:
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color="#1b4f8a")
    axes.set_xlabel("tokens learned from (thousands)")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
