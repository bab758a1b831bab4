"""Laws of the plan: its numbers follow from the formulas and the run's own lines, and it states its assumptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from mpidp.plan import __main__ as planning
from mpidp.plan.__main__ import plan
from mpidp.plan.ranks.measured import read, seconds
from mpidp.plan.ranks.table import duration, table

TOKENS = 2048  # per step
NOISE = {"noise_signal_square": 0.5, "noise_trace": 0.5 * 6144}  # a noise scale of 3 B
TIMES = {"data_seconds": 0.0, "compute_seconds": 0.4, "comm_wait_seconds": 0.05, "update_seconds": 0.03, "step_seconds": 0.5}


def write(run: Path, lines: list[dict[str, Any]], config: str = "", batch: int = 16, lanes: int = 8) -> Path:
    """Write a run's folder with these lines."""
    run.mkdir(parents=True)
    cut = f"global_batch = {batch}\nmicro_batch = 2\nlanes = {lanes}\n"
    (run / "config.toml").write_text(config or f"[model]\nmodel_dim = 128\n\n[train]\n{cut}")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def steps(first: int, last: int, noise: dict[str, float] = NOISE, **more: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for s in range(first, last + 1):
        said = noise if s % 10 == 0 else {}
        lines.append({"step": s, "train_loss": 5.0 - s / 100, "tokens": TOKENS * s, **TIMES, **more, **said})
        if s % 50 == 0:
            lines.append({"step": s, "val_loss": 6.0 - s / 100, "val_tokens": 99})
    return lines


def start(ranks: int, step: int = 0) -> dict[str, Any]:
    return {"event": "start", "step": step, "ranks": ranks, "lanes": 8, "micro_batches": 8}


def test_the_table_follows_from_the_formulas(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [start(2), *steps(1, 200), {"event": "end", "step": 200}])
    found = plan([run], [1, 2, 4, 16])
    assert found["noise"]["noise_scale_tokens"] == pytest.approx(3 * TOKENS)
    assert found["noise"]["quarters_tokens"] == pytest.approx([3 * TOKENS] * 4)
    assert found["noise"]["measurements"] == 10 and found["noise"]["bounds_tokens"] == pytest.approx((3 * TOKENS, 3 * TOKENS))
    assert (found["loss"], found["loss_name"], found["steps"], found["ranks"]) == (4.0, "val_loss", 200, 2)
    assert found["fewest_steps"] == pytest.approx(200 / 4) and found["fewest_tokens"] == pytest.approx(50 * 3 * TOKENS)
    rows = {row["multiple"]: row for row in found["rows"]}
    assert list(rows) == [0.25, 0.5, 1, 2, 4, 8, 16]
    assert [row["lanes"] for row in found["rows"]] == [2, 4, 8, 16, 32, 64, 128]
    for multiple, row in rows.items():
        assert row["tokens"] == TOKENS * multiple and row["global_batch"] == 16 * multiple
        assert row["steps"] == pytest.approx(50 * (1 + 3 / multiple))
    for multiple, ranks, micro_batches in ((1.0, 2, 4), (1.0, 4, 2), (2.0, 4, 4), (16.0, 16, 8), (0.25, 2, 1)):
        expected = rows[multiple]["steps"] * (micro_batches * 0.1 + 0.05 + 0.03)
        assert rows[multiple]["seconds"][str(ranks)] == pytest.approx(expected)
    assert rows[1.0]["seconds"]["1"] == pytest.approx(200 * (8 * 0.1 + 0.03))  # one rank sends nothing
    assert "16" not in rows[1.0]["seconds"]  # 8 lanes
    assert found["measured_step_seconds"] == 0.5
    every = [(s, int(p), m) for m, row in rows.items() for p, s in row["seconds"].items()]
    assert found["fastest"]["seconds"] == min(s for s, _, _ in every)
    assert found["cheapest"]["rank_seconds"] == min(s * p for s, p, _ in every)
    best = {cell["ranks"]: cell for cell in found["best"]}
    for p, cell in best.items():
        assert cell["seconds"] == min(s for s, ranks, _ in every if ranks == p)
    within = [p for p, cell in best.items() if cell["rank_seconds"] <= 2 * found["cheapest"]["rank_seconds"]]
    assert found["worth_ranks"] == max(within)


def test_a_loss_on_the_way(tmp_path: Path) -> None:
    later = steps(101, 200, {"noise_signal_square": 0.5, "noise_trace": 99.0})
    run = write(tmp_path / "run", [start(2), *steps(1, 100), *later])
    found = plan([run], [2], loss=5.25)  # between 5.5 at step 50 and 5.0 at step 100
    assert found["steps"] == pytest.approx(75) and found["loss"] == 5.25
    assert found["noise"]["noise_scale_tokens"] == pytest.approx(3 * TOKENS)  # later measurements do not count for this loss
    assert plan([run], [2], loss=5.9)["steps"] == 50  # the loss is reached at the first evaluation
    with pytest.raises(UsageError, match=r"--loss=3: .* Its lowest val_loss is 4\.0000"):
        plan([run], [2], loss=3.0)


def test_waiting_for_uneven_lanes_is_not_communication(tmp_path: Path) -> None:
    """8 lanes on 3 ranks: rank 0 computes 2 micro-batches and waits for one more."""
    run = write(tmp_path / "run", [start(3), *steps(1, 100, compute_seconds=0.2, comm_wait_seconds=0.13)])
    (timed,) = seconds([read(run)])
    assert (timed.ranks, timed.micro_batch, timed.comm, timed.update) == pytest.approx((3, 0.1, 0.03, 0.03))
    counted = write(tmp_path / "counted", [start(3), *steps(1, 100, compute_seconds=0.3, comm_wait_seconds=0.02, grad_accum=3)])
    (timed,) = seconds([read(counted)])
    assert (timed.micro_batch, timed.comm) == pytest.approx((0.1, 0.02))


def test_a_run_that_went_on_elsewhere_times_both(tmp_path: Path) -> None:
    there = steps(101, 200, compute_seconds=0.22, comm_wait_seconds=0.08)
    run = write(tmp_path / "run", [start(2), *steps(1, 100), {"event": "resume", "step": 100}, start(4, 100), *there])
    two, four = seconds([read(run)])
    assert (two.ranks, two.micro_batch, two.comm) == pytest.approx((2, 0.1, 0.05))
    assert (four.ranks, four.micro_batch, four.comm) == pytest.approx((4, 0.11, 0.08))
    assert plan([run])["ranks"] == 4


def test_a_slow_beginning_is_not_timed(tmp_path: Path) -> None:
    lines = [*steps(1, 6, compute_seconds=40.0)[:3], *steps(4, 10)]
    (timed,) = seconds([read(write(tmp_path / "run", [start(2), *lines]))])
    assert timed.micro_batch == pytest.approx(0.1)


def test_several_runs_are_interpolated(tmp_path: Path) -> None:
    """With different batches: the times of a micro-batch and of communication are separated."""
    a = write(tmp_path / "a", [start(2), *steps(1, 100)])
    b = write(tmp_path / "b", [start(4), *steps(1, 20, {}, compute_seconds=0.2, comm_wait_seconds=0.07)], batch=32, lanes=16)
    found = plan([a, b], [8])  # 4 micro-batches per rank in b
    assert [one["micro_batch"] for one in found["measured"]] == pytest.approx([0.1, 0.05])
    present = next(row for row in found["rows"] if row["multiple"] == 1)
    assert present["seconds"]["8"] == pytest.approx(100 * (0.05 + 0.09 + 0.03))


def test_other_models_do_not_time_this_one(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [start(2), *steps(1, 100)])
    other = "[model]\nmodel_dim = 64\n[train]\nglobal_batch = 8\nmicro_batch = 4\nlanes = 2\n"
    b = write(tmp_path / "b", [start(2), *steps(1, 100)], other)
    with pytest.raises(UsageError, match=r"differ in model\.model_dim, train\.micro_batch"):
        plan([a, b])


def test_ranks_that_are_not_said_are_one_and_that_is_said(tmp_path: Path) -> None:
    run = write(tmp_path / "old", steps(1, 100, compute_seconds=0.8, comm_wait_seconds=0.0))
    found = plan([run])
    assert found["ranks"] == 1 and found["ranks_not_said"] == [str(run)]
    text = table(found)
    assert f"The number of ranks is missing in metrics.jsonl and assumed to be 1: {run}." in text
    assert "Communication was not measured" in text


def test_lines_and_fields_that_are_missing_or_broken_are_left_out(tmp_path: Path) -> None:
    whole = [start(2), *steps(1, 100)]
    want = plan([write(tmp_path / "whole", whole)])
    odd: list[dict[str, Any]] = [
        {"step": None}, {"no": "step"}, {"event": "skipped", "step": 100, "batch": 3, "grad_norm": None},
        {"step": 100, "tokens": TOKENS * 100, "compute_seconds": None, "noise_signal_square": None, "noise_trace": 3.0},
    ]  # fmt: skip
    run = write(tmp_path / "odd", [*whole, *odd])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[]\n7\n"x"\n{"step": 101, "tok')
    assert {**plan([run]), "run": want["run"]} == want
    bare = [{k: v for k, v in line.items() if k not in ("data_seconds", "update_seconds", "step_seconds")} for line in whole]
    found = plan([write(tmp_path / "bare", bare)])
    assert found["measured_step_seconds"] is None and found["measured"][0]["update"] == 0.0
    assert "* this run   !" in table(found)


def test_no_evaluation_but_the_same_end(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [line for line in [start(2), *steps(1, 100)] if "val_loss" not in line])
    found = plan([run])
    assert (found["loss"], found["loss_name"], found["steps"]) == (4.0, "train_loss", 100)
    with pytest.raises(UsageError, match="never evaluated"):
        plan([run], loss=4.0)


@pytest.mark.parametrize(
    ("lines", "lanes", "words"),
    [
        ([], 8, "has no line of a step"),
        ([start(2), *steps(1, 100, {})], 8, "--train.noise_every=10$"),
        ([start(1), *steps(1, 100, {})], 1, r"--train.noise_every=10 and with train.lanes above 1"),
        ([start(2), *steps(1, 100, {"noise_signal_square": -0.5, "noise_trace": 9.0})], 8, "smaller train.noise_every"),
        ([start(2), *steps(1, 40), *steps(41, 100, {})], 8, "0 noise measurements in the second half"),
        ([start(2), *({**line, "compute_seconds": None} for line in steps(1, 100))], 8, "no step can be timed"),
    ],
)
def test_what_cannot_be_planned_from_says_how_to_mend_it(tmp_path: Path, lines: list[Any], lanes: int, words: str) -> None:
    run = write(tmp_path / "run", lines, lanes=lanes)
    with pytest.raises(UsageError, match=words):
        plan([run])


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give the folder of a run"):
        plan([tmp_path])
    with pytest.raises(UsageError, match="invalid global_batch"):
        plan([write(tmp_path / "a", steps(1, 9), "[train]\nsteps = 3\n")])
    with pytest.raises(UsageError, match="no batch of the table has 4096 lanes or more"):
        plan([write(tmp_path / "b", [start(2), *steps(1, 100)])], [4096])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", [start(2), *steps(1, 200)])
    monkeypatch.setattr(sys, "argv", ["plan", str(run), "--ranks", "4,2,2", "--json"])
    planning.main()
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan([run], [2, 4])))
    monkeypatch.setattr(sys, "argv", ["plan", str(run)])
    planning.main()
    said = capsys.readouterr().out
    assert said == table(plan([run])) + "\n" and max(map(len, said.splitlines())) < 140
    assert "noise scale: 6,144 tokens" in said and "(not measured)" in said
    here = next(line for line in said.splitlines() if line.startswith("     16 "))
    assert f"{duration(200 * 0.48)}*" in here and said.count("*") == 2  # the cell and the legend
    monkeypatch.setattr(sys, "argv", ["plan", str(run), "--ranks", "2,0"])
    with pytest.raises(UsageError, match="whole numbers of at least 1"):
        planning.main()


def test_it_starts_alone_without_torch_and_mpi(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [start(2), *steps(1, 30, {})])
    words = "import sys, mpidp.plan.__main__ as p; sys.argv[1:] = ['ranks', '--help']\ntry: p.main()\nexcept SystemExit: pass\n"
    words += "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules), 'too much is imported'"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--loss" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "mpidp.plan", str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("mpidp: ") and "--train.noise_every=10" in done.stderr
