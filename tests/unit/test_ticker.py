"""Laws of the line of progress: on standard error, not before it is time, and on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools import progress
from data_tools.prepare import prepare
from data_tools.progress import Ticker


def test_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    ticker = Ticker("prepare")
    ticker.phase("encoded", 4)
    for seconds in range(25):
        now = 100.0 + seconds
        ticker.add(documents=1, size=500_000, parts=seconds % 8 == 0)
    found = capsys.readouterr()
    assert found.out == "" and found.err.splitlines() == [
        "prepare: 10 s, encoded: 11 documents, 6 MB, file 2 of 4", "prepare: 20 s, encoded: 21 documents, 10 MB, file 3 of 4"]
    quiet = Ticker("prepare", quiet=True)
    now = 1000.0
    quiet.add(documents=1)
    quiet.say("training")
    assert capsys.readouterr().err == ""


def test_prepare_reports_its_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "IN_LOG", 0.0)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("some text " * 40)
    prepare(str(tmp_path), "bpe:260", tmp_path / "out", 2)
    err = capsys.readouterr().err
    assert all(words in err for words in ("text for the tokenizer: ", "encoded: 5 documents", "file 5 of 5", "shard 3 of 3"))
    prepare(str(tmp_path), "bpe:260", tmp_path / "out2", 2, verbose=False)
    assert capsys.readouterr().err == ""
