"""Laws of the folder in which convert and export write: two commands do not mix their files, and no file is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.new_folder import new_folder
from mpidp.errors import UsageError
from mpidp.runtime.work_folder import work_folder

ROOT = Path(__file__).resolve().parents[2]


def test_of_two_exports_into_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out") as first:
        (first / "a").write_text("1")
        with pytest.raises(UsageError, match="is being written by another process"), work_folder(tmp_path / "out"):
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


CODE = """
import signal, sys, time
from pathlib import Path
from data_tools.new_folder import new_folder
from mpidp.runtime.command import run_entry

def main():
    with new_folder(Path(sys.argv[1])) as (new, scratch):
        (new / "file").write_text("1")
        print("ready", flush=True)
        time.sleep(100)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its commands with SIGINT ignored
run_entry(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -9)])
def test_nothing_is_left_after_a_signal_or_after_the_next_conversion(tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path / "out")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.wait(60) == code
    child.stdout.close()
    assert len(list(tmp_path.iterdir())) == (1 if number == signal.SIGKILL else 0)
    with new_folder(tmp_path / "out") as (new, _):
        (new / "file").write_text("2")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("1")
    os.symlink(tmp_path / "kept", tmp_path / ".out.part")
    with pytest.raises(UsageError, match="choose another --out"), work_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "kept/file").exists()
