"""Laws of repeated crashes: a limited number of starts in a row from one checkpoint, until a user acts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpidp.errors import DataError, MpidpError, Stopped, UsageError
from mpidp.faults.restarts import RestartLog


def start(run: Path, step: int, most: int = 3, error: BaseException | None = None, rank: int = 0, killed: bool = False) -> None:
    tries = RestartLog(run)
    tries.begin(step, most, rank=0)
    if not killed:
        tries.ended(error, rank)


@pytest.mark.parametrize("step", [-1, 40])
def test_the_fourth_start_from_one_checkpoint_is_refused(tmp_path: Path, step: int) -> None:
    for _ in range(3):
        start(tmp_path, step, error=DataError("train.h5 is damaged"), rank=1)
    where = "the checkpoint of step 40" if step == 40 else "the beginning"
    words = f"started 3 times in a row from {where}, .*error was: rank 1: train.h5 is damaged.*--run.tries=4"
    for _ in range(2):  # and again
        with pytest.raises(UsageError, match=words):
            start(tmp_path, step)
    start(tmp_path, step, most=4, killed=True)
    (tmp_path / "tries.json").unlink()
    start(tmp_path, step)


def test_a_refusal_is_no_reason_of_its_own(tmp_path: Path) -> None:
    start(tmp_path, 4, error=ValueError("x"))
    tries = RestartLog(tmp_path)
    with pytest.raises(UsageError) as caught:
        tries.begin(4, 1, rank=0)
    tries.ended(caught.value, 0)
    with pytest.raises(UsageError, match="error was: rank 0: ValueError: x"):
        start(tmp_path, 4, most=1)


def test_who_was_killed_left_no_word(tmp_path: Path) -> None:
    start(tmp_path, 4, error=ValueError("an older word"))
    start(tmp_path, 4, killed=True)
    with pytest.raises(UsageError, match="started 2 times .* left no error message: it was killed"):
        start(tmp_path, 4, most=2)


def test_progress_counts_anew(tmp_path: Path) -> None:
    for step in (0, 0, 2, 2, 4, 4, 4):
        start(tmp_path, step, killed=True)
    with pytest.raises(UsageError, match="started 3 times in a row from the checkpoint of step 4"):
        start(tmp_path, 4)


@pytest.mark.parametrize("end", [None, Stopped.on_every_rank("at step 4"), KeyboardInterrupt()])
def test_a_clean_end_is_no_try(tmp_path: Path, end: BaseException | None) -> None:
    for _ in range(9):
        start(tmp_path, 4, error=end)
    assert not (tmp_path / "tries.json").exists()


def test_a_start_that_is_refused_is_no_try(tmp_path: Path) -> None:
    """For example, a setting or MPIDP_FAULT is not possible with this launch. What was known before is kept."""
    refusal = UsageError.on_every_rank("comm.transport=window is not possible here")
    for _ in range(9):
        start(tmp_path, 4, error=refusal)
    assert not (tmp_path / "tries.json").exists()
    start(tmp_path, 4, error=ValueError("x"))
    for _ in range(9):
        start(tmp_path, 4, error=refusal)
        start(tmp_path, -1, error=refusal)
    with pytest.raises(UsageError, match="started 1 times in a row from .* step 4.*error was: rank 0: ValueError: x"):
        start(tmp_path, 4, most=1)


def test_one_rank_tells_of_an_error_that_all_have(tmp_path: Path) -> None:
    others = RestartLog(tmp_path)
    others.begin(4, 3, rank=1)
    others.ended(MpidpError.on_every_rank("alike"), rank=1)
    assert not (tmp_path / "tries.json").exists()
    start(tmp_path, 4, error=MpidpError.on_every_rank("alike"))
    with pytest.raises(UsageError, match="error was: alike"):
        start(tmp_path, 4, most=1)


def test_before_it_begins_nothing_counts(tmp_path: Path) -> None:
    RestartLog(tmp_path).ended(UsageError("train.seed was 0, is 1"), 0)
    assert not (tmp_path / "tries.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"step": 4}', '{"step": "x", "tries": 3, "words": ""}', "\x00"])
def test_a_file_cut_short_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "tries.json").write_text(content)
    start(tmp_path, 4, most=1, killed=True)


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    start(tmp_path / "absent", 4, error=ValueError("x"))
    start(tmp_path / "absent", 4)
