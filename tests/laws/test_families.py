"""Laws of training models of each family. A fine-tune has the losses and gradients of transformers, the export is the model, and
the number of ranks changes no bit. The data are prompts with completions: documents apart, a loss mask, longer than windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_tools.prepare import prepare
from mpidp.checkpoint.reader import Reader
from mpidp.config.schema import Config
from mpidp.data.loader import MicroBatch
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.evaluate import evaluate_text
from mpidp.evaluate import read_options as evaluate_options
from mpidp.export import export
from mpidp.generate import generate, read_options
from mpidp.hf.families import BY_MODEL_TYPE
from mpidp.hf.folder import ModelFolder
from mpidp.hf.names import settings_of
from mpidp.hf.tokens import huggingface_json
from mpidp.runtime.world import polite_barrier
from tests.families import MODEL_TYPES, ONE_OF_EACH, ROWS, config_of_row, folder_of_row, under_our_names
from tests.tiny import WORLD, at, gradients_of, job_at, sizes, text, tiny, train_at

pytestmark = pytest.mark.mpi
T, BATCH, STEPS = 24, 4, 20
OPTIM = {"name": "sgd", "lr": 0.1, "beta1": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant", "clip": 0.0}
CLOSE = 1e-5  # distance of two gradients of a parameter, relative to its norm


@pytest.fixture(scope="module")
def data(shared_folder: Path) -> Path:
    """Rows of 6 to 22 tokens, packed into windows of 24."""
    out = shared_folder / "rows_of_families"
    if WORLD.rank == 0 and not out.exists():
        words, rows = text(9000), []
        for i in range(330):
            at, length = 23 * i, 5 + 7 * i % 17
            rows.append({"prompt": words[at : at + length // 3], "completion": words[at + length // 3 : at + length]})
        (shared_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(str(shared_folder / "rows.jsonl"), "byte", out, shards=2, val_fraction=0.1, seq_len=T,
                form="prompt_completion", verbose=False)
    polite_barrier(WORLD)
    return out


def source_of(row: str, where: Path) -> Path:
    """The folder of a row with a byte tokenizer. Collective over WORLD."""
    out = where / row.replace(", ", "_").replace(" ", "_")
    if WORLD.rank == 0 and not out.exists():
        folder_of_row(row, out)
        (out / "tokenizer.json").write_text(huggingface_json(ByteTokenizer()))
    polite_barrier(WORLD)
    return out


def begun(data: Path, source: Path, run: Path, /, **sections: dict[str, Any]) -> Config:
    plain = Config().model
    model = {key: getattr(plain, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")} | {"seq_len": T}
    train = {"init_from": str(source), "steps": STEPS, "global_batch": BATCH, "micro_batch": BATCH, "eval_every": 0}
    found: dict[str, Any] = {"model": model, "train": train, "optim": OPTIM, "data": {"order": "sequential"}}
    return tiny(data, run, **{key: found.get(key, {}) | sections.get(key, {}) for key in {*found, *sections}})


def reader_of(run: Path) -> Reader:
    return Reader(run / "checkpoints" / (run / "latest").read_text())


def batch_of(stream: TokenStream, step: int) -> MicroBatch:
    first, count = BATCH * step * T, BATCH * T + 1
    ids, mask = stream.read(first, count).astype(np.int64), stream.read_mask(first, count)
    starts = stream.read_starts(first, count)
    assert mask is not None
    windows = [slice(at, at + T + 1) for at in range(0, BATCH * T, T)]
    return MicroBatch.of(0, *(np.stack([whole[cut] for cut in windows]) for whole in (ids, mask, starts)))


def loss_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The mean loss over the targets, from transformers: each document is an input of its own."""
    total = torch.zeros(())
    assert batch.doc_ids is not None
    for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.doc_ids, strict=True):
        for one in ids.unique():
            here = ids == one
            if (targets[here] >= 0).any():
                total = total + F.cross_entropy(model(tokens[here][None]).logits[0], targets[here], reduction="sum")
    return total / batch.num_tokens


