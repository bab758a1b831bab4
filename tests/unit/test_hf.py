"""Laws of import from and export to Hugging Face: transformers computes the same losses and logits, exported weights are imported
bit for bit, and folders with unsupported models are rejected with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Theirs
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from data_tools.prepare import prepare
from mpidp.checkpoint.reader import Reader
from mpidp.config.command_line import from_args
from mpidp.config.schema import Config
from mpidp.data.shards import TokenStream
from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from mpidp.errors import CheckpointError, DataError, MpidpError, UsageError
from mpidp.evaluate import evaluate_text
from mpidp.evaluate import read_options as evaluate_options
from mpidp.export import export
from mpidp.hf import tokens
from mpidp.hf.families import LLAMA
from mpidp.hf.folder import ModelFolder
from mpidp.hf.names import config_of, settings_of, shape_of
from mpidp.hf.write import files_of
from mpidp.inference.choices import Question, encode
from mpidp.inference.generation import _encoded
from mpidp.inference.loading import open_model
from mpidp.model.shape import shapes_of
from mpidp.training.initial_weights import open_origin
from tests.tiny import WORLD, Ran, text, tiny, train_at

T = 16
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}
KINDS: dict[str, dict[str, Any]] = {  # padded vocabulary, grouped heads; the second like SmolLM2, the third like Llama 3.2
    "untied": {"rms_norm_eps": 1e-6},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "mistral": {"sliding_window": None, "max_position_embeddings": 64},
    "llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 16},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "text.txt").write_text(text(6000))
    prepare(str(folder / "text.txt"), "bpe:280", folder / "shards", shards=2, val_fraction=0.2, verbose=False)
    return folder / "shards"


def llama(kind: str = "untied") -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 288, "bos_token_id": None, "eos_token_id": 0}
    made, config = (MistralForCausalLM, MistralConfig) if kind == "mistral" else (LlamaForCausalLM, LlamaConfig)
    model: Any = made(config(**sizes, **rest | KINDS[kind]))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2) if p.dim() > 1 else p.normal_(1, 0.1)
    return model


@pytest.fixture(scope="module")
def folders(shards: Path) -> dict[str, Path]:
    """Folders of every kind, saved by transformers in several files."""
    found = {}
    for kind in KINDS:
        found[kind] = shards.parent / kind
        llama(kind).save_pretrained(found[kind], max_shard_size="40KB")
        shutil.copy(shards / "tokenizer.json", found[kind])
    return found


def begun(shards: Path, source: Path, run: Path, /, **sections: dict[str, Any]) -> Config:
    """Return the config of a run with the initial weights of source."""
    plain = Config()
    found: dict[str, Any] = {
        "model": {key: getattr(plain.model, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")},
        "train": {"init_from": str(source), "steps": 5, "global_batch": 4, "eval_every": 0},
        "optim": {"warmup_steps": 1},
    }
    for name, values in sections.items():
        found[name] = found.get(name, {}) | values
    return tiny(shards, run, **found)


def reader_of(run: Path) -> Reader:
    return Reader(run / "checkpoints" / (run / "latest").read_text())


@pytest.fixture(scope="module")
def trained(shards: Path, folders: dict[str, Path]) -> dict[str, tuple[Path, Ran]]:
    found = {}
    for kind, source in folders.items():
        run = shards.parent / f"run_{kind}"
        found[kind] = run, train_at(1, begun(shards, source, run, train={"steps": 2}))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fine_tune_is_that_of_transformers(
    shards: Path, folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    """Compare every loss, over steps that change them."""
    optim = {"name": name, "lr": 3e-3 if name == "adamw" else 0.3, "beta1": 0.9 if name == "adamw" else 0.0, "beta2": 0.95,
             "weight_decay": 0.1, "warmup_steps": 0, "schedule": "constant", "clip": 0.0}
    ran = train_at(1, begun(shards, folders[kind], tmp_path / "run", optim=optim, data={"order": "sequential"},
                            train={"steps": 6, "micro_batch": 4}))
    model = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).train()
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]
    optimizer: Any = torch.optim.AdamW(groups, lr=optim["lr"], betas=(0.9, 0.95), eps=1e-8) if name == "adamw" else (
        torch.optim.SGD(groups, lr=optim["lr"]))
    stream, losses = TokenStream(shards, "train"), []
    for step in range(6):
        windows = [stream.read((4 * step + i) * T, T + 1).astype(np.int64) for i in range(4)]
        ids = torch.from_numpy(np.stack(windows))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert ran.losses == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_bytes", [5 * 10**9, 30_000])
def test_transformers_reads_what_was_exported(
    trained: dict[str, tuple[Path, Ran]], shards: Path, tmp_path: Path, kind: str, max_bytes: int
) -> None:
    """The same logits and ids, and an import restores the weights bit for bit."""
    from mpidp.inference.loading import load_model
    from mpidp.parallel.grid import make_grid

    run, ran = trained[kind]
    name = type(llama(kind)).__name__
    assert f"{tmp_path / 'out'}: {name} with" in export(WORLD, str(run), str(tmp_path / "out"), max_file_bytes=max_bytes)
    weights = sorted(tmp_path.glob("out/*.safetensors"))
    assert (len(weights) > 3) == (max_bytes == 30_000) and not list(tmp_path.glob(".out*"))
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    assert type(model) is type(llama(kind))
    ours = load_model(reader_of(run), make_grid(WORLD), "cpu", 1).model
    ids = torch.from_numpy(TokenStream(shards, "val").read(0, 3 * T).astype(np.int64)).view(3, T)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)
    assert model.config.max_position_embeddings == 64 and model.generation_config.eos_token_id == 0
    tokenizer, mine = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(run)
    for words in (text(300), "  Ünï\n\tcödé 漢字 🚀", ""):
        assert tokenizer(words).input_ids == mine.encode(words).tolist()
        assert tokenizer.decode(mine.encode(words).tolist()) == words
    assert tokenizer.eos_token_id == mine.eod
    again = train_at(1, begun(shards, tmp_path / "out", tmp_path / "again", train={"steps": 1}))
    assert again.end["step"] == 1
    assert reader_of(tmp_path / "again").meta["init_from"]["weights_sha256"] == ran.sha256


def theirs_with_bos(given: Path, made: Path, bos: int) -> None:
    """A tokenizer.json that puts a token before every text."""
    other = Theirs.from_str(given.read_text())
    name = other.id_to_token(bos)
    other.post_processor = TemplateProcessing(single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, bos)])
    other.save(str(made))


def test_a_text_begins_as_in_transformers(
    trained: dict[str, tuple[Path, Ran]], folders: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    """With initial weights that were trained with BOS, prompts, texts and choices begin with it, as defined by Llama's
    tokenizer.json; export keeps it. The vocabulary is padded."""
    source = tmp_path / "source"
    shutil.copytree(folders["untied"], source)
    theirs_with_bos(shards / "tokenizer.json", source / "tokenizer.json", 7)
    prepare(str(shards.parent / "text.txt"), str(source / "tokenizer.json"), tmp_path / "shards", shards=2, val_fraction=0.2,
            verbose=False)
    run = tmp_path / "run"
    train_at(1, begun(tmp_path / "shards", source, run, train={"steps": 1}))
    _, _, encoder = open_model(evaluate_options([str(run), "--threads=1"]), WORLD)
    model = AutoTokenizer.from_pretrained(_with_config(source / "tokenizer.json", tmp_path / "it"))
    for words in (text(60)[:9], "Ü", " a"):
        ids = _encoded(encoder.prompt, words, T, 0)
        assert ids == model(words).input_ids and ids[0] == 7
    assert _encoded(encoder.prompt, "", T, 0) == [7] == model("").input_ids
    item = Question(1, "the ", ["rank", "tree"], 0)
    assert [one.ids for one in encode(encoder, item, T)] == [model(item.context + choice).input_ids for choice in item.choices]
    alone = load_tokenizer(run)
    assert alone.bos == 7 and alone.encode("a b").tolist() == model("a b").input_ids[1:]
    ours, _ = trained["untied"]  # a run whose tokenizer has no BOS
    assert open_model(evaluate_options([str(ours)]), WORLD)[2].table.bos is None
    export(WORLD, str(run), str(tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids == model("a b").input_ids
    (tmp_path / "some.txt").write_text(words := text(40)[:13])
    found = evaluate_text(evaluate_options([str(run), "--text", str(tmp_path / "some.txt"), "--threads=1"]), WORLD)
    ids = torch.tensor([model(words).input_ids])
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert found["loss"] == pytest.approx(float(hf(input_ids=ids, labels=ids).loss.detach()), rel=1e-5)


def test_half_precision_becomes_float32_masters(shards: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        shutil.copytree(folders["tied"], folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        llama("tied").to(dtype).save_pretrained(folder)
        train_at(1, begun(shards, folder, folder / "run", train={"steps": 1}, optim={"lr": 0.0}))
        reader, wanted = reader_of(folder / "run"), llama("tied").to(dtype).float().state_dict()
        source = ModelFolder(folder)
        for name in source.sizes:
            assert torch.equal(reader[f"model/{name}"], wanted[source.stored_name(name)]), name
        out = folder / "out"
        export(WORLD, str(folder / "run"), str(out), str(dtype).removeprefix("torch."))
        there = load_file(out / "model.safetensors")  # bfloat16 is exported as it was imported
        assert all(tensor.dtype == dtype and torch.equal(tensor.float(), wanted[name]) for name, tensor in there.items())


def test_a_run_begins_with_another(trained: dict[str, tuple[Path, Ran]], shards: Path, tmp_path: Path) -> None:
    """A new optimizer starts at step 0. A resume needs only the run's own checkpoint, not the first run."""
    run, ran = trained["llama3"]
    source = tmp_path / "source"
    shutil.copytree(run, source)
    config = begun(shards, source, tmp_path / "run", train={"save_every": 2})
    whole = train_at(1, config)
    meta = reader_of(tmp_path / "run").meta
    assert meta["init_from"] == {"path": str(source), "weights_sha256": ran.sha256}
    assert meta["config"]["model.rope_scaling"] == "llama3:8,1,4,12" and meta["config"]["model.vocab_size"] == 288
    assert (tmp_path / "run/hf/config.json").read_bytes() == (shards.parent / "llama3/config.json").read_bytes()
    assert whole.lines[0]["step"] == 1
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000005")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    shutil.rmtree(source)
    resumed = train_at(1, config)
    assert resumed.end == whole.end and reader_of(tmp_path / "run").meta["init_from"] == meta["init_from"]
    with pytest.raises(UsageError, match=r"train\.init_from was .* and is now ''"):
        train_at(1, config.with_values(train={"init_from": "", "steps": 9}))
    with pytest.raises(UsageError, match="neither a run .* hf download"):
        train_at(1, config.with_values(run={"resume": "never"}))
    with pytest.raises(UsageError, match=r"is in run\.dir"):
        train_at(1, config.with_values(train={"init_from": str(tmp_path / "run")}))


