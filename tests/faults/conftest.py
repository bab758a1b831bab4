"""Fixtures: a tiny set of shards and a finished run on it, shared by the session; a separate folder for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.commands import SAVED, TINY, Forks, Shell, end_record, faulty


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/ and tiny.toml. Tests do not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n\n" for i in range(200)))
    (folder / "tiny.toml").write_text(TINY)
    options = ("--source", "text.txt", "--out", "shards", "--shards", "2", "--val-fraction", "0.1")
    done = Shell(folder).run("-m", "data_tools.prepare", *options)
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def finished(prepared: Path, forks: Forks) -> Path:
    """An uninterrupted run of tiny.toml. Tests do not change it."""
    done = forks.run(prepared, "mpidp.train", "tiny.toml")
    assert done.code == 0, done
    return prepared / "run"


@pytest.fixture(scope="session")
def whole_hash(finished: Path) -> str:
    """weights_sha256 of the uninterrupted run. Any number of ranks and any interruptions must give the same hash."""
    return str(end_record(finished)["weights_sha256"])


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    """A folder for one test, with a copy of the shards and tiny.toml."""
    shutil.copytree(prepared / "shards", tmp_path / "shards")
    shutil.copy(prepared / "tiny.toml", tmp_path)
    return tmp_path


@pytest.fixture
def shell(place: Path) -> Shell:
    return Shell(place)


@pytest.fixture(params=["mpich", "openmpi"])
def either(request: pytest.FixtureRequest, place: Path) -> Shell:
    """Run the test once under each MPI."""
    return Shell(place, request.param)


@pytest.fixture(scope="session")
def killed(prepared: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiny.toml that was killed in step 6: it has checkpoints of steps 2 and 4, the lock of a dead process, and log
    lines after step 4."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(prepared, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    ended = forks.run(folder, "mpidp.train", "tiny.toml", inject=faulty(SAVED + "os._exit(9)", batches=[5]))
    assert ended.code == 9, ended
    return folder / "run"


@pytest.fixture
def half_run(place: Path, killed: Path) -> Path:
    """place/run: a copy of the killed run."""
    shutil.copytree(killed, place / "run")
    return place / "run"
