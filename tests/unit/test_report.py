"""Laws of the report: shares add up to the total time, every measurement is in the right part, and nothing else is claimed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpidp.config.schema import Config, fields_of, to_toml
from mpidp.errors import UsageError
from mpidp.metrics.jsonl import MetricsFile, took
from mpidp.report.__main__ import named, report
from mpidp.report.charts import Curve, curves, duration, short, thinned, ticks
from mpidp.report.compare import scaling, scaling_of
from mpidp.report.costs import costs
from mpidp.report.pictures import draw
from mpidp.report.read import RecordedRun, read
from mpidp.report.sections import of_steps, usual_speed
from mpidp.report.waterfall import PARTS, of_step, waterfall

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "nodes": {"one": 1, "two": 1}, "energy_of": ["cpu"], "energy_not": "", "parameters": 1234, "versions": {"torch": "9"},
    "data": {"path": "d", "index_sha256": "ab" * 32, "train_tokens": 5000},
}


def start(step: int = 0, ranks: int = 2, at: float = 1000.0, **more: Any) -> dict[str, Any]:
    return {"event": "start", "step": step, "ranks": ranks, "setup_seconds": 4.0, "unix_seconds": at, **FACTS, **more}


def step(number: int, at: float, compute: tuple[float, ...] = (0.3, 0.5), **more: Any) -> dict[str, Any]:
    """A step of 1 s on rank 0: 0.1 data, compute, waiting until all arrived after 0.75, 0.2 update, 0.05 between them."""
    return {
        "step": number, "train_loss": 5.0 / number, "tokens": 100 * number, "tokens_per_second": 100.0, "mfu": None,
        "data_seconds": 0.1, "compute_seconds": compute[0], "comm_wait_seconds": 0.65 - compute[0], "update_seconds": 0.2,
        "step_seconds": 1.0, "comm_bytes": 8, "unix_seconds": at, "rank_compute_seconds": list(compute),
        "rank_data_seconds": [0.1] * len(compute), "energy_joules": 30.0, **more,
    }


END = {"event": "end", "step": 4, "reason": "steps", "weights_sha256": "ff", "evaluate_seconds": 0.5, "checkpoint_seconds": 0.5}
WHOLE = [
    start(), *(step(n, 1000.0 + n) for n in (1, 2)), {"step": 2, "val_loss": 2.5, "val_tokens": 9, "unix_seconds": 1003.0},
    step(3, 1005.0, evaluate_seconds=1.0), step(4, 1006.0), {**END, "unix_seconds": 1007.5},
]


def write(folder: Path, lines: list[dict[str, Any]], **settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(Config().with_values(**settings)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_second_is_where_it_belongs(tmp_path: Path) -> None:
    """4 s of start, 4 steps of 1 s, 1.5 s of evaluations, 0.5 s of a checkpoint, the rest unknown."""
    fall = waterfall(read(write(tmp_path / "run", WHOLE)))
    assert fall.whole == pytest.approx(11.5) and list(fall.seconds) == list(PARTS)
    found = {part: seconds for part, seconds in fall.seconds.items() if seconds > 1e-9}
    assert found == pytest.approx({
        "ideal": 1.6, "straggler": 0.4, "communication": 0.6, "data": 0.4, "update": 0.8, "evaluation": 1.5, "checkpoint": 0.5,
        "start": 4.0, "other": 1.7,
    })
    assert fall.goodput == pytest.approx(3.8 / 11.5)
    speeds = list(fall.speeds().values())
    assert speeds[0] == pytest.approx(400 / 1.6) and speeds[-1] == pytest.approx(400 / 11.5)
    assert speeds == sorted(speeds, reverse=True)


def test_a_slow_step_is_told_apart_from_a_usual_one(tmp_path: Path) -> None:
    """Of 12 steps one computes 0.2 s longer on all ranks; the fastest tenth is taken as ideal."""
    lines = [start(), *(step(n, 1000.0 + n, (0.5, 0.5) if n == 7 else (0.3, 0.3)) for n in range(1, 13))]
    fall = waterfall(read(write(tmp_path / "run", lines)))
    assert fall.seconds["ideal"] == pytest.approx(12 * 0.3) and fall.seconds["slowdown"] == pytest.approx(0.2)


SECONDS = st.floats(0, 1e4) | st.sampled_from([0.0, 1e-9])


@given(st.lists(st.tuples(*[SECONDS] * 6, st.lists(SECONDS, max_size=4), st.booleans()), min_size=1, max_size=12))
def test_shares_add_up_to_all_of_the_time(rows: list[tuple[Any, ...]]) -> None:
    """With any clocks: also if parts are longer than the whole, or other ranks are slower than rank 0's step."""
    lines: list[dict[str, Any]] = []
    at = 0.0
    for i, (data, compute, wait, update, stall, whole, ranks, dated) in enumerate(rows):
        at += whole
        lines.append(
            {
                "step": i + 1,
                "train_loss": 1.0,
                "tokens": i + 1,
                "data_seconds": data,
                "compute_seconds": compute,
                "comm_wait_seconds": wait,
                "update_seconds": update,
                "stall_seconds": stall,
                "step_seconds": whole,
                "slowest_cost_seconds": stall,
                **({"rank_compute_seconds": ranks, "rank_data_seconds": ranks[::-1]} if ranks else {}),
                **({"unix_seconds": at} if dated else {}),
            }
        )
        parts = of_step(lines[-1])
        assert min(parts.values()) > -1e-9
        assert math.fsum(parts.values()) == pytest.approx(max(whole, data + compute + wait + update), rel=1e-9, abs=1e-9)
    fall = waterfall(RecordedRun(Path("x"), "x", {}, lines))
    assert fall.whole >= sum(took(lines)) - 1e-6
    if fall.whole:
        assert math.fsum(fall.shares.values()) == pytest.approx(1.0, rel=1e-9)
        assert list(fall.speeds().values())[-1] == pytest.approx(len(rows) / fall.whole)


