"""Files from untrusted sources: their content is never executed or unpacked, and the command names the file.

| fault | expected | checked |
|---|---|---|
| a .pt with a command, a zip bomb, a .tar.gz, endless headers, as a shard with valid checksums | 3 | code, not executed |
| the same as the tensors of a checkpoint with valid checksums | 4 | same, little memory |
| the same as a manifest, tokenizer.json, index.json, the config file, a source | 4, 3, 3, 2, 3 | same |
| terminal escapes in texts, names and keys | printed as \\x1b | output |
| a manifest with valid checksums that names other files, absurd shapes, invalid ranges or no position | 4 | same |
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mpidp.checkpoint import manifest
from tests.faults.commands import Ended, Forks, expect
from tests.faults.test_bad_data import SHARD, relist

TENSORS = "rank_00000.safetensors"
BOMB_BYTES = 2 << 30  # size when unpacked; the commands have less memory
LITTLE_MEMORY = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))"


class Runs:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("owned", "w")


@cache
def bomb() -> bytes:
    content = io.BytesIO()
    archive = zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("data.pkl", "w", force_zip64=True) as file:
        for _ in range(BOMB_BYTES >> 24):
            file.write(bytes(1 << 24))
    return content.getvalue()


def pt() -> bytes:
    content = io.BytesIO()
    torch.save({"model": Runs()}, content)
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo("../../owned")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"owned"))
    return content.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    ".pt": pt,
    "pickle": lambda: pickle.dumps(Runs()),
    "zip bomb": bomb,
    ".tar.gz": tar,
    "endless header": lambda: (1 << 60).to_bytes(8, "little") + b'{"a": {"dtype": "F32"',
    "deep header": lambda: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "absurd tensor": lambda: _safetensors({"model/x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
}


def _safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def refused(ended: Ended, place: Path, code: int, *phrases: str) -> None:
    expect(ended, code, *phrases)
    assert not [path for path in (*place.rglob("owned"), place.parent / "owned", Path("/owned")) if path.exists()], "it was run"


def vouch(folder: Path, change: Callable[[dict[str, Any]], object] = lambda body: None) -> None:
    """Update the manifest's checksums for the present files."""
    body = manifest.read_manifest(folder)
    for record in body["files"]:
        data = (folder / record["file"]).read_bytes()
        record |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    change(body)
    (folder / "manifest.json").write_bytes(manifest._seal(body))


@pytest.fixture
def newest(half_run: Path) -> Path:
    """Return the only checkpoint of a killed run."""
    shutil.rmtree(half_run / "checkpoints" / "step_00000002")
    return half_run / "checkpoints" / "step_00000004"


@pytest.mark.parametrize("name", ARCHIVES)
def test_as_a_shard(place: Path, forks: Forks, name: str) -> None:
    (place / "shards" / SHARD).write_bytes(ARCHIVES[name]())
    relist(place / "shards")
    for words in (("mpidp.train", "tiny.toml"), ("data_tools.verify", "shards")):
        refused(forks.run(place, *words, inject=LITTLE_MEMORY), place, 3, f"shards/{SHARD}: ")


@pytest.mark.parametrize("name", ARCHIVES)
def test_as_the_tensors_of_a_checkpoint(place: Path, newest: Path, forks: Forks, name: str) -> None:
    (newest / TENSORS).write_bytes(ARCHIVES[name]())
    vouch(newest)
    for words in (("mpidp.train", "tiny.toml"), ("mpidp.evaluate", "run"), ("mpidp.generate", "run")):
        refused(forks.run(place, *words, inject=LITTLE_MEMORY), place, 4, "step_00000004")


