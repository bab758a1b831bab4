"""Measures the time from the launch to the log line of step 1, by phase, with a large set of shards.

    python benchmarks/startup.py                                   # 10 GB in 8 shards, 1 rank, 3 repeats
    python benchmarks/startup.py --gigabytes 100 --shards 64 --ranks 4 -- --train.threads=1

The shards are sparse files in a temporary folder. Headers and index.json are valid. The tokens were never written, so they are
read as zeros and take no space. This covers all work of a start without data.verify, which would read every byte. Each
measurement is a new process. The time begins when the launcher is called, and is measured on rank 0. All files are in the page
cache. The first start after a boot, or from a shared disk, also waits for the disk. Medians over the repeats are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.abc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.time()  # in the child process: Python has started
CHILD = "--measured-run"
PARTS = ("launcher and Python", "start MPI", "import torch", "other imports", "open the data, agree", "print settings",
         "build the job", "step 1 and the rest", "total", "of this: data, index to batch", "of this: torch's compiler")
PYTHON, MPI, TORCH, OTHERS, PLAN, SAY, BUILD, STEP, ALL, DATA, COMPILER = PARTS
SECONDS: dict[str, float] = {}  # in the child process: by phase


def make_shards(folder: Path, gigabytes: float, shards: int) -> None:
    """Write training shards of byte tokens in the format of mpidp.data.shards, without contents and with invalid checksums."""
    import h5py
    import numpy as np

    from mpidp.data.index import FileRecord, Index, SplitRecord
    from mpidp.data.shard_writer import SHARD_FORMAT, VERSION
    from mpidp.data.tokenizer import ByteTokenizer

    tokenizer, tokens, files = ByteTokenizer(), int(gigabytes * 1e9 / 2 / shards), []
    documents, sha256 = tokens // 5000, hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    for k in range(shards):
        path = folder / f"train_{k:05d}.h5"
        with h5py.File(path, "w", libver=("earliest", "v110")) as file:
            for name, length, dtype in (("doc_offsets", documents, "<u8"), ("tokens", tokens, "<u2")):
                file.create_dataset(name, shape=(length,), dtype=dtype)[-1:] = 0  # one write allocates the whole dataset
            file.attrs.update({"format": np.bytes_(SHARD_FORMAT), "version": VERSION, "split": np.bytes_("train"),
                               "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": np.bytes_(sha256)})
        files.append(FileRecord(path.name, "train", tokens, documents, tokens, path.stat().st_size, "0" * 8, "0" * 64))
    split = SplitRecord(shards * tokens, shards * documents, shards * tokens, loss_mask=False)
    index = Index(tokenizer.vocab_size, tokenizer.eod, tokenizer.kind, sha256, {"train": split}, files, {})
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "index.json").write_text(index.to_json())
    print(f"{shards} shards, {sum(file.size for file in files) / 1e9:.2f} GB, {sum(file.tokens for file in files):,} tokens")


def timed(call: Any, name: str) -> Any:
    """Wrap a call so that its seconds are added to SECONDS[name]."""
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin = time.time()
        try:
            return call(*args, **kwargs)
        finally:
            SECONDS[name] = SECONDS.get(name, 0.0) + time.time() - begin

    return wrapper


class CompilerWatch(importlib.abc.MetaPathFinder):
    """Measures the time to import torch's compiler, which a run without train.compile does not need."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader.exec_module = timed(spec.loader.exec_module, COMPILER)
        return spec


def train_one_step(called_at: float) -> None:
    """Run mpidp.train in a child process and measure its phases. The child imports modules in the same order as mpidp.train."""
    SECONDS[PYTHON] = BEGAN - called_at
    del sys.argv[1:3]
    sys.meta_path.insert(0, CompilerWatch())
    bring = timed(importlib.import_module, OTHERS)
    train = bring("mpidp.train")
    mpi = timed(importlib.import_module, MPI)("mpi4py.MPI")
    timed(importlib.import_module, TORCH)("torch")
    attempts, after_step = bring("mpidp.training.attempts"), bring("mpidp.training.after_step")
    loader = bring("mpidp.data.loader")
    run_plan, run_summary = bring("mpidp.training.run_plan"), bring("mpidp.training.run_summary")
    run_plan.plan = timed(run_plan.plan, PLAN)
    run_summary.log_summary = timed(run_summary.log_summary, SAY)
    attempts.build = timed(attempts.build, BUILD)
    for kind, function in ((run_plan.TokenStream, "__init__"), (run_plan.TokenStream, "check"),
                           (run_plan.Sampler, "__post_init__"),
                           (loader.Loader, "__init__"), (loader.Loader, "__next__")):
        setattr(kind, function, timed(getattr(kind, function), DATA))
    log_step = after_step.log_step

    def first_logged(*args: Any, **kwargs: Any) -> None:
        log_step(*args, **kwargs)
        SECONDS[ALL] = time.time() - called_at
        if mpi.COMM_WORLD.rank == 0:
            print(f"\nmeasured {json.dumps(SECONDS)}", flush=True)

    after_step.log_step = first_logged
    train.run_entry(train.main)


def measure(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line.removeprefix("measured ") for line in done.stdout.splitlines() if line.startswith("measured ")]
    if done.returncode or not found:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seconds = dict.fromkeys(PARTS, 0.0) | json.loads(found[0])
    return seconds | {STEP: seconds[ALL] - sum(seconds[part] for part in PARTS[: PARTS.index(STEP)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--ranks", default="1", help="numbers of ranks, measured in turn in every repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--launcher", default="mpirun -np")
    parser.add_argument("settings", nargs="*", help="settings of mpidp.train, after --")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {n: [] for n in options.ranks.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        (shards := Path(folder) / "shards").mkdir()
        make_shards(shards, options.gigabytes, options.shards)
        for repeat in range(options.repeats):
            for n in rows:
                rows[n].append(measure([
                    *options.launcher.split(), n, sys.executable, __file__, CHILD, str(time.time()), f"--data.path={shards}",
                    f"--run.dir={folder}/run-{repeat}-{n}", "--train.steps=1", *options.settings]))
    for n, runs in rows.items():
        print(f"{n} rank{'s' if n != '1' else ''}")
        for part in PARTS:
            times = [run[part] for run in runs]
            print(f"  {part:<32} {statistics.median(times):>7.3f} s   ({min(times):.3f} to {max(times):.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        train_one_step(float(sys.argv[2]))
    else:
        main()
