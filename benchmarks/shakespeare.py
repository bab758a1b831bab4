"""Compares mpidp with nanoGPT, with nanoGPT's CPU settings. Measures the loss after 2,000 steps, and the time to reach nanoGPT's
loss.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt                      # mpidp only: losses, hashes, times
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/shakespeare.py --text tinyshakespeare.txt --nanogpt nanoGPT    # mpidp and nanoGPT

The model has 4 layers, 4 heads, width 128 and context 64, with 12 sequences per step, characters as tokens and no dropout. The
last 10% of the text are held out. mpidp runs on several numbers of ranks with one thread each. The loss is in nats per character
over the whole held-out text in windows of 64. It is computed in the same way for both programs. "train s" is the time of the
steps, without start-up and evaluations. "command s" is the total time. The losses of mpidp repeat bit for bit on one machine.
Each time is from one run, so compare only ratios within one call, on an idle machine. With nanoGPT this takes about 20 minutes on
2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SETTING = [
    "--model.num_layers=4", "--model.num_heads=4", "--model.model_dim=128", "--model.seq_len=64", "--model.dropout=0",
    "--train.global_batch=12", "--train.micro_batch=3", "--train.threads=1", "--train.device=cpu", "--train.dtype=float32",
    "--train.eval_tokens=0", "--train.save_every=0", "--optim.warmup_steps=100", "--optim.beta2=0.99", "--optim.clip=1",
]
# adamw has the settings of nanoGPT's config/train_shakespeare_char.py, so that only the architecture differs from nanoGPT.
# Higher learning rates (2e-3 and 3e-3 down to 0) were not better for it.
OPTIMIZERS = {
    "adamw": ["--optim.name=adamw", "--optim.lr=1e-3", "--optim.min_lr=1e-4", "--optim.weight_decay=0.1"],
    "muon": ["--optim.name=muon", "--optim.lr=3e-3", "--optim.min_lr=0", "--optim.weight_decay=0.1"],
    "modern": ["--model.recipe=modern", "--optim.lr=6e-3", "--optim.min_lr=0", "--optim.weight_decay=0.1"],
}
NANOGPT = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
    "--always_save_checkpoint=True",
]
# Run in nanoGPT's folder on a checkpoint of its train.py. Uses the windows and the mean of mpidp's evaluation.
SCORE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
ids = torch.from_numpy(np.fromfile(sys.argv[2], dtype=np.uint16).astype(np.int64))
total, targets = 0.0, len(ids) - 1
full = targets // 64 * 64
parts = [*zip(ids[:full].view(-1, 64).split(128), ids[1:full + 1].view(-1, 64).split(128))]
if full < targets:
    parts.append((ids[None, full:-1], ids[None, full + 1:]))
with torch.no_grad():
    for x, y in parts:
        total += model(x, y)[1].item() * y.numel()
print(saved["iter_num"], total / targets)
"""


