"""Laws of training only some parameters of a model. The number of ranks does not change the bits. Frozen parameters never change
and are not sent. Runs with adapters resume, evaluate and generate with their base and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from data_tools.prepare import prepare
from mpidp.checkpoint.reader import Reader
from mpidp.checkpoint.resume import open_run
from mpidp.data.shards import TokenStream
from mpidp.errors import UsageError
from mpidp.evaluate import evaluate
from mpidp.inference.loading import load_model
from mpidp.model.lora import is_adapter
from mpidp.parallel.grid import make_grid
from mpidp.runtime.world import polite_barrier
from tests.tiny import SENTENCE, WORLD, at, corpus, job_at, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
LORA = {"lora_rank": 2, "lora_targets": "q,v,down"}
FROZEN = "embedding.*,blocks.0.*,*norm.weight"

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adapters": {"model": {**LORA, "dropout": 0.1}, "train": {"steps": 8}},
    "adapters, messages": {"model": LORA, "comm": {"transport": "messages"}, "mesh": {"shard": 1}},
    "frozen": {"optim": {"freeze": FROZEN}, "train": {"steps": 8}},
    "frozen, messages": {"optim": {"freeze": "blocks.1.*"}, "comm": {"transport": "messages"}},
}


def base_of(shards: Path, run: Path) -> dict[str, torch.Tensor]:
    """Return the parameters before the first step. Collective over WORLD."""
    def begin(comm: MPI.Intracomm) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in job_at(comm, tiny(shards, run)).engine.model.named_parameters()}

    return WORLD.bcast(at(1, begin)[0])


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_ranks_changes_no_bit(shared_folder: Path, shared_tmp: Path, name: str) -> None:
    data = corpus(shared_folder)
    runs = {n: train_at(n, tiny(data, shared_tmp / f"at{n}", **CASES[name])) for n in sizes(1, 3, 8)}
    alone = runs.pop(1)
    assert alone.losses[-1] < alone.losses[0] and len(set(alone.losses)) == len(alone.losses)
    for n, run in runs.items():
        assert (run.sha256, run.lines) == (alone.sha256, alone.lines), f"{n} ranks"


METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "synchronous": {}, "int8": {"comm": {"compress": "int8"}},
    "local": {"strategy": {"name": "local", "sync_every": 2, "meet_every": 6}},
    "delayed": {"strategy": {"name": "delayed", "meet_every": 3}},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", ["frozen", "adapters"])
def test_what_is_frozen_never_changes(shared_folder: Path, shared_tmp: Path, name: str, what: str) -> None:
    """All trained parameters change. A checkpoint of adapters contains only these."""
    data, n, sections = corpus(shared_folder), sizes(1, 2)[-1], dict(METHODS[name])
    sections |= {"model": LORA} if what == "adapters" else {"optim": {"freeze": FROZEN}}
    before = base_of(data, shared_tmp / "before")
    train_at(n, tiny(data, shared_tmp / "run", **sections))
    reader = Reader(shared_tmp / "run/checkpoints/step_00000006")
    saved = {key.removeprefix("model/"): reader[key] for key in reader if key.startswith("model/")}
    moments = {key.split("/")[1] for key in reader if key.startswith("strategy/") and key.endswith("/exp_avg")}
    trained = {name for name in saved if is_adapter(name)}
    if what == "adapters":
        assert set(saved) == trained and len(trained) == 2 * 2 * 3
        assert all(saved[name].any() for name in saved if name.endswith("lora_b"))
    else:
        moved = {name for name in before if not torch.equal(before[name], saved[name])}
        trained = {name for name in before if name.startswith(("blocks.1", "head")) and "norm" not in name}
        assert set(saved) == set(before) and moved == trained
    assert not moments or moments == trained


def sent(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(line["comm_bytes"] for line in lines if "train_loss" in line)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("reducer", ["tree", "allreduce"])
def test_only_what_is_trained_is_sent(shared_folder: Path, shared_tmp: Path, reducer: str) -> None:
    """The bytes sent are proportional to the size of the flat gradient, which has whole norm blocks for each trained unit of the
    model."""
    data, found = corpus(shared_folder), {}
    comm = {"reducer": reducer, "transport": "messages", "copies": "rank"}
    parts = {"all": {}, "adapters": {"model": LORA}, "head": {"optim": {"freeze": "embedding*,blocks*,norm*"}}}
    for name, sections in parts.items():
        config = tiny(data, shared_tmp / name, comm=comm, **sections)

        def elements(one: MPI.Intracomm, config: Any = config) -> int:
            return int(job_at(one, config).strategy.buffer.num_elements)

        train_at(2, config)
        found[name] = sent(shared_tmp / name) / WORLD.bcast(at(1, elements)[0])
    assert found["all"] > 0 and found["adapters"] == pytest.approx(found["all"], rel=0.01)
    assert found["head"] == pytest.approx(found["all"], rel=0.01) and sent(shared_tmp / "head") < sent(shared_tmp / "all") / 3


@pytest.mark.parametrize("sections", [{"model": {**LORA, "dropout": 0.1}}, {"optim": {"freeze": FROZEN}}], ids=["lora", "frozen"])
def test_a_run_goes_on_on_any_number_of_ranks(shared_folder: Path, shared_tmp: Path, sections: dict[str, Any]) -> None:
    data = corpus(shared_folder)
    for n, steps in zip((sizes(1, 2)[-1], 1, sizes(1, 3)[-1]), (2, 4, 6), strict=True):
        optim = {"warmup_steps": 2, "lr": 1e-2, "schedule": "constant"} | sections.get("optim", {})
        run = train_at(n, tiny(data, shared_tmp / "parts", **sections | {"train": {"steps": steps}, "optim": optim}))
    whole = train_at(1, tiny(data, shared_tmp / "once", **sections | {"optim": optim}))
    assert run.sha256 == whole.sha256


def test_a_run_of_adapters_is_evaluated_and_speaks(shared_folder: Path, shared_tmp: Path) -> None:
    data, run = corpus(shared_folder), shared_tmp / "run"
    end = train_at(sizes(1, 2)[-1], tiny(data, run, model=LORA, train={"eval_tokens": 0}, optim={"lr": 0.1})).end
    found = at(sizes(1, 2)[-1], lambda comm: evaluate(str(run), None, comm))[0]
    assert found["loss"] == end["val_loss"]

    def moved(comm: MPI.Intracomm) -> float:
        loaded = load_model(open_run(run, comm), make_grid(comm, 1, 1), "cpu", 1)
        window = torch.arange(16).view(1, 16)
        after = loaded.last_logits(window)
        for name, p in loaded.model.named_parameters():
            if name.endswith("lora_b"):
                p.data.zero_()
        return float((after - loaded.last_logits(window)).abs().max())

    assert at(1, moved)[0] > 0.01


def test_a_changed_adapter_is_another_run(shared_folder: Path, shared_tmp: Path) -> None:
    data = corpus(shared_folder)
    train_at(1, tiny(data, shared_tmp / "run", model=LORA, train={"steps": 1}, optim={"warmup_steps": 0}))
    with pytest.raises(UsageError, match="model.lora_rank was 2 and is now 3"):
        train_at(1, tiny(data, shared_tmp / "run", model=LORA | {"lora_rank": 3}, optim={"warmup_steps": 0}))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_freezing_on_a_mesh_is_freezing(shared_folder: Path, shared_tmp: Path, mesh: dict[str, int]) -> None:
    """Freezing also works for an embedding that two stages share."""
    data = corpus(shared_folder)
    sections: dict[str, Any] = {"model": {"tie_embeddings": True}, "optim": {"freeze": "embedding.*,blocks.0.attention.*"}}
    alone = train_at(1, tiny(data, shared_tmp / "alone", **sections))
    parted = train_at(2, tiny(data, shared_tmp / "parted", **sections, mesh=mesh))
    assert parted.losses == pytest.approx(alone.losses, rel=1e-5)
    assert parted.sha256 == alone.sha256 or "tp" in mesh


def rows(folder: Path) -> Path:
    """Shards with rows. Rank 0 creates them once. Collective over WORLD."""
    out = folder / "rows"
    if WORLD.rank == 0 and not out.exists():
        words = SENTENCE.split()
        pairs = [{"prompt": " ".join(words[i % 7 : i % 11 + 2]) + "?", "completion": words[i * i % 20]} for i in range(150)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        prepare(
            str(folder / "rows.jsonl"), out=out, form="prompt_completion", seq_len=64, shards=3, val_fraction=0.1, verbose=False
        )
    polite_barrier(WORLD)
    return out


def test_rows_are_learned_alike_by_any_number_of_ranks(shared_folder: Path, shared_tmp: Path) -> None:
    """The loss is the mean over all targets of the global batch, although ranks have different numbers of targets."""
    data, model = rows(shared_folder), {"seq_len": 64, **LORA}
    more: dict[str, Any] = {"model": model, "optim": {"lr": 0.03}, "train": {"eval_tokens": 0}}
    runs = [train_at(n, tiny(data, shared_tmp / f"at{n}", **more)) for n in sizes(1, 3, 8)]
    assert all((run.sha256, run.lines) == (runs[0].sha256, runs[0].lines) for run in runs)
    assert runs[0].losses[-1] < runs[0].losses[0]
    end, stream = runs[0].end, TokenStream(data)
    mask = stream.read_mask(0, stream.num_tokens)
    assert mask is not None and runs[0].lines[0]["tokens"] < int(mask.sum()) < stream.num_tokens / 2
    found = at(sizes(1, 2)[-1], lambda comm: evaluate(str(shared_tmp / "at1"), None, comm))[0]
    assert found["loss"] == end["val_loss"]  # evaluation keeps documents apart, too


def test_documents_of_text_may_be_kept_apart(shared_folder: Path, shared_tmp: Path) -> None:
    """The setting applies in training and evaluation. The loss differs from the loss with joined documents. There are fewer
    targets, because the first token of a document is not predicted."""
    lines, data = shared_folder / "lines.jsonl", shared_folder / "lines"
    if WORLD.rank == 0:
        lines.write_text("".join(json.dumps({"text": SENTENCE[i % 60 : i % 60 + 9]}) + "\n" for i in range(300)))
        prepare(str(lines), out=data, val_fraction=0.2, verbose=False)
    polite_barrier(WORLD)
    ends = {}
    for documents in ("joined", "apart"):
        config = tiny(data, shared_tmp / documents, data={"path": str(data), "documents": documents}, train={"eval_tokens": 0})
        ends[documents] = train_at(sizes(1, 2)[-1], config).end
        found = at(1, lambda comm, run=documents: evaluate(str(shared_tmp / run), None, comm))[0]
        assert found["loss"] == ends[documents]["val_loss"]
        ends[documents]["counted"] = found["tokens"]
    stream = TokenStream(data, "val")
    begins = int(stream.read_starts(1, stream.num_tokens - 1).sum())
    assert ends["joined"]["counted"] - ends["apart"]["counted"] == begins > 20
    assert ends["joined"]["val_loss"] != ends["apart"]["val_loss"]
