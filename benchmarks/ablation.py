"""Compares options of the model and of the optimizer by the loss that they reach, over several seeds.

    python benchmarks/ablation.py --text tinyshakespeare.txt                     # every option, 3 seeds: hours on 2 cores
    python benchmarks/ablation.py --text tinyshakespeare.txt --options normuon,qk-norm --seeds 5
    python benchmarks/ablation.py --short                                        # a few steps on this repository's own pages

The setting is that of shakespeare.py: 4 layers, width 128, context 64, 12 sequences per step, characters, 2,000 steps with Muon.
Each option changes the settings of OPTIONS in addition to the baseline. The table shows the mean of the held-out loss over the
seeds, its difference to the baseline, a p-value, and the median time of a step relative to the baseline. The p-value is that of a
paired two-sided t-test. Runs with the same seed have the same data in the same order. Compare times only on an idle machine. If
the p-value of an option is above 0.05, it is not shown that the option changes the loss. With 20 options, one p-value below 0.05
is expected by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from shakespeare import OPTIMIZERS, ROOT, SETTING, prepare, run

BASE = [*SETTING, *OPTIMIZERS["muon"]]
OPTIONS: dict[str, list[str]] = {
    "modern": ["--model.recipe=modern", "--optim.name=normuon"],
    "adamw": OPTIMIZERS["adamw"],
    "normuon": ["--optim.name=normuon"],
    "cautious-decay": ["--optim.cautious_decay=true"],
    "momentum-warmup": ["--optim.momentum_warmup=300"],
    "linear-to-zero": ["--optim.schedule=linear"],
    "wsd": ["--optim.schedule=wsd"],
    "zero-init": ["--model.zero_init=true"],
    "input-mix": ["--model.input_mix=true"],
    "relu2": ["--model.activation=relu2"],
    "relu2-no-gate": ["--model.activation=relu2", "--model.gated=false", "--model.hidden_dim=512"],
    "qk-norm": ["--model.qk_norm=head"],
    "logit-cap": ["--model.logit_cap=15"],
    "norms-both": ["--model.norm_place=both"],
    "embedding-scale": ["--model.embedding_scale=11.3"],
    "tied": ["--model.tie_embeddings=true"],
    "beta2-0.95": ["--optim.beta2=0.95"],
    "no-clip": ["--optim.clip=0"],
    "lr-x2": ["--optim.lr=6e-3"],
    "lr-x0.5": ["--optim.lr=1.5e-3"],
    "no-decay": ["--optim.weight_decay=0"],
}


def p_value(differences: list[float]) -> float:
    """Return the two-sided p-value of a t-test of whether the mean of the differences is 0. With fewer than two differences,
    return nan."""
    n = len(differences)
    if n < 2:
        return math.nan
    deviation = statistics.stdev(differences)
    if deviation == 0.0:
        return 0.0 if statistics.fmean(differences) else 1.0
    t, freedom = abs(statistics.fmean(differences)) / (deviation / math.sqrt(n)), n - 1
    # P(|T| > t): with x = sqrt(freedom) tan(a), the density of T is proportional to cos(a)^(freedom - 1).
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    weights = np.cos(angles) ** (freedom - 1)
    return float(weights[angles >= math.atan(t / math.sqrt(freedom))].sum() / weights.sum())


def measured(folder: Path, name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train once. Return (held-out loss at the end, median seconds of a step)."""
    run_dir = folder / f"{name}-{seed}"
    run([*options.launcher.split(), str(options.ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={run_dir}",
         f"--data.path={folder / 'shards'}", f"--train.steps={options.steps}", "--train.eval_every=0", *BASE,
         f"--train.seed={seed}", f"--optim.warmup_steps={min(100, options.steps // 10)}", *OPTIONS.get(name, []),
         *options.settings], ROOT)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["val_loss"], statistics.median(line["step_seconds"] for line in lines if "train_loss" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare.txt"))
    parser.add_argument("--options", default=",".join(OPTIONS), help="comma list of OPTIONS")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each option")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--short", action="store_true", help="20 steps, 2 seeds, two options: does it work?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="more settings of mpidp.train for all runs, after --")
    options = parser.parse_args()
    names = options.options.split(",")
    if unknown := set(names) - set(OPTIONS):
        sys.exit(f"--options: {', '.join(sorted(unknown))} is unknown; choose some of {', '.join(OPTIONS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.short:
            options.steps, options.seeds, names = 20, 2, ["normuon", "zero-init"]
            options.text = folder / "pages.txt"
            options.text.write_text("\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))[:60_000])
        elif not options.text.is_file():
            print(f"skipped: {options.text} does not exist; give --text FILE, for example the tinyshakespeare text of char-rnn")
            return
        print(prepare(options.text, folder))
        print(f"{options.steps} steps, {options.seeds} seeds, {options.ranks} ranks\n")
        print(f"{'option':<17} {'val loss':>9} {'difference':>11} {'p':>7} {'step time':>10}", flush=True)
        found: dict[str, list[tuple[float, float]]] = {}
        for name in ["baseline", *names]:
            found[name] = [measured(folder, name, 1337 + seed, options) for seed in range(options.seeds)]
            losses, base = [loss for loss, _ in found[name]], [loss for loss, _ in found["baseline"]]
            differences = [loss - other for loss, other in zip(losses, base, strict=True)]
            times = [statistics.median(seconds for _, seconds in found[which]) for which in (name, "baseline")]
            compared = f"{statistics.fmean(differences):+.4f}", f"{p_value(differences):.3f}"
            difference, p = compared if name != "baseline" else ("", "")
            print(f"{name:<17} {statistics.fmean(losses):>9.4f} {difference:>11} {p:>7} {times[0] / times[1]:>10.2f}", flush=True)
        if options.json:
            print(json.dumps({"steps": options.steps, "runs": found}))


if __name__ == "__main__":
    main()
