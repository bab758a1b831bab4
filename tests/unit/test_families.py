"""Laws of the table of model families: transformers and mpidp compute the same model from a folder, boxes are cut from stored
tensors, and a field of config.json is never ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mpidp.checkpoint.entry import Entry
from mpidp.errors import DataError, UsageError
from mpidp.hf.families import BY_MODEL_TYPE, FAMILIES, FREE, ONLY, Family
from mpidp.hf.folder import ModelFolder, whole
from mpidp.hf.names import config_of, options_of, settings_of, shape_of
from mpidp.hf.refused import REFUSED
from mpidp.model.options import DEFAULTS
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import Transformer
from tests.families import MODEL_TYPES, ONE_OF_EACH, ROWS, VOCABULARY, config_of_row, folder_of_row, model_of_row

T = 24  # longer than the windows


def ours(folder: ModelFolder, seq_len: int = T) -> Transformer:
    model = Transformer(shape_of(folder.settings, seq_len))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(folder.box(f"model/{name}", whole(folder.sizes, name)))
    return model


def tokens(seq_len: int = T) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, seq_len), generator=torch.Generator().manual_seed(1))


def saved(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


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
    assert "longrope has other factors above 24 tokens. With model.seq_len=25" in folder.notes_at(25)[0]


# Fields.

FILE = {"_name_or_path", "transformers_version", "architectures", "model_type", "dtype"}  # what a folder says about itself
NOTHING: dict[str, list[Any]] = {  # values for fields that are null in a tiny model
    "head_dim": [16], "attn_logit_softcapping": [2.0], "final_logit_softcapping": [2.0], "use_bidirectional_attention": [True],
    "summary_activation": ["tanh"], "sliding_window": [5], "problem_type": ["regression"], "n_inner": [64], "pad_token_id": [3],
    "bos_token_id": [3], "layer_types": [["sliding_attention"] * 4],
}


NEAR = {"rope": "rope|partial_rotary", "rot": "partial_rotary|rot", "n": "heads|layer|position", "hidden_size": "heads",
        "max_window": "sliding_window", "use_sliding": "sliding_window|layer_types", "sliding": "sliding_window|layer_types",
        "": "$^"}


def others(key: str, value: Any) -> list[Any]:
    """Return other values for a field."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.125]
    if isinstance(value, str):
        return ["gelu", "relu2", "relu"] if "act" in key else [value + "x"]
    if isinstance(value, list):
        flip = {"sliding_attention": "full_attention", "full_attention": "sliding_attention", 0: 1, 1: 0}
        return [value[::-1], [flip.get(one, one) for one in value], value[1:]]
    if isinstance(value, dict):
        return [changed for inner in value for other in others(inner, value[inner]) for changed in [{**value, inner: other}]] + [
            {**value, "rope_type": "linear", "factor": 3.0}, {**value, "rope_type": "dynamic", "factor": 3.0},
            {**value, "partial_rotary_factor": 0.25}, {**value, "mrope_section": [1, 1, 2]}]
    return NOTHING.get(key, [1])


