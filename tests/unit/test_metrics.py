"""Laws of metrics: lines are complete JSON and written at once, nothing is repeated after a restart, phases add up, and progress
output is brief."""

from __future__ import annotations

import errno
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from mpidp.metrics import jsonl
from mpidp.metrics.clock import Clock
from mpidp.metrics.jsonl import MetricsFile
from mpidp.metrics.progress import Progress, peak_flops


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_there_at_once_and_in_full_precision(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, 0)
    value = 0.1 + 0.2 + 1e-17
    metrics.write({"step": 1, "train_loss": value, "what": "ü"})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train_loss": value, "what": "ü"}]
    metrics.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m", 0, 0)
    metrics.write({"step": 1, "a": math.nan, "b": -math.inf, "c": 1.0, "d": None})
    metrics.close()
    assert lines(tmp_path / "m") == [{"step": 1, "a": None, "b": None, "c": 1.0, "d": None}]


def test_lines_beyond_the_checkpoint_half_lines_and_ends_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": s, "train_loss": 1.0 / s} for s in range(1, 8)]
    events = [{"event": "resume", "step": 2}, {"event": "skipped", "step": 4, "batch": 4}, {"event": "end", "step": 4}]
    again = {"event": "skipped", "step": 4, "batch": 5}  # after the checkpoint: it will be skipped again
    path.write_text("".join(json.dumps(line) + "\n" for line in [*whole, *events, again]) + "not JSON\n[]\n" + '{"step": 5, "tra')
    metrics = MetricsFile(path, step=4, next_batch=5)
    metrics.write({"event": "resume", "step": 4})
    metrics.close()
    assert lines(path) == [*whole[:4], *events[:2], {"event": "resume", "step": 4}]


def test_lines_wait_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk accepts 20 bytes, then nothing, then everything."""
    room = [20]

    class Disk(io.FileIO):
        def write(self, content: Any) -> int:
            if room[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = super().write(bytes(content)[: room[0]])
            room[0] -= taken
            return taken

    metrics = MetricsFile(tmp_path / "m", 0, 0)
    monkeypatch.setattr(metrics, "_file", Disk(tmp_path / "m", "a"))
    for step in (1, 2, 3):
        metrics.write({"step": step, "train_loss": 0.5})
    assert (tmp_path / "m").read_text() == '{"step": 1, "train_l'
    room[0] = 1000
    metrics.write({"step": 4})
    room[0] = 0
    metrics.write({"step": 5})
    metrics.close()
    assert lines(tmp_path / "m") == [*({"step": step, "train_loss": 0.5} for step in (1, 2, 3)), {"step": 4}]
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, 0, 0).close()
    assert lines(path) == []


def test_phases_add_up_and_start_anew() -> None:
    clock = Clock()
    with clock.timed("step"):
        for _ in range(2):
            with clock.timed("data"):
                time.sleep(0.01)
        with clock.timed("compute"):
            time.sleep(0.005)
    taken = clock.pop_seconds()
    assert set(taken) == {"data_seconds", "compute_seconds", "step_seconds"}
    assert taken["data_seconds"] >= 0.02 and taken["step_seconds"] >= taken["data_seconds"] + taken["compute_seconds"]
    assert clock.pop_seconds() == {}


RECORD = {"train_loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1e4, "mfu": None}


def test_progress_is_a_line_a_second_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total_steps=50, active=True)
    for step in range(1, 51):
        progress.step({"step": step, **RECORD})
    progress.print("words")
    progress.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:-1]] in (["1/50", "50/50"], ["50/50"]) and said[-1] == "words"


def test_progress_says_whose_speed_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """Between two meetings, the number of tokens does not grow, and the speed is that of rank 0."""
    progress = Progress(total_steps=4, active=True)
    for step in range(1, 5):
        progress._last = 0.0  # long ago
        progress.step({"step": step, **RECORD, "tokens": 100 * (step // 2)})
    said = capsys.readouterr().out.splitlines()
    assert ["tokens/s on rank 0  eta" in line for line in said] == [True, False, True, False]


def test_progress_of_other_ranks_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total_steps=1, active=False)
    progress.step({"step": 1, **RECORD})
    progress.print("words")
    assert capsys.readouterr().out == ""


def test_mfu_is_claimed_where_the_peak_is_known() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some Other Device") is None


@pytest.mark.parametrize(
    "written", ["", "{step1}", "{step1}{step2}", "{step1}{step2}{val2}", "{step1}{step2}{val2}{end2}", "{step1}{half}"]
)
def test_who_goes_on_for_a_dead_rank_writes_what_it_lacked_the_time_for(tmp_path: Path, written: str) -> None:
    """Each of the failed rank's last lines occurs once, however many it wrote; its end event and an incomplete line are removed.
    """
    lines = {"step1": {"step": 1, "train_loss": 2.0}, "step2": {"step": 2, "train_loss": 1.0},
             "val2": {"step": 2, "val_loss": 1.5}, "end2": {"event": "end", "step": 2}}
    path = tmp_path / "metrics.jsonl"
    texts = {name: json.dumps(line) + "\n" for name, line in lines.items()}
    begun = texts["step1"] * 5000 if written == "{step1}" else ""  # longer than the part that is examined
    path.write_text(begun + written.format(**texts, half='{"step": 2, "tra'))
    latest = [lines["step2"], lines["val2"]] if written else [lines["step1"], lines["step2"], lines["val2"]]
    metrics = MetricsFile(path, 2, 2, latest)
    metrics.write({"step": 3})
    metrics.close()
    expected = texts["step1"] + texts["step2"] + texts["val2"] + '{"step": 3}\n'
    assert path.read_text() == begun + expected


@pytest.mark.parametrize("tail", [1, 10, 64, 100, 1000, 10_000])
@pytest.mark.parametrize("half", [0, 1, 30, 300])
@pytest.mark.parametrize("end", ["", json.dumps({"event": "end", "step": 3, "seconds": [1.0] * 40}) + "\n"])
@pytest.mark.parametrize("written", [0, 1, 2, 3, 4, 5])
def test_lines_of_any_length_occur_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int, half: int, end: str, written: int
) -> None:
    """With thousands of ranks, one line is longer than the part of the file that is examined first."""
    monkeypatch.setattr(jsonl, "TAIL_BYTES", tail)
    seconds = {"rank_compute_seconds": [0.25] * 40}
    begun = [{"step": step, "train_loss": 1.0, **seconds} for step in (1, 2)]
    latest = [{"step": 3, "train_loss": 0.5, **seconds}, {"step": 3, "val_loss": 0.5}, {"step": 3, "event": "audit", **seconds}]
    texts = [json.dumps(line) + "\n" for line in [*begun, *latest]]
    path = tmp_path / "metrics.jsonl"
    rest = "" if end and written == 5 else texts[written][:half].rstrip() if written < 5 else ""
    path.write_text("".join(texts[:written]) + (end if written == 5 else "") + rest)
    MetricsFile(path, 3, 3, latest).close()
    assert path.read_text() == "".join([*texts[: min(2, written)], *texts[2:]])
