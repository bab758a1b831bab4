"""nanoGPT's CPU setting: the loss after 2,000 steps, the time it takes, and what nanoGPT needs for the same.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt                      # ours alone: losses, hashes, times
    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/shakespeare.py --text tinyshakespeare.txt --nanogpt nanoGPT    # and nanoGPT in the same call

4 layers, 4 heads, 128 wide, context 64, 12 sequences a step, characters, no dropout; the last 10% of the characters are held
out. Ours runs at several numbers of ranks with one thread each. Loss is nats a character over the whole held-out part in
windows of 64, computed the same way for both. "train s" is the time of the steps alone, without start-up and evaluations;
"command s" is everything. Losses repeat to the bit on one machine. Times are of one run each: only ratios within one call
count, and only on a machine that is otherwise quiet. About 20 minutes on 2 cores with nanoGPT.
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
# adamw is what nanoGPT's config/train_shakespeare_char.py asks for, so that what is left against nanoGPT is the architecture.
# Higher rates were no better for it: 2e-3 and 3e-3 down to 0.
OPTIMIZERS = {
    "adamw": ["--optim.name=adamw", "--optim.lr=1e-3", "--optim.min_lr=1e-4", "--optim.weight_decay=0.1"],
    "muon": ["--optim.name=muon", "--optim.lr=3e-3", "--optim.min_lr=0", "--optim.weight_decay=0.1"],
}
NANOGPT = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
    "--always_save_checkpoint=True",
]
# Runs in nanoGPT's folder, on a checkpoint of its train.py: the windows and the mean of mpidp's own evaluation.
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
    """(What it printed, its seconds.)"""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {})
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout, time.perf_counter() - began


def prepare(text: Path, folder: Path) -> str:
    """folder/shards for ours, train.bin, val.bin and meta.pkl in folder for nanoGPT; returns what is in them."""
    characters = text.read_bytes().decode()
    number = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = np.array([number[c] for c in characters], dtype=np.uint16)
    num_train = int(0.9 * len(ids))
    num_val = len(ids) - num_train
    ids[:num_train].tofile(folder / "train.bin")
    ids[num_train:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(number)}))
    # The shards end with an end-of-document token: ours is asked for that one too, which it never saw (0.0002 of its loss).
    run([sys.executable, "-m", "data_tools.prepare", "--source", str(text.resolve()), "--tokenizer", "char", "--shards", "1",
         "--val-fraction", repr((num_val + 1) / (len(ids) + 1)), "--out", str(folder / "shards")], ROOT)
    held_out = json.loads((folder / "shards" / "index.json").read_text())["splits"]["val"]["tokens"]
    assert held_out == num_val + 1, f"{held_out} tokens are held out, not {num_val} characters and an end"
    return f"{text.name}: {num_train:,} characters to learn from, {num_val:,} held out, {len(number)} different ones"


def ours(folder: Path, name: str, ranks: int, eval_every: int, options: argparse.Namespace) -> dict:
    run_dir = folder / f"{name}-{ranks}"
    _, seconds = run([*options.launcher.split(), str(ranks), sys.executable, "-m", "mpidp.train", f"--run.dir={run_dir}",
                      f"--data.path={folder / 'shards'}", f"--train.steps={options.steps}", f"--train.eval_every={eval_every}",
                      *SETTING, *OPTIMIZERS[name], *options.settings], ROOT)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name, "cores": ranks, "val_loss": lines[-1]["val_loss"], "weights_sha256": lines[-1]["weights_sha256"],
        "step_seconds": [line["step_seconds"] for line in lines if "train_loss" in line], "command_seconds": seconds,
        "curve": [(line["step"], line["val_loss"]) for line in lines if "val_tokens" in line],
    }


def nanogpt(folder: Path, threads: int, options: argparse.Namespace) -> dict:
    steps, out = options.steps, folder / f"nanogpt-{threads}"
    said, seconds = run([sys.executable, "train.py", *NANOGPT, f"--max_iters={steps}", f"--lr_decay_iters={steps}",
                         f"--eval_interval={steps}", f"--dataset={folder}", f"--out_dir={out}"], options.nanogpt, threads)
    # It evaluates within iterations 0 and `steps`, the latter after the checkpoint: neither time counts.
    times = [float(ms) / 1e3 for ms in re.findall(r"^iter \d+: loss .*?, time ([\d.]+)ms", said, re.MULTILINE)][1:steps]
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
    """When ours first passed nanoGPT's final loss, in steps and in time, and the factors of that."""
    final, steps, base = theirs[-1]["val_loss"], len(theirs[-1]["step_seconds"]), sum(theirs[-1]["step_seconds"])
    print(f"\nnanoGPT took {steps} steps and {base:.1f} s ({theirs[-1]['cores']} threads) to {final:.4f}. Ours was there at")
    passed: dict[str, int] = {}
    for name, runs in results.items():  # the curve of the first is that of all: it is the same at any number of ranks
        reached = [step for step, loss in runs[0]["curve"] if loss <= final]
        if not reached:
            print(f"  {name:<11} no step")
            continue
        passed[name] = reached[0]
        for r in runs:
            seconds = sum(r["step_seconds"][: reached[0]])
            print(f"  {name:<11} step {reached[0]:>5}, {r['cores']} ranks: {seconds:>6.1f} s, {seconds / base:.3f} of its time")
    print("\nThe factors of that (architecture x optimizer x system):")
    if plain := passed.get("adamw"):
        print(f"  architecture  {plain / steps:.3f}  our model with its optimizer and schedule: {plain} steps for {steps}")
        for name in passed:
            print(f"  optimizer     {passed[name] / plain:.3f}  {name}, its learning rate: {passed[name]} steps for {plain}")
    for t in theirs:
        for r in [r for runs in results.values() for r in runs if r["cores"] == t["cores"]]:
            mine, other = (1e3 * statistics.median(x["step_seconds"]) for x in (r, t))
            print(f"  system        {mine / other:.3f}  {r['name']}, {r['cores']} threads: {mine:.1f} ms, not {other:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare.txt"))
    parser.add_argument("--ranks", default="2,1,4", help="numbers of ranks; the first one's run evaluates on the way")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval-every", type=int, default=50, help="how finely the moment of passing nanoGPT is known")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, to run it too")
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("settings", nargs="*", help="more settings of mpidp.train, after --")
    options = parser.parse_args()
    if not options.text.is_file():
        print(f"skipped: there is no file {options.text}; give --text FILE, for example the tinyshakespeare text of char-rnn")
        return
    if options.nanogpt and not (options.nanogpt / "train.py").is_file():
        sys.exit(f"there is no train.py in --nanogpt {options.nanogpt}")
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
