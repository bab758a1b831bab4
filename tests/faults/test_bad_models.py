"""Models, tokenizers, templates, masks and runs that cannot be used: one message that says what is wrong, where, and how to fix
it.

| fault | command | expected | checked |
|---|---|---|---|
| a Hugging Face folder: files missing, or pickled weights | train.init_from | 3: files, reason | code, output; no run.dir |
| shards of another tokenizer; of one larger than the model | train.init_from | 3, 2: the right one | code, output; no run.dir |
| chats without a template | prepare | 2: where a template is searched | code, output; no shards |
| a mask without targets: everywhere, or in the evaluated part | train | 3 before step 1, the split | code, output; no run.dir |
| a mask that is listed but missing in the file | train, verify | 3, the file | code, output; no run.dir |
| a run without any checkpoint | evaluate, generate, export, report, init_from | 2, 4 | code, output; nothing written |
| an unfinished run with checkpoints | evaluate, export, init_from | 0, from the newest | code, output |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from tests.faults.commands import Forks, expect, faulty
from tests.faults.test_bad_data import relist


@pytest.fixture(scope="session")
def exported(finished: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run exported as a Hugging Face folder, with weights in several files. Tests do not change it."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    expect(forks.run(finished.parent, "mpidp.export", "run", "--out", out, "--max-file-gb", "2e-5"), 0)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def two_missing(folder: Path, forks: Forks) -> None:
    for file in sorted(folder.glob("hf/*.safetensors"))[:2]:
        file.unlink()


def pickled(folder: Path, forks: Forks) -> None:
    for file in folder.glob("hf/model*"):
        file.unlink()
    (folder / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def another(folder: Path, forks: Forks) -> None:
    (folder / "text.txt").write_text("some text\n" * 300)
    expect(forks.run(folder, "data_tools.prepare", "--source", "text.txt", "--tokenizer", "bpe:260", "--out", "shards"), 0)


def larger(folder: Path, forks: Forks) -> None:
    another(folder, forks)
    shutil.copy(folder / "shards" / "tokenizer.json", folder / "hf")


FOLDERS: dict[str, tuple[Callable[[Path, Forks], None], int, list[str]]] = {
    "files missing": (two_missing, 3, ["hf: 2 of ", "weight files are missing (model-00001-of-"]),
    "pickled": (pickled, 3, ["hf: its weights are pickled (pytorch_model.bin)", "can execute any code", "safetensors"]),
    "another tokenizer": (another, 3, ["a different tokenizer than hf/tokenizer.json", "prepare --tokenizer hf/tokenizer.json"]),
    "a larger tokenizer": (larger, 2, ["model.vocab_size=257", "shards has 260"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_begun_with(place: Path, exported: Path, forks: Forks, name: str) -> None:
    spoil, code, phrases = FOLDERS[name]
    shutil.copytree(exported, place / "hf")
    spoil(place, forks)
    expect(forks.run(place, "mpidp.train", "tiny.toml", "--train.init_from=hf"), code, *phrases)
    assert not (place / "run").exists()


def test_chats_without_a_template(tmp_path: Path, forks: Forks) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    words = ("--format", "chat", "--source", "chats.jsonl", "--seq-len", 16, "--out", "mine")
    expect(forks.run(tmp_path, "data_tools.prepare", *words), 2, "needs a chat template", "--chat-template FILE")
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


def unmasked(file: h5py.File) -> None:
    del file["loss_mask"]


def masked(file: h5py.File) -> None:
    file["loss_mask"][...] = 0


MASKS: dict[str, tuple[str, Callable[[h5py.File], None], str]] = {
    "no target": ("train_*.h5", masked, "shards: the loss mask excludes all of the first 3,"),
    "no target to evaluate on": ("val_*.h5", masked, "targets of split 'val', so there is no loss"),
    "no mask": ("train_00001.h5", unmasked, "shards/train_00001.h5: its dataset loss_mask is missing, or is only a link"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_without_tokens(place: Path, forks: Forks, name: str) -> None:
    files, change, phrase = MASKS[name]
    (place / "pairs.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "completion": "{i + 1}"}}\n' for i in range(300)))
    rows = ("--format", "prompt_completion", "--source", "pairs.jsonl", "--seq-len", 16, "--shards", 2, "--val-fraction", 0.1)
    expect(forks.run(place, "data_tools.prepare", *rows, "--out", "shards"), 0)
    for path in (place / "shards").glob(files):
        with h5py.File(path, "r+") as file:
            change(file)
        relist(place / "shards", path.name)
    expect(forks.run(place, "mpidp.train", "tiny.toml"), 3, phrase, "again")
    assert not (place / "run").exists()
    if change is unmasked:
        expect(forks.run(place, "data_tools.verify", "shards"), 3, phrase)


EMPTY = "run contains no checkpoint. Train first, with --run.dir=run"
USES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "evaluate": (("mpidp.evaluate", "run"), 4, EMPTY),
    "generate": (("mpidp.generate", "run"), 4, EMPTY),
    "export": (("mpidp.export", "run", "--out", "out"), 4, EMPTY),
    "init_from": (("mpidp.train", "tiny.toml", "--run.dir=out", "--train.init_from=run"), 4, EMPTY),
    "report": (("mpidp.report", "run", "--out", "out"), 2, "no line of a step: the run has not completed a step yet"),
}


@pytest.fixture(scope="session")
def stillborn(prepared: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiny.toml that was killed in its first step."""
    folder = tmp_path_factory.mktemp("stillborn")
    shutil.copytree(prepared, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    ended = forks.run(folder, "mpidp.train", "tiny.toml", inject=faulty("os._exit(9)", batches=[0]))
    assert ended.code == 9 and (folder / "run" / "metrics.jsonl").exists(), ended
    return folder / "run"


@pytest.mark.parametrize("name", USES)
def test_a_run_that_never_came_to_a_checkpoint(place: Path, stillborn: Path, forks: Forks, name: str) -> None:
    (module, *words), code, phrase = USES[name]
    shutil.copytree(stillborn, place / "run")
    expect(forks.run(place, module, *words), code, phrase)
    assert not (place / "out").exists()


@pytest.mark.parametrize("name", ["evaluate", "export", "init_from"])
def test_a_run_that_never_ended_serves_from_its_newest_checkpoint(place: Path, half_run: Path, forks: Forks, name: str) -> None:
    (module, *words), _, _ = USES[name]
    ended = forks.run(place, module, *words)
    expect(ended, 0)
    assert {"evaluate": "step 4: loss", "export": "step 4 of run", "init_from": "weights from run"}[name] in ended.out