@pytest.mark.parametrize(("settings", "said"), [
    ({"num_layers": 3}, "model.num_layers=3, but the source has 2"), ({"tie_embeddings": True}, "model.tie_embeddings=True"),
    ({"norm_eps": 1e-4, "head_dim": 4},
     "model.head_dim=4, but the source has 0; model.norm_eps=0.0001, but the source has 1e-06"),
])
def test_a_contradiction_is_refused_by_name(
    shards: Path, folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match="another model: .*Leave these settings out") as caught:
        open_origin(config := begun(shards, folders["untied"], tmp_path, model=settings), WORLD).completed(config)  # type: ignore[union-attr]
    assert said in str(caught.value)


@pytest.mark.parametrize(("name", "words", "said"), [
    ("untied", ["--model.num_layers=4"], "model.num_layers=4, but the source has 2"),
    ("tied", ["--model.tie_embeddings=false"], "model.tie_embeddings=False, but the source has True"),
    ("untied", ["--model.num_layers=2", "--model.num_kv_heads=0", "--model.vocab_size=0", "--model.tie_embeddings=false"], ""),
    ("tied", [], ""),
])
def test_a_given_setting_counts_even_if_it_has_its_default(
    shards: Path, folders: dict[str, Path], tmp_path: Path, name: str, words: list[str], said: str
) -> None:
    """On the command line or in a file. 0 means that the value is computed."""
    place = [f"--train.init_from={folders[name]}", f"--data.path={shards}", f"--run.dir={tmp_path / 'run'}"]
    settings = [word.removeprefix("--model.").replace("=", " = ") for word in words]
    (tmp_path / "it.toml").write_text("\n".join(["[model]", *settings]))
    for given in (words, [str(tmp_path / "it.toml")]):
        origin = open_origin(config := from_args([*given, *place]), WORLD)
        assert origin is not None
        with pytest.raises(UsageError, match=f"another model: {said}") if said else nullcontext():
            assert origin.completed(config).model.num_layers == 2


