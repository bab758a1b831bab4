"""Reads metrics.jsonl to replay an asynchronous run. The file contains the order in which gradients arrived."""

from __future__ import annotations

from pathlib import Path
from typing import Required, TypedDict

from mpidp.errors import UsageError
from mpidp.runtime.json_file import read_json_lines

# Maps the number of each step at which all ranks synchronize (a meeting) to the arrivals since the previous meeting. With
# parameter servers, there is one list per server: the workers in the order in which their gradients arrived. With a quorum, there
# is one list per round (one sum of the gradients that have arrived): the rank of each gradient in the sum.
Order = dict[int, list[list[int]]]


class _Line(TypedDict, total=False):
    step: Required[int]
    arrivals: list[list[int]]


def read_arrivals(log: str, workers: int, servers: int, staleness: int) -> Order:
    """Return {step at which all ranks synchronize: the arrivals since the previous such step} (see Order). `log`: the
    metrics.jsonl of the run to replay, or "" to return {}. `workers`, `servers`: numbers of workers and of parameter servers.
    With a quorum, `servers` is 0 and `workers` is the number of ranks. Raises UsageError if the file cannot be read, or if the
    arrivals are not possible with these numbers and with `staleness` (the setting strategy.staleness). Independent."""
    if not log:
        return {}
    try:
        lines, damaged = read_json_lines(Path(log), _Line)
    except OSError as error:
        raise UsageError(f"strategy.replay={log} cannot be read ({error.strerror}). Give the metrics.jsonl of a run") from error
    if damaged:
        raise UsageError(
            f"strategy.replay={log}: {damaged} lines are damaged, so the order in which gradients arrived is not complete. Give "
            "an undamaged copy of the file"
        )
    found: Order = {line["step"]: line["arrivals"] for line in lines if "arrivals" in line}
    if servers:
        _check_pushes(log, found, workers, servers)
    else:
        _check_rounds(log, found, workers, staleness)
    return found


def _check_pushes(log: str, found: Order, workers: int, servers: int) -> None:
    there = {(1 + max((max(one) for one in order if one), default=-1), len(order)) for order in found.values()}
    if there != {(workers, servers)}:
        of = " and ".join(f"{w} workers and {s} servers" for w, s in sorted(there)) or "no parameter servers"
        raise UsageError(f"strategy.replay={log}: that run had {of}, but this run has {workers} workers and {servers} servers")
    for step, order in found.items():
        if len({one.count(worker) for one in order for worker in range(workers)}) > 1 or any(min(one) < 0 for one in order):
            raise UsageError(f"strategy.replay={log}, step {step}: the recorded order of arrivals is damaged. It must show that "
                             f"each of the {workers} workers sends its gradient of each batch to each server once")


def _check_rounds(log: str, found: Order, ranks: int, staleness: int) -> None:
    """Raise UsageError if the recorded rounds are not possible. A round is one sum of the gradients that have arrived. When
    round i has been summed, at least one rank must have contributed its gradient of batch i, and no rank may have contributed
    its gradient of a later batch. Every rank must have contributed its gradients of all batches up to i - staleness. After the
    last round, every rank must have contributed all of its gradients."""
    for step, rounds in found.items():
        had = [0] * ranks
        for i, joined in enumerate(rounds, 1):
            if not set(joined) <= set(range(ranks)):
                raise UsageError(
                    f"strategy.replay={log}: that run had more ranks than this run ({ranks}). Start as many ranks as that run had"
                )
            for rank in joined:
                had[rank] += 1
            if not i - staleness <= min(had) <= max(had) == i:
                raise UsageError(
                    f"strategy.replay={log}, step {step}: the recorded order of gradients is not possible with {ranks} ranks and "
                    f"strategy.staleness={staleness}. Use the settings of that run"
                )
        if set(had) != {len(rounds)}:
            raise UsageError(f"strategy.replay={log}, step {step}: gradients of some of the {ranks} ranks are missing. Start as "
                             "many ranks as that run had")
    if not found:
        raise UsageError(
            f"strategy.replay={log}: that run had no quorum (no line has the field `arrivals`). Give the metrics.jsonl of a run "
            "with strategy.quorum below 1"
        )