def run(command: list[str], cwd: Path, threads: int = 0) -> tuple[str, float]:
    """Run a command. Return (its standard output, its seconds)."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {})
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout, time.perf_counter() - began


def prepare(text: Path, folder: Path) -> str:
    """Write folder/shards for mpidp, and train.bin, val.bin and meta.pkl for nanoGPT. Return a description of the data."""
    characters = text.read_bytes().decode()
    number = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = np.array([number[c] for c in characters], dtype=np.uint16)
    num_train = int(0.9 * len(ids))
    num_val = len(ids) - num_train
    ids[:num_train].tofile(folder / "train.bin")
    ids[num_train:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(number)}))
    # The shards end with an end-of-document token, which mpidp predicts too without having trained on it (0.0002 of its loss).
    run([sys.executable, "-m", "data_tools.prepare", "--source", str(text.resolve()), "--tokenizer", "char", "--shards", "1",
         "--val-fraction", repr((num_val + 1) / (len(ids) + 1)), "--out", str(folder / "shards")], ROOT)
    held_out = json.loads((folder / "shards" / "index.json").read_text())["splits"]["val"]["tokens"]
    assert held_out == num_val + 1, f"{held_out} tokens are held out, not {num_val} characters and an end"
    return f"{text.name}: {num_train:,} training characters, {num_val:,} held out, {len(number)} distinct"


def ours(folder: Path, name: str, ranks: int, eval_every: int, options: argparse.Namespace) -> dict:
    run_dir = folder / f"{name}-{ranks}"
    steps = options.mpidp_steps or options.steps
    _, seconds = run([*options.launcher.split(), str(ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={run_dir}",
                      f"--data.path={folder / 'shards'}", f"--train.steps={steps}", f"--train.eval_every={eval_every}",
                      *SETTING, *OPTIMIZERS[name], *options.settings], ROOT)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name, "cores": ranks, "val_loss": lines[-1]["val_loss"], "weights_sha256": lines[-1]["weights_sha256"],
        "step_seconds": [line["step_seconds"] for line in lines if "train_loss" in line], "command_seconds": seconds,
        "curve": [(line["step"], line["val_loss"]) for line in lines if "val_tokens" in line],
    }


def nanogpt(folder: Path, threads: int, options: argparse.Namespace) -> dict:
    steps, out = options.steps, folder / f"nanogpt-{threads}"
    output, seconds = run([sys.executable, "train.py", *NANOGPT, f"--max_iters={steps}", f"--lr_decay_iters={steps}",
                         f"--eval_interval={steps}", f"--dataset={folder}", f"--out_dir={out}"], options.nanogpt, threads)
    # Iterations 0 and `steps` include an evaluation (the last one after the checkpoint), so their times are ignored.
    times = [float(ms) / 1e3 for ms in re.findall(r"^iter \d+: loss .*?, time ([\d.]+)ms", output, re.MULTILINE)][1:steps]
    scored, _ = run([sys.executable, "-c", SCORE, str(out / "ckpt.pt"), str(folder / "val.bin")], options.nanogpt)
    last_step, loss = scored.splitlines()[-1].split()
    assert int(last_step) == steps and len(times) == steps - 1, f"nanoGPT ended at {last_step} with {len(times)} timed steps"
    return {
        "name": "nanoGPT", "cores": threads, "val_loss": float(loss), "command_seconds": seconds,
        "step_seconds": [statistics.median(times), *times],
    }


def show(r: dict) -> None:
    times, where = r["step_seconds"], f"{r['cores']} {'ranks' if 'curve' in r else 'threads'}"
    print(f"{r['name']:<11} {where:>9} {r['val_loss']:>9.4f} {sum(times):>8.1f} {1e3 * statistics.median(times):>8.2f} "
          f"{r['command_seconds']:>10.1f}  {r.get('weights_sha256', '')[:16]}", flush=True)


def compare(results: dict[str, list[dict]], theirs: list[dict]) -> None:
    """Print when mpidp first reached nanoGPT's final loss, in steps and in time, and the contributing factors."""
    final, steps, base = theirs[-1]["val_loss"], len(theirs[-1]["step_seconds"]), sum(theirs[-1]["step_seconds"])
    print(f"\nnanoGPT took {steps} steps and {base:.1f} s ({theirs[-1]['cores']} threads) to reach {final:.4f}. mpidp took")
    passed: dict[str, int] = {}
    for name, runs in results.items():  # the curve is the same at any number of ranks, so the first run's is used
        reached = [step for step, loss in runs[0]["curve"] if loss <= final]
        if not reached:
            print(f"  {name:<11} not reached")
            continue
        passed[name] = reached[0]
        for r in runs:
            seconds = sum(r["step_seconds"][: reached[0]])
            print(f"  {name:<11} step {reached[0]:>5}, {r['cores']} ranks: {seconds:>6.1f} s, {seconds / base:.3f} x nanoGPT")
    print("\nFactors of this time (architecture x optimizer x system):")
    if plain := passed.get("adamw"):
        print(f"  architecture  {plain / steps:.3f}  mpidp's model, nanoGPT's optimizer: {plain} steps instead of {steps}")
        for name in passed:
            print(f"  optimizer     {passed[name] / plain:.3f}  {name}: {passed[name]} steps instead of {plain}")
    for t in theirs:
        for r in [r for runs in results.values() for r in runs if r["cores"] == t["cores"]]:
            mpidp_ms, other = (1e3 * statistics.median(x["step_seconds"]) for x in (r, t))
            print(f"  system        {mpidp_ms / other:.3f}  {r['name']}, {r['cores']} cores: {mpidp_ms:.1f} ms, not {other:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare.txt"))
    parser.add_argument("--ranks", default="2,1,4", help="numbers of ranks; only the first also evaluates during training")
    parser.add_argument("--optimizers", default="adamw,muon", help=f"comma list of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mpidp-steps", type=int, help="steps of mpidp, if not --steps: the learning rate then falls sooner")
    parser.add_argument("--eval-every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, to run it as well")
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="more settings of mpidp.train, after --")
    options = parser.parse_args()
    if not options.text.is_file():
        print(f"skipped: {options.text} does not exist; give --text FILE, for example the tinyshakespeare text of char-rnn")
        return
    if options.nanogpt and not (options.nanogpt / "train.py").is_file():
        sys.exit(f"--nanogpt {options.nanogpt} contains no train.py")
    sizes = [int(n) for n in options.ranks.split(",")]
    theirs: list[dict] = []
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(prepare(options.text, folder))
        print(f"\n{'':<21} {'val loss':>9} {'train s':>8} {'ms/step':>8} {'command s':>10}  weights", flush=True)
        for threads in (1, 2) if options.nanogpt else ():
            theirs.append(nanogpt(folder, threads, options))
            show(theirs[-1])
        for kind in options.optimizers.split(","):
            for n in sizes:
                results.setdefault(kind, []).append(ours(folder, kind, n, options.eval_every if n == sizes[0] else 0, options))
                show(results[kind][-1])
    for kind, runs in results.items():
        hashes, at = {r["weights_sha256"] for r in runs}, ", ".join(str(r["cores"]) for r in runs)
        print(f"{kind}: {'the same weights' if len(hashes) == 1 else f'{len(hashes)} different weights'} at {at} ranks")
    if theirs:
        compare(results, theirs)
    if options.json:
        print(json.dumps({"ours": results, "nanogpt": theirs}))


if __name__ == "__main__":
    main()