def walk(row: str) -> list[tuple[str, Any]]:
    config = json.loads(config_of_row(row).to_json_string(use_diff=False))
    old = {"rope_theta": [123.0], "rope_scaling": [{"type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 2.0}],
           "partial_rotary_factor": [0.5], "rotary_pct": [0.75], "rotary_emb_base": [123.0], "rope_local_base_freq": [123.0],
           "sliding_window_pattern": [2], "max_window_layers": [1], "no_rope_layer_interval": [2]}
    found = [(key, other) for key, value in config.items() if key not in FILE for other in others(key, value)]
    return found + [(key, value) for key, values in old.items() for value in values]


@pytest.mark.parametrize("row", [*ONE_OF_EACH, "smollm3, windows", "qwen3, windows", "phi3, longrope"])
def test_no_field_of_a_config_is_ignored(row: str, tmp_path: Path) -> None:
    """Change one field after the other. Either mpidp computes what transformers computes, or it refuses the field by its name, or
    the field is one of those that change no logits."""
    source = folder_of_row(row, tmp_path / "it")
    plain, weights, ids = saved(source), model_of_row(row).state_dict(), tokens()
    family, kind = BY_MODEL_TYPE[MODEL_TYPES[row]], type(AutoConfig.for_model(MODEL_TYPES[row]))
    with torch.no_grad():
        logits = model_of_row(row).eval()(ids).logits
    checked, refused, same, wrong = 0, 0, 0, list[Any]()
    for key, value in walk(row):
        hidden = "rope_parameters" if key in ("rope_theta", "rotary_pct") else ""
        changed = {**{name: one for name, one in plain.items() if name != hidden}, key: value}
        (source / "config.json").write_text(json.dumps(changed))
        theirs: torch.Tensor | None
        try:
            if key == "tie_word_embeddings":  # the files decide
                model = AutoModelForCausalLM.from_pretrained(source).eval()
            else:
                model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(json.dumps(changed)))).eval()
                model.load_state_dict(weights)
            with torch.no_grad():
                theirs = model(ids).logits
        except Exception:  # noqa: BLE001 - transformers refuses the value, in one way or another
            theirs = None
        if key in FREE or key in family.free:
            assert theirs is None or torch.equal(theirs, logits) or key == "max_position_embeddings", (key, value)
        try:
            folder = ModelFolder(source)
            if theirs is None:
                continue  # mpidp may compute what transformers cannot, such as another number of key-value heads
            with torch.no_grad():
                found = ours(folder)(ids)
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4, msg=f"{key}={value}")
            checked, same = checked + 1, same + torch.equal(theirs, logits)
        except DataError as error:
            refused += 1
            named = f"{key}|tensors do not match|model\\.|" + next(more for start, more in NEAR.items() if key.startswith(start))
            wrong += [] if re.search(named, str(error)) else [(key, value, str(error))]
    assert not wrong and checked > same > 0 and refused > 5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_field_that_transformers_reads_is_known(family: Family) -> None:
    """The source of each model reads only fields that the row names."""
    folder = Path(transformers.__file__).parent / "models" / family.model_type.removesuffix("_text")
    source = "".join(file.read_text() for file in folder.glob("modeling_*.py"))
    if family.model_type == "gemma3_text":
        source = source[: source.index("class Gemma3MultiModalProjector")] + source[source.index("class Gemma3ForCausalLM") :]
    read = set(re.findall(r"\bconfig\.([a-z_0-9]+)", source))
    read |= set(re.findall(r'getattr\((?:self\.)?config, "([a-z_0-9]+)"', source))
    mapped = type(AutoConfig.for_model(family.model_type)).attribute_map
    known = {*FREE, *ONLY, *family.only, *family.free, *(key for one in family.fields for key in one.keys)}
    code = {"get_text_config", "per_layer_config", "text_config", "vision_config", "mm_tokens_per_image", "image_token_id"}
    of_rotary = {"head_dim"} if family.model_type in ("gpt_neox",) else set()
    assert {mapped.get(key, key) for key in read} - known - code - of_rotary == set()


def test_a_field_that_nobody_knows_is_refused_by_its_name(tmp_path: Path) -> None:
    source = folder_of_row("llama", tmp_path)
    (source / "config.json").write_text(json.dumps(saved(source) | {"my_attention": 3, "router": "x"}))
    with pytest.raises(DataError, match=r"does not know my_attention=3, router='x' of LlamaForCausalLM.* remove them in a copy"):
        ModelFolder(source)


REFUSALS = {
    "mixtral": "a mixture of experts.*Nearest supported: MistralForCausalLM", "lfm2": "convolutions.*Nearest supported: Qwen3",
    "gemma3": "images.*Nearest supported: Gemma3ForCausalLM", "llama4": "experts.*Nearest supported: Llama",
    "gpt_oss": "Nearest supported: Qwen3", "never": "Supported: LlamaForCausalLM, Mistral",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_families_are_refused_with_what_is_near(kind: str) -> None:
    for config in ({"model_type": kind}, {"model_type": kind, "architectures": ["X"]}):
        with pytest.raises(DataError, match=f"model_type='{kind}': this family is not supported.*{REFUSALS[kind]}"):
            settings_of(config, "it")
    with pytest.raises(DataError, match="LlamaForCausalLM.*'mistral' belong to different families"):
        settings_of({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "it")


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


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 2**31, 10**400, float("inf"), float("nan"), "", "x", [], [1], [None], {}, {"a": {"b": []}},
    {"rope_type": "yarn"}, {"rope_type": "linear", "factor": "x"}, {"rope_type": ["a"]}, {"type": {}},
    {"rope_type": "longrope", "short_factor": 3, "long_factor": None}, ["sliding_attention"] * 3, {"full_attention": 3},
    {"full_attention": {"rope_type": "yarn", "factor": None}}, {"sliding_attention": {"rope_theta": []}},
)


@pytest.mark.parametrize("row", ONE_OF_EACH)
def test_odd_values_in_a_config_are_refused_with_words(row: str) -> None:
    """No other error than DataError, with a short message that names the file."""
    family = BY_MODEL_TYPE[MODEL_TYPES[row]]
    config = json.loads(config_of_row(row).to_json_string(use_diff=False)) | {"architectures": [family.architecture]}
    keys = {*config, *family.only, *(key for one in family.fields for key in one.keys)}
    for changed in ({**config, key: value} for key in keys for value in ODD):
        said = "it: "
        try:
            found = settings_of(changed, "it")
            config_of(shape_of(found, found["position_rows"] or 8), "float32", {}, changed)
        except DataError as error:
            said = str(error)
        assert said.startswith("it: ")
        assert len(said) < 1500
