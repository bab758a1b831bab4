"""Laws of other kinds of models in mpidp.train. N ranks equal one rank bit for bit. A resumed run equals an uninterrupted run.
Trained models can be used. Models that differ between ranks are rejected before step 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpidp.errors import UsageError
from mpidp.evaluate import evaluate
from mpidp.generate import generate, read_options
from tests.tiny import DEVICE, WORLD, at, corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
TRAIN = {"steps": 5, "eval_every": 0, "eval_tokens": 0}
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"kind": "lstm", "model_dim": 16, "hidden_dim": 0, "dropout": 0.1, "tie_embeddings": True},
    "own": {
        "kind": "tests.own_models:Gru", "num_layers": 4, "model_dim": 16, "hidden_dim": 0, "dropout": 0.1, "options": "depth=2",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_restarts_change_no_bit_and_the_run_can_be_used(shared_folder: Path, shared_tmp: Path, kind: str) -> None:
    data, model = corpus(shared_folder), KINDS[kind]
    runs = [train_at(n, tiny(data, shared_tmp / f"at{n}", model=model, train=TRAIN)) for n in sizes(1, 2, 3)]
    assert len(set(runs[0].losses)) == 5 and runs[0].losses[-1] < runs[0].losses[0]
    assert all((run.sha256, run.lines) == (runs[0].sha256, runs[0].lines) for run in runs)
    n = len(runs)
    for steps, ranks in [(3, 1), (5, n)]:
        sections = {"train": TRAIN | {"steps": steps}, "optim": {"schedule": "constant", "lr": 1e-2, "warmup_steps": 2}}
        resumed = train_at(ranks, tiny(data, shared_tmp / "again", model=model, **sections))
    whole = train_at(n, tiny(data, shared_tmp / "whole", model=model, **sections))
    assert resumed.sha256 == whole.sha256 and resumed.events("resume")
    named = model["kind"]
    assert evaluate(str(shared_tmp / "at1"), None, WORLD, kind=named)["loss"] == runs[0].end["val_loss"]
    words = [str(shared_tmp / f"at{n}"), "--prompt=the rank", "--tokens=20", "--seed=3", f"--device={DEVICE}", "--threads=1",
             f"--model.kind={named}"]
    said = [at(ranks, lambda comm: generate(comm, read_options(words)))[0] for ranks in sizes(1, 2)]  # also beyond the context
    assert all(one == said[0] for one in said) and said[0][0]["text"]


@pytest.mark.parametrize("sections", [
    {"comm": {"compress": "int8"}}, {"strategy": {"name": "local", "sync_every": 2, "meet_every": 2}}, {"mesh": {"shard": 1}},
], ids=str)  # fmt: skip
def test_methods_know_nothing_of_kinds(shared_folder: Path, shared_tmp: Path, sections: dict[str, Any]) -> None:
    for kind, model in KINDS.items():
        run = train_at(sizes(2)[-1], tiny(corpus(shared_folder), shared_tmp / kind, model=model, train=TRAIN, **sections))
        assert run.end["step"] == 5 and run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(("name", "said"), [
    ("wider", "parameter 0: rank 0 has embedding.weight"), ("scaled", "buffer scale: rank 0"),
])  # fmt: skip
def test_ranks_with_unlike_models_are_told(shared_folder: Path, shared_tmp: Path, name: str, said: str) -> None:
    if WORLD.size < 2:
        pytest.skip("there is one model")
    model = KINDS["own"] | {"kind": f"tests.own_models:{name}", "dropout": 0.0, "options": ""}
    with pytest.raises(UsageError, match=said):
        train_at(2, tiny(corpus(shared_folder), shared_tmp / name, model=model, train=TRAIN))


def test_all_begin_with_rank_0s_weights(shared_folder: Path, shared_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = KINDS["own"] | {"kind": "tests.own_models:Ranked", "dropout": 0.0, "options": ""}
    runs = [train_at(n, tiny(corpus(shared_folder), shared_tmp / str(n), model=model, train=TRAIN)) for n in sizes(1, 2)]
    assert len({run.sha256 for run in runs}) == 1
    if WORLD.rank == 0 and WORLD.size > 1:
        assert "the model factory draws different initial weights on ranks [1] than on rank 0" in capsys.readouterr().err
