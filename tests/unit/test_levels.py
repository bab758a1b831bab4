"""Laws of tests/levels.py and tests/run.py: every test runs at some level, and a part that fails is counted as failed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import levels, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("test", ["tests/methods/test_x.py::test_a", "tests/unit/test_x.py::test_b"])
def test_every_test_runs_and_every_table_keeps_a_row(test: str, rows: int) -> None:
    tiers = levels.tiers([f"{test}[{i}]" for i in range(rows)], [set()] * rows)
    assert set(tiers) <= {1, 2, 3} and 1 in tiers
    assert 2 in levels.tiers([f"tests/methods/test_cells.py::test_c[{i}]" for i in range(rows)], [set()] * rows)
    assert levels.LEVELS["quick"] | levels.LEVELS["rest"] == levels.LEVELS["check"] < levels.LEVELS["long"] == {1, 2, 3}
    if "unit" in test:
        assert set(tiers) == {1}


def test_markers_and_rows_of_the_other_mpi_leave_the_first_tier() -> None:
    names = ["tests/unit/test_x.py::test_a", "tests/unit/test_x.py::test_b", "tests/faults/test_table.py::test_c[openmpi]"]
    assert levels.tiers(names, [{"check"}, {"long"}, set()]) == [2, 3, 2]


def test_an_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDP_LEVEL", "fast")
    with pytest.raises(ValueError, match="choose one of quick, rest, check, long"):
        levels.level()


def test_parts_that_fail_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code, passed, failed in ((0, 1, 0), (3, 0, 1)):
        found = run.execute(run.plain(sys.executable, "-c", f"print('hello'); exit({code})"), "", tmp_path / "log", show=False)
        assert (found.passed, len(found.failed)) == (passed, failed)
    assert "hello" in capsys.readouterr().out  # the output of what failed
    assert run.execute(run.plain("no_such_command"), "", tmp_path / "log", show=False).failed
    tests = ["import pytest", "def test_a(): pass", "def test_b(): assert 0", "def test_c(): pytest.skip('no')"]
    (tmp_path / "test_x.py").write_text("\n".join(tests))
    found = run.execute(run.alone(str(tmp_path / "test_x.py"), "-p", "tests.conftest"), "quick", tmp_path / "log", show=False)
    assert (found.passed, len(found.failed), found.skipped) == (1, 1, ["Skipped: no"])
    text = run.summary({"unit": found}, 61.0)
    assert text.splitlines()[-1] == "1 passed, 1 failed, 1 skipped" and "1:01" in text and "skipped 1: no" in text


@pytest.mark.parametrize("count", [1, run.MAX_RETRIED, run.MAX_RETRIED + 1])
def test_tests_that_passed_only_alone_are_named_and_too_many_are_a_failure(count: int) -> None:
    results = {"faults": run.Result(passed=9, retried=[f"tests/faults/test_x.py::test_{i}" for i in range(count)])}
    text = run.summary(results, 1.0)
    for test in results["faults"].retried:
        assert f"FAILED at the first attempt, passed when it ran alone: {test}" in text
    assert text.splitlines()[-1] == f"9 passed, 0 failed, 0 skipped, {count} passed only alone"
    assert run.has_failed(results) == (count > run.MAX_RETRIED) == ("needed a second attempt" in text)


def test_make_and_ci_know_every_part() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", makefile, re.M))
    assert targets >= set(run.PARTS) | {"test", "check"}
    ci = [part for part, _ in run.TEST + run.CHECK + run.BESIDE_CHECK]
    assert {part for part in run.PARTS if part not in ("long", "soak", "slurm")} == set(ci)


def test_tables_and_selections_name_tests_that_exist() -> None:
    """A renamed test must not leave its level or a part unnoticed."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").glob("*/test_*.py")}
    for start, _, _ in levels.TABLES:
        file, _, name = start.partition("::")
        assert any(path.startswith(file) and f"def {name}" in text for path, text in sources.items()), start
    for words, folder in ((run.OPENMPI_METHODS, "methods"), (run.SLURM_SHORT, "slurm"), ("ranks or resume or elastic", "laws")):
        text = "".join(path + text for path, text in sources.items() if path.startswith(f"tests/{folder}/"))
        assert [word for word in words.split(" or ") if word.rstrip("0123456789") not in text] == []
    paths = {word for commands in run.PARTS.values() for command in commands for word in command.words if "tests/" in word}
    assert paths and all((ROOT / path.removeprefix("--ignore=")).exists() for path in paths)
