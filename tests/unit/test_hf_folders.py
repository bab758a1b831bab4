"""Folders as people have them: transformers and mpidp read the same weights, and what cannot be read is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from data_tools.prepare import prepare
from mpidp.checkpoint.added_rows import AddedRows
from mpidp.checkpoint.entry import Entry
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError, UsageError
from mpidp.evaluate import evaluate
from mpidp.export import export
from mpidp.hf import tokens
from mpidp.hf.folder import ModelFolder
from mpidp.hf.names import config_of, settings_of, shape_of
from mpidp.training.initial_weights import open_origin
from tests.tiny import WORLD, text, train_at
from tests.unit.test_hf import begun, llama, reader_of

T = 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    (folder / "text.txt").write_text(text(4000))
    prepare(str(folder / "text.txt"), "bpe:280", folder / "shards", shards=1, val_fraction=0.2, verbose=False)
    return folder / "shards"


@pytest.fixture
def it(tmp_path: Path, shards: Path) -> Path:
    """A folder with tied embeddings in one file."""
    return saved(tmp_path / "it", "tied", shards)


def saved(folder: Path, kind: str, shards: Path, **more: Any) -> Path:
    llama(kind).save_pretrained(folder, **more)
    shutil.copy(shards / "tokenizer.json", folder)
    return folder


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    there = load_file(file)
    change(there)
    save_file(there, file, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def losses(folder: Path, shards: Path, tmp_path: Path) -> tuple[float, float]:
    """Return the loss over the first windows of the validation split as transformers and as mpidp compute it."""
    stream = TokenStream(shards, "val")
    model, total, count = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, stream.num_tokens - 1
    for first in range(0, count, T):  # the last window can be shorter
        ids = torch.from_numpy(stream.read(first, min(T, count - first) + 1).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    optim = {"lr": 1e-30, "warmup_steps": 0, "weight_decay": 0}
    train_at(1, begun(shards, folder, tmp_path / "run", train={"steps": 1}, optim=optim))
    return total / count, evaluate(str(tmp_path / "run"), str(shards), WORLD, device="cpu")["loss"]


def test_a_head_of_its_own_is_used_although_the_config_ties_it(it: Path, shards: Path, tmp_path: Path) -> None:
    change_weights(it, lambda w: w.update({HEAD: torch.randn_like(w[EMBEDDING])}))
    theirs, ours = losses(it, shards, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert not reader_of(tmp_path / "run").meta["config"]["model.tie_embeddings"]
    assert "tie_word_embeddings=true, but lm_head.weight differs" in ModelFolder(it).notes[0]
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    assert HEAD in load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("what", ["equal", "equal in float64", "instead of the embedding"])
def test_a_tied_head_that_is_stored_is_the_embedding(it: Path, shards: Path, tmp_path: Path, what: str) -> None:
    change_weights(it, lambda w: w.update({HEAD: w[EMBEDDING].to(torch.float64 if "64" in what else torch.float32, copy=True)}))
    if what == "instead of the embedding":
        change_weights(it, lambda w: w.pop(EMBEDDING))
    theirs, ours = losses(it, shards, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5) and not ModelFolder(it).notes
    assert reader_of(tmp_path / "run").meta["config"]["model.tie_embeddings"]


def test_a_tied_head_of_another_size_is_refused(it: Path) -> None:
    change_weights(it, lambda w: w.update({HEAD: torch.zeros(300, 32)}))
    with pytest.raises(DataError, match=r"lm_head.weight has shape \[300, 32\]"):
        ModelFolder(it)


@pytest.mark.parametrize("old_files", [True, False])
def test_one_file_of_weights_comes_before_an_index(shards: Path, tmp_path: Path, old_files: bool) -> None:
    it = saved(tmp_path / "it", "untied", shards, max_shard_size="40KB")
    other = llama("untied")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    other.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new/model.safetensors", it)
    if not old_files:
        for file in it.glob("model-*"):
            file.unlink()
    theirs, ours = losses(it, shards, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert "model.safetensors is read, as in transformers" in ModelFolder(it).notes[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_weight_that_is_not_finite_is_named(it: Path, shards: Path, tmp_path: Path, value: float) -> None:
    def change(there: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        there[name] = there[name].double() if value == 1e300 else there[name]
        there[name][3, 5] = value

    change_weights(it, change)
    with pytest.raises(DataError, match=r"tensor model.layers.1.mlp.up_proj.weight has values that are nan or inf"):
        train_at(1, begun(shards, it, tmp_path / "run"))


def test_a_weight_too_large_for_the_dtype_is_named(
    it: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(it, lambda w: w[name][1].fill_(1e5))
    train_at(1, begun(shards, it, tmp_path / "run", train={"steps": 1}, optim={"lr": 1e-30, "warmup_steps": 0}))
    with pytest.raises(UsageError, match=rf"{name} has values up to 100000, but the largest value of --dtype float16 is"):
        export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"), "float16")
    assert not list(tmp_path.glob("*out*"))
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"), "bfloat16")
    assert load_file(tmp_path / "out/model.safetensors")[name].float().max() == 99840
    assert "nan or inf" not in caplog.text


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def test_a_window_of_mistral_is_a_setting() -> None:
    """Without the field, the window is that of transformers."""
    config = json.loads(llama("mistral").config.to_json_string(use_diff=False)) | MISTRAL
    assert settings_of({key: value for key, value in config.items() if key != "sliding_window"}, "it")["window"] == 4096
    assert MistralConfig().sliding_window == 4096 and settings_of(config | {"sliding_window": 7}, "it")["window"] == 7
    assert settings_of(config | {"sliding_window": None}, "it")["window"] == 0


@pytest.mark.parametrize("before", [MISTRAL, MISTRAL | {"sliding_window": 64}])
def test_an_export_has_the_window_of_the_run(before: dict[str, Any]) -> None:
    """Runs of earlier versions had no window."""
    settings = settings_of(json.loads(llama("mistral").config.to_json_string(use_diff=False)) | MISTRAL, "it")
    made = config_of(shape_of(settings, 8192), "float32", {}, before)
    assert made["sliding_window"] is None and made["max_position_embeddings"] == 8192
    windowed = config_of(shape_of(settings | {"window": 64}, 8192), "float32", {}, before)
    assert windowed["sliding_window"] == 64


NUMBERS = (-1, 0, 0.5, 2**31, 1e308, float("inf"), float("nan"))
ODD = (None, True, *NUMBERS, "", "x", "4", [], [1], [None], {}, {"a": 1}, {"a": {"b": []}})


def test_odd_values_in_a_config_are_refused_with_words(it: Path) -> None:
    config = json.loads((it / "config.json").read_text()) | {"rope_scaling": None, "rope_theta": 1e4}
    nested = [("rope_parameters", key) for key in ("rope_type", "rope_theta", "factor", "type", "partial_rotary_factor")]
    for key in [*config, *nested, ("rope_scaling", "factor"), ("rope_scaling", "original_max_position_embeddings")]:
        for value in ODD:
            changed = dict(config)
            if isinstance(key, tuple):
                llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
                changed[key[0]] = llama3 | {key[1]: value}
            else:
                changed[key] = value
            (it / "config.json").write_text(json.dumps(changed))
            said = ""
            try:
                ModelFolder(it)
            except DataError as error:
                said = str(error)
            assert not said or str(it) in said and len(said) < 2000, (key, value)


def test_sizes_that_no_file_has_are_refused_at_once(it: Path) -> None:
    began = time.monotonic()
    for layers, said in ((2**16, r", but the weight files have only \d+ tensors"), (2**31 - 1, " must be .* at most 65,536")):
        change_config(it, num_hidden_layers=layers)
        with pytest.raises(DataError, match=f"num_hidden_layers={layers}{said}"):
            ModelFolder(it)
    file = it / "tokenizer.json"
    content = file.read_bytes()
    changed = json.loads(content)
    changed["added_tokens"].append(changed["added_tokens"][0] | {"id": 2**31, "content": "<far>"})
    changed["model"]["vocab"]["<far>"] = 2**31
    file.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="it has an id of 16777216 or more"):
        tokens.same(file, content)
    assert time.monotonic() - began < 60  # not the hours that counting takes


def test_links_that_lead_out_are_refused(it: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (it / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"special_tokens_map.json is a link to .*secret, which is outside"):
        open_origin(begun(shards, it, tmp_path / "run"), WORLD)
    (it / "special_tokens_map.json").unlink()
    (it / "special_tokens_map.json").symlink_to("config.json")
    assert open_origin(begun(shards, it, tmp_path / "run"), WORLD) is not None
    snapshot = tmp_path / "models--a--b/snapshots/0123"  # as the Hub's cache keeps a model
    shutil.copytree(it, snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "config.json").rename(snapshot.parents[1] / "blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert open_origin(begun(shards, snapshot, tmp_path / "run"), WORLD) is not None


def test_other_files_of_the_tokenizer_come_along_and_code_does_not(it: Path, shards: Path, tmp_path: Path) -> None:
    change_config(it, auto_map={"AutoModelForCausalLM": "somebody/code--model.Own"}, task_specific_params={"a": 3})
    (it / "tokenizer.model").write_bytes(b"\x0a\xff")
    (it / "additional_chat_templates").mkdir()
    (it / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    train_at(1, begun(shards, it, tmp_path / "run", train={"steps": 1}, optim={"warmup_steps": 0}))
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    for name in ("tokenizer.model", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (it / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["task_specific_params"] == {"a": 3} and "auto_map" not in config


def test_a_source_may_be_spelled_otherwise_or_move(
    it: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(source: str, steps: int) -> Any:
        config = begun(shards, it, tmp_path / "run", train={"steps": steps}, optim={"schedule": "constant"})
        return train_at(1, config.with_values(train={"init_from": source}))

    train("it/", 2)
    for steps, source in ((3, "it"), (4, "./it"), (5, str(it))):
        assert train(source, steps).end["step"] == steps
    it.rename(tmp_path / "moved")
    assert train("it", 6).end["step"] == 6  # a resume does not read it
    assert train("moved", 7).end["step"] == 7
    change_weights(tmp_path / "moved", lambda w: w["model.norm.weight"].add_(1.0))
    (tmp_path / "moved").rename(tmp_path / "other")
    with pytest.raises(DataError, match="the weights in other are not those from which the run started"):
        train("other", 8)


def more_tokens(folder: Path, count: int) -> None:
    """Add tokens to a folder's tokenizer.json, as people do for chats, without adding rows to the model."""
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    first = max(about["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    about["added_tokens"] += [{"id": first + i, "content": f"<new_{i}>"} | flags for i in range(count)]
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}], ids=["", "lora"])
def test_rows_are_added_for_more_tokens(shards: Path, tmp_path: Path, kind: str, lora: dict[str, Any]) -> None:
    it = saved(tmp_path / "it", kind, shards)
    size = json.loads((it / "tokenizer.json").read_text())["model"]["vocab"]
    more_tokens(it, 290 - len(size))  # the model has 288 rows
    (tmp_path / "text.txt").write_text(text(3000))
    prepare(str(tmp_path / "text.txt"), str(it / "tokenizer.json"), tmp_path / "data", shards=1, verbose=False)
    sections = {"train": {"steps": 1, "eval_every": 0}, "optim": {"lr": 1e-30, "warmup_steps": 0, "weight_decay": 0.0}}
    with pytest.raises(UsageError, match="has 290 tokens, which do not fit.* Set model.vocab_size=290 to add 2 rows"):
        train_at(1, begun(tmp_path / "data", it, tmp_path / "run", model=lora, **sections))
    config = begun(tmp_path / "data", it, tmp_path / "run", model={"vocab_size": 290, **lora}, **sections)
    ran = train_at(1, config)
    again = train_at(1, config.with_values(train={"steps": 2}))
    assert again.end["step"] == 2 and again.events("resume")
    assert evaluate(str(tmp_path / "run"), None, WORLD, device="cpu")["loss"] == pytest.approx(ran.end["val_loss"], rel=1e-5)
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(it, dtype=torch.float32)
    theirs.resize_token_embeddings(290)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for one, two in ((theirs.model.embed_tokens, ours.model.embed_tokens), (theirs.lm_head, ours.lm_head)):
        torch.testing.assert_close(two.weight, one.weight, atol=1e-3, rtol=0)


