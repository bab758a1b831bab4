"""Laws of trackers: each receives every number once, and no fault of a tracker reaches the training."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from mpidp.metrics.jsonl import MetricsFile
from mpidp.metrics.track import sender
from mpidp.metrics.track.sender import Trackers
from mpidp.metrics.track.table import PACKAGES, check_trackers, trackers_of
from mpidp.metrics.track.tracked import compact, scalars_of

FAKE = """
import json, os, time
HOW = os.environ["HOW"]
OUT = open(os.environ["OUT"], "a", buffering=1)
def put(*what): OUT.write(json.dumps(what) + chr(10))
def fail(where):
    if HOW == "raises at " + where: raise OSError("no server at http://me:s3cr3t@host/api")
    if HOW == "hangs at " + where: time.sleep(1000)
    if HOW == "exits at " + where: raise SystemExit(4)
    if HOW == "dies at " + where: os.kill(os.getpid(), 9)
fail("import")
class Settings:
    def __init__(self, **others): pass
class Run:
    def __init__(self): self.summary, self.failures = {}, 1 * (HOW == "recovers")
    def log(self, values, step):
        fail("log")
        if self.failures:
            self.failures -= 1
            raise OSError("not now")
        if HOW == "prints": print("x" * 100000)
        put("log", step, values)
    def finish(self, exit_code):
        fail("finish")
        put("finish", exit_code, self.summary)
def init(**given):
    fail("init")
    put("init", given["id"], given["mode"], given["config"], given["tags"], given["name"], given["project"])
    return Run()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a module `wandb` that writes its calls to a file."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wandb.py").write_text(FAKE)
    for name, value in {"PYTHONPATH": str(tmp_path / "modules"), "OUT": str(tmp_path / "out"), "HOW": ""}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def about(folder: Path, step: int = 0) -> dict[str, Any]:
    return {"folder": str(folder / "run/track"), "name": "run", "project": "mpidp", "tags": ["a", "b"], "step": step,
            "config": {"optim.lr": 0.1, "data.path": "d"}}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": number, "unix_seconds": 1e9 + number, "train_loss": loss, "mfu": None, "rank_compute_seconds": [1.0, 2.0]}


def calls(folder: Path) -> list[list[Any]]:
    path = folder / "out"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_tracker_receives_every_number_once_and_the_facts_of_the_run(fake: Path) -> None:
    trackers = Trackers(["wandb"], about(fake))
    file = MetricsFile(fake / "metrics.jsonl", 0, 0, also=trackers)
    file.write({"event": "start", "step": 0, "ranks": 2, "versions": {"torch": "2"}, "lists": [1]})
    for number in range(1, 401):
        file.write(step(number, float("nan") if number == 7 else 1 / number))
    file.write({"step": 400, "val_loss": 0.5, "unix_seconds": 1.0})
    file.write({"event": "end", "step": 400, "reason": "steps", "val_loss": 0.5, "weights_sha256": "ab"})
    file.close()
    trackers.finish()
    (init, *logs, end) = calls(fake)
    assert init[2:] == ["offline", about(fake)["config"], ["a", "b"], "run", "mpidp"]
    steps = [["log", n, {"steps/train_loss": 1 / n}] for n in range(1, 401) if n != 7]
    assert logs == [*steps, ["log", 400, {"val/val_loss": 0.5}]]
    ends = {"end/reason": "steps", "end/val_loss": 0.5, "end/weights_sha256": "ab"}
    assert end == ["finish", 0, {"start/ranks": 2, "start/versions.torch": "2"} | ends]


def test_a_resumed_run_continues_its_curve(fake: Path) -> None:
    """The run has the same id, and steps that are computed again are not written again."""
    for begin, stop in ((0, 5), (3, 8)):
        trackers = Trackers(["wandb"], about(fake, begin))
        for number in range(begin + 1, stop + 1):
            trackers.write(step(number))
        trackers.close()
        trackers.finish()
    found = calls(fake)
    ids = [call[1] for call in found if call[0] == "init"]
    assert len(ids) == 2 and ids[0] == ids[1]
    assert [call[1] for call in found if call[0] == "log"] == list(range(1, 9))
    assert [call[1] for call in found if call[0] == "finish"] == [1, 1]  # neither job reached the end of the run


def test_the_facts_of_every_start_are_stored(fake: Path) -> None:
    """A resumed run starts at the step of an event that the tracker already has. Its numbers are written once nevertheless."""
    for ranks in (2, 3):
        trackers = Trackers(["wandb"], about(fake, 4 * (ranks == 3)))
        trackers.write({"event": "start", "step": 4 * (ranks == 3), "ranks": ranks})
        trackers.write(step(4))
        trackers.write({"event": "saved", "step": 4})
        trackers.close()
        trackers.finish()
    found = calls(fake)
    assert [call[2] for call in found if call[0] == "finish"] == [{"start/ranks": 2}, {"start/ranks": 3}]
    assert [call[1] for call in found if call[0] == "log"] == [4]


