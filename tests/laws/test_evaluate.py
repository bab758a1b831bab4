"""Law: the evaluated loss of a trained model, and its generated text, do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from data_tools.prepare import prepare
from mpidp.checkpoint.manifest import _seal, read_manifest
from mpidp.data.index import read_index
from mpidp.data.shard_writer import write_shard
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import load_tokenizer
from mpidp.errors import CheckpointError, DataError
from mpidp.evaluate import evaluate
from mpidp.export import export
from mpidp.generate import generate
from mpidp.generate import read_options as generate_options
from mpidp.hf.tokens import huggingface_json
from mpidp.inference.scored_bytes import scored_bytes
from tests.tiny import WORLD, Ran, at, corpus, first_ranks, masked_corpus, sizes, tiny, train_at
from tests.unit.small_tokenizers import sentencepiece

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def trained(shared_folder: Path) -> tuple[Path, Ran]:
    """Return (the folder of a run, the run). The run evaluates on the whole validation split, for comparison."""
    folder = shared_folder / "run"
    train = {"steps": 8, "eval_tokens": 0, "save_every": 3}
    return folder, train_at(2 if WORLD.size > 1 else 1, tiny(corpus(shared_folder), folder, train=train))


def test_the_same_figures_at_any_number_of_ranks(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    folder, run = trained
    for split in ("val", "train"):
        found = [
            one for n in sizes(1, 2, 3, 4, 5, 8) for one in at(n, lambda comm, of=split: evaluate(str(folder), None, comm, of))
        ]
        assert all(one == found[0] for one in found)
        stream, said = TokenStream(corpus(shared_folder), split), found[0]
        assert said["tokens"] == stream.num_tokens - 1 and said["step"] == 8
        assert said["perplexity"] == math.exp(said["loss"])
        begins = 0 if split == "train" and stream.read(0, 1)[0] == stream.eod else 1  # the first token is no target
        scored = stream.text_bytes - begins
        assert said["bits_per_byte"] == pytest.approx(said["loss"] * said["tokens"] / math.log(2) / scored)
        if split == "val":
            assert said["loss"] == run.end["val_loss"]  # equal to the last bit


def test_one_checkpoint_of_a_run(trained: tuple[Path, Ran]) -> None:
    folder, run = trained
    found = at(sizes(1, 3)[-1], lambda comm: evaluate(str(folder / "checkpoints/step_00000006"), None, comm))[0]
    assert found["step"] == 6
    assert found["loss"] == next(line["val_loss"] for line in run.lines if line["step"] == 6 and "val_loss" in line)


def test_only_targets_that_count_are_counted(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    data = masked_corpus(shared_folder)
    found = [one for n in sizes(1, 2, 5) for one in at(n, lambda comm: evaluate(str(trained[0]), str(data), comm))]
    stream = TokenStream(data, "val")
    mask = stream.read_mask(0, stream.num_tokens)
    assert mask is not None and 0 < found[0]["tokens"] == int(mask[1:].sum()) < stream.num_tokens - 1
    assert all(one == found[0] for one in found)
    scored = int((mask & (stream.read(0, stream.num_tokens) != stream.eod))[1:].sum())  # one byte per token
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["loss"] * found[0]["tokens"] / math.log(2) / scored)


@pytest.mark.parametrize("apart", [False, True])
def test_bytes_are_those_of_the_targets(trained: tuple[Path, Ran], shared_folder: Path, apart: bool) -> None:
    """The data are 600 documents of two bytes. If documents are kept apart, the second byte and the end of each are targets."""
    out = shared_folder / "ab"
    if WORLD.rank == 0 and not out.exists():
        (shared_folder / "ab.jsonl").write_text('{"text": "ab"}\n' * 600)
        prepare(str(shared_folder / "ab.jsonl"), "byte", out, shards=2, val_fraction=0.2, verbose=False)
    WORLD.barrier()
    stream = TokenStream(out, "val")
    stream.apart = apart
    documents = stream.num_documents
    assert documents > 100 and stream.num_tokens == 3 * documents
    wanted = documents if apart else 2 * documents - 1
    teams = [first_ranks(n) for n in sizes(1, 2, 3)]  # every rank makes all of them, because this is collective
    assert all(scored_bytes(stream, team) == wanted for team in teams if team != MPI.COMM_NULL)


def test_bytes_of_a_tokenizer_that_begins_texts_with_a_space(shared_folder: Path) -> None:
    out, some = shared_folder / "spaced", shared_folder / "sp"
    if WORLD.rank == 0:
        some.mkdir(exist_ok=True)
        (some / "tokenizer.json").write_text(sentencepiece().to_json())
        (some / "x.jsonl").write_text('{"text": "aa bb"}\n' * 300)
        prepare(str(some / "x.jsonl"), str(some / "tokenizer.json"), out, shards=1, val_fraction=0, verbose=False)
    WORLD.barrier()
    stream = TokenStream(out, "train")
    assert stream.text_bytes == 300 * 5
    assert scored_bytes(stream, WORLD) == 300 * 5 - 1  # without the first token, an a


def changed(tokenizer: Path) -> None:
    parsed = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(parsed | {"kind": "char", "characters": "".join(map(chr, range(256)))}))


def test_the_same_tokenizer_in_another_file_is_accepted(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    """Formatted otherwise, or converted to Hugging Face's format: the ids are the same. Another tokenizer is refused."""
    plain, n = corpus(shared_folder), sizes(1, 2)[-1]
    found = []
    for name, rewrite in [("indented", indented), ("converted", converted), ("other", changed)]:
        out = shared_folder / name
        if WORLD.rank == 0:
            with_tokenizer(plain, out, rewrite)
        WORLD.barrier()
        if name == "other":
            with pytest.raises(DataError, match="prepared with another tokenizer"):
                at(n, lambda comm, data=out: evaluate(str(trained[0]), str(data), comm))
        else:
            found.append(at(n, lambda comm, data=out: evaluate(str(trained[0]), str(data), comm))[0])
    assert found == [at(n, lambda comm: evaluate(str(trained[0]), str(plain), comm))[0]] * 2


