"""Predicts how much each method sends and how long its steps take on a cluster, from the link speed and the compute time. Pure.

There are P ranks, n bytes of gradients, links of latency a and bandwidth B, and k ranks per node. `sum` is the time of one
reduction of all gradients over all ranks, which traffic.py computes.

| strategy | seconds per step |
|---|---|
| synchronous | compute + sum, minus the time that comm.overlap hides: at most 2/3 of the last micro-batch (its backward) |
| delayed | the longer of compute and sum |
| local | compute + sum / sync_every |
| local with overlap | compute + max(0, sum - sync_every x compute) / sync_every |
| local, group=pairs | compute + (k n / B + a) / sync_every |
| server | the longer of compute + 2 n k / B + 2 a (on a worker) and w n / B (on a server that has w workers) |

With `local`, all ranks average their models every strategy.meet_every steps. Such a step is called a meeting, and also takes
the time `sum`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpidp.config.defaults import sync_intervals
from mpidp.config.resolve import workers
from mpidp.config.schema import Config, checked, fields_of
from mpidp.errors import UsageError
from mpidp.plan.methods.traffic import Cluster, Sizes, lanes_of, one_sum, sizes_of
from mpidp.plan.ranks.predict import most_micro_batches
from mpidp.strategies.averaging_groups import partition

LOCAL = {"name": "local"}  # averages every 50 steps, or once in shorter runs
METHODS: dict[str, dict[str, dict[str, Any]]] = {  # settings by section; the methods closest to synchronous training come first
    "synchronous": {},
    **{kind: {"comm": {"compress": kind}}
       for kind in ("bf16", "fp16", "int8", "int4", "powersgd", "topk", "int2", "onebit", "randomk")},
    "delayed": {"strategy": {"name": "delayed"}},
    "local": {"strategy": LOCAL},
    **{f"local+{kind}": {"strategy": LOCAL, "comm": {"compress": kind}} for kind in ("int2", "topk")},
    # With the default of meet_every, every average would be a meeting, and no average would overlap with steps.
    "local-overlap": {"strategy": {**LOCAL, "overlap": True, "meet_every": 500}},
    "local-pairs": {"strategy": {"name": "local", "group": "pairs"}},
    "server-async": {"strategy": {"name": "server"}},
}
WORTH = 1.1  # another method is recommended only if its speed, relative to synchronous, is at least this
LONG = 1 << 30  # number of steps of a run that is so long that its end has no influence on means
BACKWARD = 2 / 3  # share of backward in the compute time


def variant(config: Config, name: str) -> Config:
    """Return `config` with the method `name` instead of its own method. Raises UsageError if the other settings do not allow this
    method. Pure."""
    plain = Config()
    base = replace(config, strategy=plain.strategy).with_values(
        comm={"compress": "none", "ratio": 0.0, "ratio_warmup": 0, "momentum": 0.0}
    )
    return checked(base.with_values(**METHODS[name]))


def to_paste(config: Config, other: Config) -> list[str]:
    """Return the command-line settings that change `other` into `config`. Pure."""
    before = other.flat()
    changed = [(key, value) for key, _, value in fields_of(config) if value != before[key]]
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed]


def _sync_intervals(config: Config, steps: int) -> tuple[int, int]:
    return sync_intervals(config.flat(), steps)


def sent_bytes(config: Config, sizes: Sizes, cluster: Cluster, steps: int) -> int:
    """Return the bytes that rank 0 sends in a run of `steps` steps, as metrics.jsonl counts them. The last step counts as a
    meeting (a step at which all ranks synchronize). Pure."""
    if cluster.ranks == 1:
        return 0
    strategy, a_sum = config.strategy, one_sum(config, sizes, cluster).sent_bytes
    every, meet = _sync_intervals(config, steps)
    if strategy.name == "server":
        return steps * sizes.num_bytes
    if strategy.name != "local":
        return steps * a_sum
    meetings = {*range(meet, steps + 1, meet), steps}
    rounds = [step for step in range(every, steps + 1, every) if step not in meetings]
    if strategy.group == "all":
        return (len(meetings) + len(rounds)) * a_sum
    pairs = [partition("pairs", step // every, cluster.ranks, (), 2) for step in rounds]
    own_pairs = [pair for drawn in pairs for pair in drawn if 0 in pair and len(pair) == 2]
    return len(meetings) * a_sum + len(own_pairs) * sizes.num_bytes


def step_seconds(config: Config, sizes: Sizes, cluster: Cluster, compute: float) -> float:
    """Return the mean time of a step in a long run, in seconds. compute: compute time of a step in seconds, if all ranks share
    the micro-batches of the step. Pure."""
    if cluster.ranks == 1:
        return compute
    a_sum, small = one_sum(config, sizes, cluster).seconds(cluster), cluster.small_exchange_seconds
    every, meet = _sync_intervals(config, LONG)
    k, name, most = cluster.ranks_a_node, config.strategy.name, most_micro_batches(lanes_of(config), cluster.ranks)
    once = sizes.num_bytes / cluster.bandwidth_bytes_per_second
    if name == "synchronous":
        hidden = 0.0 if config.comm.overlap == "none" or cluster.nodes == 1 else BACKWARD * compute / most
        return compute + max(0.0, a_sum - hidden) + small
    if name == "delayed":
        return max(compute, a_sum + small) + small / meet
    if name == "server":
        working = workers(config, cluster.ranks)
        own = compute * most_micro_batches(lanes_of(config), working) / most
        trip = own + 2 * once * min(k, working) + 2 * cluster.latency_seconds
        return max(trip, working * once / (cluster.ranks - working)) + (once + small) / meet
    rounds, meeting = meet // every - 1, a_sum + small  # the number of averages between two meetings, and the time of a meeting
    if config.strategy.group != "all":
        return compute + (rounds * (k * once + cluster.latency_seconds) + meeting) / meet
    exposed = max(0.0, a_sum - every * compute) if config.strategy.overlap else a_sum
    return compute + (rounds * (exposed + small) + meeting + small) / meet


@dataclass(frozen=True)
class MethodRow:
    """The predicted or measured figures of a method."""

    method: str
    settings: list[str]  # settings that select the method on the command line
    refused: str = ""  # the reason why the method cannot be used, or empty
    sent_bytes: float | None = None  # bytes that rank 0 sends per step
    step_seconds: float | None = None
    speed: float | None = None  # relative to synchronous; 2.0 means half the step time
    loss: float | None = None  # loss at the end of a trial


def predict(config: Config, vocab_size: int, cluster: Cluster, compute: float, wanted: Sequence[str] = ()) -> list[MethodRow]:
    """Predict the bytes sent and the step time of the method `synchronous` and of the methods in `wanted`. If `wanted` is
    empty, predict them for all methods. Return the rows in the order of METHODS. compute: compute time of a step, in seconds.
    Raises UsageError if a wanted method is unknown. Pure."""
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise UsageError(f"--methods: there is no method {', '.join(unknown)}. The methods are {', '.join(METHODS)}")
    sizes, rows = sizes_of(config, vocab_size), list[MethodRow]()
    for name in [name for name in METHODS if not wanted or name in ("synchronous", *wanted)]:
        settings: list[str] = []
        try:
            chosen = variant(config, name)
            settings = to_paste(chosen, config)
            if (working := workers(chosen, cluster.ranks)) > (count := lanes_of(config).num_lanes):
                raise UsageError(f"{working} ranks, but the global batch has {count} lanes (sequences of micro-batches; each "
                                 "rank needs at least one). Raise train.global_batch")
            if chosen.comm.compress == "powersgd" and cluster.ranks == 1:
                raise UsageError("comm.compress=powersgd needs at least two ranks, because with one rank nothing is sent")
            steps = _sync_intervals(chosen, LONG)[1]
            sent = sent_bytes(chosen, sizes, cluster, steps) / steps
            rows.append(MethodRow(name, settings, "", sent, step_seconds(chosen, sizes, cluster, compute)))
        except UsageError as error:
            rows.append(MethodRow(name, settings, str(error)))
    return with_speeds(rows)


def with_speeds(rows: Sequence[MethodRow]) -> list[MethodRow]:
    """Return the rows with their speeds relative to the row `synchronous`. If there is no such row, the speeds are None. Pure."""
    base = next((row.step_seconds for row in rows if row.method == "synchronous"), None)
    return [replace(row, speed=base / row.step_seconds if base and row.step_seconds else None) for row in rows]


def recommend(rows: Sequence[MethodRow], tried: bool) -> tuple[str, str]:
    """Return (recommended method, reason). tried: whether the rows are results of trials. Trials are compared by loss.
    Predictions are compared by speed: of the methods within 10% of the fastest, the one closest to synchronous training is
    recommended. A method that is less than 10% faster than synchronous is never recommended. Pure."""
    there = {row.method: row for row in rows if not row.refused and row.step_seconds and row.speed and (row.loss or not tried)}
    if "synchronous" not in there:
        return "", "no recommendation: there is no synchronous run for comparison."
    base, worth = there["synchronous"], [row for row in there.values() if (row.speed or 0.0) >= WORTH]
    if not worth:
        return base.method, "synchronous: no other method makes a step at least 10% faster."
    if tried:
        best = min(worth, key=lambda row: row.loss or math.inf)
        if (best.loss or math.inf) >= (base.loss or math.inf):
            return base.method, f"synchronous: no faster method reached a lower loss in the same time (closest: {best.method})."
        return best.method, (
            f"{best.method}: loss {best.loss:.4f}, while synchronous reached {base.loss:.4f} in the same time. A step is "
            f"{best.speed:.1f}x faster. A longer run may rank the methods differently. Compare again later in training."
        )
    fastest = max(worth, key=lambda row: row.speed or 0.0)
    best = next(row for row in worth if (row.speed or 0.0) * WORTH >= (fastest.speed or 0.0))
    other = f"the fastest is {fastest.method}; no method closer to synchronous training is within 10% of it"
    return best.method, (
        f"{best.method}: {best.speed:.1f}x faster per step than synchronous; {'it is the fastest' if best is fastest else other}."
        " This compares only the speed. Use --run to compare the loss reached in the same time."
    )
