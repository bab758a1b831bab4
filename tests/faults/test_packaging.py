"""The wheel and the sdist: what they contain, and that they install and run in a new environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mpidp

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mpidp", "data_tools")
TOP = ("pyproject.toml", "README.md", "README.zh.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile")
OTHERS = ("tests", "docs", "jobs", "benchmarks", "examples")
DEPENDENCIES = ("mpi4py", "torch", "numpy", "h5py", "safetensors", "tokenizers", "rich", "setuptools")

pytestmark = [
    pytest.mark.check,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="SKIPPED FOR LACK OF build: pip install build"),
]


def run(*words: str | Path, folder: Path, **env: str) -> str:
    """Run a command without the checkout on the path. Return its output."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([*map(str, words)], cwd=folder, env=clean | env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{words}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in TOP:
        shutil.copy(ROOT / name, copy)
    for name in (*SOURCES, *OTHERS):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--no-isolation", copy, "--outdir", copy / "dist", folder=copy.parent)
    return copy / "dist"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def sources() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for name in SOURCES for path in (ROOT / name).rglob("*.py")}


def test_the_wheel_contains_the_sources_and_the_command(dist: Path) -> None:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        names = set(wheel.namelist())
        info = f"mpidp-{mpidp.__version__}.dist-info"
        assert {name for name in names if not name.startswith(info)} == sources()
        assert f"{info}/licenses/LICENSE" in names
        assert "mpidp = mpidp.__main__:run" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_sdist_contains_the_sources_readme_and_license(dist: Path) -> None:
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if sdist.getmember(name).isfile()}
    generated = {"PKG-INFO", "setup.cfg"}
    kept = {name for name in names if not name.startswith("mpidp.egg-info/")} - generated
    assert kept == sources() | {"pyproject.toml", "README.md", "LICENSE"}


def new_environment(folder: Path) -> Path:
    """Create an environment that borrows the dependencies of this one, but not mpidp. Return its bin folder."""
    run(sys.executable, "-m", "venv", folder, folder=folder.parent)
    run(folder / "bin/python", "-m", "pip", "uninstall", "--yes", "setuptools", folder=folder.parent)  # Python 3.11's is too old
    origins = [importlib.util.find_spec(name).origin for name in DEPENDENCIES]
    borrowed = sorted({str(Path(origin).parents[1]) for origin in origins})
    only(folder, "lib/python*/site-packages").joinpath("borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


def mpi_library() -> dict[str, str]:
    """Return the variable that names the MPI library of a wheel. mpi4py looks for it in its own environment only."""
    site = Path(importlib.util.find_spec("mpi4py").origin).parents[1]
    found = [path for folder in (Path(sys.prefix, "lib"), site.parents[1]) for path in sorted(folder.glob("libmpi.so.*"))]
    return {"MPI4PY_LIBMPI": str(found[0])} if found else {}


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_runs_in_a_new_environment(dist: Path, tmp_path: Path, kind: str) -> None:
    programs, mpi = new_environment(tmp_path / "env"), mpi_library()
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
    run(programs / "python", *pip, only(dist, kind), folder=tmp_path)
    assert run(programs / "mpidp", "--version", folder=tmp_path) == f"mpidp {mpidp.__version__}\n"
    code = "import mpidp, data_tools; print(mpidp.__file__, data_tools.__file__)"
    place = run(programs / "python", "-c", code, folder=tmp_path)
    assert all(path.startswith(str(tmp_path / "env")) for path in place.split())
    if kind == "*.whl":  # with the embedded corpus, which takes a minute to prepare
        said = run(programs / "mpidp", "train", "--train.steps=2", "--train.eval_tokens=4096", folder=tmp_path, **mpi)
        assert "no shards in shards/stdlib: preparing them" in said and "done: step 2" in said
        said = run(programs / "mpidp", "generate", "runs/default", "--tokens=3", "--prompt=def ", folder=tmp_path, **mpi)
        assert said.startswith("def ")
