"""The order in which gradients arrived, as metrics.jsonl has it: what an asynchronous run is replayed by."""

from __future__ import annotations

import json
from pathlib import Path

from mpidp.errors import UsageError

# By the step of a meeting, of what arrived since the one before. Parameter servers: of each server, the workers in the order of
# their pushes. A quorum: of each round, the ranks whose contributions joined it, once for each.
Order = dict[int, list[list[int]]]


def read_arrivals(log: str, workers: int, servers: int, staleness: int) -> Order:
    """Of a run with as many workers and servers; without servers, of a quorum that was as patient. UsageError when the file is
    none of such a run. Independent."""
    if not log:
        return {}
    found: Order = {}
    try:
        for line in Path(log).read_text().splitlines():
            record = json.loads(line)
            if "arrivals" in record:
                found[int(record["step"])] = record["arrivals"]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"strategy.replay={log}: cannot be read ({error}); give the metrics.jsonl of a run") from error
    if servers:
        _check_pushes(log, found, workers, servers)
    else:
        _check_rounds(log, found, workers, staleness)
    return found


def _check_pushes(log: str, found: Order, workers: int, servers: int) -> None:
    there = {(1 + max((max(one) for one in order if one), default=-1), len(order)) for order in found.values()}
    if there != {(workers, servers)}:
        of = " and ".join(f"of {w} workers and {s} servers" for w, s in sorted(there)) or "of no parameter server"
        raise UsageError(f"strategy.replay={log} is {of}: not of {workers} workers and {servers} servers as this run is")


def _check_rounds(log: str, found: Order, ranks: int, staleness: int) -> None:
    """Whoever repeats them must neither wait for ever nor need more memory than it has: in round i somebody gave batch i, nobody
    gave more, nobody is later than the bound, and at the end all is in."""
    for step, rounds in found.items():
        had = [0] * ranks
        for i, joined in enumerate(rounds, 1):
            if not set(joined) <= set(range(ranks)):
                raise UsageError(f"strategy.replay={log} is of more than {ranks} ranks, as this run has")
            for rank in joined:
                had[rank] += 1
            if not i - staleness <= min(had) <= max(had) == i:
                raise UsageError(
                    f"strategy.replay={log}, step {step}: no order of {ranks} ranks, of which none is later than "
                    f"strategy.staleness={staleness}"
                )
        if set(had) != {len(rounds)}:
            raise UsageError(f"strategy.replay={log}, step {step}: not all that {ranks} ranks computed has arrived")
    if not found:
        raise UsageError(f"strategy.replay={log} is of a run without a quorum: its lines tell of no arrivals")
