"""Laws of audits: one flipped bit changes the checksum, a majority is right, and a rank that computes wrongly is identified."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpidp.faults.audit import checksum, suspects, vote


@given(st.integers(0, 2**32), st.integers(1, 300), st.data())
def test_any_one_flipped_bit_changes_the_checksum(seed: int, length: int, data: st.DataObject) -> None:
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    before = checksum(tensor)
    place, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 31))
    tensor[place : place + 1].view(torch.int32).bitwise_xor_(1 << bit if bit < 31 else -(1 << 31))
    assert checksum(tensor) != before


def test_the_checksum_is_of_the_bits_in_any_order_and_shape() -> None:
    tensor = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    whole = checksum(tensor)
    assert whole == checksum(tensor.flatten()[torch.randperm(300)]) == checksum(tensor.t().contiguous())
    assert whole == sum(int(x) for x in tensor.flatten().view(torch.int32).tolist())
    assert whole == sum(checksum(row) for row in tensor)
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.full((3,), torch.nan)) == checksum(torch.full((3,), torch.nan))
    assert checksum(torch.full((1 << 17,), -1.0)) == (1 << 17) * int(torch.tensor(-1.0).view(torch.int32))  # more than 32 bits


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("a", (0, [])), ("aa", (0, [])), ("aaaaa", (0, [])),
        ("ab", (None, [0, 1])), ("abc", (None, [0, 1, 2])), ("aabb", (None, [0, 1, 2, 3])),
        ("aab", (0, [2])), ("baa", (1, [0])), ("aba", (0, [1])), ("baaca", (1, [0, 3])), ("aabca", (0, [2, 3])),
        ("aabbc", (None, [0, 1, 2, 3, 4])),
    ],
)
def test_more_than_half_are_right(rows: str, found: tuple[int | None, list[int]]) -> None:
    assert vote([(ord(row), 7) for row in rows]) == found


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_who_is_outvoted_differs_from_who_is_right(rows: list[int]) -> None:
    good, bad = vote([(row,) for row in rows])
    if good is None:
        assert bad == list(range(len(rows))) and max(map(rows.count, rows)) * 2 <= len(rows)
    else:
        assert bad == [i for i, row in enumerate(rows) if row != rows[good]] and len(bad) * 2 < len(rows)


@pytest.mark.parametrize(("size", "offset"), [(s, o) for s, o in product(range(3, 9), range(1, 8)) if o < s and 2 * o != s])
def test_one_of_three_or_more_that_computes_wrongly_stands_out(size: int, offset: int) -> None:
    """Rank r computes its own lane, and that of rank r - offset as a check."""
    for wrong in range(size):
        pairs = [(rank, (rank + offset) % size) for rank in range(size)]
        assert suspects([pair for pair in pairs if wrong in pair]) == [wrong]


def test_two_suspect_each_other() -> None:
    assert suspects([(0, 1), (1, 0)]) == [0, 1] == suspects([(1, 0)])
    assert suspects([(2, 2)]) == [2]