def test_what_agrees_is_taken(shards: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    config = begun(shards, folders["untied"], tmp_path, model={"num_layers": 2, "vocab_size": 288, "seq_len": 8})
    origin = open_origin(config, WORLD)
    assert origin is not None
    model = origin.completed(config).model
    assert (model.num_kv_heads, model.model_dim, model.hidden_dim, model.seq_len) == (2, 32, 48, 8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
                     "MixtralForCausalLM.*The nearest supported"),
    "no architecture": ({"architectures": None, "model_type": "qwen2_moe"}, "model_type='qwen2_moe'"),
    "attention bias": ({"attention_bias": True}, r"q_proj.bias \[32\] is missing"),
    "mlp bias": ({"mlp_bias": True}, r"gate_proj.bias \[48\] is missing"),
    "activation": ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    "window": ({"sliding_window": 8}, "sliding_window=8"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    "no width": ({"hidden_size": None}, "hidden_size is missing"), "no number": ({"vocab_size": "many"}, "vocab_size='many'"),
    "a half layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5"),
    "none": ({"num_attention_heads": 0}, "must be a positive"),
    "heads": ({"num_key_value_heads": 3}, "3 key-value heads"),
    "ntk": ({"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 2.0}},
            "rope scaling 'ntk' is not supported.*cannot be left out"),
    "dynamic": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
                "rope scaling 'dynamic' is not supported.*up to max_position_embeddings.*keep rope_theta"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0, 2.0], "short_factor": [1.0, 1.0]}},
                 "2 short and 2 long factors, but 8 rotary dimensions need 4"),
    "half a yarn": ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope scaling yarn: 'factor' is missing"),
    "of each layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all layers must have the same"),
    "half a llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
    "partial": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    "other shape": ({"intermediate_size": 64}, r"mlp.gate_proj.weight has shape \[48, 32\], but config.json implies \[64, 32\]"),
    "more layers": ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight \[32\] is missing.*and 4 more"),
    "fewer layers": ({"num_hidden_layers": 1}, r"model.layers.1.\S+ with shape \[\d+.*\] is not part of such a model"),
    "tied": ({"tie_word_embeddings": False}, r"lm_head.weight \[288, 32\] is missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_config_is_refused_by_name(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, said = WRONG[what]
    shutil.copytree(folders["tied" if what == "tied" else "untied"], tmp_path / "it")
    config = json.loads((tmp_path / "it/config.json").read_text()) | change
    (tmp_path / "it/config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(DataError, match=said):
        ModelFolder(tmp_path / "it")


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Modify the folder's first weight file."""
    file = min(folder.glob("*.safetensors"))
    there = load_file(file)
    change(there)
    save_file(there, file, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda it: (it / "config.json").unlink(), "config.json: cannot be read"),
    "no JSON": (lambda it: (it / "config.json").write_text("{"), "not a valid JSON object"),
    "a list": (lambda it: (it / "config.json").write_text("[]"), "not a valid JSON object"),
    "missing files": (lambda it: [p.unlink() for p in sorted(it.glob("*.safetensors"))[:2]],
                      r"2 of \d+ weight files are missing \(model-00001-of-\d+.safetensors, model-00002"),
    "nothing": (lambda it: [p.unlink() for p in it.glob("model*")], "no model.safetensors and no model.safetensors.index.json"),
    "pickled": (lambda it: [*(p.unlink() for p in it.glob("model*")), (it / "pytorch_model.bin").write_bytes(b"\x80")],
                "pickled .pytorch_model.bin.*can execute any code.*save_pretrained"),
    "cut short": (lambda it: min(it.glob("*.safetensors")).write_bytes(b"\x10" * 20), "00001-of-.*cannot be read as safetensors"),
    "elsewhere": (lambda it: (it / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "same folder"),
    "integers": (lambda it: spoil(it, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), "is I8, not one of F32"),
    "extra": (lambda it: spoil(it, lambda t: t.update({"model.extra.weight": torch.ones(2, 3)})),
              r"model.extra.weight with shape \[2, 3\] is not part of such a model"),
    "missing": (lambda it: spoil(it, lambda t: t.pop(min(t))), r"is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_with_the_reason(folders: dict[str, Path], tmp_path: Path, fault: str) -> None:
    shutil.copytree(folders["untied"], tmp_path / "it")
    FAULTS[fault][0](tmp_path / "it")
    with pytest.raises(DataError, match=FAULTS[fault][1]) as caught:
        ModelFolder(tmp_path / "it")
    assert str(tmp_path / "it") in str(caught.value) and caught.value.exit_code == 3


def test_data_of_another_tokenizer_is_refused(folders: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(3000))
    prepare(str(tmp_path / "text.txt"), "bpe:270", tmp_path / "other", shards=1, verbose=False)
    with pytest.raises(DataError, match=r"a different tokenizer than .*untied/tokenizer.json.*prepare --tokenizer"):
        train_at(1, begun(tmp_path / "other", folders["untied"], tmp_path / "run"))
    shutil.copytree(folders["untied"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    prepare(str(tmp_path / "text.txt"), "bpe:300", tmp_path / "larger", shards=1, verbose=False)
    with pytest.raises(UsageError, match=r"model.vocab_size=288, but the tokenizer of .*larger has"):
        train_at(1, begun(tmp_path / "larger", tmp_path / "bare", tmp_path / "run"))


def test_the_same_tokenizer_written_otherwise_is_the_same(shards: Path, tmp_path: Path) -> None:
    given = shards / "tokenizer.json"
    AutoTokenizer.from_pretrained(_with_config(given, tmp_path / "a")).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_bytes() != given.read_bytes()
    assert tokens.same(tmp_path / "b/tokenizer.json", given.read_bytes())
    changed = json.loads(given.read_text())
    changed["model"]["merges"].pop()
    (tmp_path / "c.json").write_text(json.dumps(changed))
    assert not tokens.same(tmp_path / "c.json", given.read_bytes())
    (tmp_path / "c.json").write_text("{")
    for compare in (tokens.same, tokens.extends):
        with pytest.raises(DataError, match=r"c.json: not a readable tokenizer.json"):
            compare(tmp_path / "c.json", given.read_bytes())
        for wrong in (b"{", b"\xff", b"[]"):
            with pytest.raises(DataError, match=r"^shards/x: not a readable tokenizer.json"):
                compare(given, wrong, "shards/x")


def test_a_tokenizer_with_added_tokens_extends_its_original(shards: Path, tmp_path: Path) -> None:
    given = shards / "tokenizer.json"
    larger = AutoTokenizer.from_pretrained(_with_config(given, tmp_path / "a"))
    assert larger.add_tokens(["<|im_start|>", "<pad>"], special_tokens=True) == 2
    larger.save_pretrained(tmp_path / "b")
    file = tmp_path / "b/tokenizer.json"
    assert tokens.extends(given, given.read_bytes()) and tokens.extends(given, file.read_bytes())
    assert not tokens.same(given, file.read_bytes()) and not tokens.extends(file, given.read_bytes())
    about, changed = json.loads(given.read_text()), json.loads(given.read_text())
    about["added_tokens"].append(about["added_tokens"][0] | {"id": about["model"]["vocab"]["a"], "content": "a"})  # not a new id
    changed["model"]["merges"].pop()
    for other in (about, changed):
        assert not tokens.extends(given, json.dumps(other).encode())


def test_shards_may_have_more_tokens_than_the_tokenizer_of_the_model(
    folders: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text(3000))
    for count in (1, 10):  # the model has 280 tokens and 288 rows
        larger = AutoTokenizer.from_pretrained(_with_config(shards / "tokenizer.json", tmp_path / f"a{count}"))
        larger.add_tokens([f"<new{i}>" for i in range(count)], special_tokens=True)
        larger.save_pretrained(tmp_path / f"b{count}")
        prepare(str(tmp_path / "text.txt"), str(tmp_path / f"b{count}/tokenizer.json"), tmp_path / f"s{count}", shards=1,
                verbose=False)
    source = shutil.copytree(folders["untied"], tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x0a")
    train_at(1, begun(tmp_path / "s1", source, tmp_path / "run", train={"steps": 1}))
    assert not (tmp_path / "run/hf/tokenizer.model").exists()  # it does not contain the added token
    with pytest.raises(UsageError, match=r"model.vocab_size=288.*has 290 tokens.*Set model.vocab_size=290"):
        train_at(1, begun(tmp_path / "s10", folders["untied"], tmp_path / "other"))


def _with_config(tokenizer: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.mark.parametrize("ours", [ByteTokenizer(), CharTokenizer("\n <>|abcdefhilmnoprstuy漢Ü🚀")], ids=["byte", "char"])
def test_small_tokenizers_give_the_same_ids_in_transformers(ours: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokens.huggingface_json(ours))
    found = AutoTokenizer.from_pretrained(_with_config(tmp_path / "tokenizer.json", tmp_path / "it"))
    assert tokens.same(tmp_path / "tokenizer.json", ours.to_json().encode())
    name = tokens.names_of(tokens.huggingface_json(ours))[ours.eod]
    assert len(found) == ours.vocab_size and found.convert_tokens_to_ids(name) == ours.eod
    every = bytes(range(256)).decode("latin-1") if ours.kind == "byte" else ours.characters
    for words in ("the tree adds\n  in order", "漢 Ü  🚀\n\n", every, "", " "):
        assert found(words).input_ids == ours.encode(words).tolist(), words
        assert found.decode(ours.encode(words).tolist(), clean_up_tokenization_spaces=False) == words


def test_byte_runs_are_exported_too(tmp_path: Path) -> None:
    """A run with a byte tokenizer that did not start from Hugging Face."""
    (tmp_path / "text.txt").write_text(text(3000))
    prepare(str(tmp_path / "text.txt"), "byte", tmp_path / "shards", shards=1, verbose=False)
    ran = train_at(1, tiny(tmp_path / "shards", tmp_path / "run", model={"vocab_size": 264}, train={"steps": 1},
                           optim={"warmup_steps": 0}))
    assert Reader(tmp_path / "run/checkpoints/step_00000001")["model/head.weight"].shape == (264, 32)  # padded
    export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    modes = {file.name: oct(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes  # weights have the same permissions as config.json
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Ü").input_ids == list("Ü".encode())
    again = begun(tmp_path / "shards", tmp_path / "out", tmp_path / "again", train={"steps": 1})
    train_at(1, again)  # with the same shards
    assert reader_of(tmp_path / "again").meta["init_from"]["weights_sha256"] == ran.sha256
    with pytest.raises(UsageError, match="out exists and is not overwritten"):
        export(WORLD, str(tmp_path / "run"), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="cannot be written"):
        export(WORLD, str(tmp_path / "run"), str(tmp_path / "text.txt" / "out"))
    (tmp_path / "empty").mkdir()
    for run, error in ((tmp_path / "empty", CheckpointError), (tmp_path / "none", MpidpError)):
        with pytest.raises(error, match="contains no checkpoint|no such folder"):
            export(WORLD, str(run), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_of_two_rope_keys_that_differ_the_one_of_transformers_is_used() -> None:
    config = json.loads(llama("tied").config.to_json_string(use_diff=False)) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 3e4,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    }
    theirs, ours = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters, settings_of(config, "it")
    assert theirs["rope_type"] == "llama3" and ours["rope_scaling"].startswith(f"llama3:{theirs['factor']:g},")
    assert ours["rope_theta"] == theirs["rope_theta"] == 3e4


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_comes_back(kind: str) -> None:
    """With the keys of transformers 5, with older ones, and after a round trip."""
    config = json.loads(llama(kind).config.to_json_string(use_diff=False))
    settings = settings_of(config, "it")
    shape = shape_of(settings, 64)
    made = config_of(shape, "float32", {}, {})
    assert settings_of(made, "it") == settings_of({**made, "hidden_act": "swish"}, "it") == settings
    assert settings_of({key: value for key, value in made.items() if key != "rope_parameters"}, "it") == settings
    assert LlamaConfig(**made).rope_parameters == llama(kind).config.rope_parameters
    assert {LLAMA.name(name): size for name, size in shapes_of(shape).items()} == {
        name: tuple(p.shape) for name, p in llama(kind).named_parameters()
    }


def test_files_are_filled_in_order() -> None:
    sizes = {"a": 5, "b": 5, "c": 9, "d": 30, "e": 1}
    assert files_of(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert files_of(sizes, 50) == [list(sizes)] and files_of(sizes, 1) == [[name] for name in sizes]
