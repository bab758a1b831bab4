"""The data commands: --help without MPI, the output of inspect, the findings of verify, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_tools.inspect import describe
from data_tools.prepare import prepare
from data_tools.verify import verify
from mpidp.data.shard_writer import checksums
from mpidp.errors import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "in.txt").write_text("Once upon a time there was a corpus.\n" * 100)
    prepare(str(folder / "in.txt"), out=folder / "out", shards=3, verbose=False)
    return folder / "out"


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def run(module: str, *arguments: str, block: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in its own process; block: a module that cannot be imported."""
    code = f"import sys, runpy; sys.modules[{block!r}] = None; sys.argv[1:] = {list(arguments)!r}; " \
           f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("module", ["prepare", "inspect", "verify"])
def test_help_needs_no_mpi(module: str) -> None:
    done = run(f"data_tools.{module}", "--help", block="mpi4py")
    assert done.returncode == 0 and f"data_tools.{module}" in done.stdout and not done.stderr


def test_inspect_shows_what_is_there(shards: Path) -> None:
    said = describe(shards, excerpt_tokens=16)
    for word in ("byte", "train_00002.h5", "val_00000.h5", "skew", "Once upon a time", "kind file"):
        assert word in said
    assert run("data_tools.inspect", str(shards), block="mpi4py").returncode == 0


def test_inspect_escapes_control_characters(shards: Path) -> None:
    raw = json.loads((shards / "index.json").read_text())
    raw["source"]["path"] = "a\nb\tc\x1b[31m\u202e"
    raw["tokenizer"]["kind"] = "d\ne"
    (shards / "index.json").write_text(json.dumps(raw))
    said = run("data_tools.inspect", str(shards)).stdout
    assert "path a\\nb\\tc\\x1b[31m\\u202e" in said and "tokenizer d\\ne," in said


def test_locations_share_an_equal_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"b": 1}\n' * 9)
    with pytest.raises(DataError) as caught:
        prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "out", verbose=False)
    words, places = str(caught.value), ", ".join(f"{tmp_path}/a.jsonl:{line}" for line in range(1, 6))
    assert words.count("text") > 0 and words.count("its fields are") == 1 and f"{places}: " in words and words.endswith(", ...")


def test_verify_passes_what_is_whole(shards: Path) -> None:
    assert len(verify(shards).splitlines()) == 1 and "4 files" in verify(shards)
    done = run("data_tools.verify", str(shards), block="mpi4py")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("name", ["train_00001.h5", "val_00000.h5", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_names_the_damaged_file(shards: Path, name: str, damage: str) -> None:
    path = shards / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-5])
    with pytest.raises(DataError, match=name):
        verify(shards)


def test_verify_reads_every_id(shards: Path) -> None:
    """An id outside the vocabulary under valid checksums can only be found by reading the ids."""
    path = shards / "train_00001.h5"
    with h5py.File(path, "r+") as file:
        file["tokens"][5] = np.uint16(257)
    raw = json.loads((shards / "index.json").read_text())
    raw["files"][1] |= dict(zip(("crc32", "sha256"), checksums(path), strict=True))
    (shards / "index.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"train_00001.h5: token 5 is 257"):
        verify(shards)


def test_another_tokenizer_is_found(shards: Path) -> None:
    raw = json.loads((shards / "index.json").read_text())
    (shards / "tokenizer.json").write_text('{"format": "mpidp-tokenizer", "version": 1, "kind": "char", "characters": "ab"}')
    with pytest.raises(DataError, match="tokenizer.json"):
        verify(shards)
    raw["tokenizer"]["sha256"] = checksums(shards / "tokenizer.json")[1]
    (shards / "index.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="it has 3 ids"):
        verify(shards)


@pytest.mark.parametrize(("module", "arguments", "code"), [
    ("verify", [], 2), ("verify", ["nowhere"], 3), ("inspect", ["nowhere"], 3), ("prepare", ["--source", "nowhere"], 3),
    ("prepare", ["--shards", "0"], 2), ("prepare", ["--shards", "x"], 2), ("prepare", ["--nonsense"], 2),
])
def test_exit_codes(module: str, arguments: list[str], code: int, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if module == "prepare" else []
    done = run(f"data_tools.{module}", *arguments, *out)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and (not arguments or arguments[-1] in done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("tokenizers", "bpe")])
def test_missing_extras_are_named(package: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" if name.endswith(".zst") else b"x")
    tokenizer = ["--tokenizer", "bpe:300"] if name == "bpe" else []
    done = run("data_tools.prepare", "--source", str(tmp_path / name), "--out", str(tmp_path / "out"), *tokenizer, block=package)
    assert done.returncode == 2
    assert ("pip install tokenizers" if name == "bpe" else "mpidp[data]") in done.stderr
