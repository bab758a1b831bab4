"""Laws of the table of model families: transformers and mpidp compute the same model from a folder, boxes are cut from stored
tensors, and a field of config.json is never ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mpidp.checkpoint.entry import Entry
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.errors import DataError, UsageError
from mpidp.hf.families import BY_MODEL_TYPE, FAMILIES
from mpidp.hf.folder import ModelFolder, whole
from mpidp.hf.names import config_of, options_of, settings_of, shape_of
from mpidp.hf.refused import REFUSED
from mpidp.hf.tokens import huggingface_json
from mpidp.hf.write import write_folder
from mpidp.inference.loading import open_source
from mpidp.model.options import DEFAULTS
from mpidp.model.shape import TransformerShape
from mpidp.runtime.log import log
from tests.families import (
    MODEL_TYPES,
    ONE_OF_EACH,
    ROWS,
    VOCABULARY,
    T,
    config_of_row,
    folder_of_row,
    model_of_row,
    ours,
    saved,
    tokens,
)
from tests.tiny import WORLD


@pytest.mark.parametrize("row", ROWS)
def test_a_folder_is_the_model_of_transformers(row: str, tmp_path: Path) -> None:
    """The same logits, below and above the length of the first training."""
    theirs, folder = model_of_row(row).eval(), ModelFolder(folder_of_row(row, tmp_path))
    assert sum(p.numel() for p in theirs.parameters()) == sum(torch.Size(size).numel() for size in folder.sizes.values())
    for seq_len in (T, 10):
        ids = tokens(seq_len)
        with torch.no_grad():
            torch.testing.assert_close(ours(folder, seq_len)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_boxes_are_cut_from_what_is_stored(row: str, tmp_path: Path) -> None:
    folder = ModelFolder(folder_of_row(row, tmp_path))
    for name, size in folder.sizes.items():
        everything = folder.box(f"model/{name}", whole(folder.sizes, name))
        assert everything.shape == size
        for part in (2, 3):
            at, length = tuple(n // part for n in size), tuple(max(1, n // 3) for n in size)
            cut = folder.box(f"model/{name}", Entry(torch.empty(length, device="meta"), at=at, shape=size))
            assert torch.equal(cut, everything[tuple(slice(a, a + n) for a, n in zip(at, length, strict=True))]), name


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("known", [True, False], ids=["fine-tuned", "from random weights"])
def test_an_exported_config_is_the_same_model(row: str, known: bool, tmp_path: Path) -> None:
    """Read by mpidp and by transformers, in the keys of transformers 5 alone and in those of older versions alone."""
    folder = ModelFolder(folder_of_row(row, tmp_path / "a"))
    shape = shape_of(folder.settings, folder.settings["position_rows"] or 64)
    made = config_of(shape, "float32", {"eos_token_id": 0}, saved(tmp_path / "a") if known else {})
    for without in ((), ("rope_parameters",), ("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base")):
        config = {key: value for key, value in made.items() if key not in without}
        assert settings_of(config, "it") == folder.settings, without
        if without != ("rope_parameters",) or BY_MODEL_TYPE[made["model_type"]].model_type != "olmo3":
            again = type(AutoConfig.for_model(made["model_type"])).from_dict(config)
            assert settings_of(json.loads(again.to_json_string(use_diff=False)), "it") == folder.settings, without
    if known:
        assert made["architectures"] == saved(tmp_path / "a")["architectures"]


def test_a_model_that_no_family_has_is_refused_by_its_options() -> None:
    shape = TransformerShape(VOCABULARY, 2, 4, 2, 32, 48, 16, qk_norm="head", mlp_bias=True)
    with pytest.raises(UsageError, match="no family of transformers .* LlamaForCausalLM is nearest, .* model.qk_norm=head$"):
        config_of(shape, "float32", {}, {})
    shape = TransformerShape(VOCABULARY, 2, 4, 2, 32, 48, 16, window=4)
    with pytest.raises(UsageError, match="model.window=4, which LlamaForCausalLM does not have"):
        config_of(shape, "float32", {}, {"architectures": ["LlamaForCausalLM"]})


FIRST = {  # the family of a model from random weights, by its options
    "LlamaForCausalLM": {}, "MistralForCausalLM": {"window": 8}, "Qwen2ForCausalLM": {"attention_bias": "q,k,v"},
    "Qwen3ForCausalLM": {"qk_norm": "head"}, "SmolLM3ForCausalLM": {"rotary_layers": "yyyn"},
    "Olmo2ForCausalLM": {"qk_norm": "layer", "norm_place": "after"},
    "Olmo3ForCausalLM": {"qk_norm": "layer", "norm_place": "after", "window": 8, "window_layers": "wf"},
    "GraniteForCausalLM": {"residual_scale": 0.5}, "ArceeForCausalLM": {"gated": False, "activation": "relu2"},
    "Phi3ForCausalLM": {"rotary_dims": 4}, "Starcoder2ForCausalLM": {"norm": "layer", "gated": False},
}


@pytest.mark.parametrize("architecture", FIRST)
def test_a_model_from_random_weights_is_of_the_first_family_that_fits(architecture: str) -> None:
    made = config_of(TransformerShape(VOCABULARY, 4, 4, 2, 32, 48, 16, **FIRST[architecture]), "float32", {}, {})
    assert made["architectures"] == [architecture]


@pytest.mark.parametrize("row", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_tensors_may_lack_the_prefix(row: str, tmp_path: Path) -> None:
    """As in the files of a model without a head, also with the constants that old files contain."""
    source = folder_of_row(row, tmp_path)
    layout, there = BY_MODEL_TYPE[MODEL_TYPES[row]].layout, load_file(source / "model.safetensors")
    before = ModelFolder(source)
    wanted = {name: before.box(f"model/{name}", whole(before.sizes, name)) for name in before.sizes}
    bare = {name.removeprefix(layout.prefix): tensor for name, tensor in there.items()}
    layer = layout.layer.format(1).removeprefix(layout.prefix)
    bare |= {f"{layer}{end if end[0] == '.' else f'.self_attn.{end}'}": torch.ones(1, 1, 64, 64) for end in layout.ignored}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    found = ModelFolder(source)
    assert all(torch.equal(found.box(f"model/{name}", whole(found.sizes, name)), tensor) for name, tensor in wanted.items())
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(found)(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_a_note_says_that_longrope_differs_for_short_inputs(tmp_path: Path) -> None:
    folder = ModelFolder(folder_of_row("phi3, longrope", tmp_path))
    assert not folder.notes_at(24)
    assert "longrope has other factors for inputs above 24 tokens. With model.seq_len=25" in folder.notes_at(25)[0]


def test_generate_and_evaluate_show_the_notes_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shown = folder_of_row("phi3, longrope, long", tmp_path), list[str]()
    (path / "tokenizer.json").write_text(huggingface_json(ByteTokenizer()))
    monkeypatch.setattr(log, "warning", lambda text, *values: shown.append(text % values))
    open_source(path, WORLD, 12)
    assert not shown
    open_source(path, WORLD, 13)
    assert len(shown) == 1 and "longrope has other factors for inputs above 12 tokens" in shown[0]


def test_export_shows_the_note_about_longrope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shown = ModelFolder(folder_of_row("phi3, longrope, long", tmp_path / "it")), list[str]()
    monkeypatch.setattr(log, "warning", lambda text, *values: shown.append(text % values))
    for seq_len in (12, 13):
        write_folder(tmp_path / f"{seq_len}", shape_of(folder.settings, seq_len), ours(folder).state_dict().__getitem__,
                     huggingface_json(ByteTokenizer()), SpecialTokens(None, (256,)))
    assert len(shown) == 1 and "With model.seq_len=13, mpidp uses these factors for all inputs" in shown[0]


REFUSALS = {
    "mixtral": "a mixture of experts.*The nearest supported family is MistralForCausalLM",
    "lfm2": "convolutions.*The nearest supported family is Qwen3",
    "gemma3": "images.*The nearest supported family is Gemma3ForCausalLM",
    "llama4": "experts.*The nearest supported family is Llama",
    "gpt_oss": "The nearest supported family is Qwen3", "never": "Supported are LlamaForCausalLM, Mistral",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_families_are_refused_with_what_is_near(kind: str) -> None:
    for config in ({"model_type": kind}, {"model_type": kind, "architectures": ["X"]}):
        with pytest.raises(DataError, match=f"model_type='{kind}' is not supported.*{REFUSALS[kind]}"):
            settings_of(config, "it")
    with pytest.raises(DataError, match="LlamaForCausalLM.*'mistral' belong to different families"):
        settings_of({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "it")


def test_another_head_is_refused_with_the_architecture_to_write() -> None:
    for named, kind, wanted in (("GPT2Model", "gpt2", "GPT2LMHeadModel"), ("LlamaModel", "llama", "LlamaForCausalLM")):
        with pytest.raises(DataError, match=rf"{named}.* mpidp supports only {wanted}\..*set architectures to \[\"{wanted}\"\]"):
            settings_of({"architectures": [named], "model_type": kind}, "it")


def test_refused_families_exist() -> None:
    assert not {*REFUSED} - {*CONFIG_MAPPING_NAMES} and not {*REFUSED} & {*BY_MODEL_TYPE}
    assert {nearest for _, nearest in REFUSED.values()} <= {family.architecture for family in FAMILIES}


def test_options_are_those_of_the_model() -> None:
    """Every option that a row sets exists, and a shape gives back its settings."""
    for family in FAMILIES:
        named = {*family.options, *(option for one in family.fields for option in one.options)}
        assert named - {*DEFAULTS} <= {
            "vocab_size", "num_layers", "num_heads", "num_kv_heads", "model_dim", "hidden_dim", "tie_embeddings", "rope_theta",
            "rope_scaling", "norm_eps", "head_dim",
        }
    for row in ONE_OF_EACH:
        found = settings_of(json.loads(config_of_row(row).to_json_string(use_diff=False)) | {
            "architectures": [BY_MODEL_TYPE[MODEL_TYPES[row]].architecture]}, "it")
        assert options_of(shape_of(found, found["position_rows"] or 8)) == found


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs/huggingface.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    assert rows == [(family.architecture, family.title) for family in FAMILIES]
