"""Opening a run that somebody else made runs no code that its files name, unless the user names the same code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import prepare
from mpidp import evaluate, generate, replay
from mpidp.checkpoint.manifest import _seal, read_manifest
from mpidp.config.schema import Config
from mpidp.errors import CheckpointError, DataError, MpidpError, UsageError
from mpidp.export import export
from tests.tiny import WORLD, text, tiny, train_at

KIND = "marker_of_a_run:Model"
MODULE = """
from pathlib import Path
import torch
Path(__file__).with_name("imported").touch()
class Model(torch.nn.Module):
    def __init__(self, vocab_size, model_dim, note="none"):
        super().__init__()
        Path(__file__).with_name("called").write_text(note)
        self.embedding, self.head = torch.nn.Embedding(vocab_size, model_dim), torch.nn.Linear(model_dim, vocab_size)
    def forward(self, x):
        return self.head(self.embedding(x))
"""
PLAIN = {key: getattr(Config().model, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")}
SIZES = PLAIN | {"model_dim": 8, "seq_len": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module, shards, and a run of the module's model."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "marker_of_a_run.py").write_text(MODULE)
    (folder / "text.txt").write_text(text(3000))
    prepare(str(folder / "text.txt"), "byte", folder / "shards", shards=1, val_fraction=0.2, verbose=False)
    sys.path.insert(0, str(folder))
    own = SIZES | {"kind": KIND, "options": "note=hello"}
    train_at(1, tiny(folder / "shards", folder / "run", model=own, train={"steps": 2, "eval_every": 0}))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def place(made: Path) -> Path:
    """The same folder as on the machine of somebody who opens the run for the first time."""
    sys.modules.pop("marker_of_a_run", None)
    for name in ("imported", "called"):
        (made / name).unlink(missing_ok=True)
    shutil.rmtree(made / "mine", ignore_errors=True)
    return made


def begin_with(place: Path, run: str, *named: str) -> Any:
    kinds = {"kind": named[0].removeprefix("--model.kind=")} if named else {}
    model = PLAIN | {"seq_len": 16} | kinds
    train = {"init_from": run, "steps": 2, "eval_every": 0}
    return train_at(1, tiny(place / "shards", place / "mine", model=model, train=train))


def evaluated(place: Path, run: str, *named: str) -> Any:
    options = evaluate.read_options([run, *named])
    return evaluate.evaluate(options.run, None, WORLD, device="cpu", kind=options.model_kind)


def of_a_text(place: Path, run: str, *named: str) -> Any:
    return evaluate.evaluate_text(evaluate.read_options([run, f"--text={place / 'text.txt'}", "--device=cpu", *named]), WORLD)


def generated(place: Path, run: str, *named: str) -> Any:
    return generate.generate(WORLD, generate.read_options([run, "--tokens=2", "--device=cpu", *named]))


USES: dict[str, Callable[..., Any]] = {
    "generate": generated,
    "evaluate": evaluated,
    "evaluate --text": of_a_text,
    "replay": lambda place, run, *named: replay.inspect_step(replay.read_options([run, *named]), WORLD),
    "train.init_from": begin_with,
}


@pytest.mark.parametrize("use", USES)
def test_code_runs_only_if_the_user_names_it(place: Path, use: str) -> None:
    work, run = USES[use], str(place / "run")
    with pytest.raises(UsageError, match=f"import this module and call its factory.* add --model.kind={KIND}"):
        work(place, run)
    with pytest.raises(UsageError, match=f"has model.kind={KIND}"):
        work(place, run, "--model.kind=json:JSONDecoder")
    assert not (place / "imported").exists() and "marker_of_a_run" not in sys.modules
    work(place, run, f"--model.kind={KIND}")
    assert (place / "called").read_text() == "hello"


def test_an_export_never_calls_it(place: Path) -> None:
    with pytest.raises(UsageError, match=f"has model.kind={KIND}: only model.kind=transformer can be exported"):
        export(WORLD, str(place / "run"), str(place / "out"))
    assert not (place / "imported").exists()


@pytest.mark.parametrize(("change", "wrong"), [
    ({"factory": "marker_of_a_run:Model"}, CheckpointError),  # the named kind, with another factory behind it
    ({"arguments": {"vocab_size": 257, "model_dim": 8, "note": ["nested"]}}, CheckpointError),
    (None, MpidpError),  # a built-in kind with the shape of a custom model
])
def test_a_manifest_with_two_names_is_refused(place: Path, change: dict[str, Any] | None, wrong: type[Exception]) -> None:
    run, kind = place / "mine", "tests.own_models:Gru" if change and "factory" in change else KIND
    shutil.copytree(place / "run", run)
    path = next((run / "checkpoints").iterdir())
    body = read_manifest(path)
    body["config"]["model.kind"] = kind if change else "transformer"
    body["shape"] |= change or {}
    (path / "manifest.json").write_bytes(_seal(body))
    named = [f"--model.kind={kind}"] if change else []
    with pytest.raises(wrong):
        USES["generate"](place, str(run), *named)
    assert not (place / "called").exists()


def test_a_run_s_own_start_file_names_no_code(place: Path) -> None:
    """RUN/init.json holds settings of the source, and a later start reads them instead of the source."""
    run = place / "mine"
    begin_with(place, str(place / "run"), f"--model.kind={KIND}")
    assert json.loads((run / "init.json").read_bytes())["settings"]["kind"] == KIND
    sys.modules.pop("marker_of_a_run", None)
    (place / "imported").unlink()
    with pytest.raises(UsageError, match=f"add --model.kind={KIND}"):
        begin_with(place, str(place / "run"))
    assert not (place / "imported").exists()
    assert begin_with(place, str(place / "run"), f"--model.kind={KIND}").end["step"] == 2


@pytest.mark.parametrize("change", [{"num_layers": 2**31 - 1}, {"model_dim": 2**24}, {"num_layers": 3}])
def test_sizes_of_a_manifest_that_its_files_do_not_have_are_refused_at_once(place: Path, change: dict[str, int]) -> None:
    small = PLAIN | {"num_layers": 1, "model_dim": 8, "num_heads": 2, "hidden_dim": 16, "seq_len": 16}
    train_at(1, tiny(place / "shards", place / "small", model=small, train={"steps": 2, "eval_every": 0, "save_every": 0}))
    path = next((place / "small/checkpoints").iterdir())
    body = read_manifest(path)
    body["config"] |= {f"model.{key}": value for key, value in change.items()}
    body["shape"] |= change
    (path / "manifest.json").write_bytes(_seal(body))
    said = r"its shape has|has shape|KeyError|num_layers=\d+ is not an integer in 1\.\.65536"
    for use in ("generate", "evaluate", "train.init_from"):
        with pytest.raises((CheckpointError, DataError), match=f"{said}|do not have the sizes"):
            USES[use](place, str(path))
    with pytest.raises(CheckpointError, match=said):
        export(WORLD, str(path), str(place / "out"))
    assert not (place / "out").exists()
    shutil.rmtree(place / "small")
