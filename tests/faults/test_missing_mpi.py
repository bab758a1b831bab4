"""Without an MPI library that mpi4py can load, every command that needs MPI exits with code 2 and says once what to install.
"""

from __future__ import annotations

import pytest

from mpidp.runtime.missing_mpi import missing_mpi
from tests.faults.commands import Shell, expect

COMMANDS = [
    "mpidp.train tiny.toml", "mpidp.train tiny.toml --dry-run", "mpidp.generate run --prompt a",
    "mpidp.evaluate run --text tiny.toml",
    "mpidp.export run out", "mpidp.replay run", "mpidp.doctor", "mpidp.doctor --json",
    "data_tools.prepare --source tiny.toml --tokenizer byte --out other",
]
REMEDY = "pip install 'mpidp[mpich]'"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_to_install(shell: Shell, command: str) -> None:
    ended = shell.run("-m", *command.split(), MPI4PY_LIBMPI="/nonexistent", MPI4PY_MPIABI="")
    expect(ended, 2, "mpi4py cannot load an MPI library", REMEDY)


def test_one_rank_of_many_says_it(either: Shell) -> None:
    ended = either.run("-m", "mpidp.train", "tiny.toml", ranks=3, MPI4PY_LIBMPI="/nonexistent", MPI4PY_MPIABI="")
    assert ended.code == 2 and ended.err.count(REMEDY) == 1 and "Traceback" not in ended.said, ended


def test_a_broken_mpi4py(shell: Shell) -> None:
    (shell.folder / "mpi4py").mkdir()
    (shell.folder / "mpi4py/__init__.py").write_text("raise ImportError('cannot load MPI library')")
    expect(shell.run("-c", "import mpidp.runtime.command as c, mpidp.doctor.__main__ as d; c.run_entry(d.main)"), 2, REMEDY)


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "mpi4py.MPI", raising=False)
    assert missing_mpi(ImportError("libhdf5.so: cannot open shared object file", name="h5py", path="/x/h5py/_errors.so")) is None
    assert missing_mpi(ModuleNotFoundError("No module named 'own'", name="own")) is None
    assert missing_mpi(RuntimeError("a model's own error")) is None and missing_mpi(ValueError("cannot load MPI library")) is None
    debian = ImportError("libmpi.so.12: cannot open shared object file", name="MPI", path="/x/mpi4py/MPI.mpich.so")
    assert "libmpi.so.12: cannot open" in str(missing_mpi(debian))
    assert "pip install" in str(missing_mpi(ModuleNotFoundError("No module named 'mpi4py'", name="mpi4py")))
