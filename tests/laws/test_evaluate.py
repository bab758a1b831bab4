"""Law: the evaluated loss of a trained model, and its generated text, do not depend on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mpidp.data.shards import TokenStream
from mpidp.errors import CheckpointError, DataError
from mpidp.evaluate import evaluate
from tests.tiny import WORLD, Ran, at, corpus, masked_corpus, sizes, tiny, train_at

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def trained(shared_folder: Path) -> tuple[Path, Ran]:
    """Return (its folder, the run). It evaluates on all of the validation split, for comparison."""
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
        assert said["bits_per_byte"] == pytest.approx(said["loss"] * said["tokens"] / math.log(2) / stream.text_bytes)
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
