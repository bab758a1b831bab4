"""Laws of divided tensors: boxes of a range of elements, and the predicted memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from mpidp.checkpoint.boxes import boxes_of_run, tensor_of
from mpidp.checkpoint.entry import Entry
from mpidp.checkpoint.local_parameters import boxes_held, bytes_by_use, load_boxes
from mpidp.config import resolve
from mpidp.errors import UsageError
from tests.memory_formulas import of_replicas, of_shards


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (1, 7), (7, 1), (3, 2, 4)])
def test_boxes_cover_a_run_once_and_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for low, high in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        boxes = boxes_of_run(shape, low, high)
        assert len(boxes) <= max(1, 2 * len(shape) - 1) and all(0 not in size for _, size in boxes)
        inside = [whole[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))].reshape(-1) for at, size in boxes]
        assert [int(one) for box in inside for one in box] == list(range(low, high))


def test_the_boxes_of_a_matrix_are_at_most_three() -> None:
    assert boxes_of_run((4, 3), 2, 11) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    assert boxes_of_run((4, 3), 4, 5) == [((1, 1), (1, 1))] and boxes_of_run((4, 3), 7, 7) == []


def test_what_is_held_is_counted_once() -> None:
    flat = torch.zeros(10)
    assert bytes_by_use(a=[flat[:3], flat[3:]], b=[], c=[torch.zeros(0)]) == {"a": 40, "b": 0, "c": 0}


def test_sharding_holds_less() -> None:
    assert of_replicas(640, 2, 2) == {"parameters": 2560, "gradients": 5120, "optimizer": 5120}
    assert sum(of_replicas(640, 1, 2, rank, 3)["optimizer"] for rank in range(3)) == 5120
    units = {"embedding": 256, "blocks.0": 640}
    assert of_shards(units, 0, 1, 1, 2, 64, 3) == {"parameters": 3584, "gradients": 3584, "optimizer": 7168}
    assert of_shards(units, 3, 4, 2, 1, 64, 2) == {"parameters": 3584, "gradients": 2048, "optimizer": 1024}
    assert of_shards(units, 3, 4, 2, 1, 64, 3) == {"parameters": 1792, "gradients": 2048, "optimizer": 1024}
    assert sum(of_shards(units, rank, 4, 1, 2, 64, 2)["optimizer"] for rank in range(4)) == 7168


def test_boxes_find_their_places_and_nothing_else_is_taken() -> None:
    held = {"w/exp_avg#0": Entry(torch.zeros(1, 2), "sharded", (0, 1), (2, 3)), "w/step": Entry(torch.tensor(0.0))}
    assert list(boxes_held(held)) == ["w/exp_avg"] and tensor_of("w/exp_avg#0") == "w/exp_avg"

    class Counts:
        updates = 0

        def set_updates(self, updates: int) -> None:
            self.updates = updates

    counts = Counts()
    load_boxes({"w/exp_avg#0": torch.ones(1, 2), "w/step": torch.tensor(3.0)}, held, counts)
    assert held["w/exp_avg#0"].tensor.sum() == 2 and counts.updates == 3
    with pytest.raises(ValueError, match="no parameter"):
        load_boxes({"v/exp_avg#0": torch.ones(1)}, held, counts)


def test_where_ranks_may_die_nothing_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve.check_shards(3)
    monkeypatch.setattr(resolve, "launched_with_ulfm", lambda: True)
    resolve.check_shards(0)
    for level in (1, 2, 3):
        with pytest.raises(UsageError, match=f"mesh.shard={level} is not supported with mpirun --with-ft ulfm"):
            resolve.check_shards(level)
