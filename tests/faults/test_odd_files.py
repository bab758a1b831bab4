"""Files of a run and of shards with odd content, and things that are no regular files in their place.

| fault | expected | checked |
|---|---|---|
| metrics.jsonl with damaged lines (not JSON, not UTF-8, ...) | 0; left out, with a warning | replay, report, resume at the end |
| no metrics.jsonl | 0: replay from the checkpoints, and the end is written again | code, output |
| a FIFO as any of the files of a run or of shards | the file is named at once | code, output |
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.faults.commands import Ended, Forks, end_record, expect
from tests.faults.test_bad_data import SHARD

LEFT_OUT = "metrics.jsonl: 1 damaged line is ignored"
BAD_LINES = {
    "not JSON": b"{train_loss", "not UTF-8": b'{"step": 3, "train_loss": "\xff"}', "deep": b'{"step": 3, "x": ' + b"[" * 5000,
    "nested": b'{"step": 3, "x": ' + b"[" * 500 + b"]" * 500 + b"}", "no object": b"[3]", "no step": b'{"train_loss": 1.0}',
    "types": b'{"step": "3", "train_loss": {}}', "huge": b'{"step": 3, "tokens": 1' + b"0" * 400 + b"}",
    "surrogate": b'{"step": 3, "event": "\\ud800"}', "infinite": b'{"step": 3, "train_loss": 1e999}',
}


def ends_well(ended: Ended, *phrases: str) -> None:
    expect(ended, 0)
    assert all(phrase in ended.said for phrase in phrases), ended


@pytest.fixture
def run(place: Path, finished: Path) -> Path:
    """place/run: a copy of the finished run."""
    shutil.copytree(finished, place / "run")
    return place / "run"


@pytest.mark.parametrize("name", BAD_LINES)
def test_damaged_lines_are_left_out_and_said(place: Path, run: Path, forks: Forks, name: str) -> None:
    file, whole = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()
    end = end_record(run)
    file.write_bytes(BAD_LINES[name] + b"\n" + whole)
    for words in (("mpidp.replay", "run"), ("mpidp.report", "run")):
        ends_well(forks.run(place, *words), LEFT_OUT)
    ends_well(forks.run(place, "mpidp.train", "tiny.toml"), "has ended at step 6", LEFT_OUT)
    file.write_bytes(whole[: whole.rindex(b'{"step": 6') if b'{"step": 6' in whole else 0] + BAD_LINES[name] + b"\n")
    ends_well(forks.run(place, "mpidp.train", "tiny.toml"), "has ended at step 6", LEFT_OUT)
    assert end_record(run)["weights_sha256"] == end["weights_sha256"]
    assert all(json.loads(line) for line in file.read_bytes().splitlines())


def test_no_metrics_at_all(place: Path, run: Path, forks: Forks) -> None:
    (run / "metrics.jsonl").unlink()
    ends_well(forks.run(place, "mpidp.replay", "run"), "checkpoint same")
    expect(forks.run(place, "mpidp.plan", "run"), 2, "no metrics.jsonl")
    expect(forks.run(place, "mpidp.report", "run"), 2, "no metrics.jsonl")
    ends_well(forks.run(place, "mpidp.train", "tiny.toml"), "has ended at step 6")
    assert end_record(run)["reason"] == "steps"


@pytest.mark.parametrize(("name", "code"), [
    ("run/checkpoints/step_00000006/manifest.json", 0), ("run/checkpoints/step_00000006/rank_00000.safetensors", 0),
    ("run/metrics.jsonl", 2), (f"shards/{SHARD}", 3), ("shards/index.json", 3), ("shards/tokenizer.json", 3),
])
def test_nobody_waits_for_the_writer_of_a_fifo(place: Path, run: Path, forks: Forks, name: str, code: int) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)
    ended = forks.run(place, "mpidp.train", "tiny.toml")
    expect(ended, code)
    assert name in ended.said and "not a regular file" in ended.said, ended