FAULTS = {
    "raises at import": "opening the tracker failed (OSError: no server at http://***@host/api)",
    "raises at init": "opening the tracker failed",
    "exits at init": "opening the tracker failed (SystemExit", "dies at import": "exit code -9",
    "hangs at import": "opening the tracker has not finished after 0.3 s",
    "hangs at init": "opening the tracker has not finished after 0.3 s",
    "raises at log": "a call of the tracker failed", "hangs at log": "a call of the tracker has not finished after 0.3 s",
    "dies at log": "exit code -9", "raises at finish": "a call of the tracker failed", "hangs at finish": "was stopped",
}  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_of_a_tracker_is_a_warning(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """A tracker that hangs gets more lines than the pipe holds."""
    monkeypatch.setenv("HOW", how)
    monkeypatch.setattr(sender, "PATIENCE_SECONDS", 0.3 if "hangs" in how else 60.0)
    monkeypatch.setattr(sender, "FINISH_SECONDS", 2.0 if "hangs" in how else 60.0)
    trackers, said, number = Trackers(["wandb"], about(fake)), "", 0
    while number < 2000 or FAULTS[how] not in said and "finish" not in how:
        trackers.write(step(number := number + 1))
        if number > 2000:
            time.sleep(0.05)
            said += capfd.readouterr().err
    trackers.close()
    trackers.finish()
    said += capfd.readouterr().err
    assert FAULTS[how] in said and "Training continues, and metrics.jsonl has all numbers" in said
    assert 1 <= said.count("warning: metrics.track=wandb") <= 2 and "Traceback" not in said and "s3cr3t" not in said


def test_a_tracker_that_hangs_does_not_delay_another(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "hangs at import")
    monkeypatch.setattr(sender, "FINISH_SECONDS", 6.0)
    trackers = Trackers(["tensorboard", "wandb"], about(fake))
    for number in range(1, 2001):
        trackers.write(step(number))
    trackers.close()
    trackers.finish()
    assert len(scalars(fake / "run/tensorboard")) == 2000


def test_lines_are_repeated_until_the_tracker_accepts_them(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOW", "recovers")
    trackers = Trackers(["wandb"], about(fake))
    trackers.write(step(1))
    for number in range(2, 100):
        if sum(call[0] == "log" for call in calls(fake)):
            break
        time.sleep(0.3)
        trackers.write(step(number))
    trackers.close()
    trackers.finish()
    steps = [call[1] for call in calls(fake) if call[0] == "log"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


def test_what_a_tracker_prints_goes_to_a_file(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOW", "prints")
    trackers = Trackers(["wandb"], about(fake))
    trackers.write(step(1))
    trackers.close()
    trackers.finish()
    assert capfd.readouterr() == ("", "") and (fake / "run/track/wandb.log").stat().st_size > 100_000


def test_a_process_without_its_run_ends(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the run is killed, the input of the process ends. It stores what it has, even if the tracker hangs at the end."""
    monkeypatch.setenv("HOW", "hangs at finish")
    monkeypatch.setattr(sender, "FINISH_SECONDS", 1.0)
    trackers = Trackers(["wandb"], about(fake))
    trackers.write(step(1))
    [process] = trackers._processes
    child = process._child
    assert child is not None
    trackers.close()
    assert child.wait(60) == 3 and [call[0] for call in calls(fake)] == ["init", "log"]


def test_signals_of_a_job_do_not_end_the_process(fake: Path) -> None:
    """A scheduler sends SIGTERM to all processes, and the run then writes its last checkpoint and lines."""
    trackers = Trackers(["wandb"], about(fake))
    trackers.write(step(1))
    while not calls(fake):
        time.sleep(0.05)
    [process] = trackers._processes
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGTERM)
    trackers.write(step(2))
    trackers.close()
    trackers.finish()
    assert [call[0] for call in calls(fake)] == ["init", "log", "log", "finish"]


def test_nothing_is_lost_of_a_run_whose_folder_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file")
    trackers = Trackers(["tensorboard"], about(tmp_path))
    trackers.write(step(1))
    trackers.close()
    trackers.finish()
    assert "its process cannot be started" in capfd.readouterr().err


def scalars(folder: Path, name: str = "steps/train_loss") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars(name)]


def test_tensorboard_shows_the_later_value_of_a_step(tmp_path: Path) -> None:
    for begin, stop, loss in ((0, 5, 1.0), (3, 8, 2.0)):
        trackers = Trackers(["tensorboard"], about(tmp_path, begin))
        for number in range(begin + 1, stop + 1):
            trackers.write(step(number, loss))
        trackers.write({"event": "saved", "step": stop})
        trackers.close()
        trackers.finish()
    assert scalars(tmp_path / "run/tensorboard") == [(n, 1.0 if n < 4 else 2.0) for n in range(1, 9)]


def test_names_and_packages_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers_of(" mlflow,wandb,mlflow ", tensorboard=True) == ["mlflow", "wandb", "tensorboard"]
    assert trackers_of("") == [] and trackers_of("tensorboard", tensorboard=True) == ["tensorboard"]
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        trackers_of("wanbd")
    (tmp_path / "absent").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PACKAGES, "wandb", ("absent",))
    with pytest.raises(UsageError, match=r"pip install 'mpidp\[track-wandb\]'"):
        check_trackers(["wandb"])


def test_lists_and_nulls_are_no_scalars() -> None:
    assert scalars_of(step(1)) == {"steps/train_loss": 1.0}
    line = {"event": "saved", "step": 3, "path": "p", "why": "w", "ok": True}
    assert compact(line) == {"event": "saved", "step": 3, "why": "w"}
