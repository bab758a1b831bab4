"""Law: the answers to a file of chats do not depend on the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpidp.chat import _with_answer, read_options, talk
from mpidp.data.special_tokens import FILE, SpecialTokens
from mpidp.errors import UsageError
from mpidp.inference.generation import generate
from tests.tiny import WORLD, at, corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "the rank"}], "id": 7},
    {"messages": [{"role": "user", "content": "of"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "tree"}]},
    {"prompt": "in order"}, {"messages": [{"role": "user", "content": "so that"}], "text": "kept"},
]


@pytest.fixture(scope="module")
def place(shared_folder: Path) -> Path:
    """A folder with a run and a file of chats."""
    train_at(1, tiny(corpus(shared_folder), shared_folder / "run", train={"steps": 4}))
    if WORLD.rank == 0:
        (shared_folder / "run" / FILE).write_text(SpecialTokens(None, (256,), template=TEMPLATE).to_json())
        (shared_folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    WORLD.barrier()
    return shared_folder


def test_answers_at_any_number_of_ranks(place: Path) -> None:
    words = [str(place / "run"), f"--messages={place / 'chats.jsonl'}", f"--out={place / 'out.jsonl'}", "--device=cpu",
             "--threads=1", "--tokens=20"]

    def answered(comm: MPI.Intracomm, *more: str) -> list[dict[str, Any]]:
        return [_with_answer(row) for row in generate(comm, read_options([*words, *more]))]

    whole = at(1, answered)[0]
    assert [len(row["messages"]) for row in whole] == [2, 4, 2, 2]
    assert all(row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"] for row in whole)
    assert whole[0]["id"] == 7 and whole[3]["prompt_text"] == "kept" and whole[1]["messages"][:3] == CHATS[1]["messages"]
    for n in sizes(2, 3, 4, 8):
        for batch in (1, 3):
            assert at(n, lambda comm, size=batch: answered(comm, f"--batch={size}"))[0] == whole


def test_one_conversation_needs_one_copy_of_the_model(place: Path) -> None:
    for n in sizes(2, 3):
        with pytest.raises(UsageError, match=f"{n} ranks were started. Start 1, or give the chats in a file"):
            at(n, lambda comm: talk(comm, read_options([str(place / "run"), "--device=cpu"])))