def test_a_straggler_is_told_apart_from_communication(tmp_path: Path) -> None:
    plain = of_step(step(1, 0.0, (0.3, 0.3)))
    slow = of_step(step(1, 0.0, (0.3, 0.6)))
    assert plain["straggler"] == pytest.approx(0.0) and plain["communication"] == pytest.approx(0.35)
    assert slow["straggler"] == pytest.approx(0.15) and slow["communication"] == pytest.approx(0.05)
    late_data = of_step(step(1, 0.0, (0.3, 0.3), rank_data_seconds=[0.1, 0.4]))
    assert late_data["straggler"] == pytest.approx(0.15) and late_data["data"] == pytest.approx(0.25)


def test_the_speed_is_that_of_all_ranks(tmp_path: Path) -> None:
    """The ranks meet every four steps. The lines between two meetings describe one rank of two, and count as no speed."""
    meets = [{"tokens": 100 * (n // 4 * 4), "tokens_per_second": 100.0 if n % 4 == 0 else 50.0} for n in range(1, 13)]
    run = read(write(tmp_path / "run", [start(), *(step(n, 1000.0 + n, **more) for n, more in enumerate(meets, 1))]))
    assert usual_speed(run) == 100.0 and of_steps(run, "tokens_per_second") == [(4, 100.0), (8, 100.0), (12, 100.0)]
    assert scaling([run, run]).rows[0].speed == 100.0
    before = [start(ranks=1), *(step(n, 1000.0 + n, tokens_per_second=50.0) for n in range(1, 5))]
    jobs = [*before, start(4, ranks=2, at=1005.0), step(5, 1006.0)]
    assert usual_speed(read(write(tmp_path / "jobs", jobs))) == 100.0  # the last job has two ranks, like the figure `ranks`
    assert len(of_steps(run, "comm_bytes")) == 12
    every = read(write(tmp_path / "every", WHOLE))
    assert every.meetings == every.steps


def test_what_a_restart_costs(tmp_path: Path) -> None:
    """A job ends after step 4, and the next resumes from step 2 an hour later: two steps are lost, and the hour belongs to no
    job."""
    path = write(tmp_path / "run", [start(), *(step(n, 1000.0 + n) for n in (1, 2, 3, 4))]) / "metrics.jsonl"
    metrics = MetricsFile(path, step=2, next_batch=2)
    assert metrics.lost == pytest.approx({"lost_seconds": 2.0, "lost_steps": 2, "lost_joules": 60.0})
    for line in (start(2, at=4600.0, **metrics.lost), {"event": "resume", "step": 2}, step(3, 4601.0), step(4, 4602.0)):
        metrics.write(line)
    metrics.close()
    run = read(tmp_path / "run")
    fall = waterfall(run)
    assert fall.whole == pytest.approx(4 + 2 + 2 + 4 + 2) and fall.seconds["lost"] == 2.0 and fall.seconds["start"] == 8.0
    assert costs(run, 0, 0).joules == pytest.approx(6 * 30.0)
    again = MetricsFile(path, step=0, next_batch=0)  # back to the beginning; the earlier loss still counts
    assert again.lost == pytest.approx({"lost_seconds": 2 + 2 + 4 + 2, "lost_steps": 6, "lost_joules": 180.0})
    again.close()


def test_bytes_of_skipped_batches_are_counted(tmp_path: Path) -> None:
    skipped = {"event": "skipped", "step": 2, "batch": 2, "grad_norm": None, "step_seconds": 1.0, "comm_bytes": 8}
    assert "Rank 0 sent 40B, 10B per step" in report([read(write(tmp_path / "run", [*WHOLE[:3], skipped, *WHOLE[3:]]))])
    assert "Rank 0 sent 32B, 8B per step" in report([read(write(tmp_path / "plain", WHOLE))])


def test_lost_steps_cost_the_machines_that_computed_them(tmp_path: Path) -> None:
    """A job on two machines loses 2 s of steps. The next job has four machines."""
    path = write(tmp_path / "run", [start(), *(step(n, 1000.0 + n) for n in (1, 2, 3, 4))]) / "metrics.jsonl"
    metrics = MetricsFile(path, step=2, next_batch=2)
    four = {"nodes": {"one": 1, "two": 1, "three": 1, "four": 1}}
    for line in (start(2, at=4600.0, **metrics.lost, **four), step(3, 4601.0)):
        metrics.write(line)
    metrics.close()
    assert costs(read(tmp_path / "run"), 0, 0).node_hours == pytest.approx((2 * (4 + 4) + 4 * (4 + 1)) / 3600)
    assert costs(read(write(tmp_path / "cut", WHOLE[1:])), 0, 0).node_hours is None  # the line with the hosts is missing


def test_in_one_process_the_way_back_is_counted_once(tmp_path: Path) -> None:
    """It returned at 1004.5 and began again at 1005: 2.5 s were lost, and half a second passed until it continued."""
    path = write(tmp_path / "run", [start(), *(step(n, 1000.0 + n) for n in (1, 2, 3, 4))]) / "metrics.jsonl"
    metrics = MetricsFile(path, step=2, next_batch=2)
    metrics.write(start(2, at=1004.5, setup_seconds=8.5, **metrics.lost))
    metrics.write(step(3, 1005.5))
    metrics.close()
    fall = waterfall(read(tmp_path / "run"))
    assert fall.whole == pytest.approx(4 + 5.5) and fall.seconds["lost"] == 2.0 and fall.seconds["start"] == pytest.approx(4.5)


def test_energy_and_cost_are_sums_and_stated_factors(tmp_path: Path) -> None:
    run = read(write(tmp_path / "run", WHOLE))
    found = costs(run, 400.0, 2.0)
    assert found.joules == 120.0 and found.grams == pytest.approx(120 / 3.6e6 * 400)
    assert found.node_hours == pytest.approx(2 * 11.5 / 3600) and found.price == pytest.approx(4 * 11.5 / 3600)
    assert costs(run, 0.0, 0.0).grams is None and costs(run, 0.0, 0.0).price is None
    blind = read(write(tmp_path / "blind", [start(energy_of=[], energy_not="no RAPL counter"), step(1, 1001.0)]))
    assert costs(blind, 400.0, 0.0).joules is None and costs(blind, 400.0, 0.0).why == "no RAPL counter"
    mixed = read(write(tmp_path / "mixed", [*WHOLE[:3], start(2, at=1100.0, energy_of=["cpu", "gpu"]), step(3, 1101.0)]))
    assert costs(mixed, 400.0, 0.0).joules is None and "different" in costs(mixed, 400.0, 0.0).why
    assert "not available: no RAPL counter" in report([blind])


@pytest.mark.parametrize(("rows", "kind", "efficiency"), [
    ([(1, 16, 100.0), (2, 16, 180.0), (4, 16, 200.0)], "strong", [1.0, 0.9, 0.5]),
    ([(1, 8, 100.0), (2, 16, 180.0), (2, 16, 190.0), (2, 16, 100.0)], "weak", [1.0, 0.9]),
    ([(2, 16, 100.0), (4, 16, 180.0)], "strong", [1.0, 0.9]),
    ([(1, 8, 100.0), (2, 12, 180.0)], "", [None, None]), ([(2, 8, 100.0), (2, 16, 180.0)], "", [None]),
])  # fmt: skip
def test_scaling_is_strong_or_weak_or_not_told(rows: list[Any], kind: str, efficiency: list[float | None]) -> None:
    found = scaling_of(rows)
    assert found.kind == kind and [row.efficiency for row in found.rows] == pytest.approx(efficiency)
    assert (kind or "neither" in found.why or "same number of ranks" in found.why) and found.why


def test_other_models_do_not_scale(tmp_path: Path) -> None:
    runs = [read(write(tmp_path / str(n), [start(ranks=n), step(1, 1001.0)], model={"num_layers": n})) for n in (1, 2)]
    assert scaling(runs).rows == [] and "model.num_layers" in scaling(runs).why


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.loads += [tag] * (tag in ("script", "link", "img", "iframe"))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    events = [
        {"event": "skipped", "step": 2, "batch": 2, "grad_norm": None, "step_seconds": 1.0, "unix_seconds": 1002.2},
        {"event": "audit", "step": 2, "ranks": [1], "what": "<u>bad</u> & so", "then": "", "unix_seconds": 1002.3},
    ]
    ended = read(write(tmp_path / "a<u>", [*WHOLE[:3], *events, *WHOLE[3:]]))
    cut = read(write(tmp_path / "b", WHOLE[:3], train={"steps": 9}))
    text = report(named([ended, cut]))
    page = Page(text)
    assert page.open == [] and page.loads == [] and "url(" not in text and "@import" not in text
    assert "<u>" not in text and "&lt;u&gt;bad" in text
    for words in (
        "prefers-color-scheme:dark",
        "@media print",
        "Comparison",
        "is not finished",
        "goodput",
        "1,234 parameters",
        "two (1)",
        "Rank 1 was the slowest in 4 of 4 steps",
        "batches without an update",
    ):
        assert words in text, words
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<style>.*?</style>", "", text))


def test_colours_can_be_read() -> None:
    """Contrast with the background, light and dark: at least 3:1 for lines and bars (WCAG 2.2, 1.4.11), 4.5:1 for text."""
    from mpidp.report.page import DARK, LIGHT, STYLE

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        a, b = sorted((light(one), light(other)))
        return (b + 0.05) / (a + 0.05)

    for scheme, colours, paper in (("light", LIGHT, "#ffffff"), ("dark", DARK, "#12161b")):
        (style,) = {*re.findall(rf":root\{{color-scheme:{scheme};(.*?)\}}", STYLE)}
        assert all(contrast(colour, paper) >= 3 for colour in colours)
        named = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", style))
        assert contrast(named["ink"], paper) >= 7 and contrast(named["soft"], paper) >= 4.5
        assert min(contrast(named[name], paper) for name in ("loss", "ideal")) >= 3


def test_a_run_that_goes_on_now_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", WHOLE[:3])
    assert "no job is working on it" in report([read(folder)])
    (folder / "lock").write_text("{}")
    assert "in progress: step 2 of" in report([read(folder)])


def test_old_records_are_read_for_what_they_say(tmp_path: Path) -> None:
    """Records without times or ranks, and with an incomplete line at the end, are read."""
    old = [
        {
            key: value
            for key, value in line.items()
            if key
            in (
                "step",
                "train_loss",
                "tokens",
                "tokens_per_second",
                "step_seconds",
                "compute_seconds",
                "comm_wait_seconds",
                "slowest_cost_seconds",
                "event",
                "val_loss",
            )
        }
        for line in WHOLE
    ]
    folder = write(tmp_path / "run", old)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train')
    text, run = report([read(folder)]), read(folder)
    assert "have no times" in text and "was not recorded" in text and "not available" in text
    assert waterfall(run).whole == pytest.approx(4.0 + 0.0) and costs(run, 1, 1).node_hours is None


@pytest.mark.parametrize(("made", "said"), [
    ([], "no such folder"), (["x/"], "has no config.toml"), (["x/config.toml"], "has no metrics.jsonl (the run has not"),
    (["x/config.toml", "x/metrics.jsonl"], "has not completed a step yet"),
])  # fmt: skip
def test_what_is_no_run_is_said(tmp_path: Path, made: list[str], said: str) -> None:
    for name in made:
        (tmp_path / "x").mkdir(exist_ok=True)
        if not name.endswith("/"):
            (tmp_path / name).write_text("")
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "x")
    assert said in str(caught.value) and str(tmp_path / "x") in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    run = write(tmp_path / "run", WHOLE)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mpidp.report", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )

    done = command("run", "--out", "page.html", "--price-per-node-hour", "3")
    assert done.returncode == 0 and "page.html: run" in done.stdout, done.stderr
    assert "at the given rate" in (tmp_path / "page.html").read_text()
    for words, said in (
        (["absent"], "no such folder"),
        (["run", "run"], "given twice"),
        (["run", "--out", "no/page.html"], "--out=no/page.html"),
        (["run", "--grams-per-kwh", "-1"], "must not be negative"),
        ([], "RUN"),
    ):
        failed = command(*words)
        assert failed.returncode == 2 and said in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "metrics.jsonl"]  # the run's files are unchanged


def test_pictures(tmp_path: Path) -> None:
    runs = [
        read(write(tmp_path / f"run{n}", [start(ranks=n), *(step(i, 1000.0 + i, (0.3,) * n) for i in (1, 2))])) for n in (1, 2)
    ]
    made = draw(runs, tmp_path / "png")
    assert {path.name for path in made} >= {"loss.png", "throughput.png", "waterfall_run1.png", "ranks_run2.png", "scaling.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made)


def test_axes_are_round_and_thin_curves_keep_their_ends() -> None:
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10] and ticks(3.0, 3.0) == [3.0] and ticks(1e-7, 2e-7)[0] == pytest.approx(1e-7)
    assert [short(value) for value in (0, 999.9, 12345, 2.5e6, 0.00123)] == ["0", "1 k", "12.3 k", "2.5 M", "0.00123"]
    assert [duration(value) for value in (0.25, 12.34, 250, 7265)] == ["250 ms", "12.3 s", "4 min 10 s", "2 h 01 min"]
    points = [(float(i), 1.0) for i in range(1000)]
    thin = thinned(points, 100)
    assert len(thin) == 100 and (thin[0], thin[-1]) == ((0.0, 1.0), (999.0, 1.0))
    assert curves("empty", [Curve("x", [])], "a", "b") == "" and "polyline" not in curves(
        "one", [Curve("x", [(1.0, 2.0)])], "a", "b"
    )


def test_every_setting_of_a_run_is_in_its_page(tmp_path: Path) -> None:
    text = report([read(write(tmp_path / "run", WHOLE, train={"seed": 4242}))])
    assert all(key in text for key, _, _ in fields_of()) and "4242" in text


@pytest.mark.parametrize("evaluations", [0, 1, 2])
def test_charts_of_validation_loss_show_validation_losses(tmp_path: Path, evaluations: int) -> None:
    """Runs with few evaluations get a chart of training losses of its own. A loss that is not finite is left out."""
    lines = [line for line in WHOLE if "val_loss" not in line]
    for n in range(evaluations):
        lines.insert(3, {"step": 2, "val_loss": 2.5 - n / 10, "val_tokens": 9, "unix_seconds": 1003.0})
    lines[2] = lines[2] | {"train_loss": None}
    runs = [write(tmp_path / "a", WHOLE, train={"seed": 1}), write(tmp_path / "b", lines, train={"seed": 2})]
    page = report(named([read(run) for run in runs]))
    charts = dict(re.findall(r"<svg[^>]*aria-label=\"([^:\"]*):[^>]*>(.*?)</svg>", page))
    of_b = re.findall(r"<title>[^<]*b: ([0-9.]+)", charts["Validation loss against tokens"])
    assert len(of_b) == evaluations and all(2.3 < float(loss) < 2.6 for loss in of_b)
    training = charts["Training loss against time"]
    assert len(re.findall(r"<title>[^<]*b: ", training)) == 3 and not re.search(r"b: 0 ", training)


def test_figures_of_tasks_are_shown(tmp_path: Path) -> None:
    lines = [*WHOLE[:4], {"step": 1, "val_tokens": 0, "easy/acc": 0.25, "easy/acc_stderr": 0.1, "<b>/acc": 0.5},
             {"step": 2, "val_loss": 2.0, "val_tokens": 9, "easy/acc": 0.75, "easy/other": None}, *WHOLE[4:]]
    found = report([read(write(tmp_path / "run", lines))])
    row = "<td>easy/acc</td><td class=\"n\">0.25 (step 1)</td><td class=\"n\">0.75 (step 2)</td><td class=\"n\">0.25 to 0.75</td>"
    assert row in found and "&lt;b&gt;/acc" in found and "acc_stderr" not in found and "easy/other" not in found
    assert "<h2>Tasks</h2>" not in report([read(write(tmp_path / "plain", WHOLE))])


def test_the_comparison_names_the_weights(tmp_path: Path) -> None:
    other = [*WHOLE[:-1], WHOLE[-1] | {"weights_sha256": "0123456789abcdef" * 4}]
    runs = [write(tmp_path / "a", other), write(tmp_path / "b", WHOLE), write(tmp_path / "c", WHOLE[:-1])]
    page = report(named([read(run) for run in runs]))
    rows = re.findall(r"<tr>(?:<td[^>]*>[^<]*</td>)+</tr>", page)
    hashes = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[-1] for row in rows if row.count("<td") == 13]
    assert hashes == ["0123456789ab", "ff", "-"]
