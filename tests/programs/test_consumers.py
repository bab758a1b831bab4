"""Programs that read an export compute what mpidp computes, in float32, except where mpidp.hf.consumers refuses the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpidp.errors import UsageError
from mpidp.hf.consumers import CONSUMERS, check
from tests.programs.exports import FAMILIES, MODELS, NEW, PROMPTS, Export
from tests.programs.readers import READERS

LENGTH = 64  # ids of the compared text
ODD = ("", " ", "\n", "the  rank\n\n of\ta tree. ", "naïve Ünïcode 漢字 🚀 the",
       "done.\r\n 'tis 12345 x=3; 1234567\n\n  I'LL\r\n\r\n ")
FEW = {"onnxruntime-genai": ("untied", "gqa", "narrow", "bos", "char")}  # its builder takes seconds
OWN_TOKENIZER_DIFFERS = {("onnxruntime-genai", "bos"), ("onnxruntime-genai", "char")}  # notes of CONSUMERS
NEAR = {("llama.cpp", "gpt2"): 1e-2}  # its GELU is a table of float16
FAILURES = "largest difference|dimension|head_size|buffer to copy|not in model"
SPLITS = ("llama-bpe", "qwen2")  # tokenizers of public models, without their vocabulary
ROWS = [
    (program, model) for program in READERS for model in FEW.get(program, (*MODELS, *FAMILIES))
    if program == "llama.cpp" or model not in SPLITS
]


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


@pytest.mark.parametrize(("program", "model"), ROWS, ids=["-".join(row) for row in ROWS])
def test_a_program_agrees_exactly_where_it_is_not_refused(
    program: str, model: str, exported: Callable[[str], Export], tmp_path: Path
) -> None:
    export = exported(model)
    try:
        check(program, texts(export.folder))
    except UsageError:
        with pytest.raises(Exception, match=FAILURES):  # it fails, or is wrong
            compare(program, export, tmp_path)
        return
    compare(program, export, tmp_path)


def compare(program: str, export: Export, place: Path) -> None:
    """Assert that log-probabilities, greedy tokens and ids of texts are those of mpidp."""
    read = READERS[program](export.folder, place)
    ours = export.log_probs[:LENGTH]
    theirs = read.log_probs(export.ids[:LENGTH])[:, : ours.shape[1]]
    given = ~np.isnan(theirs).any(1)
    assert given.sum() > LENGTH / 2
    largest = abs(theirs - ours)[given].max()
    assert largest < NEAR.get((program, export.name), 1e-4), f"largest difference of log-probabilities: {largest:.2e}"
    for prompt, tokens in zip(export.prompts, export.greedy, strict=True):
        assert read.greedy(prompt, NEW) == tokens, "other greedy tokens"
    tokenizer = export.tokenizer()
    same = [read.ids(one) == tokenizer.encode(one).ids for one in (*PROMPTS, *ODD)]
    assert all(same) != ((program, export.name) in OWN_TOKENIZER_DIFFERS), "ids of texts differ"


def test_every_program_that_is_tested_can_be_named() -> None:
    assert set(READERS) <= set(CONSUMERS)
