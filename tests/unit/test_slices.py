"""Laws of sums over slices (model.slices): the tree is that over lanes, and a rank's slices are those of the whole model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpidp.model.part import Part
from mpidp.parallel.tied import tie_micro_batch
from mpidp.parallel.tree_comm import tree_sum
from mpidp.reducers.tree_order import fold_all


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_slices_are_added_in_the_order_of_lanes(count: int) -> None:
    rng = np.random.default_rng(count)
    values = (rng.standard_normal((count, 50)) * 10.0 ** rng.integers(-4, 5, (count, 50))).astype(np.float32)
    held = {i: values[i].copy() for i in range(count)}
    additions, at = fold_all([((0, i), i) for i in range(count)], count)
    for into, source in additions:
        held[into] += held[source]
    assert (tree_sum([torch.from_numpy(one) for one in values]).numpy() == held[at]).all()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "shape"), [
    ("blocks.0.attention.q.weight", (48, 20)), ("blocks.0.attention.o.weight", (20, 48)), ("blocks.0.attention.k.bias", (48,)),
    ("blocks.0.feed_forward.down.weight", (20, 28)), ("head.weight", (261, 20)),
])
def test_the_slices_of_all_ranks_are_those_of_one(size: int, name: str, shape: tuple[int, ...]) -> None:
    """Each rank's slices begin where its part begins, and have the lengths that they have on one rank."""
    whole, found = Part((range(1),), head_dim=6).slices(name, shape, 4), []
    assert whole is not None
    starts = [0, *itertools.accumulate(whole[1])]
    for index in range(size):
        part = Part((range(1),), index=index, size=size, head_dim=6)
        cut = part.slices(name, shape, 4)
        assert cut is not None and cut[0] == whole[0]
        assert part.box(name, shape)[cut[0]] == slice(starts[len(found)], starts[len(found) + len(cut[1])])
        found += cut[1]
    assert found == whole[1]


def test_what_every_rank_holds_has_no_slices() -> None:
    part = Part((range(1),))
    assert part.slices("blocks.0.attention_norm.weight", (20,), 4) is None
    assert part.slices("blocks.0.attention.o.bias", (20,), 4) is None


@pytest.mark.parametrize("first", [True, False])
def test_a_tied_weight_is_like_others_after_the_backward_pass_of_its_micro_batch(first: bool) -> None:
    class Other:
        """The other stage: takes every gradient, and its own gradient is 2."""

        chunks = 1

        def __init__(self) -> None:
            self.first, self.messages = first, list[tuple[int, int]]()

        def send(self, kind: int, v: int, x: torch.Tensor, chunk: int) -> None:
            self.messages.append((v, chunk))

        def receive(self, kind: int, v: int, shape: tuple[int, ...], chunk: int) -> torch.Tensor:
            self.messages.append((v, chunk))
            return torch.full(shape, 2.0)

    weight, other = torch.nn.Parameter(torch.ones(3)), Other()
    with tie_micro_batch(weight, other, 5):  # type: ignore[arg-type]
        weight.sum().backward()
    assert weight.grad is not None and (weight.grad == (3.0 if first else 0.0)).all()
    weight.sum().backward()
    assert (weight.grad == (4.0 if first else 1.0)).all()
    assert other.messages == [(5, 1 if first else 0)]
