"""Laws of adapters on given base weights. The number of ranks does not change the bits. Resume, evaluation, generation, replay
and export work with the base and the checkpoint, and reject a different base."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config
from mpidp.errors import DataError, MpidpError, UsageError
from mpidp.evaluate import evaluate
from mpidp.export import export
from mpidp.generate import generate, read_options
from mpidp.replay import inspect_step
from tests.hybrid.test_init_from import folder
from tests.tiny import WORLD, at, corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
LORA = {"lora_rank": 2, "lora_targets": "q,v,down", "dropout": 0.1}
OPTIM = {"lr": 0.03, "warmup_steps": 1, "schedule": "constant"}


def on(data: Path, run: Path, source: Path, steps: int = 4, **model: Any) -> Config:
    """Train adapters on source."""
    plain = Config().model
    left_out = {key: getattr(plain, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")}
    train = {"init_from": str(source), "steps": steps, "eval_every": 0, "eval_tokens": 0, "global_batch": 6, "save_every": 2}
    return tiny(data, run, model=left_out | LORA | model, train=train, optim=OPTIM)


def base(where: Path, data: Path, kind: str) -> Path:
    """A copy of the base model, because tests change it. Collective over WORLD."""
    source = where / "source"
    if kind == "run":
        train_at(1, tiny(data, source, train={"steps": 1, "eval_every": 0}, optim=OPTIM))
        return source
    made = folder(where, False)
    if WORLD.rank == 0:
        made.rename(source)
    WORLD.barrier()
    return source


def replayed(n: int, run: Path, step: int, base: str = "") -> dict[str, Any]:
    options = argparse.Namespace(run=str(run), step=step, data=None, device=None, threads=None, model_kind="", base=base)
    return at(n, lambda comm: inspect_step(options, comm))[0]


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_it_is_one_run_on_any_number_of_ranks_and_can_be_used(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data = corpus(shared_folder)
    source, few = base(shared_tmp, data, kind), sizes(1, 2)[-1]
    runs = [train_at(n, on(data, shared_tmp / f"at{n}", source)) for n in sizes(1, 2, 3)]
    alone, run = runs[0], shared_tmp / f"at{few}"
    assert all((one.sha256, one.lines) == (alone.sha256, alone.lines) for one in runs) and len(set(alone.losses)) == 4
    saved = Reader(run / "checkpoints/step_00000004")
    assert not [key for key in saved if key.startswith("model/") and "lora" not in key]
    for n, steps in zip((few, 1), (2, 4), strict=True):
        again = train_at(n, on(data, shared_tmp / "parts", source, steps))
    assert again.sha256 == alone.sha256 and again.events("resume")
    assert at(few, lambda comm: evaluate(str(run), None, comm))[0]["loss"] == alone.end["val_loss"]
    words = [str(run), "--prompt=the rank", "--tokens=9", "--device=cpu", "--threads=1"]
    said = [at(n, lambda comm: generate(comm, read_options(words)))[0] for n in sizes(1, 2)]
    assert said[0] == said[-1]
    for n, step in ((few, 1), (1, 4)):  # from the base, and from a checkpoint on the base; the checkpoints are compared, too
        found = replayed(n, run, step)
        assert found["same"], found["verdict"]
    at(1, lambda comm: export(comm, str(run), str(shared_tmp / "out")))
    with pytest.raises(UsageError, match="is a LoRA run. Export it"):
        train_at(few, on(data, shared_tmp / "more", run))
    plain = {"lora_rank": 0, "lora_targets": Config().model.lora_targets}
    further = on(data, shared_tmp / "further", shared_tmp / "out", 1, **plain).with_values(optim={"lr": 0.0})
    assert train_at(1, further).end["val_loss"] == pytest.approx(alone.end["val_loss"], rel=1e-6)  # it is the same model


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_base_that_is_gone_or_another_is_told(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data, few = corpus(shared_folder), sizes(1, 2)[-1]
    source, run, aside = base(shared_tmp, data, kind), shared_tmp / "run", shared_tmp / "aside"
    train_at(few, on(data, run, source, 2))
    before = (run / "init.json").read_bytes()
    uses = {
        "train": lambda: train_at(few, on(data, run, source)),
        "evaluate": lambda: at(few, lambda comm: evaluate(str(run), None, comm)),
        "export": lambda: at(few, lambda comm: export(comm, str(run), str(shared_tmp / "out"))),
        "replay": lambda: replayed(few, run, 2),
    }

    def refused(said: str) -> None:
        for name, use in uses.items():
            with pytest.raises(MpidpError, match=said) as caught:
                use()
            assert isinstance(caught.value, (DataError, UsageError)) and str(source) in str(caught.value), name
        assert not (shared_tmp / "out").exists() and (run / "init.json").read_bytes() == before

    if WORLD.rank == 0:
        source.rename(aside)
    WORLD.barrier()
    refused("neither a run .*nor a Hugging Face folder")
    if kind == "run":  # it was trained further meanwhile
        if WORLD.rank == 0:
            shutil.copytree(aside, source)
        WORLD.barrier()
        train_at(1, tiny(data, source, train={"steps": 2, "eval_every": 0}, optim=OPTIM))
    else:
        train_at(1, on(data, shared_tmp / "plain", aside, 1, lora_rank=0, lora_targets=Config().model.lora_targets))
        at(1, lambda comm: export(comm, str(shared_tmp / "plain"), str(source)))
    refused("the weights in .* are not those from which the run started|has changed since")
    if WORLD.rank == 0:
        shutil.rmtree(source)
        aside.rename(source)
    WORLD.barrier()
    assert train_at(few, on(data, run, source)).end["step"] == 4


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_base_that_has_moved_is_named(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    """The weights of the base are checked, not its path. Therefore a run with adapters can be moved to another machine."""
    data, few = corpus(shared_folder), sizes(1, 2)[-1]
    source, run, moved = base(shared_tmp, data, kind), shared_tmp / "run", shared_tmp / "elsewhere"
    whole = train_at(few, on(data, shared_tmp / "whole", source))
    train_at(few, on(data, run, source, 2))
    if WORLD.rank == 0:
        source.rename(moved)
    WORLD.barrier()
    with pytest.raises(DataError, match="or give its new place with --base DIR"):
        at(1, lambda comm: evaluate(str(run), None, comm))
    there = str(moved)
    assert at(few, lambda comm: evaluate(str(run), None, comm, base=there))[0]["tokens"] > 0
    words = [str(run), "--prompt=the rank", "--tokens=3", "--device=cpu", "--threads=1", f"--base={there}"]
    assert at(few, lambda comm: generate(comm, read_options(words)))[0][0]["tokens"] == 3
    assert replayed(few, run, 2, there)["same"]
    at(1, lambda comm: export(comm, str(run), str(shared_tmp / "out"), base=there))
    again = train_at(few, on(data, run, Path(f"{moved.parent}/./elsewhere")))
    assert again.events("resume") and again.sha256 == whole.sha256
    assert evaluate(str(run), None, WORLD)["loss"] == whole.end["val_loss"]  # the new checkpoints name the new place
    train_at(1, tiny(data, shared_tmp / "plain", train={"steps": 1, "eval_every": 0}, optim=OPTIM))
    with pytest.raises(UsageError, match="needs no base model. Omit --base, which only LoRA"):
        at(1, lambda comm: evaluate(str(shared_tmp / "plain"), None, comm, base=there))
