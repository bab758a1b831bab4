"""Recomputes steps of a run and checks the results: `[mpirun -np N] python -m mpidp.replay RUN [--step S | --against RUN2]`.

The steps are recomputed in memory, on any number of ranks, from the newest checkpoint before these steps, or from the
initial weights.
The results are compared with the record of the run, which is its metrics.jsonl and its checkpoints. No file is written.
docs/replay.md describes the output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from mpidp.errors import MpidpError
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.options import add_data, add_json, add_opening, program


def main() -> None:
    """Replay steps and print the differences. Exit with code 1 if there are differences. Collective over COMM_WORLD."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    from mpidp.training.replayer import print_on_rank_0

    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        found = world.bcast((against if options.against else inspect_step)(options, world), root=0)
        print_on_rank_0(world, found["verdict"] if found["same"] else "")
    if world.rank == 0 and options.json:
        print(json.dumps(found))
    if not found["same"]:
        raise MpidpError.on_every_rank(found["verdict"])


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UsageError if the command line is invalid. Pure."""
    parser = Parser(prog=program("mpidp.replay"), usage="[mpirun -np N] %(prog)s RUN [--step S] [--against RUN2] [options]",
                    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run")
    add("--step", type=int, metavar="S", help="last step to replay (default: the last recorded step). The micro-batches of "
                                              "this step are listed")
    add("--against", metavar="RUN2", help="compare RUN with RUN2 up to --step, and find the first step and tensor that differ")
    add_data(parser, "that the run was trained on", default="the run's data.path")
    add("--device", choices=("auto", "cpu", "cuda"), help="device to compute on (default: the run's)")
    add("--threads", type=int, help="CPU threads per rank (default: the run's)")
    add_opening(parser)
    add_json(parser)
    return parser.parse_args(list(arguments))


def inspect_step(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Replay the steps up to options.step, compare the results with the run's log and checkpoints, and list the micro-batches
    of options.step. Return the results as plain values. Collective over world."""
    from mpidp.training.replayer import Replay, print_on_rank_0, read_record

    record = read_record(options.run, world)
    step = record.last if options.step is None else options.step
    replay = Replay(record, step, options, world)
    found: dict[str, Any] = {"run": options.run, "step": step, "from": replay.source, "differences": []}
    count, printed = 0, time.monotonic()
    for seen in replay.batches(inside=True):
        facts = replay.compare(seen)
        bad = [f"step {seen.step}: {text}" for same, text in facts if not same]
        if seen.step == step or (bad and not found["differences"]) or time.monotonic() > printed + 3:
            printed = time.monotonic()
            print_on_rank_0(world, f"step {seen.step}  " + ("  ".join(text for _, text in facts) or "not recorded"))
        _show(world, seen.micro_batches)
        found |= {"batch": seen.batch, **seen.figures, "micro_batches": seen.micro_batches}
        found["differences"] += bad
        count += len(facts)
    same, kind = not found["differences"], "close to" if replay.loose else "the same as"
    verdict = f"{options.run}: steps {replay.start + 1} to {step}, replayed from {replay.source}, are {'' if same else 'not '}"
    verdict += f"{kind} the record" + (f" ({count} comparisons)" if same else f"; first difference: {found['differences'][0]}")
    return found | {"same": same, "verdict": verdict}


def _show(world: Any, rows: list[dict[str, Any]]) -> None:
    """Print a line for each micro-batch in `rows`, on rank 0. If its loss or gradient norm is the largest or is not finite, the
    line says so and shows the training windows of the micro-batch."""
    from mpidp.training.replayer import print_on_rank_0

    print_on_rank_0(world, f"{'micro-batch':>11} {'lane':>5} {'loss':>11} {'grad_norm':>11}" if rows else "")
    tops = {key: max((row[key] for row in rows if row[key] is not None), default=0.0) for key in ("loss", "grad_norm")}
    for row in rows:
        marks = [f"{key} {'not finite' if row[key] is None else 'largest'}" for key in tops if row[key] in (None, tops[key])]
        loss, norm = (math.nan if row[key] is None else row[key] for key in tops)
        where = f"   {', '.join(marks)}; windows {row['windows']}" if marks else ""
        print_on_rank_0(world, f"{row['micro_batch']:>11} {row['lane']:>5} {loss:>11.6g} {norm:>11.6g}{where}")


def against(options: argparse.Namespace, world: Any) -> dict[str, Any]:
    """Compare two runs, options.run and options.against: first the values in their logs, then the tensors of their replays.
    Return the results as plain values, with the first step and tensor that differ. Collective over world."""
    from mpidp.faults.audit import checksum
    from mpidp.training.replayer import FIGURES, Replay, print_on_rank_0, read_record

    records = [read_record(run, world) for run in (options.run, options.against)]
    one, other = (record.lines for record in records)
    both = sorted(one.keys() & other.keys())
    different = {s: [f"{key} {one[s][key]} -> {other[s][key]}" for key in FIGURES if one[s][key] != other[s][key]] for s in both}
    first_different = next((s for s in both if different[s]), 0)
    step, names = options.step or first_different, f"{options.run} and {options.against}"
    found: dict[str, Any] = {"runs": [options.run, options.against], "step": step, "settings": [], "first": None}
    if not step:
        same = f"are the same up to step {both[-1]}, the last in both records"
        verdict = f"{names} {same if both else 'have no step in common'}"
        return found | {"same": bool(both), "verdict": verdict}
    first_different = first_different if first_different <= step else 0
    if first_different:
        print_on_rank_0(world, f"the records differ from step {first_different}: {', '.join(different[first_different])}")
    traces: list[dict[int, tuple[str, dict[str, int]]]] = []
    metas, broken = [], []
    for record in records:
        replay, trace, wrong = Replay(record, step, options, world), {}, ""
        for seen in replay.batches(inside=False):
            where = f"step {seen.step}" if seen.figures else f"the state after step {seen.step}, before the first replayed step"
            trace[seen.batch] = where, seen.gradient | {name: checksum(tensor) for name, tensor in replay.tensors().items()}
            wrong = wrong or next((f"{where}: {text}" for same, text in replay.compare(seen) if not same), "")
        traces.append(trace)
        metas.append(replay.job.record.meta["config"] | {key: replay.job.record.meta[key] for key in ("data", "tokenizer")})
        broken += [f"the record of {record.path} differs from its replay ({wrong})"] if wrong else []
    found["settings"] = [f"{key}: {metas[0][key]} -> {metas[1][key]}" for key in metas[0]
                         if metas[0][key] != metas[1][key] and not key.startswith("run.")]
    print_on_rank_0(world, "settings and data: " + ("; ".join(found["settings"]) or "no difference"))
    first, second = traces
    found["first"] = next(((first[batch][0], name) for batch in sorted(first.keys() & second.keys())
                           for name, bits in first[batch][1].items() if bits != second[batch][1].get(name, bits)), None)
    verdict = f"the replays of {names} are the same up to step {step}"
    if found["first"]:
        verdict = f"{names} differ first in {found['first'][0]}, in the tensor {found['first'][1]}"
    elif first_different:
        verdict += ", so settings and data do not explain why the records differ. A machine computed something wrong "
        verdict += "(train.audit_every detects this)"
    return found | {"same": not (found["first"] or first_different or broken), "verdict": "; ".join([verdict, *broken])}


if __name__ == "__main__":
    run_entry(main)
