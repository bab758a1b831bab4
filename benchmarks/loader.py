"""Compares the loader's throughput with the throughput of training, because a step should never wait for data.

    python benchmarks/loader.py                              # seq_len 128 and 1024, the default model, 1 rank, 1 thread
    python benchmarks/loader.py --seq-lens 256 --repeats 5 -- --model.model_dim=64 --train.micro_batch=4

Shards of the standard library's source are prepared in a temporary folder and stay in the page cache. Therefore the benchmark
measures the computation of the order of windows, the reads and the copies, but not a disk. Every repeat consists of a short
training run, then the loader alone with the same settings. Medians of the repeats are printed. `ratio` is the loader's throughput
divided by the throughput of training. The aim is 100 or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_tools.prepare import prepare
from mpidp.config.command_line import from_args
from mpidp.data.lanes import Lanes
from mpidp.data.loader import Loader
from mpidp.data.sampler import Sampler
from mpidp.data.shards import TokenStream


def delivered(settings: list[str], seconds: float) -> float:
    """Return tokens per second of next(loader), as the only rank of a run with these settings."""
    config = from_args(settings)
    train, seq_len = config.train, config.model.seq_len
    stream = TokenStream(config.data.path)
    lanes = Lanes(train.global_batch, train.micro_batch, train.lanes)
    sampler = Sampler(stream.num_tokens, seq_len, lanes, train.seed, config.data.order, stream.token_bytes)
    loader = Loader(stream, sampler, range(lanes.num_micro_batches), torch.device("cpu"))
    try:
        for _ in range(10):  # opens the files and uses up what was read ahead
            next(loader)
        tokens, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            tokens += sampler.batch_sequences(next(loader).batch) * seq_len
        return tokens / spent
    finally:
        loader.close()


def consumed(settings: list[str], launcher: str, skip: int, run_dir: Path) -> tuple[float, float]:
    """Return (tokens per second, seconds per step in next(loader)) of a short training run."""
    command = [*launcher.split(), "1", sys.executable, "-m", "mpidp.train", f"--run.dir={run_dir}", "--train.eval_every=0",
               "--train.eval_tokens=128", "--train.save_every=0", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line][skip:]
    speed = statistics.median(line["tokens_per_second"] for line in steps)
    return speed, statistics.median(line["data_seconds"] for line in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", default="128,1024", help="sequence lengths, measured in turn in every repeat")
    parser.add_argument("--tokenizer", default="byte", help="byte, or bpe:1024 as in `make train`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the loader alone, per measurement")
    parser.add_argument("--steps", type=int, default=10, help="steps of each training run")
    parser.add_argument("--skip", type=int, default=3, help="number of first steps to ignore")
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths = [int(n) for n in options.seq_lens.split(",")]
    rows: dict[int, list[tuple[float, float, float]]] = {n: [] for n in lengths}
    with tempfile.TemporaryDirectory() as folder:
        prepare(source="stdlib", tokenizer=options.tokenizer, out=f"{folder}/shards", verbose=False)
        for repeat in range(options.repeats):
            for n in lengths:
                settings = [f"--data.path={folder}/shards", f"--model.seq_len={n}", f"--train.steps={options.steps}",
                            "--train.threads=1", *options.settings]
                run_dir = Path(folder) / f"run-{repeat}-{n}"
                trained, waited = consumed(settings, options.launcher, options.skip, run_dir)
                rows[n].append((trained, waited, delivered(settings, options.seconds)))
    print(f"{'seq_len':>7} {'training tokens/s':>18} {'waiting ms/step':>16} {'loader tokens/s':>16} {'ratio':>7} {'least':>7}")
    for n, runs in rows.items():
        trained, waited, alone = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [run[2] / run[0] for run in runs]
        print(f"{n:>7} {trained:>18,.0f} {1e3 * waited:>16.3f} {alone:>16,.0f} {statistics.median(ratios):>7.0f} "
              f"{min(ratios):>7.0f}")


if __name__ == "__main__":
    main()