def indented(tokenizer: Path) -> None:
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=4))


def converted(tokenizer: Path) -> None:
    tokenizer.write_text(huggingface_json(load_tokenizer(tokenizer)))


def with_tokenizer(shards: Path, out: Path, rewrite: Callable[[Path], None]) -> None:
    """Copy shards, and change the file of their tokenizer."""
    out.mkdir()
    shutil.copy(shards / "tokenizer.json", out)
    rewrite(out / "tokenizer.json")
    sha256, files = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(), []
    index = read_index(shards)
    for record in index.files:
        stream = TokenStream(shards, record.split)
        i = [one.name for one in stream.files].index(record.name)
        start = sum(one.tokens for one in stream.files[:i])
        about: dict[str, int | str] = {"split": record.split, "vocab_size": index.vocab_size, "tokenizer_sha256": sha256}
        written = write_shard(out / record.name, [stream.read(start, record.tokens)], record.tokens, stream.doc_offsets(i), about)
        files.append(replace(record, **written._asdict()))
    (out / "index.json").write_text(replace(index, files=files, tokenizer_sha256=sha256).to_json())


def test_a_tokenizer_that_changed_since_training_is_refused(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    run, n = shared_folder / "meddled", sizes(1, 2)[-1]
    if WORLD.rank == 0:
        shutil.copytree(trained[0], run)
        changed(run / "tokenizer.json")
    WORLD.barrier()
    words = [str(run), "--device=cpu", "--threads=1", "--tokens=3"]
    with pytest.raises(DataError, match="tokenizer.json has changed since the model was trained"):
        at(n, lambda comm: generate(comm, generate_options(words)))
    assert at(n, lambda comm: generate(comm, generate_options([*words, f"--tokenizer={trained[0]}"])))[0]
    with pytest.raises(DataError, match="tokenizer.json has changed since the model was trained"):
        at(n, lambda comm: export(comm, str(run), str(shared_folder / "exported")))


@pytest.mark.parametrize(("section", "key", "value"), [
    ("config", "model.seq_len", 0), ("config", "model.seq_len", 2**40), ("config", "model.seq_len", "16"),
    ("shape", "seq_len", -1),
    ("config", "train.micro_batch", 0), ("fingerprint", "threads", 10**6), ("fingerprint", "threads", 0),
    ("shape", "num_layers", 2**31), ("shape", "model_dim", 2**20), ("config", "data.path", 3),
])
def test_sizes_that_no_run_writes_are_refused(
    trained: tuple[Path, Ran], shared_tmp: Path, section: str, key: str, value: Any
) -> None:
    run = shared_tmp / "run"
    if WORLD.rank == 0:
        shutil.copytree(trained[0], run)
        path = run / "checkpoints/step_00000008"
        body = read_manifest(path)
        body[section][key] = value
        (path / "manifest.json").write_bytes(_seal(body))
    WORLD.barrier()
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        at(sizes(1, 2)[-1], lambda comm: evaluate(str(run), None, comm, device="cpu"))


def test_a_model_of_nan_has_no_figures(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    train = {"steps": 1, "eval_tokens": 0}
    ended = train_at(1, tiny(corpus(shared_folder), shared_folder / "nan", train=train, optim={
        "lr": 1e38, "clip": 0.0, "schedule": "constant", "warmup_steps": 0}))
    n = sizes(1, 2)[-1]
    assert not math.isfinite(ended.end["val_loss"])
    with pytest.raises(DataError, match="nan/checkpoints/step_00000001: the loss is not finite"):
        at(n, lambda comm: evaluate(str(shared_folder / "nan"), None, comm))
    for how in ("--temperature=0", "--temperature=1", "--top-p=0.5"):
        words = [str(shared_folder / "nan"), how, "--device=cpu", "--threads=1"]
        with pytest.raises(DataError, match="nan/checkpoints/step_00000001: the largest logit is not finite"):
            at(n, lambda comm, given=words: generate(comm, generate_options(given)))


@pytest.mark.parametrize("optim", [{"lr": 1e38, "clip": 0.0, "schedule": "constant", "warmup_steps": 0}, {"warmup_steps": 0}])
def test_a_last_update_that_makes_the_weights_unusable_is_reported_without_a_validation_split(
    shared_tmp: Path, capsys: pytest.CaptureFixture[str], optim: dict[str, Any]
) -> None:
    if WORLD.rank == 0:
        (shared_tmp / "some.txt").write_text("in order so that no one can tell " * 20)
        prepare(str(shared_tmp / "some.txt"), "byte", shared_tmp / "shards", shards=1, val_fraction=0, verbose=False)
    WORLD.barrier()
    train = {"steps": 1, "eval_every": 1}
    ended = train_at(sizes(1, 2)[-1], tiny(shared_tmp / "shards", shared_tmp / "run", train=train, optim=optim))
    said = WORLD.bcast(capsys.readouterr().out)
    assert said.count("warning: at step 1, the training loss is not finite, so the weights are unusable") == ("lr" in optim)
    assert ended.end["val_loss"] is None


def nowhere(places: np.ndarray) -> np.ndarray:
    """A loss mask without targets."""
    return places < 0


def test_a_split_without_any_target_has_no_loss(trained: tuple[Path, Ran], shared_folder: Path) -> None:
    data = masked_corpus(shared_folder, keep=nowhere)
    with pytest.raises(DataError):
        at(sizes(1, 2)[-1], lambda comm: evaluate(str(trained[0]), str(data), comm))


def test_what_cannot_be_evaluated_is_refused_on_all_ranks(trained: tuple[Path, Ran], shared_tmp: Path) -> None:
    n = sizes(1, 3)[-1]
    with pytest.raises(CheckpointError, match="no such folder"):
        at(n, lambda comm: evaluate(str(shared_tmp / "none"), None, comm))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        at(n, lambda comm: evaluate(str(shared_tmp), None, comm))
    with pytest.raises(DataError, match="no split 'test'"):
        at(n, lambda comm: evaluate(str(trained[0]), None, comm, "test"))
