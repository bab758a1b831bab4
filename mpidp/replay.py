"""`python -m mpidp.replay RUN --step S` or `python -m mpidp.replay RUN --against RUN2`: a run's steps anew, and who is right.

In memory, on one rank or more, whatever the run had: from the newest checkpoint before the step, or from the seed. What comes
out is compared with the run's metrics.jsonl and checkpoints; nothing is written there. docs/replay.md says how to use it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from typing import Any

from mpidp.errors import MpidpError
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.training.replayer import FIGURES, Replay, read_record, say


def main() -> None:
    """Command line -> what differs; exit code 1 when something does. Collective over COMM_WORLD."""
    parser = Parser(prog="python -m mpidp.replay", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, metavar="S", help="replay up to this step, and look into it; default: the last")
    parser.add_argument("--against", metavar="RUN2", help="where do two runs part, and why? With --step: have they by S?")
    parser.add_argument("--data", metavar="DIR", help="shards; default: the run's data.path, as seen from here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the run's")
    parser.add_argument("--threads", type=int, help="CPU threads a rank; default: the run's")
    parser.add_argument("--json", action="store_true", help="one JSON line on standard output, everything else on standard error")
    options, world = begin(parser.parse_args)
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        found = world.bcast((against if options.against else look)(options, world), root=0)
        say(world, found["verdict"] if found["same"] else "")
    if world.rank == 0 and options.json:
        print(json.dumps(found))
    if not found["same"]:
        raise MpidpError.on_every_rank(found["verdict"])


def look(options: Namespace, world: Any) -> dict[str, Any]:
    """Replay up to options.step, compare with the record, and look into that step. Collective over world."""
    record = read_record(options.run, world)
    step = record.last if options.step is None else options.step
    replay = Replay(record, step, options, world)
    found: dict[str, Any] = {"run": options.run, "step": step, "from": replay.source, "differences": []}
    count, said = 0, time.monotonic()
    for seen in replay.batches(inside=True):
        facts = replay.compare(seen)
        bad = [f"step {seen.step}: {words}" for same, words in facts if not same]
        if seen.step == step or (bad and not found["differences"]) or time.monotonic() > said + 3:
            said = time.monotonic()
            say(world, f"step {seen.step}  " + ("  ".join(words for _, words in facts) or "not recorded"))
        _show(world, seen.micro_batches)
        found |= {"batch": seen.batch, **seen.figures, "micro_batches": seen.micro_batches}
        found["differences"] += bad
        count += len(facts)
    same, kind = not found["differences"], "close to" if replay.loose else "the same as"
    verdict = f"{options.run}: steps {replay.start + 1} to {step}, replayed from {replay.source}, are {'' if same else 'not '}"
    verdict += f"{kind} what was recorded" + (f" ({count} comparisons)" if same else f", first: {found['differences'][0]}")
    return found | {"same": same, "verdict": verdict}


def _show(world: Any, rows: list[dict[str, Any]]) -> None:
    """A line a micro-batch; the largest, and what is not finite, with its windows of the training split."""
    say(world, f"{'micro-batch':>11} {'lane':>5} {'loss':>11} {'grad_norm':>11}" if rows else "")
    tops = {key: max((row[key] for row in rows if row[key] is not None), default=0.0) for key in ("loss", "grad_norm")}
    for row in rows:
        marks = [f"{key} {'not finite' if row[key] is None else 'largest'}" for key in tops if row[key] in (None, tops[key])]
        loss, norm = (math.nan if row[key] is None else row[key] for key in tops)
        where = f"   {', '.join(marks)}; windows {row['windows']}" if marks else ""
        say(world, f"{row['micro_batch']:>11} {row['lane']:>5} {loss:>11.6g} {norm:>11.6g}{where}")


def against(options: Namespace, world: Any) -> dict[str, Any]:
    """The first step and tensor in which two runs part, by their records and by replays of both. Collective over world."""
    from mpidp.faults.audit import checksum

    records = [read_record(run, world) for run in (options.run, options.against)]
    one, other = (record.lines for record in records)
    both = sorted(one.keys() & other.keys())
    apart = {s: [f"{key} {one[s][key]} -> {other[s][key]}" for key in FIGURES if one[s][key] != other[s][key]] for s in both}
    parted = next((s for s in both if apart[s]), 0)
    step, names = options.step or parted, f"{options.run} and {options.against}"
    found: dict[str, Any] = {"runs": [options.run, options.against], "step": step, "settings": [], "first": None}
    if not step:
        same = f"the same up to step {both[-1]}, the last that both recorded" if both else "without a step that both recorded"
        return found | {"same": bool(both), "verdict": f"{names} are {same}"}
    parted = parted if parted <= step else 0
    say(world, f"the records part at step {parted}: {', '.join(apart[parted])}" if parted else "")
    traces: list[dict[int, tuple[str, dict[str, int]]]] = []
    metas, broken = [], []
    for record in records:
        replay, trace, wrong = Replay(record, step, options, world), {}, ""
        for seen in replay.batches(inside=False):
            where = f"step {seen.step}" if seen.figures else f"the state after step {seen.step}, from which they begin"
            trace[seen.batch] = where, seen.gradient | {name: checksum(tensor) for name, tensor in replay.tensors().items()}
            wrong = wrong or next((f"{where}: {words}" for same, words in replay.compare(seen) if not same), "")
        traces.append(trace)
        metas.append(replay.job.record.meta["config"] | {key: replay.job.record.meta[key] for key in ("data", "tokenizer")})
        broken += [f"the record of {record.path} is not what its replay gives ({wrong})"] if wrong else []
    found["settings"] = [f"{key}: {metas[0][key]} -> {metas[1][key]}" for key in metas[0]
                         if metas[0][key] != metas[1][key] and not key.startswith("run.")]
    say(world, "settings and data: " + ("; ".join(found["settings"]) or "no difference"))
    mine, theirs = traces
    found["first"] = next(((mine[batch][0], name) for batch in sorted(mine.keys() & theirs.keys())
                           for name, bits in mine[batch][1].items() if bits != theirs[batch][1].get(name, bits)), None)
    verdict = f"{names} are the same up to step {step}, replayed here"
    if found["first"]:
        verdict = f"{names} part in {found['first'][0]}: the first tensor that differs is {found['first'][1]}"
    elif parted:
        verdict += ": neither settings nor data parted them, but a machine or a fault (train.audit_every finds faults)"
    return found | {"same": not (found["first"] or parted or broken), "verdict": "; ".join([verdict, *broken])}


if __name__ == "__main__":
    run_entry(main)