def test_boxes_with_added_rows_are_those_of_the_whole(it: Path) -> None:
    folder = ModelFolder(it)
    source = AddedRows(folder, 288)
    whole = source.box("model/embedding.weight", Entry(torch.empty((300, 32))))
    assert torch.equal(whole[:288], folder.box("model/embedding.weight", Entry(torch.empty((288, 32)))))
    torch.testing.assert_close(whole[288:], whole[:288].mean(0).expand(12, 32))
    for row, column, rows, columns in ((0, 0, 150, 32), (150, 0, 150, 32), (280, 16, 20, 16), (290, 0, 10, 32), (3, 5, 0, 2)):
        entry = Entry(torch.empty((rows, columns)), at=(row, column), shape=(300, 32))
        assert torch.equal(source.box("model/embedding.weight", entry), whole[row : row + rows, column : column + columns])
    assert torch.equal(
        source.box("model/norm.weight", Entry(torch.empty(32))), folder.box("model/norm.weight", Entry(torch.empty(32)))
    )


@pytest.mark.parametrize("index", [False, True])
def test_a_pipe_in_place_of_weights_is_refused(it: Path, shards: Path, index: bool) -> None:
    """Whoever opened it would wait forever."""
    name = "model-00001-of-00001.safetensors" if index else "model.safetensors"
    (it / "model.safetensors").unlink()
    os.mkfifo(it / name)
    if index:
        (it / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {HEAD: name}}))
    with pytest.raises(DataError, match="1 of 1 weight files are missing" if index else "no model.safetensors"):
        ModelFolder(it)