def taught(comm: MPI.Intracomm, source: Path, config: Config) -> tuple[list[float], dict[str, list[float]], dict[str, Tensor]]:
    """Fine-tune a folder with transformers. Compute each gradient also with mpidp's training step, from the same weights.

    Return the losses; by parameter the distance of the two gradients at each step, relative to its norm; and the last weights.
    The distance of a bias is relative to the norm of its matrix if that is larger: without rotary positions, the exact gradient
    of the bias of k is 0.
    """
    job, folder = job_at(comm, config), ModelFolder(source)
    ours = dict(job.engine.model.named_parameters())
    model, stream = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), TokenStream(config.data.path)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    losses, apart = [], {name: list[float]() for name in ours}
    for step in range(STEPS):
        theirs = under_our_names(folder, dict(model.named_parameters()))
        with torch.no_grad():
            for name, p in ours.items():
                p.copy_(theirs[name])
        found, batch = gradients_of(job, step), batch_of(stream, step)
        loss, scale = loss_of(model, batch), BATCH * T / batch.num_tokens  # a step divides by the number of targets last
        optimizer.zero_grad()
        loss.backward()
        wanted = under_our_names(folder, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert wanted.keys() == found.keys() == ours.keys()
        for name, gradient in found.items():
            norm = max(float(wanted[one].norm()) for one in {name, name.replace(".bias", ".weight")})
            apart[name].append(float((scale * gradient.view_as(wanted[name]) - wanted[name]).norm()) / norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, apart, model.state_dict()


@pytest.mark.check
@pytest.mark.parametrize("row", [row for row in ROWS if "long" not in row.partition(",")[2].replace("longrope", "", 1)])
def test_a_fine_tune_is_that_of_transformers(data: Path, shared_folder: Path, shared_tmp: Path, row: str) -> None:
    """Every loss agrees, and every gradient of every parameter from the same weights. The export has the logits of transformers'
    own fine-tune and is imported bit for bit."""
    source = source_of(row, shared_folder)
    optim = {"lr": 0.01 if row.startswith("olmo") else OPTIM["lr"]}  # with norms after the branches, rounding errors grow faster
    ran = train_at(1, begun(data, source, shared_tmp / "run", optim=optim))
    aside = begun(data, source, shared_tmp / "aside", optim=optim)
    losses, apart, weights = at(1, lambda comm: taught(comm, source, aside))[0]
    assert ran.losses == pytest.approx(losses, rel=1e-5)
    assert not {name: max(some) for name, some in apart.items() if not max(some) < (2 * CLOSE if row == "gpt2" else CLOSE)}
    assert max(losses) - min(losses) > 0.05
    at(1, lambda comm: export(comm, str(shared_tmp / "run"), str(shared_tmp / "out")))
    exported, said = AutoModelForCausalLM.from_pretrained(shared_tmp / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.load_state_dict(weights)
    assert type(exported) is type(model)
    ids = torch.from_numpy(TokenStream(data).read(0, 2 * T).astype(np.int64)).view(2, T)
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    again = train_at(1, begun(data, shared_tmp / "out", shared_tmp / "again", train={"steps": 1}))
    assert again.end["step"] == 1
    assert reader_of(shared_tmp / "again").meta["init_from"]["weights_sha256"] == ran.sha256


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}], ids=["", "lora"])
@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_the_number_of_ranks_changes_no_bit(data: Path, shared_folder: Path, shared_tmp: Path, row: str, lora: Any) -> None:
    """LoRA's export has the adapters in its weights."""
    source, found = source_of(row, shared_folder), {}
    for n in sizes(1, 2, 3):
        config = begun(data, source, shared_tmp / f"at{n}", model=lora, train={"steps": 6, "micro_batch": 1})
        found[n] = train_at(n, config)
    assert len({(run.sha256, json.dumps(run.learned)) for run in found.values()}) == 1
    assert found[1].losses[0] != found[1].losses[-1]
    if lora:
        at(1, lambda comm: export(comm, str(shared_tmp / "at1"), str(shared_tmp / "out")))
        model, stream = AutoModelForCausalLM.from_pretrained(shared_tmp / "out", dtype=torch.float32).eval(), TokenStream(data)
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        config = begun(data, source, shared_tmp / "at1", model=lora, train={"steps": 7, "micro_batch": 1})
        seventh = train_at(1, config).losses[-1]
        with torch.no_grad():
            assert seventh == pytest.approx(float(loss_of(model, batch_of(stream, 6))), rel=1e-5)
            assert seventh != pytest.approx(float(loss_of(plain, batch_of(stream, 6))), rel=1e-4)


@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_a_folder_is_evaluated_and_speaks(shared_folder: Path, shared_tmp: Path, row: str) -> None:
    """Beyond the window: the loss and the most likely tokens are those of transformers."""
    source, words = source_of(row, shared_folder), text(663)[600:]
    if WORLD.rank == 0:
        (shared_tmp / "some.txt").write_text(words)
    polite_barrier(WORLD)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.tensor([[ByteTokenizer().eod, *words.encode()]])
    options = evaluate_options([str(source), f"--text={shared_tmp / 'some.txt'}", "--threads=1", "--device=cpu"])
    with torch.no_grad():
        wanted = float(model(input_ids=ids, labels=ids).loss)
    assert at(1, lambda comm: evaluate_text(options, comm))[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    given = [str(source), f"--prompt={words[:40]}", "--temperature=0", "--tokens=12", "--device=cpu", "--threads=1"]
    made = at(1, lambda comm: generate(comm, read_options(given)))[0]
    tokenizer, said = ByteTokenizer(), list(words[:40].encode())
    with torch.no_grad():
        while len(said) < 52 and said[-1] != tokenizer.eod:
            said.append(int(model(torch.tensor([said])).logits[0, -1, : tokenizer.vocab_size].argmax()))
    wanted_ids = [one for one in said[40:] if one != tokenizer.eod]
    if WORLD.rank == 0:
        assert made[0]["tokens"] == len(wanted_ids) > 0
        assert made[0]["text"] == tokenizer.decode(wanted_ids)


@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_a_model_from_random_weights_is_exported_as_a_family(data: Path, shared_tmp: Path, row: str) -> None:
    """With the options of a row. The next loss of the run is that of transformers, and an import is bit for bit."""
    config = json.loads(config_of_row(row).to_json_string(use_diff=False)) | {
        "architectures": [BY_MODEL_TYPE[MODEL_TYPES[row]].architecture]}
    model = settings_of(config, row) | {"seq_len": T}
    train = {"init_from": "", "steps": 2}
    ran = train_at(1, begun(data, Path(), shared_tmp / "run", model=model, train=train))
    said = at(1, lambda comm: export(comm, str(shared_tmp / "run"), str(shared_tmp / "out")))[0]
    theirs = AutoModelForCausalLM.from_pretrained(shared_tmp / "out", dtype=torch.float32).eval()
    assert type(theirs).__name__ in said
    again = train_at(1, begun(data, shared_tmp / "out", shared_tmp / "again", train={"steps": 1}))
    assert reader_of(shared_tmp / "again").meta["init_from"]["weights_sha256"] == ran.sha256
    third = train_at(1, begun(data, Path(), shared_tmp / "run", model=model, train=train | {"steps": 3})).losses[-1]
    with torch.no_grad():
        assert third == pytest.approx(float(loss_of(theirs, batch_of(TokenStream(data), 2))), rel=1e-5)
    assert again.end["step"] == 1
