"""Laws of the folder of an export: two exports into one folder do not mix, and nothing is left over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpidp.errors import UsageError
from mpidp.hf.work_folder import work_folder


def test_of_two_exports_into_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with pytest.raises(UsageError, match="is being written by another export"), work_folder(tmp_path / "out"):
            pass
        assert (first / "a").read_text() == "1"
        first.rename(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "out"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.part/deep").mkdir(parents=True)
    (tmp_path / ".out.part/deep/old").write_text("1")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("1")
    (tmp_path / ".out.part/link").symlink_to(tmp_path / "kept")
    with work_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert (tmp_path / "kept/file").exists() and not folder.exists()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("1")
    os.symlink(tmp_path / "kept", tmp_path / ".out.part")
    with pytest.raises(OSError), work_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "kept/file").exists()
