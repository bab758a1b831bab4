"""Laws of mpidp.hf.consumers and mpidp.hf.gguf that need no other program (tests/programs compares with the programs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpidp.data.tokenizer import ByteTokenizer, CharTokenizer, train_bpe
from mpidp.errors import UsageError
from mpidp.export import export, read_options
from mpidp.hf.consumers import CONSUMERS, check
from mpidp.hf.gguf import NEVER, merges_of_characters, vocabulary, write_gguf
from mpidp.hf.tokens import huggingface_json
from tests.tiny import WORLD, corpus, tiny, train_at
from tests.unit.small_tokenizers import sentencepiece, wordpiece

CONFIG = {"model_type": "llama", "vocab_size": 270, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
          "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
LINEAR = {"rope_type": "linear", "factor": 8.0}
THIRD = {"model_type": "gemma3_text", "sliding_window": 32, "sliding_window_pattern": 3, "head_dim": 16}
BPE = huggingface_json(train_bpe(iter(["the rank of a tree " * 9]), 270))


def texts(config: dict[str, Any], tokenizer: str = BPE) -> dict[str, bytes]:
    parts = {"config.json": CONFIG | config, "tokenizer_config.json": {}}
    return {name: json.dumps(one).encode() for name, one in parts.items()} | {"tokenizer.json": tokenizer.encode()}


@pytest.mark.parametrize(("program", "config", "words"), [
    ("ctranslate2", {"head_dim": 24}, "head_dim"), ("ctranslate2", LLAMA3, "llama3"),
    ("onnxruntime-genai", {"head_dim": 24}, "multiple of 16"),
    ("ctranslate2", {"model_type": "olmo2"}, "it supports only llama, mistral"),
    ("llama.cpp", {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 32}, "windows"),
    ("mlx-lm", {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 32}, "windows"),
    ("onnxruntime-genai", {"rope_scaling": LINEAR}, "linear"),
    ("onnxruntime-genai", {**THIRD, "rope_scaling": LINEAR}, "linear"),
    ("onnxruntime-genai", {**THIRD, "rope_parameters": {"full_attention": LINEAR}}, "linear"),
    ("llama.cpp", THIRD, "every sixth layer"),
    ("llama.cpp", {**THIRD, "sliding_window_pattern": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}, "sixth"),
    ("mlx-lm", {"model_type": "gpt_neox"}, "intermediate_size"),
])
def test_a_model_that_a_program_does_not_compute_is_refused(program: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"--for {program}: .*{words}"):
        check(program, texts(config))
    assert isinstance(check(program, texts({})), list)
    assert check("transformers", texts(config)) == []


def test_tokenizers_that_a_program_does_not_read_are_noted() -> None:
    char = huggingface_json(CharTokenizer("abc "))
    assert check("onnxruntime-genai", texts({})) == check("onnxruntime-genai", texts({}, huggingface_json(ByteTokenizer()))) == []
    assert "-1" in check("onnxruntime-genai", texts({}, char))[0]


def test_small_differences_are_noted() -> None:
    """docs/consumers.md has the measured differences."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 270, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
    files = texts({}) | {"config.json": json.dumps(gpt2).encode()}
    assert check("llama.cpp", texts({})) == check("transformers", files) == []
    (note,) = check("llama.cpp", files)
    assert note.startswith("llama.cpp: for GPT-2, its GELU is a table of float16")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_the_note_on_bos_is_given_only_if_the_tokenizer_adds_bos(adds: bool, nested: bool) -> None:
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * adds
    last: dict[str, Any] = {"type": "TemplateProcessing", "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}]}
    last = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, last]} if nested else last
    notes = check("onnxruntime-genai", texts({}, json.dumps(json.loads(BPE) | {"post_processor": last})))
    assert ["does not add BOS" in note for note in notes] == [True] * adds


def test_what_llama_cpp_needs_is_taken_from_the_tokenizer() -> None:
    for text, pre, merges, by_bytes in (
        (BPE, "gpt-2", (), False),
        (huggingface_json(ByteTokenizer()), "gpt-2", (NEVER,), False),
        (huggingface_json(CharTokenizer("abc ")), "gpt-2", (NEVER,), True),
        (huggingface_json(CharTokenizer("aé漢")), "gpt-2", ("Ã ©", "æ ¼", "æ¼ ¢"), True),
    ):
        found = vocabulary(text)
        assert found is not None and (found.pre, found.merges, found.by_bytes) == (pre, merges, by_bytes)
    for other in (sentencepiece(), wordpiece()):
        assert vocabulary(other.to_json()) is None
    spaced = json.loads(BPE)
    spaced["pre_tokenizer"]["add_prefix_space"] = True
    assert vocabulary(json.dumps(spaced)) is None
    assert merges_of_characters({"é": 0, "è": 1, "a": 2}) == ["Ã ©", "Ã ¨"]


def test_nothing_is_written_for_a_program_that_fails(tmp_path: Path) -> None:
    run, model = tmp_path / "run", {"rope_scaling": "llama3:8,1,4,8"}
    train_at(1, tiny(corpus(tmp_path), run, model=model, train={"steps": 1, "eval_every": 0}, optim={"warmup_steps": 0}))
    with pytest.raises(UsageError, match="ctranslate2"):
        export(WORLD, str(run), str(tmp_path / "out"), consumer="ctranslate2")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").write_text("raise ImportError('no module of mine')\n")
    with pytest.raises(UsageError, match=r"llama.cpp's converter failed: .*no module of mine"):
        export(WORLD, str(run), str(tmp_path / "out.gguf"), form="gguf", llama_cpp=str(tmp_path / "llama.cpp"))
    with pytest.raises(UsageError, match=r"has no convert_hf_to_gguf.py"):
        write_gguf(tmp_path, tmp_path / "out.gguf", "float32", str(tmp_path))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]
    export(WORLD, str(run), str(tmp_path / "out"), consumer="mlx-lm")
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("words", [
    ["run", "--out", "x", "--for", "word"], ["run", "--out", "x", "--llama-cpp", "y"],
    ["run", "--out", "x", "--format", "gguf", "--for", "mlx-lm"],
])
def test_options_that_do_not_fit_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--for|--llama-cpp"):
        read_options(words)
    assert read_options(["run", "--out", "x", "--format", "gguf", "--for", "llama.cpp"]).consumer in CONSUMERS
