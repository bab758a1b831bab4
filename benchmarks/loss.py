"""Compares time and memory of the head and the loss: all logits at once, in chunks, and torch's F.linear_cross_entropy.

    python benchmarks/loss.py                                         # 4,096 positions, a vocabulary of 50,304, width 256
    python benchmarks/loss.py --positions 8192 --vocab 128256 --width 512 --repeats 5

Each figure is a median over processes, which alternate. A process computes loss and gradients three times on one thread. `time`
is the shortest processor time of the three computations. `memory` is the growth of the largest resident memory during them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from resource import RUSAGE_SELF, getrusage

import torch
import torch.nn.functional as F

from mpidp.model.loss_chunks import chunk_rows
from mpidp.model.shape import TransformerShape
from mpidp.parallel.chunked_loss import ChunkedLoss

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def losses(positions: int, vocab: int, width: int) -> dict[str, Loss]:
    """Return functions (hidden, weight, targets) -> sum of losses, by name."""
    shape = TransformerShape(vocab, 1, 1, 1, width, 1, positions)
    rows = chunk_rows("chunked", shape, positions)
    found: dict[str, Loss] = {
        "whole": lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"),
        f"chunked ({rows} positions)": lambda hidden, weight, targets: ChunkedLoss(
            shape, lambda: [weight], rows, torch.float32)(hidden, targets),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chosen = torch.nn.LinearCrossEntropyOptions()
        found["torch, with options"] = lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=chosen)
    return found


def measure(name: str, positions: int, vocab: int, width: int) -> tuple[float, float, float]:
    """Return (processor seconds, MB, loss)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(positions, width), torch.randn(vocab, width) / 16
    targets = torch.randint(0, vocab, (positions,))
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # starts the library of products
    loss, before, seconds = losses(positions, vocab, width)[name], getrusage(RUSAGE_SELF).ru_maxrss, []
    hidden.requires_grad_()
    weight.requires_grad_()
    for _ in range(3):
        hidden.grad = weight.grad = None
        began = time.process_time()
        value = loss(hidden, weight, targets)
        value.backward()
        seconds.append(time.process_time() - began)
    return min(seconds), (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1e3, float(value.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.positions, options.vocab, options.width)
    if options.one:
        print(json.dumps(measure(options.one, *sizes)))
        return
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in losses(*sizes)}
    for _ in range(options.repeats):
        for name, results in found.items():
            words = [sys.executable, __file__, "--one", name, "--positions", str(sizes[0]), "--vocab", str(sizes[1]),
                     "--width", str(sizes[2])]
            results.append(tuple(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)))
    reference = statistics.median(seconds for seconds, _, _ in found["whole"])
    for name, results in found.items():
        seconds, megabytes, value = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"{name:<26} time {seconds:6.2f} s, ratio {seconds / reference:.2f}; memory {megabytes:6.0f} MB; loss {value:.3f}")


if __name__ == "__main__":
    main()
