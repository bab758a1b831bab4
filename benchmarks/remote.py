"""Compares shards on a server with the same shards on disk, for the loader alone and for the steps of a training. Also measures
run.mirror.

    moto_server -p 5555 &                                    # or any S3 server; set the variables of boto3
    python benchmarks/remote.py --disk shards/mine --address s3://bucket/mine --mirror s3://bucket/runs

The loader reads `--batches` batches from disk, then from the server with an empty cache, then again with the full cache. Three
kinds of training alternate: with shards on disk, with shards on the server and an empty cache, and with shards on disk, a mirror
and a checkpoint every 5 steps. Medians and ratios to the disk are printed. The first steps of a training are left out.
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

from mpidp.data.lanes import Lanes
from mpidp.data.loader import Loader
from mpidp.data.sampler import Sampler
from mpidp.data.shards import TokenStream
from mpidp.storage.remote import CacheOptions

SKIP = 5  # steps of a training that are left out


def loader_speed(path: str, cache: Path, batches: int, seq_len: int) -> float:
    """Return tokens per second of the loader. The time begins when the shards are opened."""
    begin = time.perf_counter()
    stream = TokenStream(path, "train", CacheOptions(str(cache)))
    lanes = Lanes(64, 8, 0)
    sampler = Sampler(stream.num_tokens, seq_len, lanes, 0, "shuffled", stream.token_bytes)
    loader = Loader(stream, sampler, range(lanes.num_micro_batches), torch.device("cpu"))
    try:
        tokens = sum(sampler.batch_sequences(next(loader).batch) * seq_len for _ in range(batches))
        return tokens / (time.perf_counter() - begin)
    finally:
        loader.close()


def step_seconds(settings: list[str], folder: Path) -> tuple[float, float]:
    """Return (seconds per step, seconds per step of waiting for data), medians of a training."""
    command = [sys.executable, "-m", "mpidp.train", f"--run.dir={folder}", "--train.eval_every=0", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line][SKIP:]
    return statistics.median(s["step_seconds"] for s in steps), statistics.median(s["data_seconds"] for s in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", required=True, metavar="DIR")
    parser.add_argument("--address", required=True)
    parser.add_argument("--mirror", default="", help="address below which each repeat gets a folder; empty: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for what, path in [("loader, disk", options.disk), ("loader, server, empty cache", options.address),
                               ("loader, server, full cache", options.address)]:
                rows.setdefault(what, []).append(loader_speed(path, folder / "a", options.batches, options.seq_len))
            plain = [f"--train.steps={options.steps}", f"--model.seq_len={options.seq_len}", "--train.threads=1",
                     "--data.verify=false", *options.settings]
            kinds = {"disk": [f"--data.path={options.disk}"],
                     "server": [f"--data.path={options.address}", f"--data.cache_dir={folder / 'b'}"]}
            if options.mirror:
                kinds["disk, checkpoints"] = [f"--data.path={options.disk}", "--train.save_every=5"]
                kinds["disk, checkpoints, mirror"] = [
                    f"--data.path={options.disk}", "--train.save_every=5", f"--run.mirror={options.mirror}/{time.time():.0f}"
                ]
            for i, (what, words) in enumerate(kinds.items()):
                step, data = step_seconds(plain + words, folder / f"run{i}")
                rows.setdefault(f"step, {what}", []).append(step)
                rows.setdefault(f"data, {what}", []).append(data)
        print(f"repeat {repeat + 1} done", file=sys.stderr, flush=True)
    for what, values in rows.items():
        base = rows[{"loader": "loader, disk", "step": "step, disk", "data": "data, disk"}[what.partition(",")[0]]]
        if what.startswith("step, disk, checkpoints, mirror"):
            base = rows["step, disk, checkpoints"]
        ratio = statistics.median(one / other for one, other in zip(values, base, strict=True))
        middle = statistics.median(values)
        shown = f"{middle:,.0f} tokens/s" if what.startswith("loader") else f"{middle:.4f} s"
        print(f"{what:<34} {shown:>20}   ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
