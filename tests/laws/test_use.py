"""Law: generated texts and evaluated likelihoods do not depend on the number of ranks, or on how many texts are computed at the
same time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.errors import CheckpointError, DataError, MpidpError, UsageError
from mpidp.evaluate import evaluate_choices, evaluate_text
from mpidp.evaluate import read_options as evaluate_options
from mpidp.generate import generate, read_options
from tests.tiny import SEQ_LEN, WORLD, at, corpus, sizes, text, tiny, train_at

pytestmark = pytest.mark.mpi
PROMPTS = ["the rank", "of a tree", "adds", "in order ", "", "so that", "no one can tell", "w", "the"]
QUESTIONS = [
    {"context": "the ", "choices": ["rank", "zzzz"], "label": 0},
    {"context": "of a ", "choices": ["qq", "tree", "lanes"], "label": 1},
    {"context": "", "choices": ["the", "xyz"], "label": "the"},
    {"context": "when it was done", "choices": [".", "#"], "label": 0},
    {"context": "who was there when it ", "choices": ["was", "were"], "label": 0},
]


@pytest.fixture(scope="module")
def place(shared_folder: Path) -> Path:
    """A folder with a run and input files."""
    train_at(2 if WORLD.size > 1 else 1, tiny(corpus(shared_folder), shared_folder / "run", train={"steps": 8, "save_every": 0}))
    if WORLD.rank == 0:
        rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
        (shared_folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (shared_folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        (shared_folder / "some.txt").write_text(text(333) + "é")
        (shared_folder / "long.txt").write_text("short\n" + "x" * (SEQ_LEN + 1))
    WORLD.barrier()
    return shared_folder


def written(place: Path, n: int, *words: str) -> list[dict[str, Any]]:
    """Return what generate writes on n ranks. The texts are longer than the model's context."""
    given = ["--device=cpu", "--threads=1", "--tokens=30", "--seed=3", *words]
    return at(n, lambda comm: generate(comm, read_options([str(place / "run"), *given])))[0]


def test_a_file_of_prompts_at_any_number_of_ranks_and_in_any_batches(place: Path) -> None:
    file = f"--prompts={place / 'prompts.jsonl'}"
    whole = written(place, 1, file, "--batch=1")
    assert [(row["prompt"], row["id"]) for row in whole] == [(prompt, i) for i, prompt in enumerate(PROMPTS)]
    assert len({row["text"] for row in whole}) == len(PROMPTS)
    for n, batch in [(1, 3), (2, 1), (2, 4), (3, 2), (4, 2), (4, 100), (8, 1)]:
        if n <= WORLD.size:
            assert written(place, n, file, f"--batch={batch}") == whole, (n, batch)
    for i in (0, 4):  # alone; the seed of the first text is --seed
        alone = written(place, 1, f"--prompt={PROMPTS[i]}")
        assert (alone[0]["text"] == whole[i]["text"]) == (i == 0)


def test_the_same_text_at_any_number_of_ranks_and_as_a_stream(place: Path) -> None:
    pieces: list[str] = []

    def stream(comm: MPI.Intracomm) -> list[dict[str, Any]]:
        words = [str(place / "run"), "--prompt=the rank", "--seed=3", "--device=cpu", "--threads=1", "--tokens=30"]
        return generate(comm, read_options(words), pieces.append)

    found = [written(place, n, "--prompt=the rank") for n in sizes(1, 2, 4)]
    found.append(at(sizes(1, 3)[-1], stream)[0])
    assert all(one == found[0] for one in found) and found[0][0]["text"]
    said = WORLD.bcast("".join(pieces))
    assert said == "the rank" + found[0][0]["text"]


def told(place: Path, n: int, *words: str) -> list[dict[str, Any]]:
    """Return what evaluate prints on each of n ranks."""
    options = evaluate_options([str(place / "run"), "--device=cpu", "--threads=1", *words])
    work = evaluate_text if options.text else evaluate_choices
    return at(n, lambda comm: work(options, comm))


def test_questions_at_any_number_of_ranks(place: Path) -> None:
    found = [one for n in sizes(1, 2, 3, 4, 8) for one in told(place, n, f"--choices={place / 'questions.jsonl'}")]
    assert all(one == found[0] for one in found)
    assert found[0]["items"] == 5 and found[0]["cut_items"] == 2 and found[0]["step"] == 8
    assert found[0]["chance"] == pytest.approx((4 / 2 + 1 / 3) / 5)
    assert found[0]["accuracy"] >= 0.6  # the model has learned which characters exist


def test_a_text_at_any_number_of_ranks(place: Path) -> None:
    for words in ([], ["--stride=5"], [f"--stride={SEQ_LEN}"]):
        found = [one for n in sizes(1, 2, 3, 4, 8) for one in told(place, n, f"--text={place / 'some.txt'}", *words)]
        assert all(one == found[0] for one in found)
        assert found[0]["tokens"] == 335 and 0 < found[0]["loss"] < math.log(257)
        assert found[0]["bits_per_byte"] == pytest.approx(found[0]["loss"] / math.log(2))


def bad_uses(place: Path) -> list[tuple[type[MpidpError], str, Any]]:
    return [
        (DataError, r"prompt 2 has 17 tokens, but model.seq_len is", lambda n: written(place, n, f"--prompts={place}/long.txt")),
        (DataError, "cannot read .*none.txt", lambda n: written(place, n, f"--prompts={place}/none.txt")),
        (DataError, "prompt 1: .*surrogates not allowed", lambda n: written(place, n, "--prompt=\udcff")),
        (UsageError, "--out .* cannot be written", lambda n: written(place, n, f"--out={place}/no/out.jsonl")),
        (UsageError, "--out .* cannot be written", lambda n: written(place, n, f"--out={place}")),
        (DataError, "cannot read .*none.txt", lambda n: told(place, n, f"--text={place}/none.txt")),
        (UsageError, "--stride 17 would skip tokens: the stride must be at most 16",
         lambda n: told(place, n, f"--text={place}/some.txt", "--stride=17")),
        (DataError, "line 1: not valid JSON", lambda n: told(place, n, f"--choices={place / 'some.txt'}")),
        (DataError, "not a regular file", lambda n: told(place, n, f"--choices={place}")),
        (CheckpointError, "contains no checkpoint", lambda n: at(n, lambda comm: generate(comm, read_options([str(place)])))),
    ]


def test_bad_uses_are_refused_on_all_ranks(place: Path) -> None:
    for kind, said, use in bad_uses(place):
        with pytest.raises(kind, match=said):
            use(sizes(1, 3)[-1])
