"""What each method would send and take on a cluster, foretold from its link and from what computing takes. Pure.

With the P ranks, n bytes, latency a, bandwidth B, k ranks a node and the seconds of a sum of plan_sums.py:

| strategy | seconds a step |
|---|---|
| synchronous | compute + what of the sum comm.overlap cannot hide behind the last micro-batch's backward (2/3 of it) |
| delayed | the longer of compute and sum |
| local | compute + sum / sync_every; with overlap, what of a sum is not hidden by a round's computing, and all at a meeting |
| local, group=pairs | compute + k n / B + a a round, and a sum at a meeting |
| server | the longer of a worker's round trip, compute + 2 n k / B + 2 a, and of what its server's link takes: n / B a worker |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpidp.config.defaults import rhythm
from mpidp.config.resolve import workers
from mpidp.config.schema import Config, checked, fields_of
from mpidp.errors import UsageError
from mpidp.planning.methods.traffic import Cluster, Sizes, lanes_of, one_sum, sizes_of
from mpidp.planning.ranks.predict import most_micro_batches
from mpidp.strategies.averaging_groups import partition

LOCAL = {"name": "local"}  # every 50 steps, or once where there are fewer
METHODS: dict[str, dict[str, dict[str, Any]]] = {  # settings by section; first those that change least in what is learned
    "synchronous": {},
    **{kind: {"comm": {"compress": kind}}
       for kind in ("bf16", "fp16", "int8", "int4", "powersgd", "topk", "int2", "onebit", "randomk")},
    "delayed": {"strategy": {"name": "delayed"}},
    "local": {"strategy": LOCAL},
    **{f"local+{kind}": {"strategy": LOCAL, "comm": {"compress": kind}} for kind in ("int2", "topk")},
    "local-overlap": {"strategy": {**LOCAL, "overlap": True, "meet_every": 500}},  # every round would be a meeting otherwise
    "local-pairs": {"strategy": {"name": "local", "group": "pairs"}},
    "server-async": {"strategy": {"name": "server"}},
}
WORTH = 1.1  # times as fast as synchronous: for less nothing is put at risk
LONG = 1 << 30  # steps, of a run whose end does not matter
BACKWARD = 2 / 3  # of computing


def variant(config: Config, name: str) -> Config:
    """The run with this method instead of its own. UsageError where they do not go together. Pure."""
    plain = Config()
    base = replace(config, strategy=plain.strategy).with_values(
        comm={"compress": "none", "ratio": 0.0, "ratio_warmup": 0, "momentum": 0.0}
    )
    return checked(base.with_values(**METHODS[name]))


def to_paste(config: Config, other: Config) -> list[str]:
    """What makes the one of the other, on a command line. Pure."""
    before = {key: value for key, _, value in fields_of(other)}
    changed = [(key, value) for key, _, value in fields_of(config) if value != before[key]]
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed]


def _rhythm(config: Config, steps: int) -> tuple[int, int]:
    return rhythm({key: value for key, _, value in fields_of(config)}, steps)


def sent_bytes(config: Config, sizes: Sizes, cluster: Cluster, steps: int) -> int:
    """By rank 0 in the first so many steps, at whose end there is a meeting: what metrics.jsonl adds up to. Pure."""
    if cluster.ranks == 1:
        return 0
    strategy, a_sum = config.strategy, one_sum(config, sizes, cluster).sent_bytes
    every, meet = _rhythm(config, steps)
    if strategy.name == "server":
        return steps * sizes.num_bytes
    if strategy.name != "local":
        return steps * a_sum
    meetings = {*range(meet, steps + 1, meet), steps}
    rounds = [step for step in range(every, steps + 1, every) if step not in meetings]
    if strategy.group == "all":
        return (len(meetings) + len(rounds)) * a_sum
    pairs = [partition("pairs", step // every, cluster.ranks, (), 2) for step in rounds]
    met = [two for drawn in pairs for two in drawn if 0 in two and len(two) == 2]
    return len(meetings) * a_sum + len(met) * sizes.num_bytes


def step_seconds(config: Config, sizes: Sizes, cluster: Cluster, compute: float) -> float:
    """Of a step in the long run. compute: seconds of a step on a rank where all of them share the lanes. Pure."""
    if cluster.ranks == 1:
        return compute
    a_sum, tell = one_sum(config, sizes, cluster).seconds(cluster), cluster.tell_seconds
    every, meet = _rhythm(config, LONG)
    k, name, most = cluster.ranks_a_node, config.strategy.name, most_micro_batches(lanes_of(config), cluster.ranks)
    once = sizes.num_bytes / cluster.bandwidth_bytes_per_second
    if name == "synchronous":
        hidden = 0.0 if config.comm.overlap == "none" or cluster.nodes == 1 else BACKWARD * compute / most
        return compute + max(0.0, a_sum - hidden) + tell
    if name == "delayed":
        return max(compute, a_sum + tell) + tell / meet
    if name == "server":
        working = workers(config, cluster.ranks)
        own = compute * most_micro_batches(lanes_of(config), working) / most
        trip = own + 2 * once * min(k, working) + 2 * cluster.latency_seconds
        return max(trip, working * once / (cluster.ranks - working)) + (once + tell) / meet
    rounds, met = meet // every - 1, a_sum + tell  # rounds between two meetings
    if config.strategy.group != "all":
        return compute + (rounds * (k * once + cluster.latency_seconds) + met) / meet
    seen = max(0.0, a_sum - every * compute) if config.strategy.overlap else a_sum
    return compute + (rounds * (seen + tell) + met + tell) / meet


@dataclass(frozen=True)
class Row:
    """A method, and what is foretold or, once it was tried, was measured of it."""

    method: str
    settings: list[str]  # to paste
    refused: str = ""  # why it cannot be had
    sent_bytes: float | None = None  # a step, by rank 0
    step_seconds: float | None = None
    speed: float | None = None  # times as fast as synchronous
    loss: float | None = None  # reached when tried


def predict(config: Config, vocab_size: int, cluster: Cluster, compute: float, wanted: Sequence[str] = ()) -> list[Row]:
    """Of every method, or of synchronous and those wanted, in their order. UsageError for one that there is not. Pure."""
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise UsageError(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(METHODS)}")
    sizes, rows = sizes_of(config, vocab_size), list[Row]()
    for name in [name for name in METHODS if not wanted or name in ("synchronous", *wanted)]:
        settings: list[str] = []
        try:
            chosen = variant(config, name)
            settings = to_paste(chosen, config)
            if (working := workers(chosen, cluster.ranks)) > (count := lanes_of(config).num_lanes):
                raise UsageError(f"{working} ranks, but the global batch has {count} lanes: raise train.global_batch")
            if chosen.comm.compress == "powersgd" and cluster.ranks == 1:
                raise UsageError("comm.compress=powersgd on one rank: there is nothing to send")
            steps = _rhythm(chosen, LONG)[1]
            sent = sent_bytes(chosen, sizes, cluster, steps) / steps
            rows.append(Row(name, settings, "", sent, step_seconds(chosen, sizes, cluster, compute)))
        except UsageError as error:
            rows.append(Row(name, settings, str(error)))
    return with_speeds(rows)


def with_speeds(rows: Sequence[Row]) -> list[Row]:
    """Beside synchronous, where that is there. Pure."""
    base = next((row.step_seconds for row in rows if row.method == "synchronous"), None)
    return [replace(row, speed=base / row.step_seconds if base and row.step_seconds else None) for row in rows]


def recommend(rows: Sequence[Row], tried: bool) -> tuple[str, str]:
    """(method, why). What was only foretold is judged by speed: of those within a tenth of the fastest, the one that changes
    least in what is learned. What was tried is judged by its loss. Neither leaves synchronous for less than a tenth. Pure."""
    there = {row.method: row for row in rows if not row.refused and row.step_seconds and row.speed and (row.loss or not tried)}
    if "synchronous" not in there:
        return "", "no recommendation: there is no synchronous run to compare with."
    base, worth = there["synchronous"], [row for row in there.values() if (row.speed or 0.0) >= WORTH]
    if not worth:
        return base.method, "synchronous: the link hides nothing worth the risk, no method would make a step 10% faster."
    if tried:
        best = min(worth, key=lambda row: row.loss or math.inf)
        if (best.loss or math.inf) >= (base.loss or math.inf):
            return base.method, f"synchronous: faster methods learned no more in the same time ({best.method} comes nearest)."
        return best.method, (
            f"{best.method}: loss {best.loss:.4f} against {base.loss:.4f} of synchronous in the same time, at {best.speed:.1f} "
            "times its steps. A longer run may rank them otherwise: compare again later in training."
        )
    fastest = max(worth, key=lambda row: row.speed or 0.0)
    best = next(row for row in worth if (row.speed or 0.0) * WORTH >= (fastest.speed or 0.0))
    within = f"none that changes less comes within 10% of the fastest, {fastest.method}"
    beside = "it is the fastest" if best is fastest else within
    return best.method, (
        f"{best.method}: steps {best.speed:.1f} times as fast as synchronous, and {beside}. "
        "This is speed alone: --run tells what is learned in the same time."
    )
