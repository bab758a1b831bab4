"""Every example trains successfully. On 2 ranks it gives the weights of one rank, bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import at, corpus, sizes

pytestmark = pytest.mark.mpi
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(name: str, **arguments: Any) -> dict[str, Any]:
    """Check that one and two ranks give the same result, and return the result."""
    train = example(name).train
    found = [at(n, lambda comm: train(comm=comm, **arguments)) for n in sizes(1, 2)]
    assert len({one["sha256"] for ranks in found for one in ranks}) == 1
    assert all(ranks[0] == found[0][0] for ranks in found)
    return found[0][0]


@pytest.mark.check
def test_digits() -> None:
    pytest.importorskip("sklearn")
    assert both("digits", epochs=2)["right"] > 200  # of 297


@pytest.mark.check
def test_text() -> None:
    assert both("text", epochs=1)["right"] > 0.3  # of 9 packages


def test_translate() -> None:
    assert both("translate", epochs=1, every=4)["loss"] < 2.2  # with 25 letters chance is log 25 = 3.2


def test_masked(shared_folder: Path) -> None:
    losses = both("masked", path=str(corpus(shared_folder, tokens=12000)), steps=24, batch=16, dim=32, layers=1)["losses"]
    assert losses[-1] < losses[0] - 0.5


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path
