"""What the tools write: a full disk, and two processes that write to the same folder.

| fault | expected | checked |
|---|---|---|
| a full disk in prepare, convert, export, generate | 2, the file named; nothing half written, no temporary file | listing |
| two simultaneous prepares of one OUT | one works, the other exits with 2; the shards are whole | both codes, verify |
| two simultaneous first trainings, which both prepare the default corpus | both train; prepared once | both codes, output |
| Ctrl-C in convert | death by SIGINT, one line; nothing half written | listing |
| links with the old names of temporary files | never followed | content |
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.commands import Forks, Shell, expect

FULL = 3_000  # bytes: the output of a command must fit, too


def full(limit: int = FULL) -> str:
    """Return Python source after which no file of the process can be larger than `limit` bytes."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.fixture(autouse=True)
def source(place: Path) -> None:
    (place / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n\n" for i in range(200)))


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("out", ["shards", "new"])
def test_prepare_on_a_full_disk(place: Path, forks: Forks, out: str) -> None:
    before = listing(place)
    words = ("--source", "text.txt", "--out", out, "--shards", "1", "--val-fraction", "0")
    ended = forks.run(place, "data_tools.prepare", *words, inject=full())
    expect(ended, 2, f"{out}/", "cannot be written (File too large): free space")
    assert listing(place) == before, ended
    expect(forks.run(place, "data_tools.prepare", *words), 0)
    expect(forks.run(place, "data_tools.verify", out), 0)


def test_shards_that_fill_the_disk_at_any_byte(place: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> None:
    """HDF5 writes the end of a file when it closes it. A failure there must not crash the process."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]
    if (mounted := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"SKIPPED FOR LACK OF the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        codes = set()
        for filler in range(80_000, 204_800, 8_192):  # the raw tokens take 12 kB, and so does the shard
            (disk / "filler").write_bytes(bytes(filler))
            words = ("--source", "text.txt", "--out", disk / "out", "--shards", "1", "--val-fraction", "0")
            ended = forks.run(place, "data_tools.prepare", *words)
            codes.add(ended.code)
            assert (disk / "out").exists() == (ended.code == 0), ended
            expect(ended, ended.code, *(["No space left on device"] if ended.code else []))
            shutil.rmtree(disk / "out", ignore_errors=True)
        assert codes == {0, 2}
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_convert_on_a_full_disk(place: Path, forks: Forks) -> None:
    before = listing(place)
    words = ("--to", "megatron", "shards", "--out", "meg")
    expect(forks.run(place, "data_tools.convert", *words, inject=full()), 2, "meg_", "cannot be written (File too large)")
    left = listing(place)
    assert left == before, left
    expect(forks.run(place, "data_tools.convert", *words[:-1], "whole"), 0)
    before = listing(place)
    words = ("--from", "megatron", "whole", "--out", "again", "--tokenizer", "byte")
    expect(forks.run(place, "data_tools.convert", *words, inject=full()), 2, "cannot be written (File too large)")
    assert listing(place) == before


@pytest.mark.parametrize("name", ["litdata", "mds"])
def test_convert_is_interrupted(place: Path, forks: Forks, name: str) -> None:
    before = listing(place)
    interrupt = ("import os, signal, data_tools.formats.row_files as files\n"
                 "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                 "files.RowFiles.close = lambda self: os.kill(os.getpid(), signal.SIGINT)\n")
    ended = forks.run(place, "data_tools.convert", "--to", name, "shards", "--out", "new", inject=interrupt)
    expect(ended, -signal.SIGINT, "mpidp: interrupted")
    assert listing(place) == before


def test_export_on_a_full_disk(place: Path, finished: Path, forks: Forks) -> None:
    shutil.copytree(finished, place / "run")
    before = listing(place)
    ended = forks.run(place, "mpidp.export", "run", "--out", "hf", inject=full())
    expect(ended, 2, "hf cannot be written", "File too large")
    assert listing(place) == before


def test_generate_on_a_full_disk(place: Path, finished: Path, forks: Forks) -> None:
    shutil.copytree(finished, place / "run")
    (place / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 40)
    (place / "out.jsonl").write_text("old")
    before = listing(place)
    words = ("run", "--prompts", "prompts.jsonl", "--tokens", "100", "--out", "out.jsonl")
    expect(forks.run(place, "mpidp.generate", *words, inject=full()), 2, "--out out.jsonl cannot be written (File too large)")
    assert listing(place) == before


@pytest.mark.parametrize("there", [True, False])
def test_two_prepares_of_one_folder(shell: Shell, there: bool) -> None:
    out = "shards" if there else "new"
    words = ("-m", "data_tools.prepare", "--source", "text.txt", "--out", out, "--shards", "40")
    ended = [started.wait() for started in [shell.start(*words), shell.start(*words)]]
    codes = sorted(one.code for one in ended)
    assert codes in ([0, 0], [0, 2]), ended  # [0, 0]: the second began when the first had finished
    for one in ended:
        expect(one, one.code, *(["in use by process", "choose another folder with --out=DIR"] if one.code else []))
    expect(shell.run("-m", "data_tools.verify", out), 0)
    assert sorted(os.listdir(shell.folder / out))[:2] == ["index.json", "tokenizer.json"]


def test_two_first_trainings(shell: Shell) -> None:
    code = (
        "import sys, time, mpidp.train as train, data_tools.out_folder as out\n"
        "from mpidp.runtime.command import run_entry\n"
        "train.DEFAULT_CORPUS = {'source': 'text.txt', 'tokenizer': 'byte', 'shards': 2}\n"
        "to_disk = out.OutFolder.put_in_place\n"
        "out.OutFolder.put_in_place = lambda *words: (time.sleep(3), to_disk(*words))\n"
        "run_entry(train.main)\n"
    )
    text = (shell.folder / "tiny.toml").read_text().replace('path = "shards"', "")
    (shell.folder / "first.toml").write_text(text)
    both = [shell.start("-c", code, "first.toml", f"--run.dir=run{i}") for i in (1, 2)]
    ended = [started.wait() for started in both]
    for one in ended:
        expect(one, 0)
    assert sum("shards with" in one.out for one in ended) == 1, ended
    assert any("Waiting until that process has finished" in one.out for one in ended), ended


def test_links_of_others_are_not_followed(place: Path, forks: Forks) -> None:
    (place / "precious").write_text("keep")
    names = [".index.json.tmp", ".train_00000.h5.tmp", ".tokenizer.json.tmp"]
    for folder in (place / "shards", place):
        for name in (*names, ".meg_train.bin.part", ".meg_train.idx.part", ".report.html.tmp"):
            (folder / name).symlink_to(place / "precious")
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--out", "shards"), 0)
    expect(forks.run(place, "data_tools.convert", "--to", "megatron", "shards", "--out", "meg"), 0)
    assert (place / "precious").read_text() == "keep"
    (place / "shards" / ".prepare.lock").symlink_to(place / "precious")
    expect(forks.run(place, "data_tools.prepare", "--source", "text.txt", "--out", "shards"), 2, "symbolic links")
    assert (place / "precious").read_text() == "keep"
