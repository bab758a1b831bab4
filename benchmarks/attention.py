"""Measures time and memory of attention with a window and of attention to packed documents, each with blocks and with a dense
mask.

    python benchmarks/attention.py --seq-len 8192 --window 1024 --repeats 3

A row is a forward and a backward pass of one layer (one sequence, 4 heads of 64, float32), in its own process. "memory" is the
peak resident memory of the process during the passes, minus the resident memory before. "CPU" is the CPU time of the process in
the fastest repeat.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mpidp.model.documents import Documents, dense_mask, within
from mpidp.model.scores import Scores, causal, masked

CHILD = "--one"
ROWS = ("causal", "window", "window, dense mask", "window, cap", "window, cap, dense mask", "documents", "documents, dense mask")


def attention_of(row: str, ids: Tensor, window: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function of q, k, v."""
    one = torch.zeros_like(ids)
    how = Scores(window if "window" in row else 0, cap=30.0 if "cap" in row else 0.0)
    if "dense" in row:
        mask = dense_mask(ids if "documents" in row else one, how.window)
        return lambda q, k, v: masked(q, k, v, mask, how)
    if "documents" in row:
        documents = Documents(ids)
        return lambda q, k, v: within(documents, q, k, v, how)
    return lambda q, k, v: causal(q, k, v, how)


def reset_peak() -> None:
    """Reset the measured largest resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(row: str, seq_len: int, window: int, document: int, repeats: int) -> None:
    """Print the memory in MiB and the CPU time in ms of one row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = (torch.rand(1, seq_len) < 1 / document).long().cumsum(1)
    given = [torch.randn(1, 4, seq_len, 64, requires_grad=True) for _ in range(3)]
    small = [torch.randn(1, 4, 8, 64, requires_grad=True) for _ in range(3)]
    causal(*small, Scores()).sum().backward()  # load the kernels
    reset_peak()
    before, times = status("VmRSS"), []
    attention = attention_of(row, ids, window)
    for _ in range(repeats):
        begin = time.process_time()
        attention(*given).sum().backward()
        times.append(time.process_time() - begin)
    print((status("VmHWM") - before) / 2**20, 1000 * min(times))


def status(key: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--document", type=int, default=400, help="mean length of a document")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(CHILD, dest="one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.seq_len, options.window, options.document, options.repeats)
        return
    print(f"T {options.seq_len}, window {options.window}, documents of {options.document} tokens on average")
    print(f"{'row':28}{'memory, MiB':>12}{'CPU, ms':>10}")
    for row in ROWS:
        found = subprocess.run([sys.executable, *sys.argv, CHILD, row], capture_output=True, text=True, check=True)
        memory, cpu = map(float, found.stdout.split())
        print(f"{row:28}{memory:12.1f}{cpu:10.1f}", flush=True)


if __name__ == "__main__":
    main()