@pytest.mark.parametrize("name", [".pt", "pickle", "zip bomb", "deep header"])
def test_as_any_other_file(place: Path, newest: Path, forks: Forks, name: str) -> None:
    content = ARCHIVES[name]()
    (place / "source.txt").write_bytes(content)
    options = ("--source", "source.txt", "--out", "mine")
    refused(forks.run(place, "data_tools.prepare", *options, inject=LITTLE_MEMORY), place, 3, "source.txt")
    (newest / "manifest.json").write_bytes(content)
    refused(forks.run(place, "mpidp.train", "tiny.toml", inject=LITTLE_MEMORY), place, 4, "manifest.json: cannot be read")
    for file, code in (("shards/tokenizer.json", 3), ("shards/index.json", 3), ("tiny.toml", 2)):
        (place / file).write_bytes(content)
        refused(forks.run(place, "mpidp.train", "tiny.toml", inject=LITTLE_MEMORY), place, code, file)


def first(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the record of a file, and one of its tensors."""
    record = body["files"][0]
    return record, next(iter(record["pieces"]))


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file elsewhere": lambda body: body["files"][0].update(file="../../../secret"),
    "an absolute path": lambda body: body["files"][0].update(file="/proc/self/environ"),
    "a shape beyond all memory": lambda body: body["tensors"][first(body)[1]].update(shape=[1 << 40]),
    "a negative shape": lambda body: body["tensors"][first(body)[1]].update(shape=[-4]),
    "no type": lambda body: body["tensors"][first(body)[1]].update(dtype="load"),
    "a range beyond the tensor": lambda body: first(body)[0]["pieces"].update({first(body)[1]: [[5, 1 << 40]]}),
    "a dimension that is none": lambda body: first(body)[0]["pieces"].update({first(body)[1]: [[0, 1]] * 7}),
    "a piece of nothing": lambda body: first(body)[0]["pieces"].update({"model/other": [[0, 1]]}),
    "tensors that are no dict": lambda body: body.update(tensors=[1, 2]),
    "no files": lambda body: body.pop("files"),
    "no position": lambda body: body.pop("position"),
    "a position of other fields": lambda body: body["position"].update(owner="me"),
    "threads that no machine has": lambda body: body["config"].update({"train.threads": 1 << 31}),
    "threads that are a text": lambda body: body["config"].update({"train.threads": "x"}),
    "no config": lambda body: body.pop("config"),
    "another model": lambda body: body["tensors"].pop(first(body)[1]),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_lies(place: Path, newest: Path, forks: Forks, name: str) -> None:
    (place / "secret").write_bytes((newest / TENSORS).read_bytes())
    vouch(newest, LIES[name])
    refused(forks.run(place, "mpidp.train", "tiny.toml", "--train.threads=0", inject=LITTLE_MEMORY), place, 4, "step_00000004")


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e"


def test_no_terminal_escapes_are_printed(place: Path, forks: Forks) -> None:
    """Neither texts of shards nor names in messages reach the terminal as they are."""
    (place / "text.txt").write_text(f"before {ESCAPES} after\n" * 50)
    as_json = ESCAPES.encode("unicode_escape").decode().replace("\\x", "\\u00")
    (place / "bad.jsonl").write_text('{"text": ["' + as_json + '"]}\n')
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--out", "mine"), 0)
    said = [forks.run(place, "data_tools.inspect", "mine"), forks.run(place, "data_tools.inspect", ESCAPES)]
    said.append(forks.run(place, "mpidp.train", "tiny.toml", f"--train.{ESCAPES}=1"))
    said.append(forks.run(place, "data_tools.prepare", "--source", "bad.jsonl", "--out", "theirs"))
    index = json.loads((place / "shards" / "index.json").read_text())
    index["splits"]["train"][ESCAPES] = 1
    (place / "shards" / "index.json").write_text(json.dumps(index))
    said.append(forks.run(place, "mpidp.train", "tiny.toml"))
    assert [one.code for one in said] == [0, 3, 2, 3, 3], said
    for ended in said:
        assert not set("\x1b\x07\x9b\x7f\u202e") & set(ended.said), ended
    assert "before \\x1b]0;owned\\x07" in said[0].out
