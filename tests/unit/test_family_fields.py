"""Laws of fields of config.json: none is ignored, and odd values are refused with words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from mpidp.errors import DataError
from mpidp.hf.families import BY_MODEL_TYPE, FAMILIES, FREE, ONLY, Family
from mpidp.hf.folder import ModelFolder
from mpidp.hf.names import config_of, settings_of, shape_of
from tests.families import MODEL_TYPES, ONE_OF_EACH, config_of_row, folder_of_row, model_of_row, ours, saved, tokens

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


QUICK = ("llama", "gpt2", "phi3", "gemma3_text")  # rows in `make test`; the others take about a minute together
ROWS = (*ONE_OF_EACH, "smollm3, windows", "qwen3, windows", "phi3, longrope")


WITH_GROUPS = [family.model_type for family in FAMILIES if any("num_key_value_heads" in one.keys for one in family.fields)]


@pytest.mark.parametrize("given", [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 4}], ids=str)
@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_the_number_of_key_value_heads_is_that_of_transformers(kind: str, given: dict[str, Any]) -> None:
    """If the field is missing, it is the family's default. If it is null, it is the number of heads."""
    sizes = {"vocab_size": 288, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 48}
    found = settings_of({"model_type": kind, **sizes, **given}, "config.json")["num_kv_heads"]
    try:
        wanted = type(AutoConfig.for_model(kind))(**sizes, **given).num_key_value_heads
    except StrictDataclassFieldValidationError:  # some families of transformers 5 refuse null; transformers 4 accepted it
        wanted = 32
    assert found == wanted


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row in QUICK else pytest.mark.check, id=row) for row in ROWS])
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


@pytest.mark.parametrize(("row", "fields"), [
    ("gpt_neox", {"rope_theta": 123.0}), ("gpt_neox", {"partial_rotary_factor": 1.0}), ("olmo3", {"rope_theta": 123.0}),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
])
def test_rotary_fields_that_transformers_ignores_are_refused(row: str, fields: dict[str, Any]) -> None:
    family = BY_MODEL_TYPE[MODEL_TYPES[row]]
    config = json.loads(config_of_row(row).to_json_string(use_diff=False)) | {"architectures": [family.architecture]}
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert settings_of(config, "it")
    with pytest.raises(DataError, match=f"transformers ignores {min(fields)}=.* in .*this family, and uses"):
        settings_of(config | fields, "it")


def test_a_rotary_scaling_needs_the_maximum_context_length() -> None:
    """In transformers, the default of max_position_embeddings depends on the family."""
    config = json.loads(config_of_row("qwen2").to_json_string(use_diff=False)) | {"architectures": ["Qwen2ForCausalLM"]}
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 16}
    assert settings_of(config, "it")["rope_scaling"].startswith("yarn:4,16,")
    del config["max_position_embeddings"]
    with pytest.raises(DataError, match="max_position_embeddings is missing"):
        settings_of(config, "it")
