"""Laws of a timeline: it contains every rank and phase, spans are nested, and training does not change. The same run also tests
the lines of metrics.jsonl that the report reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from mpidp.metrics.jsonl import number
from mpidp.metrics.timeline import RankTimeline, trace
from mpidp.report.__main__ import report
from mpidp.report.read import read
from mpidp.report.waterfall import of_step, waterfall
from mpidp.runtime.world import polite_barrier
from tests.tiny import WORLD, Ran, corpus, pretended, sizes, tiny, train_at

pytestmark = pytest.mark.mpi(min_size=2)
PHASES = {"step", "data", "compute", "forward", "backward", "wait", "update", "reduce", "reduction", "apply", "publish"}


@pytest.fixture(scope="module")
def ran(shared_folder: Path) -> tuple[Ran, Ran, Path]:
    """Return (a plain run, a run with everything turned on, the folder of the second run). Nodes are simulated, so that ranks
    send buckets."""
    ranks = sizes(1, 2, 3)[-1]
    shards = corpus(shared_folder)
    plain = train_at(ranks, tiny(shards, shared_folder / "plain"))
    with pretended(2):
        watched = train_at(ranks, tiny(
            shards, shared_folder / "watched", comm={"bucket_mb": 0.02, "overlap": "thread", "transport": "messages"},
            metrics={"timeline": "3:4", "kernels": True, "tensorboard": True},
        ))
    return plain, watched, shared_folder / "watched"


def spans_of(folder: Path) -> list[dict[str, Any]]:
    """Return the spans of RUN/timeline.json on all ranks. Collective over WORLD."""
    text = (folder / "timeline.json").read_text() if WORLD.rank == 0 else None
    return [one for one in json.loads(WORLD.bcast(text))["traceEvents"] if one["ph"] == "X"]


def rows(spans: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for row in {(one["pid"], one["tid"]) for one in spans}:
        yield [one for one in spans if (one["pid"], one["tid"]) == row]


def test_what_is_watched_learns_the_same(ran: tuple[Ran, Ran, Path]) -> None:
    plain, watched, _ = ran
    assert plain.sha256 == watched.sha256 and plain.learned == watched.learned


def test_every_rank_and_phase_is_there(ran: tuple[Ran, Ran, Path]) -> None:
    spans, ranks = spans_of(ran[2]), ran[1].events("start")[0]["ranks"]
    for rank in range(ranks):
        mine = [one for one in spans if one["pid"] == rank]
        names = [one["name"] for one in mine]
        assert set(names) >= PHASES and names.count("step") == 2
        buckets = {name for name in names if name.startswith("bucket ")}
        assert len(buckets) > 2 and all(names.count(bucket) == 2 for bucket in buckets)
        assert names.count("forward") == names.count("backward") > 0
        assert {one["tid"] for one in mine if one["name"] in buckets} != {0}  # the reducing thread has a row of its own
        assert [one["args"]["step"] for one in mine if one["name"] == "step"] == [3, 4]
        assert (ran[2] / f"timeline_kernels_rank{rank}.json").stat().st_size > 1000
    assert sum(one["name"] == "forward" for one in spans) == 2 * 8  # micro-batches


def test_spans_lie_within_each_other(ran: tuple[Ran, Ran, Path]) -> None:
    """Two spans of a row are disjoint or nested. Times are sorted and start with 0."""
    spans = spans_of(ran[2])
    assert min(one["ts"] for one in spans) == 0 and all(one["dur"] >= 0 for one in spans)
    assert all(a["ts"] <= b["ts"] for a, b in pairwise(spans))
    for row in rows(spans):
        open_: list[float] = []
        for one in row:
            while open_ and open_[-1] <= one["ts"] + 0.002:
                open_.pop()
            end = one["ts"] + one["dur"]
            assert not open_ or end <= open_[-1] + 0.002, one
            open_.append(end)


def test_ranks_wait_for_each_other_at_the_same_time(ran: tuple[Ran, Ran, Path]) -> None:
    """In each step, the waits of all ranks include the moment at which the last rank arrived. This shows that the clocks are
    aligned."""
    waits = [one for one in spans_of(ran[2]) if one["name"] == "wait"]
    for step in (3, 4):
        mine = [(one["ts"], one["ts"] + one["dur"]) for one in waits if one["args"]["step"] == step]
        assert max(begin for begin, _ in mine) <= min(end for _, end in mine) + 1.0  # microsecond


def test_the_report_of_a_real_run(ran: tuple[Ran, Ran, Path]) -> None:
    run = read(ran[2])
    assert len(run.steps) == 6
    assert run.ranks == len(run.steps[0]["rank_compute_seconds"]) == len(run.steps[0]["rank_data_seconds"])
    for line in run.steps:
        assert sum(of_step(line).values()) == pytest.approx(number(line, "step_seconds"), rel=0.2)
    fall = waterfall(run)
    assert sum(fall.shares.values()) == pytest.approx(1.0) and fall.seconds["evaluation"] > 0 and fall.seconds["checkpoint"] > 0
    text = report([run])
    assert "Where the time went" in text and f"rank {run.ranks - 1}" in text and f"mpidp {run.facts['versions']['mpidp']}" in text


def test_scalars_can_be_read_again(ran: tuple[Ran, Ran, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ran[2] / "tensorboard"))
    events.Reload()
    losses = [one.value for one in events.Scalars("steps/train_loss")]
    assert losses == pytest.approx(ran[1].losses) and [one.step for one in events.Scalars("val/val_loss")] == [3, 6]


def test_a_resumed_run_goes_on_without_the_timeline(ran: tuple[Ran, Ran, Path], shared_folder: Path) -> None:
    """Spans of earlier steps are not written again."""
    before = (ran[2] / "timeline.json").stat().st_mtime_ns
    polite_barrier(WORLD)
    longer = tiny(corpus(shared_folder), ran[2], train={"steps": 7}, metrics={"timeline": "3:4"}, optim={"schedule": "constant"})
    assert train_at(1, longer).end["step"] == 7
    assert (ran[2] / "timeline.json").stat().st_mtime_ns == before


def test_tensorboard_that_is_not_here_is_said_before_the_first_step(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mpidp.metrics.track.table

    monkeypatch.setattr(mpidp.metrics.track.table.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        train_at(2, tiny(corpus(shared_folder), shared_folder / "without", metrics={"tensorboard": True}))
    polite_barrier(WORLD)
    assert not (shared_folder / "without/metrics.jsonl").exists()


def test_clocks_of_machines_are_brought_together() -> None:
    """Machine b's clock is 5 s behind, and loses 1 ms in 10 s."""
    one = RankTimeline("a", [("wait", 12.0, 13.0, 0, {})], ["main"], [10.0, 20.0], [0.0, 0.0])
    other = RankTimeline("b", [("wait", 7.0, 8.0, 0, {})], ["main"], [5.0, 15.0], [5.0, 5.001])
    first, second = (span for span in trace([one, other])["traceEvents"] if span["ph"] == "X")
    assert (first["pid"], second["pid"]) == (0, 1) and second["ts"] == pytest.approx(200.0)
    assert second["dur"] == pytest.approx(1e6 + 100)


